"""`jaxlm eval`: how good a model is."""

import sys
from typing import Any

import click

from jaxlm.cli.command import Command

at_least_1 = click.IntRange(min=1)


@click.command(cls=Command, example="jaxlm eval runs/quickstart --data notes.txt --output runs/quickstart/evals")
@click.argument("model", metavar="MODEL")
@click.option(
    "--tasks",
    metavar="T[,T...]",
    help="Choice questions (.jsonl), docstrings, docstrings_shuffled, or lm-eval tasks (YAML, name).",
)
@click.option("--data", metavar="FILE", help="A text, for its perplexity.")
@click.option("--output", metavar="DIR", required=True, help="Gets results.json and samples_<task>.jsonl.")
@click.option("--batch-size", type=at_least_1, default=16, show_default=True, help="Rows of a batch.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--limit", type=at_least_1, help="Only so many items of each task, for trying things out.")
@click.option("--num-fewshot", type=click.IntRange(min=0), help="Worked examples first, in lm-eval's tasks.")
@click.option("--chat", is_flag=True, help="Ask through the chat template, in lm-eval's tasks.")
def command(model: str, tasks: str | None, data: str | None, output: str, **settings: Any) -> None:
    """Score MODEL on tasks, or on a text.

    MODEL is a Hugging Face model directory or a run directory. Of tasks, the result of every item is kept, so that
    `jaxlm compare` can tell whether two models differ. lm-eval's tasks need the extra `eval`.
    """
    if (tasks is None) == (data is None):
        raise click.UsageError("give either --tasks or --data")
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    if data is None and not names:
        raise click.UsageError("--tasks names no task")
    from jaxlm.evals import run
    from jaxlm.evals.results import describe

    how = run.Settings(**settings, report=_progress if sys.stderr.isatty() else run.silent)
    if data is not None:
        outcome = run.evaluate_text(model, data, output, how)
    else:
        outcome = run.evaluate_tasks(model, names, output, how)
    click.echo(describe(outcome))


def _progress(done: int, of: int) -> None:
    click.echo(f"\rscored {done} of {of}", nl=done == of, err=True)
