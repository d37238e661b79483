"""A training step of low-rank adapters (rank 8) on all seven projections of a frozen model."""

import functools
from typing import Any

from scripts.bench.cases.train import peer, shape_of
from scripts.bench.measure import jax_wait, repeat
from scripts.bench.shapes import hugging_face_model, jaxlm_config, random_batch

Options = dict[str, Any]
RANK = 8
PROJECTIONS = {"attn": ("q", "k", "v", "o"), "mlp": ("gate", "up", "down")}


def adapters(params: Any, key: Any) -> Any:
    """Fresh adapters beside the stacked kernels: a [N, in, R] uniform as in PEFT, b [N, R, out] zero."""
    import jax
    import jax.numpy as jnp

    def pair(kernel: Any, key: Any) -> dict[str, Any]:
        layers, inputs, outputs = kernel.shape
        bound = inputs**-0.5
        a = jax.random.uniform(key, (layers, inputs, RANK), minval=-bound, maxval=bound)
        return {"a": a, "b": jnp.zeros((layers, RANK, outputs))}

    layers = params["layers"]
    keys = iter(jax.random.split(key, 7))
    return {
        "layers": {
            branch: {name: pair(layers[branch][name]["kernel"], next(keys)) for name in names}
            for branch, names in PROJECTIONS.items()
        }
    }


def jaxlm(options: Options) -> dict[str, Any]:
    """The one step, with the adapters as what is trained and the model as what is frozen."""
    import dataclasses

    import jax

    from jaxlm.nn import transformer
    from jaxlm.nn.compute import Compute
    from jaxlm.nn.config import LoraConfig
    from jaxlm.objectives.config import NextTokenConfig
    from jaxlm.objectives.next_token import next_token
    from jaxlm.optim import chain, schedules
    from jaxlm.optim.config import OptimizerConfig
    from jaxlm.training.step import Recipe, init_state, train_step

    shape = shape_of(options)
    cfg = dataclasses.replace(jaxlm_config(shape), lora=LoraConfig(r=RANK, alpha=RANK))
    frozen = transformer.init(cfg, jax.random.key(0))
    trained = {"lora": adapters(frozen["params"], jax.random.key(1))}
    optimizer = OptimizerConfig(learning_rate=1e-3)
    recipe = Recipe(
        objective=next_token(NextTokenConfig()),
        apply=functools.partial(transformer.apply, cfg, compute=Compute(dtype=options["dtype"], scan=False)),
        optimizer=chain.make(optimizer, cfg, trained, 1000),
        schedule=schedules.make(optimizer, 1000),
    )
    state, batch = jax.jit(functools.partial(init_state, recipe))(trained), random_batch(shape)
    compiled = jax.jit(functools.partial(train_step, recipe), donate_argnums=0).lower(state, frozen, batch).compile()
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
