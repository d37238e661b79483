"""A hundred layers with and without residual connections, under both norms, against the unigram baseline.

    python -m scripts.bench.depth [--layers 100] [--steps 100]

Every arm has the same data, the same rates and the same number of steps; each arm shows its best rate. Writes
`results/depth.json` and `results/depth.png`.
"""

import argparse
import dataclasses
import itertools
import math
import pathlib
import tempfile
import time
from typing import Any

import numpy as np

from jaxlm.data.baselines import baselines
from jaxlm.evals import plots
from jaxlm.training.setup import Setup, assemble
from scripts.bench import experiment

RATES = (3e-3, 1e-2)
NORMS = ("rmsnorm", "layernorm")
MODEL = {"d_model": 32, "n_heads": 2, "d_ff": 64, "vocab_size": 512, "tie_embeddings": False}
LENGTH, ROWS, SMOOTH = 32, 16, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=100)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = experiment.write_texts(pathlib.Path(folder), 400_000, 40_000) | {"sequence_length": LENGTH}
        raw = {"model": MODEL | {"n_layers": options.layers}, "data": data}
        raw["train"] = {"steps": options.steps, "batch_size": ROWS, "attention": "reference"}
        first = experiment.open_run(raw)
        unigram = baselines(first.data.train, first.data.validation, first.data.tokenizer).unigram
        grid = itertools.product(NORMS, (True, False), RATES)
        runs = [run(raw, *cell) for cell in grid]
    result = {"configuration": raw | {"data": {"sequence_length": LENGTH}}, "unigram": unigram, "runs": runs}
    result["verdicts"] = verdicts(runs, unigram)
    print(*result["verdicts"], experiment.keep("depth", result), sep="\n")
    draw(runs, unigram, options.layers)


def run(raw: dict[str, Any], norm: str, residual: bool, rate: float) -> dict[str, Any]:
    """Train one cell: its curve, and the validation loss at the end."""
    begin = time.perf_counter()
    optimizer = {"learning_rate": rate}
    setup: Setup = experiment.open_run(raw | {"model": raw["model"] | {"norm": norm}, "optimizer": optimizer})
    cfg = dataclasses.replace(setup.program.cfg, residual=residual)
    program = assemble(setup.config, cfg, setup.program.mesh)
    score = experiment.scorer(setup, program, 32)
    rows = setup.data.validation.spread(128)
    curve = experiment.train(setup, program, setup.config.train.steps, lambda params: {"loss": score(params, rows)})
    found = {
        "norm": norm,
        "residual": residual,
        "learning_rate": rate,
        "validation_loss": curve.looks[-1]["loss"],
        "last_training_loss": float(np.mean(curve.losses[-SMOOTH:])),
        "seconds": round(time.perf_counter() - begin, 1),
        "losses": [round(loss, 4) for loss in curve.losses],
    }
    print({name: value for name, value in found.items() if name != "losses"}, flush=True)
    return found


def best(runs: list[dict[str, Any]], norm: str, residual: bool) -> dict[str, Any]:
    """The run of an arm with the lowest validation loss."""
    arm = [r for r in runs if (r["norm"], r["residual"]) == (norm, residual)]
    return min(arm, key=lambda r: r["validation_loss"] if math.isfinite(r["validation_loss"]) else math.inf)


def verdicts(runs: list[dict[str, Any]], unigram: float) -> list[str]:
    """One sentence for each arm."""
    lines = []
    for norm, residual in itertools.product(NORMS, (True, False)):
        found = best(runs, norm, residual)
        side = "below" if found["validation_loss"] < unigram else "not below"
        name = f"{norm}, {'with' if residual else 'without'} residual connections"
        lines.append(f"{name}: validation loss {found['validation_loss']:.3f}, {side} the unigram's {unigram:.3f}")
    return lines


def draw(runs: list[dict[str, Any]], unigram: float, layers: int) -> None:
    """Training loss of each arm's best rate, smoothed, beside the unigram baseline."""
    lines = []
    for norm, residual in itertools.product(NORMS, (True, False)):
        losses = best(runs, norm, residual)["losses"]
        smooth = np.convolve(losses, np.full(SMOOTH, 1 / SMOOTH), "valid").tolist()
        steps = list(range(SMOOTH, len(losses) + 1))
        lines.append(plots.Line(f"{norm}, {'residual' if residual else 'no residual'}", steps, smooth))
    lines.append(plots.Line("unigram baseline", [lines[0].x[0], lines[0].x[-1]], [unigram, unigram]))
    title = f"{layers} layers, training loss (mean of {SMOOTH} steps)"
    panel = plots.Panel(title, "step", "loss, nats per token", lines, x_log=False)
    plots.write(experiment.RESULTS / "depth.png", [panel])


if __name__ == "__main__":
    main()
