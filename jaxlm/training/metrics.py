"""The metrics file of a run: one JSON object a line, flushed as it is written, in full float precision.

`metrics.jsonl` holds what the run's configuration and seed determine, so an interrupted run writes the same values as
one that was not. What depends on the clock (throughput, memory) goes into `timing.jsonl`, in the same form.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"
TIMING_FILE = "timing.jsonl"

Row = dict[str, Any]


class MetricsFile:
    """Appends rows to a JSON lines file; each is on disk's side of the process before `write` returns.

    Opening mends the end that a killed process may have left: a torn last line is removed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        _mend(self._path)
        # Unbuffered: a failed write leaves nothing behind that a later write or close would try again.
        self._file = self._path.open("ab", buffering=0)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row.

        Args:
          row: `step` and any other values: numbers, text, scalar arrays. NaN and Infinity are written by these names.

        Raises:
          ValueError: a row without `step`, or a value that is no scalar.
          OSError: the file cannot be written (full disk); it names the path, and no part of the row stays in the file.
        """
        if "step" not in row:
            raise ValueError(f"{self._path}: a row without `step`; every row names the step it belongs to")
        line = json.dumps({name: plain(name, value) for name, value in row.items()}).encode() + b"\n"
        start = self._file.seek(0, os.SEEK_END)
        try:
            written = 0
            while written < len(line):
                written += self._file.write(line[written:]) or 0
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(start)
            raise OSError(error.errno, error.strerror, str(self._path)) from error

    def close(self) -> None:
        """Close the file; may be called twice."""
        self._file.close()

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()


def plain(name: str, value: Any) -> bool | int | float | str | None:
    """A scalar of any array library as a Python value, exactly.

    Raises:
      ValueError: `value` is not a scalar.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    item = value.item() if getattr(value, "size", None) == 1 else None
    if not isinstance(item, bool | int | float):
        raise ValueError(f"{name}: {type(value).__name__} is not a scalar; metrics are single numbers or text")
    return item


def read(path: str | os.PathLike[str]) -> list[Row]:
    """All rows in the order of the file. After a resume a step may appear twice.

    A torn last line, as a killed process leaves it, is passed over.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a line that is not the last is no JSON object; the message is `file:line: ...`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found; give the directory of a run that has started")
    lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row = _row(line)
        if row is not None:
            rows.append(row)
        elif any(rest.strip() for rest in lines[number:]):
            raise ValueError(f"{path}:{number}: not a JSON object; mend or remove the line")
    return rows


def columns(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    """Every numeric column as {step: value}, steps ascending; of a repeated step the last value counts.

    [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}]  ->  {"loss": {1: 3.0, 2: 2.0}}
    """
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        step = row.get("step")
        if not isinstance(step, int | float) or not math.isfinite(step):
            continue
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                found.setdefault(name, {})[int(step)] = float(value)
    return {name: dict(sorted(values.items())) for name, values in found.items()}


def _row(line: bytes) -> Row | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _mend(path: Path) -> None:
    """End the file at its last whole line; a row whose newline alone is missing is kept."""
    if not path.exists():
        return
    with open(path, "rb+") as file:
        data = file.read()
        tail = data[data.rfind(b"\n") + 1 :]
        if not tail:
            return
        if _row(tail) is not None:
            file.write(b"\n")
        else:
            file.truncate(len(data) - len(tail))
