"""Which charts the metrics of a run give, whatever their names."""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence

from jaxlm.training import charts, page, scales, units
from jaxlm.training.charts import Axis, Series, Style

Columns = Mapping[str, Mapping[int, float]]

COURSE = ("learning_rate", "grad_norm", "tokens_per_second", "peak_fraction", "memory", "tokens")
"""Columns that tell how training went, whatever the objective; in the order of their charts."""

TITLES: Mapping[str, tuple[str, str, float]] = {
    # column: title, unit, factor from the column's unit
    "learning_rate": ("Learning rate", "", 1.0),
    "grad_norm": ("Gradient norm", "before clipping", 1.0),
    "tokens_per_second": ("Throughput", "tokens/s", 1.0),
    "peak_fraction": ("Use of peak FLOPs", "%", 100.0),
    "memory": ("Memory", "GB", 1e-9),
    "tokens": ("Tokens", "since the start", 1.0),
    "bits_per_byte": ("Validation bits per byte", "", 1.0),
}

FAMILIES: Mapping[str, tuple[str, ...]] = {
    "rewards of pairs": ("rewards/chosen", "rewards/rejected"),
    "log-probabilities of pairs": ("logps/chosen", "logps/rejected"),
    "range of rewards": ("min_reward", "mean_reward", "max_reward"),
}
"""Columns that are read against each other share a chart with this title."""

START = 0.03
"""Share of the steps that counts as the start of a loss curve."""

FROM_ZERO = ("tokens_per_second", "tokens", "memory", "peak_fraction", "learning_rate")


def loss_chart(columns: Columns, baselines: Mapping[str, float], unit: str = "") -> str:
    """Training loss (as it is, and smoothed), validation loss, and baselines; over the step or its logarithm.

    Args:
      columns: {"loss": {step: value}, "eval/loss": ...}; either may be missing.
      baselines: name to loss, drawn as dashed lines.
      unit: of the loss.
    """
    steps, values = _arrays(columns.get("loss", {}))
    held_steps, held = _arrays(columns.get("eval/loss", {}))
    every = [*steps, *held_steps]
    if not every:
        return ""
    drawn = _smoothed("training", steps, values) if steps else []
    if held_steps:
        drawn.append(Series("validation", held_steps, held, "points", colour=1))
    drawn += _references({f"{name} model": value for name, value in baselines.items()}, every)
    near, note = _without_start(drawn)
    along = Axis("step", include=(min(every),))
    views = [charts.line_chart("Loss", near, along, Axis(unit), height=300, note=note)]
    if max(every) < 20:
        return views[0]
    views += [charts.line_chart("Loss", drawn, Axis("step, logarithmic", log=True), Axis(unit), height=300)]
    return page.either("view-of-loss", ("Steps", views[0]), ("Logarithm of steps", views[1]))


