"""Whether two runs over the same items differ: paired tests on per-item results."""

import hashlib
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxlm.data.sources import Record, read_records

LEVEL = 0.05


class Comparison(NamedTuple):
    """Two runs over the same items.

    Attributes:
      items: how many.
      gained, lost: items that B alone, and A alone, has right.
      a, b: shares of right items.
      p_value: of McNemar's exact test.
      interval: 95 % of `b - a`.
    """

    items: int
    gained: int
    lost: int
    a: float
    b: float
    p_value: float
    interval: tuple[float, float]


class Items(NamedTuple):
    """Per-item results of a file.

    Attributes:
      metric: name of the correctness compared.
      correct: by `doc_id`.
      documents: by `doc_id`, digest of the document, or None where the line has none.
    """

    metric: str
    correct: dict[Any, bool]
    documents: dict[Any, str | None]


def mcnemar(gained: int, lost: int) -> float:
    """p of McNemar's exact two-sided test: `min(1, 2 P(X <= min(gained, lost)))`, X ~ Binomial(gained + lost, 1/2)."""
    n = gained + lost
    log_factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1, dtype=np.float64)))])
    k = np.arange(min(gained, lost) + 1)
    logs = log_factorials[n] - log_factorials[k] - log_factorials[n - k] - n * math.log(2)
    return min(1.0, 2.0 * float(np.sum(np.exp(logs))))


def bootstrap_interval(gained: int, lost: int, items: int, level: float = 1 - LEVEL) -> tuple[float, float]:
    """Percentile interval of the paired bootstrap for the difference of two shares.

    Drawing `items` items with replacement makes the difference a sum of `items` independent values 1, -1 and 0 with
    probabilities gained/items, lost/items and the rest. Its distribution is computed instead of sampled, as
    many resamples would have it, so that there is no seed and no noise. It stands on multiples of 1/items; each one's
    probability is spread over its cell before the percentiles are read.

    Args:
      gained, lost, items: counts, `gained + lost <= items`.
      level: of the interval, e.g. 0.95.

    Returns:
      Lower and upper end; both are the difference itself where no item changed sides, or all did alike.
    """
    difference = (gained - lost) / items
    if abs(difference) == 1 or gained + lost == 0:
        return difference, difference
    size = 2 * items + 1
    one = np.zeros(size)
    one[0], one[1], one[-1] = items - gained - lost, gained, lost
    sums = np.roll(np.fft.irfft(np.fft.rfft(one / items) ** items, size), items).clip(0.0)
    below = np.concatenate([[0.0], np.cumsum(sums)]) / np.sum(sums)
    edges = (np.arange(size + 1) - items - 0.5) / items
    low, high = np.interp([(1 - level) / 2, (1 + level) / 2], below, edges).clip(-1.0, 1.0)
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """p adjusted for several tests at once (Holm 1979): over p no larger, `max (m - rank) p`, at most 1."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def compare(correct_a: Sequence[bool], correct_b: Sequence[bool]) -> Comparison:
    """Compare two runs, item by item; the two sequences have the same length and order."""
    a, b = np.asarray(correct_a, bool), np.asarray(correct_b, bool)
    gained, lost, items = int(np.sum(b & ~a)), int(np.sum(a & ~b)), len(a)
    interval = bootstrap_interval(gained, lost, items)
    return Comparison(items, gained, lost, float(a.mean()), float(b.mean()), mcnemar(gained, lost), interval)


def compare_files(a: str | Path, b: str | Path) -> Comparison:
    """Compare two files of per-item results, paired by `doc_id`.

    Raises:
      FileNotFoundError: no such file.
      ValueError: broken lines, lines without correctness, other items, another metric; named by file or `file:line`.
    """
    ours, theirs = read_items(a), read_items(b)
    if ours.metric != theirs.metric:
        raise ValueError(f"{b}: scored by {theirs.metric}, but {a} by {ours.metric}; compare the same metric")
    for first, second, where, other in ((ours, theirs, b, a), (theirs, ours, a, b)):
        missing = [item for item in first.correct if item not in second.correct]
        if missing:
            raise ValueError(
                f"{where}: doc_id {missing[0]!r} is missing ({len(missing)} in all), but {other} has it; "
                "compare runs over the same items"
            )
    for item, document in ours.documents.items():
        if None not in (document, theirs.documents[item]) and document != theirs.documents[item]:
            raise ValueError(f"{b}: doc_id {item!r} is another document than in {a}; compare runs over the same items")
    order = list(ours.correct)
    return compare([ours.correct[item] for item in order], [theirs.correct[item] for item in order])


def read_items(path: str | Path) -> Items:
    """Correctness of each item of a `samples_*.jsonl`: the first of `metrics`. Of several filters, the first is read.

    Raises:
      FileNotFoundError, ValueError: as `compare_files`.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; give a samples_*.jsonl, or two directories with such files")
    metric = chosen = None
    correct: dict[Any, bool] = {}
    documents: dict[Any, str | None] = {}
    for record in read_records(str(path), field="compare"):
        where, line = record
        item = line.get("doc_id")
        if isinstance(item, bool) or not isinstance(item, int | str):
            raise ValueError(f"{where}: no doc_id; give lm-eval's samples, one item a line")
        chosen = line.get("filter") if not correct else chosen
        if line.get("filter") != chosen:
            continue
        name, value = _correctness(record)
        metric = metric or name
        if name != metric:
            raise ValueError(f"{where}: scored by {name}, but the lines before by {metric}; keep one metric in a file")
        if item in correct:
            raise ValueError(f"{where}: doc_id {item!r} stands in the file twice; remove one")
        correct[item], documents[item] = value, _digest(line.get("doc"))
    if metric is None:
        raise ValueError(f"{path}: no item in it; give a samples_*.jsonl")
    return Items(metric, correct, documents)


