"""What an evaluation leaves: results.json and samples_<task>.jsonl in lm-eval's shapes, and lines to read."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Sample = dict[str, Any]


class Outcome(NamedTuple):
    """What was measured.

    Attributes:
      results: of each task, values by `metric,filter`, e.g. {"arc": {"acc,none": 0.41}}.
      samples: of each task, its items in the order of the documents.
      details: other entries of results.json.
    """

    results: dict[str, dict[str, Any]]
    samples: dict[str, list[Sample]]
    details: dict[str, Any]


def merge(outcomes: Iterable[Outcome]) -> Outcome:
    """Outcomes of several tasks as one; details that are mappings are joined."""
    merged = Outcome({}, {}, {})
    for outcome in outcomes:
        merged.results.update(outcome.results)
        merged.samples.update(outcome.samples)
        for name, value in outcome.details.items():
            known = merged.details.get(name)
            merged.details[name] = {**known, **value} if isinstance(known, dict) and isinstance(value, dict) else value
    return merged


def make_directory(path: str | Path) -> Path:
    """The directory for results, made if need be, so that what was measured does not get lost at the end.

    Raises:
      ValueError: it cannot be.
    """
    directory = Path(path)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"--output: {directory}: a file is there; name a directory")
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def write(directory: Path, outcome: Outcome) -> None:
    """Write DIR/results.json and, of each task with samples, DIR/samples_<task>.jsonl."""
    for task, samples in outcome.samples.items():
        text = "".join(_dump(sample) + "\n" for sample in samples)
        (directory / f"samples_{_file_name(task)}.jsonl").write_text(text, encoding="utf-8")
    whole = {"results": outcome.results, **outcome.details}
    (directory / "results.json").write_text(_dump(whole, indent=2) + "\n", encoding="utf-8")


def describe(outcome: Outcome) -> str:
    """One line a metric: task, metric, value."""
    rows = [
        (task, metric if filter_ in ("", "none") else f"{metric} ({filter_})", value)
        for task, metrics in outcome.results.items()
        for metric, filter_, value in _values(metrics)
    ]
    left = max((len(task) for task, _, _ in rows), default=0)
    middle = max((len(metric) for _, metric, _ in rows), default=0)
    return "\n".join(f"{task:{left}}   {metric:{middle}}   {value:.4f}" for task, metric, value in rows)


def mean_and_error(values: Iterable[float]) -> tuple[float, float | str]:
    """Mean, and its standard error with Bessel's correction, as in lm-eval; "N/A" with one value."""
    x = np.array(list(values), np.float64)
    return float(x.mean()), float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else "N/A"


def _values(metrics: Mapping[str, Any]) -> Iterable[tuple[str, str, float]]:
    for key, value in metrics.items():
        name, comma, filter_ = key.partition(",")
        if comma and isinstance(value, int | float):
            yield name, filter_, float(value)


def _file_name(task: str) -> str:
    return task.replace("/", "_").replace("\\", "_")


def _dump(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, default=_plain)


def _plain(value: Any) -> Any:
    """What JSON has no word for: numbers of numpy as numbers, anything else as text."""
    if isinstance(value, np.generic):
        return value.item()
    return sorted(map(str, value)) if isinstance(value, set) else str(value)