def evaluation_charts(columns: Columns, baselines: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A chart for each group of columns that has evaluations, the loss left out."""
    found = []
    for base, names in _groups(columns).items():
        if base == "loss" or not any(name.startswith("eval/") for name in names):
            continue
        lines = [(name, value[base]) for name, value in baselines.items() if base in value and len(names) == 1]
        found.append(_chart(base, names, columns, lines))
    return found


def course_charts(columns: Columns) -> list[str]:
    """Learning rate, gradient norm, throughput, memory, tokens: those that the run has."""
    return [_chart(name, [name], columns) for name in COURSE if name in columns]


def other_charts(columns: Columns) -> tuple[list[str], dict[str, float]]:
    """Charts of all other columns, and those that never change, by name.

    Columns that end in a layer's number (`moe/load_max/3`) become one heat map.
    """
    rest = {name: values for name, values in columns.items() if name not in COURSE}
    found, constant = [], {}
    layers = _layered(rest)
    for stem, names in layers.items():
        found.append(_layer_map(stem, names, rest))
    members = {name for names in layers.values() for name in names}
    for base, names in _groups(rest).items():
        names = [name for name in names if name not in members]
        if base == "loss" or not names or any(name.startswith("eval/") for name in names):
            continue
        values = list(rest[names[0]].values())
        if len(names) == 1 and len(values) > 2 and len(set(values)) == 1:
            constant[names[0]] = values[0]
        else:
            found.append(_chart(base, names, rest))
    return found, constant


def averaged(count: int) -> int:
    """Over how many of its `count` values a noisy curve is averaged: 2 % of them, 1 where that is hardly any."""
    return count // 50 if count >= 150 else 1


def wants_log(values: Iterable[float]) -> bool:
    """Whether a logarithmic axis shows these values better: all positive, with peaks far above the rest."""
    shown = sorted(v for v in values if math.isfinite(v))
    return bool(shown) and shown[0] > 0 and shown[-1] > 30 * shown[len(shown) // 2]


def _chart(base: str, names: Sequence[str], columns: Columns, lines: Sequence[tuple[str, float]] = ()) -> str:
    title, unit, factor = TITLES.get(base, (base, "", 1.0))
    drawn: list[Series] = []
    values: list[float] = []
    for name in names:
        steps, column = _arrays(columns[name], factor)
        values += column
        label = name if len(names) > 1 or lines else ""
        held = name.startswith("eval/")
        colour = len([one for one in drawn if one.style != "faint"])
        if held:
            drawn.append(Series("this model" if lines else label, steps, column, "points", colour=1 + colour))
        elif base in ("learning_rate", "tokens", "memory") or len(names) > 1:
            drawn.append(Series(label, steps, column, colour=colour))
        else:
            drawn += _smoothed(label, steps, column)
    ends = [step for name in names for step in columns[name]]
    drawn += _references(dict(lines), ends)
    down = Axis(unit, log=base not in FROM_ZERO and wants_log(values), include=(0.0,) if base in FROM_ZERO else ())
    return charts.line_chart(title, drawn, y=down, height=240 if lines else 190)


def _references(lines: Mapping[str, float], steps: Sequence[int]) -> list[Series]:
    """Level lines over all steps, the lowest value first."""
    # A logarithmic axis has no 0, where evaluations begin.
    ends = (min(steps), max(1, min(steps)), max(1, *steps))
    styles: tuple[Style, ...] = ("dashed", "dotted", "mixed")
    ordered = sorted(lines.items(), key=lambda item: item[1])
    return [
        Series(name, ends, (value,) * 3, styles[i % len(styles)], colour=7) for i, (name, value) in enumerate(ordered)
    ]


def _smoothed(name: str, steps: Sequence[int], values: Sequence[float]) -> list[Series]:
    """A curve, and where it has enough points to be noisy, its mean over 2 % of them in front of it."""
    window = averaged(len(values))
    if window == 1:
        return [Series(name, steps, values, colour=0)]
    mean = scales.smooth(values, window)
    return [
        Series("", steps, values, "faint", colour=0),
        Series(f"{name} (mean of {window:,} steps)".strip() if name else "", steps, mean, colour=0),
    ]


def _without_start(drawn: Sequence[Series]) -> tuple[Sequence[Series], str]:
    """The curves without what lies above all that comes after the first steps, and a remark that says so.

    A loss falls most in the first hundredth of a run; shown whole, that leaves the rest a few pixels.
    """
    start = START * max(x for one in drawn for x in one.x)
    later = [y for one in drawn for x, y in zip(one.x, one.y, strict=True) if x >= start and math.isfinite(y)]
    every = [y for one in drawn for y in one.y if math.isfinite(y)]
    if not later or max(every) - max(later) < (max(later) - min(later)) / 3:
        return drawn, ""
    note = f"The start, from {units.significant(max(every))}, lies above; the logarithmic view shows it."
    return [part for one in drawn for part in _entering(one, max(later))], note


def _entering(one: Series, top: float) -> list[Series]:
    """A curve from where it first comes down to `top`: the line from there to the first point, and the rest."""
    points = list(zip(one.x, one.y, strict=True))
    first = next((i for i, (_, y) in enumerate(points) if y <= top), 0)
    if first == 0:
        return [one]
    (x0, y0), (x1, y1) = points[first - 1], points[first]
    rest = dataclasses.replace(one, x=one.x[first:], y=one.y[first:])
    if not math.isfinite(y0):
        return [rest]
    entry = Series("", [x0 + (x1 - x0) * (y0 - top) / (y0 - y1), x1], [top, y1], colour=one.colour)
    return [dataclasses.replace(entry, style="faint") if one.style == "faint" else entry, rest]


def _groups(columns: Columns) -> dict[str, list[str]]:
    """Columns by the chart they belong to: evaluations beside what they evaluate, families together."""
    groups: dict[str, list[str]] = {}
    for name in columns:
        base = name.removeprefix("eval/").removeprefix("hard/")
        base = next((title for title, family in FAMILIES.items() if base in family), base)
        groups.setdefault(base, []).append(name)
    return {base: sorted(names, key=lambda name: (name.startswith("eval/"), name)) for base, names in groups.items()}


def _layered(columns: Columns) -> dict[str, list[str]]:
    stems: dict[str, list[str]] = {}
    for name in columns:
        if match := re.fullmatch(r"(.+)/\d+", name):
            stems.setdefault(match[1], []).append(name)
    return {stem: sorted(names, key=_layer) for stem, names in stems.items() if len(names) > 1}


def _layer(name: str) -> int:
    return int(name.rpartition("/")[2])


def _layer_map(stem: str, names: Sequence[str], columns: Columns) -> str:
    steps = sorted({step for name in names for step in columns[name]})
    values = [[columns[name].get(step, math.nan) for step in steps] for name in names]
    return charts.heat_map(stem, [str(_layer(name)) for name in names], steps, values, "by layer")


def _arrays(column: Mapping[int, float], factor: float = 1.0) -> tuple[list[int], list[float]]:
    return list(column), [factor * value for value in column.values()]
