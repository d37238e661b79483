"""`jaxlm report`: one self-contained page about a run."""

import click

from jaxlm.cli.command import Command


@click.command(cls=Command, example="jaxlm report runs/quickstart")
@click.argument("run", metavar="RUN")
def command(run: str) -> None:
    """Write RUN/report.html and print its path.

    One self-contained page: curves, evaluations, samples, configuration and environment of the run.
    """
    from jaxlm.training.report import write_report

    click.echo(write_report(run))
