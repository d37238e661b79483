"""Bytes between devices in the compiled training step, measured beside theory, on simulated devices.

    python -m scripts.bench.comm [--devices 2 4 8] [--json FILE]

Nothing is run: the step is compiled for the CPU backend on as many simulated devices and its text is read. Bytes are
those of whole arrays per device and step (results; of a reduce-scatter the operand), loops counted. The CPU backend
writes a reduce-scatter as an all-reduce and a slice, which is counted as the former.
"""

import argparse
import datetime
import json
import math
import os
import sys
from typing import Any

KINDS = ("all-gather", "all-reduce", "reduce-scatter")
LAYOUTS = {
    "DDP": {"data": -1},
    "FSDP": {"data": 1, "fsdp": -1},
    "TP": {"data": 1, "tensor": -1},
    "context": {"data": 1, "context": -1},
    "FSDP 2 x TP": {"data": 1, "fsdp": 2, "tensor": -1},
}
MODEL = {"d_model": 256, "n_layers": 4, "n_heads": 8, "d_ff": 512, "vocab_size": 2048, "max_length": 128}
ROWS, LENGTH = 16, 128


def measure(layout: dict[str, int], devices: int) -> dict[str, Any]:
    """Compile one layout: {"bytes": kind -> bytes, "theory": kind -> bytes, "wire": bytes, "state": bytes a device}."""
    import functools

    import jax

    from jaxlm.dist import mesh as meshes
    from jaxlm.dist import place, rules, traffic
    from jaxlm.dist.collectives import collectives, totals, wire_bytes
    from jaxlm.nn import transformer
    from jaxlm.nn.compute import Compute
    from jaxlm.nn.config import ModelConfig
    from jaxlm.objectives.config import NextTokenConfig
    from jaxlm.objectives.next_token import next_token
    from jaxlm.optim import chain, schedules
    from jaxlm.optim.config import OptimizerConfig
    from jaxlm.training.step import Recipe, init_state, train_step

    cfg, optimizer = ModelConfig(**MODEL), OptimizerConfig()
    mesh = meshes.make(meshes.MeshConfig(**layout), jax.devices()[:devices])
    params = jax.eval_shape(lambda: transformer.init(cfg, jax.random.key(0)))
    compute = Compute(constrain=place.constrain(mesh), mesh=mesh)
    recipe = Recipe(
        objective=next_token(NextTokenConfig()),
        apply=functools.partial(transformer.apply, cfg, compute=compute),
        optimizer=chain.make(optimizer, cfg, params, 100),
        schedule=schedules.make(optimizer, 100),
    )
    state = jax.eval_shape(functools.partial(init_state, recipe), params)
    lies = rules.shardings_like(state, params, mesh)

    def spread(x: Any, sharding: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    state = jax.tree.map(spread, state, lies)
    columns = {"tokens": "int32", "targets": "int32", "mask": "float32", "segments": "int32", "positions": "int32"}
    batch = {
        name: jax.ShapeDtypeStruct((ROWS, LENGTH), dtype, sharding=place.batch_sharding(mesh))
        for name, dtype in columns.items()
    }
    step = jax.jit(functools.partial(train_step, recipe), out_shardings=(lies, None), donate_argnums=0)
    with jax.set_mesh(mesh):
        compiled = step.lower(state, {}, batch).compile()
    text = compiled.as_text()
    return {
        "bytes": {kind: total.bytes for kind, total in totals(text).items()},
        "theory": traffic.step_bytes(cfg, params, mesh, traffic.Shape(ROWS, LENGTH)),
        "wire": wire_bytes(collectives(text)),
        "state": sum(x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(state)),
        "temporary": compiled.memory_analysis().temp_size_in_bytes,
    }


def table(results: list[dict[str, Any]]) -> str:
    """One line a layout and number of devices; MiB measured / theory by kind."""
    head = f"{'layout':12} {'devices':>7} " + " ".join(f"{kind + ' / theory':>24}" for kind in KINDS)
    lines = [head + f" {'other':>8} {'ring sends':>11} {'state':>8} {'temporary':>10}"]
    for row in results:
        found, theory = row["bytes"], row["theory"]
        cells = [f"{found.get(kind, 0) / 2**20:.3f} / {theory.get(kind, 0) / 2**20:.3f}" for kind in KINDS]
        other = sum(size for kind, size in found.items() if kind not in KINDS)
        sizes = f"{other / 2**20:8.3f} {row['wire'] / 2**20:11.3f} {row['state'] / 2**20:8.2f}"
        lines.append(
            f"{row['layout']:12} {row['devices']:7} "
            + " ".join(f"{cell:>24}" for cell in cells)
            + f" {sizes} {row['temporary'] / 2**20:10.2f}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--json", help="also write the numbers to this file")
    options = parser.parse_args(arguments)
    if "jax" in sys.modules:
        raise RuntimeError("comm: JAX is loaded already; run this in a process of its own, it sets the device count")
    most = max(options.devices)
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={most}".strip()
    os.environ["JAX_PLATFORMS"] = "cpu"
    results = []
    for devices in options.devices:
        for name, layout in LAYOUTS.items():
            if name == "FSDP 2 x TP" and devices < 4:
                continue
            print(f"{name} on {devices}", file=sys.stderr)
            results.append({"layout": name, "devices": devices} | measure(layout, devices))
    print(f"model {MODEL}, {ROWS} rows of {LENGTH}, float32, AdamW, clip; MiB per device and step")
    print(table(results))
    if options.json:
        import jax

        with open(options.json, "w") as file:
            hardware = f"{most} simulated CPU devices; compiled only"
            about = {"date": datetime.date.today().isoformat(), "hardware": hardware, "jax": jax.__version__}
            json.dump(about | {"model": MODEL, "results": results}, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
