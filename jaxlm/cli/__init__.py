"""The command `jaxlm`: one thin file per subcommand, each imported when it is used."""

import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from jaxlm import __version__
from jaxlm.cli.errors import explain

COMMANDS = {
    "train": "jaxlm.cli.train",
    "plan": "jaxlm.cli.plan",
    "generate": "jaxlm.cli.generate",
    "eval": "jaxlm.cli.eval",
    "compare": "jaxlm.cli.compare",
    "report": "jaxlm.cli.report",
    "export": "jaxlm.cli.export",
    "quantize": "jaxlm.cli.quantize",
    "merge": "jaxlm.cli.merge",
    "coord-check": "jaxlm.cli.coord_check",
    "sweep": "jaxlm.cli.sweep",
}
"""Subcommands in the order of a model's life, and the module whose `command` each is."""


class _Commands(click.Group):
    """A group whose subcommands are imported by name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        return importlib.import_module(COMMANDS[name]).command if name in COMMANDS else None

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            near = difflib.get_close_matches(name, COMMANDS, n=1)
            advice = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(COMMANDS)}"
            raise ValueError(f"{name}: unknown command; {advice}")
        return super().resolve_command(ctx, args)


@click.group(
    cls=_Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Settings are given as path.to.field=VALUE after a configuration, VALUE read as YAML. "
    "Exit codes: 0 done, 2 bad input, 1 failure during the run, 130 and 143 interrupted. "
    "JAXLM_TRACEBACK=1 shows where an error comes from.",
)
@click.version_option(__version__, message="%(prog)s %(version)s")
@click.pass_context
def _group(ctx: click.Context) -> None:
    """Train, inspect and use language models, in JAX. `jaxlm COMMAND --help` shows an example of each."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code.

    Args:
      arguments: without the program's name; null takes the process's own.
    """
    try:
        code = _group.main(
            args=None if arguments is None else list(arguments), prog_name="jaxlm", standalone_mode=False
        )
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of our results went away (`jaxlm ... | head`); Python must not try to flush again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Exception, KeyboardInterrupt) as error:
        return explain(error)
    return code if isinstance(code, int) else 0
