"""`jaxlm compare`: whether two evaluations differ."""

import click

from jaxlm.cli.command import Command


@click.command(cls=Command, example="jaxlm compare before/samples_arc.jsonl after/samples_arc.jsonl")
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
def command(a: str, b: str) -> None:
    """Say whether B differs from A, item by item.

    A and B are two samples_*.jsonl over the same items, or two directories of them. Two scores alone do not show a
    gain: this counts the items gained and lost, and gives McNemar's exact p and an interval of the difference.
    """
    from jaxlm.evals.compare import describe

    click.echo(describe(a, b))
