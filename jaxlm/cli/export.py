"""`jaxlm export`: a model that other programs load."""

import pathlib

import click

from jaxlm.cli.command import Command


@click.command(cls=Command, example="jaxlm export runs/quickstart models/quickstart")
@click.argument("run", metavar="RUN")
@click.argument("out", metavar="OUT")
def command(run: str, out: str) -> None:
    """Write a run's model as a Hugging Face directory.

    OUT gets the weights with the tokenizer beside them. RUN is a run directory, whose last checkpoint is taken if
    training has not ended, or a model directory.
    """
    from jaxlm.config import load
    from jaxlm.training.export import export

    file = pathlib.Path(run) / "config.yaml"
    export(run, out, load(file) if file.is_file() else None, lambda line: click.echo(line, err=True))
    click.echo(out)
