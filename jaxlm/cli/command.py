"""How a subcommand looks: a summary, its options, and an example that can be copied."""

from typing import Any

import click


class Command(click.Command):
    """A click command whose help ends with an example line.

    Args:
      example: a command line that begins with `jaxlm`, shown as it stands.
    """

    def __init__(self, *args: Any, example: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.example = example

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_epilog(ctx, formatter)
        formatter.write(f"\nExample:\n{self.example}\n")


config_argument = click.argument("config", metavar="CONFIG")
overrides_argument = click.argument("overrides", nargs=-1, metavar="[FIELD=VALUE]...")
