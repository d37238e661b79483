"""The whole training step: forward, backward, clip at norm 1, AdamW."""

import functools
from typing import Any

from scripts.bench.measure import gemm_rate, jax_wait, repeat, torch_wait
from scripts.bench.shapes import SHAPES, Shape, hugging_face_model, jaxlm_config, random_batch, torch_device

Options = dict[str, Any]


def shape_of(options: Options) -> Shape:
    """The chosen shape, with what the options change; another width has heads of 64 and a hidden width to match."""
    import dataclasses

    names = ("width", "layers", "rows", "length", "vocabulary")
    changed = {n: options[n] for n in names if n in options}
    if "width" in changed:
        heads = changed["width"] // 64
        changed |= {"heads": heads, "kv_heads": heads, "hidden": 64 * round(changed["width"] / 24)}
    return dataclasses.replace(SHAPES[options["size"]], **changed)


def jaxlm(options: Options) -> dict[str, Any]:
    """jaxlm's step, as `jaxlm train` compiles it."""
    import jax

    from jaxlm.training import throughput
    from jaxlm.training.step import train_step

    shape = shape_of(options)
    program, state, _ = jaxlm_program(shape, options)
    batch = random_batch(shape)
    step = jax.jit(functools.partial(train_step, program.recipe), donate_argnums=0)
    compiled = step.lower(state, {}, batch).compile()
    held = [state]

    def call():
        held[0], metrics = compiled(held[0], {}, batch)
        return metrics

    found = repeat(call, jax_wait, options["seconds"])
    flops = throughput.flops_per_token(program.cfg, shape.length) * shape.rows * shape.length
    gemm = gemm_rate(8192 if torch_like_gpu() else 2048, options["dtype"])
    peak = throughput.peak_flops(jax.devices()[0].device_kind, options["dtype"])
    return found | {
        "tokens_per_second": shape.rows * shape.length / found["wall"],
        "flops": flops,
        "gemm": gemm,
        "mfu_gemm": flops / found["wall"] / gemm,
        "mfu_peak": None if peak is None else flops / found["wall"] / peak,
        "temporary": compiled.memory_analysis().temp_size_in_bytes,
        "device": jax.devices()[0].device_kind,
    }


def jaxlm_program(shape: Shape, options: Options, **sections: Any):
    """Program, fresh state and frozen trees of a run of this shape on one device; `sections` go into its settings."""
    import dataclasses

    import jax

    from jaxlm import config as configs
    from jaxlm.dist import mesh as meshes
    from jaxlm.training.setup import assemble, load_frozen, start

    settings = configs.build(
        {
            "data": {"sequence_length": shape.length},
            "train": {"batch_size": shape.rows, "dtype": options["dtype"]}
            | {name: options[name] for name in ("remat", "scan", "attention") if name in options},
            "optimizer": {"learning_rate": 1e-3},
            **sections,
        }
    )
    cfg = dataclasses.replace(jaxlm_config(shape), lora=settings.lora)
    program = assemble(settings, cfg, meshes.make(settings.mesh, jax.devices()[:1]))
    frozen = load_frozen(settings, program)
    return program, start(None, program, frozen), frozen


def torch_like_gpu() -> bool:
    """Whether JAX runs on an accelerator."""
    import jax

    return jax.devices()[0].platform != "cpu"


def peer(model, options: Options) -> dict[str, Any]:
    """A torch model that returns its loss given (ids, labels), trained as torch users do."""
    import torch

    shape = shape_of(options)
    torch.set_num_threads(options["threads"])
    device = torch_device()
    ids = torch.randint(0, shape.vocabulary, (shape.rows, shape.length + 1), device=device)
    fused = {"fused": True}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, **fused)
    narrow = options["dtype"] == "bfloat16"

    def call():
        with torch.autocast(device, torch.bfloat16, enabled=narrow):
            loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    found = repeat(call, torch_wait, options["seconds"])
    return found | {"tokens_per_second": shape.rows * shape.length / found["wall"]}


def torch_eager(options: Options) -> dict[str, Any]:
    """The plain torch model of `llama.py`."""
    from scripts.bench.llama import Llama

    return peer(Llama(shape_of(options)).to(torch_device()), options)


def torch_compiled(options: Options) -> dict[str, Any]:
    """The same through torch.compile."""
    import torch

    from scripts.bench.llama import Llama

    return peer(torch.compile(Llama(shape_of(options)).to(torch_device())), options)


def transformers_llama(options: Options) -> dict[str, Any]:
    """transformers' Llama."""
    import torch

    model = hugging_face_model(shape_of(options)).train()

    class Loss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids, targets):
            logits = self.model(ids, use_cache=False).logits
            return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    return peer(Loss(), options)


SIDES = {"jaxlm": jaxlm, "torch": torch_eager, "torch-compile": torch_compiled, "transformers": transformers_llama}
