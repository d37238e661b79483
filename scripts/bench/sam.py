"""Training with and without SAM on little data for many epochs: the gap to validation, and how sharp the minimum is.

    python -m scripts.bench.sam [--epochs 16] [--seeds 3]

Every arm has the same data, seeds, rate and number of steps, so the arms with SAM cost twice as much. Sharpness is
measured alike for all arms, over the whole training set: how far the loss rises when the parameters move by `RADIUS`
uphill (`ascent`), and on average over random directions (`random`). Writes `results/sam.json` and `results/sam.png`.
"""

import argparse
import pathlib
import tempfile
from typing import Any

import jax
import numpy as np
import optax

from jaxlm.data.loader import Loader
from jaxlm.evals import plots
from jaxlm.optim.config import SamConfig
from jaxlm.optim.sam import perturbation
from jaxlm.training.setup import Program, Setup, global_batch
from jaxlm.training.step import accumulated
from jaxlm.types import Batch, Variables
from scripts.bench import experiment

ARMS: dict[str, dict[str, Any] | None] = {
    "without": None,
    "sam 0.05": {"rho": 0.05},
    "sam 0.2": {"rho": 0.2},
}
MODEL = {"d_model": 64, "n_layers": 2, "n_heads": 2, "d_ff": 128, "vocab_size": 512}
LENGTH, ROWS, BATCH, RATE = 32, 256, 16, 3e-3
RADIUS, DIRECTIONS, LOOKS = 0.5, 5, 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        data = experiment.write_texts(pathlib.Path(folder), 40_000, 40_000) | {"sequence_length": LENGTH}
        raw = {"model": MODEL, "data": data, "optimizer": {"learning_rate": RATE}}
        raw["train"] = {"steps": options.epochs * ROWS // BATCH, "batch_size": BATCH, "attention": "reference"}
        for arm in ARMS:
            runs += run(raw, arm, options.seeds)
    result = {"configuration": raw | {"data": {"sequence_length": LENGTH, "train_rows": ROWS}}, "radius": RADIUS}
    result |= {"arms": {arm: summary(runs, arm) for arm in ARMS}, "runs": runs}
    for arm, values in result["arms"].items():
        shown = "  ".join(f"{name} {v['mean']:.3f} ± {v['deviation']:.3f}" for name, v in values.items())
        print(f"{arm:10} {shown}")
    print(experiment.keep("sam", result))
    draw(runs)


def run(raw: dict[str, Any], arm: str, seeds: int) -> list[dict[str, Any]]:
    """Train one arm from every seed, on the same rows in another order."""
    setups = [opened(raw, arm, seed) for seed in range(seeds)]
    program, rows = setups[0].program, setups[0].data.train
    held_out = setups[0].data.validation.spread(ROWS)
    score, step = experiment.scorer(setups[0], program, ROWS), experiment.compiled_step(program)
    around = jax.jit(lambda params, batch: rises(program, params, batch))

    def look(params: Variables) -> dict[str, float]:
        return {"train": score(params, rows), "validation": score(params, held_out)}

    found = []
    for seed, setup in enumerate(setups):
        curve = experiment.train(setup, setup.program, setup.config.train.steps // LOOKS, look, step)
        last = curve.looks[-1]
        batch = global_batch(rows, np.arange(ROWS), program.mesh)
        with jax.set_mesh(program.mesh):
            sharp = {name: float(value) for name, value in around(curve.state.params, batch).items()}
        values = {"train": last["train"], "validation": last["validation"]}
        values |= {"gap": last["validation"] - last["train"]}
        values |= {"best_validation": min(each["validation"] for each in curve.looks)} | sharp
        print(arm, seed, values, flush=True)
        found.append({"arm": arm, "seed": seed, **values, "looks": curve.looks})
    return found


def opened(raw: dict[str, Any], arm: str, seed: int) -> Setup:
    """The run of an arm from a seed, its training data cut to a few rows."""
    optimizer = raw["optimizer"] | {"sam": ARMS[arm]}
    setup = experiment.open_run(raw | {"optimizer": optimizer, "run": {"seed": seed}})
    rows = setup.data.train.spread(ROWS)
    return setup._replace(data=setup.data._replace(train=rows), loader=Loader(rows, BATCH, seed))


def rises(program: Program, params: Variables, batch: Batch) -> dict[str, jax.Array]:
    """L(params + e) - L(params) for e uphill, and its mean over random e; both of length `RADIUS`."""
    gradient = accumulated(program.recipe._replace(accumulation=1, sam=None), {}, batch, jax.random.key(0))
    loss, _, grads = gradient(params)

    def rise(direction: Variables) -> jax.Array:
        e = perturbation(direction, params, SamConfig(rho=RADIUS))
        return gradient(optax.tree.add(params, e))[0] - loss

    noise = jax.lax.map(
        lambda key: rise(optax.tree.random_like(key, params)), jax.random.split(jax.random.key(1), DIRECTIONS)
    )
    return {"ascent": rise(grads), "random": noise.mean()}


def summary(runs: list[dict[str, Any]], arm: str) -> dict[str, dict[str, float]]:
    """Mean and deviation over seeds of every number."""
    mine = [r for r in runs if r["arm"] == arm]
    names = [name for name, value in mine[0].items() if isinstance(value, float)]
    return {name: experiment.mean_and_deviation(r[name] for r in mine) for name in names}


def draw(runs: list[dict[str, Any]]) -> None:
    """Training and validation loss over steps, means over seeds."""
    panels = []
    for side in ("train", "validation"):
        lines = []
        for arm in ARMS:
            looks = [r["looks"] for r in runs if r["arm"] == arm]
            steps = [row["step"] for row in looks[0]]
            lines.append(plots.Line(arm, steps, np.mean([[row[side] for row in each] for each in looks], 0).tolist()))
        panels.append(plots.Panel(f"{side} loss, mean over seeds", "step", "nats per token", lines, x_log=False))
    plots.write(experiment.RESULTS / "sam.png", panels)


if __name__ == "__main__":
    main()
