"""`python -m scripts.bench.moe PART`: what mixtures of experts cost and gain, beside their dense twins.

kernels: that layer by each backend of the grouped product that the platform has.
cost: a layer and a whole training step of top-2 of 8 and top-8 of 64 over their dense twins of equal active parameters,
  and over the number of experts; all in one process, in turns.
peers: the layer beside transformers' Mixtral layer of as many experts, in each of its implementations.
balance: largest over mean load from a skewed router, with the auxiliary loss, with the bias, and with neither.
quality: bits per byte of configs/moe_8x_top2.yaml and its dense twin on the embedded corpus, over seeds.
"""

import functools
import json
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import click

from scripts.bench.alternate import surroundings
from scripts.bench.measure import torch_wait
from scripts.bench.shapes import torch_device

RESULTS = pathlib.Path(__file__).parent / "results"
ROOT = pathlib.Path(__file__).parents[2]


class Size(NamedTuple):
    """Width, tokens of a step, positions of a row, width of the active feed-forward layer, dtype: the same for all."""

    width: int
    tokens: int
    length: int
    active: int
    dtype: str


CPU = Size(384, 4096, 256, 2048, "float32")
GPU = Size(2048, 16384, 2048, 8192, "bfloat16")

MIXTURES = {"8 top-2": (8, 2), "64 top-8": (64, 8)}
FLAT, MANY = (4, 8, 16, 32), 16384
"""Numbers of experts of the table over them, and its tokens: an expert's weights are copied once a product, which is
paid for by the rows that it has."""


def size() -> Size:
    """What fits the platform."""
    import jax

    return CPU if jax.default_backend() == "cpu" else GPU


