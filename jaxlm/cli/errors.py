"""What went wrong, as the last line on stderr, and the exit code that says whose fault it is."""

import os
import sys
import traceback

import click

BAD_INPUT, FAILURE, INTERRUPTED = 2, 1, 130
_WRONG_PATH = FileNotFoundError | FileExistsError | IsADirectoryError | NotADirectoryError | PermissionError
_WRONG_INPUT = ValueError | click.ClickException | _WRONG_PATH


def explain(error: BaseException) -> int:
    """Write an error to stderr as `jaxlm: error: WHERE: WHAT; WHAT TO DO` and return the exit code.

    A ValueError or a path that cannot be used is bad input (2). A RuntimeError, not a foreign subclass of it, and other
    errors of the system tell of a failure in words (1). Anything else was not foreseen: its traceback is shown too (1).
    JAXLM_TRACEBACK=1 shows it always.
    """
    if isinstance(error, KeyboardInterrupt | click.Abort):
        print("jaxlm: interrupted", file=sys.stderr)
        return INTERRUPTED
    wrong_input = isinstance(error, _WRONG_INPUT)
    foreseen = wrong_input or isinstance(error, OSError) or _in_words(error)
    if not foreseen or os.environ.get("JAXLM_TRACEBACK"):
        traceback.print_exception(error)
    print(f"jaxlm: error: {_line(error)}", file=sys.stderr)
    return BAD_INPUT if wrong_input else FAILURE


def _in_words(error: BaseException) -> bool:
    """Whether an error is a RuntimeError that this package wrote, not an accident such as XLA's or RecursionError."""
    kind = type(error)
    return kind is RuntimeError or (isinstance(error, RuntimeError) and kind.__module__.startswith("jaxlm."))


def _line(error: BaseException) -> str:
    """The error in one line."""
    if isinstance(error, click.UsageError):
        command = error.ctx.command_path if error.ctx else "jaxlm"
        where = command.removeprefix("jaxlm").strip() or "jaxlm"
        text = f"{where}: {error.format_message().rstrip('.')}; see {command} --help"
    elif isinstance(error, click.ClickException):
        text = error.format_message()
    elif isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {(error.strerror or 'cannot be used').lower()}; check the path"
    elif isinstance(error, ValueError | OSError | RuntimeError) and str(error):
        text = str(error)
    else:
        text = f"{type(error).__name__}: {error}"
    return " ".join(text.splitlines())