def describe(a: str | Path, b: str | Path) -> str:
    """The comparison of two files, or of the files of the same name in two directories, in words.

    Over several tasks p is adjusted by Holm's method before it is judged.

    Raises:
      FileNotFoundError, ValueError: as `compare_files`; directories with other tasks.
    """
    if not (Path(a).is_dir() and Path(b).is_dir()):
        return _text(compare_files(a, b))
    files_a, files_b = _task_files(Path(a)), _task_files(Path(b))
    for files, where, other in ((files_a, b, files_b), (files_b, a, files_a)):
        missing = sorted(set(files) - set(other))
        if missing:
            raise ValueError(f"{where}: no samples of {', '.join(missing)}; compare runs over the same tasks")
    found = {task: compare_files(files_a[task], files_b[task]) for task in files_a}
    adjusted = holm([comparison.p_value for comparison in found.values()])
    remark = f" (Holm p {{}} over {len(found)} tasks)" if len(found) > 1 else ""
    blocks = [
        f"task {task}\n{_text(comparison, p, remark.format(_p(p)))}"
        for (task, comparison), p in zip(found.items(), adjusted, strict=True)
    ]
    return "\n".join(blocks)


def _text(c: Comparison, p_value: float | None = None, remark: str = "") -> str:
    p_value = c.p_value if p_value is None else p_value
    better = "B" if c.gained > c.lost else "A"
    verdict = f"evidence of a difference, {better} is better" if p_value < LEVEL else "no evidence of a difference"
    low, high = c.interval
    return (
        f"items {c.items}   A {c.a:.4f}   B {c.b:.4f}   gained {c.gained}   lost {c.lost}   "
        f"McNemar p {_p(c.p_value)} (exact)\n"
        f"difference {(c.gained - c.lost) / c.items:+.4f}, 95 % interval [{low:+.4f}, {high:+.4f}]: {verdict}{remark}"
    )


def _p(value: float) -> str:
    return "< 0.0001" if value < 1e-4 else f"{value:.4f}"


def _task_files(directory: Path) -> dict[str, Path]:
    """Files of samples by task; lm-eval's own have the time in their names."""
    names: dict[str, Path] = {}
    for file in sorted(directory.glob("samples_*.jsonl")):
        task = re.sub(r"_\d{4}-\d\d-\d\dT[\d.-]+$", "", file.stem.removeprefix("samples_"))
        if task in names:
            raise ValueError(
                f"{file}: a second file of task {task} beside {names[task].name}; compare the files by name"
            )
        names[task] = file
    if not names:
        raise FileNotFoundError(f"{directory}: no samples_*.jsonl in it; give the directory of an evaluation")
    return names


def _correctness(record: Record) -> tuple[str, bool]:
    where, line = record
    metrics = line.get("metrics")
    name = metrics[0] if isinstance(metrics, list) and metrics else None
    if not isinstance(name, str) or name not in line:
        raise ValueError(
            f"{where}: no correctness field; the line needs metrics, and a field named as the first of them"
        )
    value = line[name]
    if not isinstance(value, int | float) or value not in (0, 1):
        raise ValueError(f"{where}: {name} is {value!r}, not 0 or 1; compare a metric that says right or wrong")
    return name, bool(value)


def _digest(document: Any) -> str | None:
    """Of a document with its empty columns left out, which some readers add."""
    if not isinstance(document, dict) or not document:
        return None
    kept = {name: value for name, value in document.items() if value is not None}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()