def turns(cases: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds of each case, wall and CPU, measured in turns after one call of each."""
    import jax

    for call in cases.values():
        jax.block_until_ready(call())
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, call in cases.items():
            wall, cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(call())
            taken[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    medians = {n: [statistics.median(column) for column in zip(*rows, strict=True)] for n, rows in taken.items()}
    return {name: {"wall": wall, "cpu": cpu} for name, (wall, cpu) in medians.items()}


def shape(experts: int, top_k: int, layers: int = 2) -> Any:
    """A model of this size; dense for no experts."""
    from jaxlm.nn.config import ModelConfig, MoEConfig

    width, _, length, active, _ = size()
    moe = MoEConfig(experts=experts, top_k=top_k, d_ff=active // top_k) if experts else None
    return ModelConfig(
        d_model=width, n_layers=layers, n_heads=width // 64, d_ff=active, vocab_size=1024, max_length=length, moe=moe
    )


def layer(cfg: Any, tokens: int | None = None, backend: Any = None) -> Callable[[], Any]:
    """Forward and backward of one feed-forward branch, its norm included."""
    import jax

    from jaxlm.nn.compute import Compute
    from jaxlm.nn.mlp import Mlp
    from jaxlm.nn.moe import MoE

    width, default, length, _, dtype = size()
    module = Mlp(cfg) if cfg.moe is None else MoE(cfg, Compute(grouped=backend))
    keys = jax.random.split(jax.random.key(0), 3)
    shape = ((tokens or default) // length, length, width)
    x, dy = (jax.random.normal(key, shape, jax.numpy.dtype(dtype)) for key in keys[:2])
    params = jax.jit(module.init)(keys[2], x)["params"]

    def apply(params: Any, x: Any) -> Any:
        y = module.apply({"params": params}, x)
        return y[0] if cfg.moe is not None else y

    def both(params: Any, x: Any, dy: Any) -> Any:
        y, back = jax.vjp(apply, params, x)
        return y, back(dy)

    compiled = jax.jit(both).lower(params, x, dy).compile()
    return lambda: compiled(params, x, dy)


def step(cfg: Any) -> Callable[[], Any]:
    """A whole training step: loss, gradient, clip, AdamW."""
    import jax
    import jax.numpy as jnp

    from jaxlm.nn import transformer
    from jaxlm.nn.compute import Compute
    from jaxlm.objectives.config import NextTokenConfig
    from jaxlm.objectives.next_token import next_token
    from jaxlm.optim import chain, schedules
    from jaxlm.optim.config import OptimizerConfig
    from jaxlm.training import balance
    from jaxlm.training.step import Recipe, init_state, train_step

    params, settings = transformer.init(cfg, jax.random.key(0)), OptimizerConfig()
    recipe = Recipe(
        objective=next_token(NextTokenConfig()),
        apply=functools.partial(transformer.apply, cfg, compute=Compute(dtype=size().dtype, scan=False)),
        optimizer=chain.make(settings, cfg, params, 1000),
        schedule=schedules.make(settings, 1000),
        extra=balance.extra(cfg),
    )
    _, count, length, _, _ = size()
    rows = (count // length, length)
    tokens = jax.random.randint(jax.random.key(1), rows, 0, cfg.V, jnp.int32)
    ones = jnp.ones(rows, jnp.int32)
    batch = {"tokens": tokens, "targets": tokens, "mask": ones.astype(jnp.float32), "segments": ones,
             "positions": jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), rows)}  # fmt: skip
    held = [jax.jit(functools.partial(init_state, recipe))(params)]
    compiled = jax.jit(functools.partial(train_step, recipe), donate_argnums=0).lower(held[0], {}, batch).compile()

    def call() -> Any:
        held[0], metrics = compiled(held[0], {}, batch)
        return metrics["loss"]

    return call


def cost(rounds: int) -> dict[str, Any]:
    """Ratios to the dense twin of layers and steps."""
    found: dict[str, Any] = {"size": size()._asdict(), "layers of a step": 2}
    mixtures = {"dense": (0, 0)} | MIXTURES
    flat = {"dense": (0, 0)} | {f"{e} top-2": (e, 2) for e in FLAT}
    for name, make, sizes in (
        ("layer", layer, mixtures),
        ("step", step, mixtures),
        (f"layer of {MANY} tokens", functools.partial(layer, tokens=MANY), flat),
    ):
        times = turns({case: make(shape(*size)) for case, size in sizes.items()}, rounds)
        found[name] = times
        found[f"{name}, over dense"] = {
            clock: {case: times[case][clock] / times["dense"][clock] for case in times} for clock in ("wall", "cpu")
        }
    return found


def kernels(rounds: int) -> dict[str, Any]:
    """The layer by the backends of this platform; on CPU `ragged` is left out, which does the work of all experts."""
    from jaxlm.nn.kernels.grouped_matmul import choose

    own = {"blocks"} if size() is CPU else {"pallas", "ragged"}
    cases = {"dense": layer(shape(0, 0))} | {
        f"{name}, {backend}": layer(shape(*mixture), backend=backend)
        for name, mixture in MIXTURES.items()
        for backend in sorted(own)
    }
    times = turns(cases, rounds)
    return {"chosen": choose(), "size": size()._asdict(), "layer": times, "TFLOP/s": rates(times)}


def rates(times: dict[str, dict[str, float]]) -> dict[str, float]:
    """TFLOP/s of the products of active experts, forward and backward: 18 * tokens * width * active width."""
    width, tokens, _, active, _ = size()
    return {name: 18 * tokens * width * active / found["wall"] / 1e12 for name, found in times.items()}


def peers(rounds: int) -> dict[str, Any]:
    """transformers' Mixtral layer at the shapes of `MIXTURES`, forward and backward, each with the norm before it."""
    found: dict[str, Any] = {"size": size()._asdict()}
    for name, (experts, top_k) in MIXTURES.items():
        cases = {"jaxlm": layer(shape(experts, top_k))}
        cases |= {f"transformers {how}": mixtral(experts, top_k, how) for how in ("eager", "grouped_mm")}
        times = turns(cases, rounds)
        found[name] = times
        for clock in ("wall", "cpu"):
            ratios = {case: t[clock] / times["jaxlm"][clock] for case, t in times.items()}
            found[f"{name}, transformers over jaxlm, {clock}"] = ratios
    return found


def mixtral(experts: int, top_k: int, implementation: str) -> Callable[[], Any]:
    """Forward and backward of transformers' layer."""
    import torch
    from transformers.models.mixtral.configuration_mixtral import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm, MixtralSparseMoeBlock

    width, tokens, length, active, dtype = size()
    sizes = {"hidden_size": width, "intermediate_size": active // top_k}
    config = MixtralConfig(**sizes, num_local_experts=experts, num_experts_per_tok=top_k)
    config._experts_implementation = implementation
    block = torch.nn.Sequential(MixtralRMSNorm(width, 1e-5), MixtralSparseMoeBlock(config))
    for parameter in block.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.05)
    block = block.to(torch_device(), getattr(torch, dtype))
    x, dy = (
        torch.randn(tokens // length, length, width, device=torch_device(), dtype=getattr(torch, dtype))
        for _ in range(2)
    )
    x.requires_grad_()

    def call() -> Any:
        block.zero_grad(set_to_none=True)
        x.grad = None
        y = block(x)
        (y[0] if isinstance(y, tuple) else y).backward(dy)
        return torch_wait(0)

    return call


def skewed(balance_: str, steps: int) -> list[float]:
    """`moe/load_max` by step, from a router that sends nearly everything to two experts."""
    import jax
    import numpy as np

    from jaxlm import config as configs
    from jaxlm.training.setup import global_batch, prepare
    from jaxlm.training.step import init_state, train_step

    raw = {"run": {"dir": "runs/unused"}, "data": {"sequence_length": 64},
           "model": {"d_model": 64, "n_layers": 2, "n_heads": 2, "vocab_size": 512,
                     "moe": {"experts": 8, "top_k": 2, "d_ff": 64, "balance": balance_, "aux_weight": 0.03,
                             "bias_rate": 0.01}},
           "train": {"steps": steps, "batch_size": 16}}  # fmt: skip
    setup = prepare(configs.build(raw))
    program = setup.program
    params = program.fresh(program.base())
    router = params["params"]["layers"]["mlp"]["router"]
    # All embeddings get a common part, and the router reads it as some experts rather than others.
    tilt = jax.numpy.asarray(np.linspace(1.0, -1.0, 8), jax.numpy.float32)
    mean = jax.random.normal(jax.random.key(3), (64,))
    router["kernel"] = 0.1 * router["kernel"] + 0.1 * mean[None, :, None] * tilt[None, None, :]
    params["params"]["embed"]["kernel"] = params["params"]["embed"]["kernel"] + 0.05 * mean[None, :]
    state = jax.jit(functools.partial(init_state, program.recipe))(params)
    run = jax.jit(functools.partial(train_step, program.recipe), donate_argnums=0)
    loads = []
    for index in range(steps):
        state, metrics = run(state, {}, global_batch(setup.data.train, setup.loader.rows(index), program.mesh))
        loads.append(float(metrics["moe/load_max"]))
    return loads


def balances(steps: int) -> dict[str, Any]:
    """The three curves, and where the mean of the last tenth is."""
    curves = {name: skewed(name, steps) for name in ("aux", "bias", "none")}
    last = {name: statistics.mean(curve[-max(steps // 10, 1) :]) for name, curve in curves.items()}
    shown = {name: [round(value, 3) for value in curve[:: max(steps // 20, 1)]] for name, curve in curves.items()}
    return {"steps": steps, "last tenth": last, "every twentieth": shown}


def quality(steps: int, seeds: int, width: int, overrides: tuple[str, ...]) -> dict[str, Any]:
    """Held-out bits per byte of the recipe, made `width` wide, and of its twin at equal active FLOPs, `seeds` runs of
    `steps` each, with these overrides of both recipes."""
    import tempfile

    from jaxlm import config as configs
    from jaxlm.training.loop import train
    from jaxlm.training.metrics import columns, read

    found: dict[str, list[float]] = {}
    sizes = {"moe_8x_top2": f"model.moe.d_ff={2 * width}", "moe_8x_top2_dense": f"model.d_ff={4 * width}"}
    with tempfile.TemporaryDirectory() as folder:
        for name, size in sizes.items():
            for seed in range(seeds):
                run = f"{folder}/{name}-{seed}"
                given = [f"run.dir={run}", f"run.seed={seed}", f"train.steps={steps}", f"train.eval_every={steps}"]
                given += [f"model.d_model={width}", size, "train.eval_batches=null", "train.prompts=[]", *overrides]
                train(configs.load(str(ROOT / "configs" / f"{name}.yaml"), given))
                values = columns(read(f"{run}/metrics.jsonl"))["eval/bits_per_byte"]
                found.setdefault(name, []).append(values[steps])
    return {
        "steps": steps,
        "width": width,
        "bits per byte": found,
        "mean": {n: statistics.mean(v) for n, v in found.items()},
    }


@click.command()
@click.argument("part", type=click.Choice(["cost", "kernels", "peers", "balance", "quality"]))
@click.argument("overrides", nargs=-1)
@click.option("--rounds", default=7, show_default=True, help="Turns of each case.")
@click.option("--steps", default=300, show_default=True, help="Steps of balance and quality.")
@click.option("--seeds", default=3, show_default=True, help="Runs of quality.")
@click.option("--width", default=256, show_default=True, help="Width of the models of quality.")
@click.option("--save", is_flag=True, help="Keep the result in scripts/bench/results/.")
def main(part: str, rounds: int, steps: int, seeds: int, width: int, overrides: tuple[str, ...], save: bool) -> None:
    """Measure one part and print it as JSON."""
    parts = {
        "cost": lambda: cost(rounds),
        "kernels": lambda: kernels(rounds),
        "peers": lambda: peers(rounds),
        "balance": lambda: balances(steps),
        "quality": lambda: quality(steps, seeds, width, overrides),
    }
    result = parts[part]()
    text = json.dumps({"part": part} | result | {"environment": surroundings()}, indent=1)
    click.echo(text)
    if save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"moe_{part}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
