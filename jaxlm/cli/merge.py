"""`jaxlm merge`: one model out of several, by mergekit's recipes."""

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from jaxlm.cli.command import Command


@click.command(cls=Command, example="jaxlm merge configs/merge_slerp.yaml runs/merge_slerp")
@click.argument("recipe", metavar="MERGE.yaml")
@click.argument("out", metavar="OUT")
@click.option("--seed", "--random-seed", default=0, show_default=True, help="Of the random methods (dare_*).")
def command(recipe: str, out: str, seed: int) -> None:
    """Merge models by a mergekit recipe.

    OUT becomes a Hugging Face directory.

    Methods: linear, slerp, task_arithmetic, ties, dare_linear, dare_ties, breadcrumbs, breadcrumbs_ties, passthrough,
    with mergekit's keys, defaults and numbers (`normalize`, `rescale`, `lambda`, gradients, filters, slices). What
    DARE keeps is rescaled to the former sum of magnitudes, as mergekit does, not by 1/density. Models are Hugging Face
    directories, run directories, PEFT adapters, or MODEL+ADAPTER.

    OUT gets the model, the base model's tokenizer, mergekit_config.yml, and merge_report.html and .json with the
    distances of the models and the result by layer.
    """
    from jaxlm.interop.mergekit import read_recipe, unused

    read = read_recipe(recipe)
    for name in unused(read):
        click.echo(
            f"jaxlm: {recipe}: parameters.{name}: {read.method} has no such parameter; it is passed over", err=True
        )
    from jaxlm.evals import merge_report
    from jaxlm.interop.mergekit_write import merge

    with _progress() as tell:
        distances = merge(read, out, seed=seed, progress=tell)
    shutil.copyfile(recipe, Path(out) / "mergekit_config.yml")
    page, _ = merge_report.write(distances, out, Path(recipe).read_text(encoding="utf-8"))
    click.echo(f"jaxlm: {page}: how far the models are apart, by layer", err=True)
    click.echo(out)


@contextmanager
def _progress() -> Iterator[Callable[[int, int, str], None]]:
    """A bar on a terminal, a line for every tenth in a log."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("merging")
            yield lambda done, total, name: bar.update(task, total=total, completed=done, description=name)
        return

    def line(done: int, total: int, name: str) -> None:
        if done * 10 // total != (done - 1) * 10 // total:
            click.echo(f"merging {done}/{total}  {name}", err=True)

    yield line
