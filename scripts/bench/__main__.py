"""`python -m scripts.bench CASE`: run a benchmark and keep its result."""

import json
import pathlib
import subprocess
import sys

import click

from scripts.bench import alternate
from scripts.bench.shapes import SHAPES

RESULTS = pathlib.Path(__file__).parent / "results"
CASES = {
    "train": ["jaxlm", "torch", "torch-compile", "transformers"],
    "attention": ["jaxlm", "torch"],
    "cross_entropy": ["jaxlm", "torch"],
    "lora": ["jaxlm", "peft"],
    "generate": ["jaxlm", "transformers"],
    "compile": ["cold", "warm", "shallow"],
    "remat": ["none", "dots", "block", "full"],
    "scale": ["jaxlm"],
}
"""Sides of each case; the first is compared with the others."""
SWEEPS = {
    "scale": [{"length": n} for n in (256, 1024, 4096)]
    + [{"width": n} for n in (128, 256, 512)]
    + [{"layers": n} for n in (3, 6, 12)],
    "attention": [{"length": n} for n in (1024, 4096, 8192)],
    "generate": [{"rows": 1}, {"rows": 8}],
}
"""Options that a case is repeated with."""
APART: dict[str, list[list[str]]] = {"comm": [[]], "moe": [["cost"], ["kernels"], ["peers"]]}
"""Cases that are programs of their own, and the arguments of each of their parts."""

GPU = {"train": {"size": "1b", "dtype": "bfloat16"}, "attention": {"dtype": "bfloat16"},
       "lora": {"size": "7b", "dtype": "bfloat16"}, "generate": {"size": "7b", "dtype": "bfloat16"}}  # fmt: skip


@click.command()
@click.argument("case", type=click.Choice([*CASES, *APART, "all"]))
@click.option("--size", type=click.Choice(list(SHAPES)), default="small", show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--threads", default=2, show_default=True, help="Cores that each side gets.")
@click.option("--clock", type=click.Choice(["wall", "cpu"]), default="wall", show_default=True)
@click.option(
    "--allocator",
    default=next(iter(alternate.allocators())),
    show_default=True,
    type=click.Choice(list(alternate.allocators())),
    help="Of both sides; of those installed here.",
)
@click.option("--pairs", default=5, show_default=True, help="Rounds of all sides.")
@click.option("--seconds", default=5.0, show_default=True, help="Seconds that a side is timed in a round.")
@click.option("--sides", default=None, help="Comma list; the first is compared with the others.")
@click.option("--gpu", is_flag=True, help="Sizes and dtypes for one accelerator.")
@click.option("--force", is_flag=True, help="Show ratios of unsteady measurements too.")
@click.option("--save", is_flag=True, help="Keep the result in scripts/bench/results/.")
def main(case: str, sides: str | None, pairs: int, gpu: bool, force: bool, save: bool, **options) -> None:
    """Compare jaxlm with its peers in alternation, in fresh processes. A ratio above 1 means that jaxlm is faster.

    Example: python -m scripts.bench train --size small --threads 1 --clock cpu
    """
    for name in [*CASES, *APART] if case == "all" else [case]:
        if name in APART:
            for part in APART[name]:
                subprocess.run([sys.executable, "-m", f"scripts.bench.{name}", *part], check=True)
            continue
        chosen = CASES[name] if sides is None else sides.split(",")
        for extra in SWEEPS.get(name, [{}]):
            result = alternate.compare(name, chosen, options | (GPU.get(name, {}) if gpu else {}) | extra, pairs)
            click.echo(alternate.table(result, force))
            if save:
                keep(result)


def keep(result: dict) -> None:
    """Add a result to the file of its case."""
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / f"{result['case']}.jsonl", "a") as file:
        file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
