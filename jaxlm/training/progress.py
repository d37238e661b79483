"""What a person sees while a run goes on: a live line on a terminal, plain lines in a log."""

import contextlib
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TextIO

from jaxlm.training import units

EXTRAS = ("accuracy", "rewards/accuracies", "reward", "objective/scores")
"""Metrics that say more than the loss where an objective has them; they are shown after it."""


class Progress(Protocol):
    """Shows how far a run is."""

    def status(self, text: str) -> None:
        """Say what is being waited for: `compiling the training step`."""

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Show a step's metrics and meter readings, by the names of `metrics.jsonl` and `timing.jsonl`."""

    def message(self, text: str) -> None:
        """Print a line that stays: an evaluation, a sample, a warning."""

    def close(self) -> None:
        """Leave the terminal as it was; may be called twice."""


def open_progress(total: int, *, enabled: bool = True, stream: TextIO | None = None) -> Progress:
    """A live display on a terminal, plain lines elsewhere, nothing where `enabled` is false.

    Args:
      total: the run's last step.
      enabled: false in all processes but the first.
      stream: where to write; null is stderr.
    """
    if not enabled:
        return Silent()
    stream = sys.stderr if stream is None else stream
    if stream.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        return Live(total, stream)
    return Plain(total, stream)


def step_line(step: int, total: int, values: Mapping[str, float]) -> str:
    """`step 10/1000  loss 5.1234  lr 3.00e-04  grad_norm 1.23  12.3k tok/s  41.0% of peak  eta 1:23  mem 1.2 GB`.

    What is not in `values` is left out.
    """
    parts = [f"step {step}/{total}"]
    for name, label, form in (
        ("loss", "loss", "{:.4f}"),
        *((name, name.rpartition("/")[2], "{:.3f}") for name in EXTRAS),
        ("learning_rate", "lr", "{:.2e}"),
        ("grad_norm", "grad_norm", "{:.3g}"),
    ):
        if name in values:
            parts.append(f"{label} {form.format(values[name])}")
    if "tokens_per_second" in values:
        parts.append(f"{units.compact(values['tokens_per_second'])} tok/s")
    if "peak_fraction" in values:
        parts.append(f"{100 * values['peak_fraction']:.1f}% of peak")
    if "eta" in values and step < total:
        parts.append(f"eta {units.clock(values['eta'])}")
    if "memory" in values:
        parts.append(f"mem {units.size(values['memory'])}")
    return "  ".join(parts)


def evaluation_line(step: int, total: int, values: Mapping[str, float]) -> str:
    """`eval 100/1000  loss 4.2100  bits_per_byte 2.1200`."""
    shown = (f"{name.removeprefix('eval/')} {value:.4f}" for name, value in values.items() if name != "step")
    return "  ".join((f"eval {step}/{total}", *shown))


def sample_line(step: int, total: int, prompt: str, completion: str, width: int = 160) -> str:
    """`sample 100/1000  "The" -> " quick brown ..."` on one line, cut after `width` characters of the completion."""
    cut = completion if len(completion) <= width else completion[:width] + "..."
    return f"sample {step}/{total}  {_quoted(prompt)} -> {_quoted(cut)}"


def _quoted(text: str) -> str:
    escaped = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text.replace("\\", "\\\\"))
    return '"' + "".join(escaped) + '"'


class Silent:
    """Shows nothing."""

    def status(self, text: str) -> None: ...

    def step(self, step: int, values: Mapping[str, float]) -> None: ...

    def message(self, text: str) -> None: ...

    def close(self) -> None: ...


class Plain:
    """Lines for logs: the first and the last step always, between them one every few seconds.

    The interval grows with the age of the run, from 5 seconds to a minute, so that a log of days stays readable.
    """

    def __init__(self, total: int, stream: TextIO, now: Callable[[], float] = time.monotonic) -> None:
        self._total, self._stream, self._now = total, stream, now
        self._start = now()
        self._last: float | None = None

    def status(self, text: str) -> None:
        self.message(f"{text} ...")

    def step(self, step: int, values: Mapping[str, float]) -> None:
        now = self._now()
        interval = min(60.0, max(5.0, (now - self._start) / 60))
        unusual = not math.isfinite(values.get("loss", 0.0))
        if self._last is None or step >= self._total or unusual or now - self._last >= interval:
            self._last = now
            self.message(step_line(step, self._total, values))

    def message(self, text: str) -> None:
        # A log whose reader has gone is no reason to stop a run.
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text + "\n")
            self._stream.flush()

    def close(self) -> None: ...


class Live:
    """A bar and a line of numbers that stay at the bottom of the terminal; messages scroll above them."""

    def __init__(self, total: int, stream: TextIO) -> None:
        from rich.console import Console
        from rich.live import Live as RichLive

        self._total, self._done = total, 0
        self._line: str | None = None
        self._status: str | None = None
        self._console = Console(file=stream, highlight=False)
        self._live = RichLive(
            console=self._console, refresh_per_second=4, get_renderable=self._render, redirect_stdout=False
        )
        self._live.start()

    def status(self, text: str) -> None:
        self._status = f"{text} ..."

    def step(self, step: int, values: Mapping[str, float]) -> None:
        self._done, self._status = step, None
        self._line = step_line(step, self._total, values)

    def message(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self._live.stop()

    def _render(self) -> Any:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        # A bar does not end its line by itself; the rows of a grid do.
        rows = Table.grid()
        width = min(self._console.width, 60)
        rows.add_row(ProgressBar(total=max(self._total, 1), completed=self._done, width=width))
        for text, style in ((self._line, "bold"), (self._status, "dim")):
            if text:
                rows.add_row(Text(text, style=style))
        return rows
