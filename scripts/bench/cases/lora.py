"""A training step of low-rank adapters (rank 8) on all seven projections of a frozen model."""

import functools
from typing import Any

from scripts.bench.cases.train import jaxlm_program, peer, shape_of
from scripts.bench.measure import jax_wait, repeat
from scripts.bench.shapes import hugging_face_model, random_batch

Options = dict[str, Any]
RANK = 8


def jaxlm(options: Options) -> dict[str, Any]:
    """The step as `jaxlm train` compiles it, with adapters as what is trained and the model as what is frozen."""
    import jax

    from jaxlm.training.step import train_step

    shape = shape_of(options)
    program, state, frozen = jaxlm_program(shape, options, lora={"r": RANK, "alpha": RANK})
    batch = random_batch(shape)
    step = jax.jit(functools.partial(train_step, program.recipe), donate_argnums=0)
    compiled = step.lower(state, frozen, batch).compile()
    held = [state]

    def call():
        held[0], metrics = compiled(held[0], frozen, batch)
        return metrics

    found = repeat(call, jax_wait, options["seconds"])
    return found | {
        "tokens_per_second": shape.rows * shape.length / found["wall"],
        "temporary": compiled.memory_analysis().temp_size_in_bytes,
    }


def peft(options: Options) -> dict[str, Any]:
    """PEFT's adapters on transformers' Llama."""
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(hugging_face_model(shape_of(options)).train(), config)

    class Loss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids, targets):
            logits = self.model(input_ids=ids, use_cache=False).logits
            return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    return peer(Loss(), options)


SIDES = {"jaxlm": jaxlm, "peft": peft}
