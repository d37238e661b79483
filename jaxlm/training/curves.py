"""Which charts the metrics of a run give, whatever their names."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence

from jaxlm.training import charts, page, scales
from jaxlm.training.charts import Axis, Series

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

FAMILIES = (
    ("rewards/chosen", "rewards/rejected"),
    ("logps/chosen", "logps/rejected"),
    ("min_reward", "mean_reward", "max_reward"),
)
"""Columns that are read against each other share a chart."""

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
    for i, (name, value) in enumerate(baselines.items()):
        style = "dashed" if i % 2 == 0 else "dotted"
        drawn.append(Series(f"{name} model", [min(every), max(every)], [value, value], style, colour=7))
    views = []
    for log in (False, True):
        along = Axis("step, logarithmic" if log else "step", log=log)
        views.append(charts.line_chart("Loss", drawn, along, Axis(unit), height=300))
    if max(every) < 20:
        return views[0]
    return page.either("loss", ("Steps", views[0]), ("Logarithm of steps", views[1]))


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
    for i, (name, value) in enumerate(lines):
        style = "dotted" if i % 2 else "dashed"
        drawn.append(Series(name, [min(ends), max(ends)], [value, value], style, colour=7))
    down = Axis(unit, log=base not in FROM_ZERO and wants_log(values), include=(0.0,) if base in FROM_ZERO else ())
    return charts.line_chart(title, drawn, y=down)


def _smoothed(name: str, steps: Sequence[int], values: Sequence[float]) -> list[Series]:
    """A curve, and where it has enough points to be noisy, its mean over 2 % of them in front of it."""
    window = len(values) // 50
    if window < 3:
        return [Series(name, steps, values, colour=0)]
    mean = scales.smooth(values, window)
    return [
        Series("", steps, values, "faint", colour=0),
        Series(f"{name} (mean of {window} steps)".strip() if name else "", steps, mean, colour=0),
    ]


def _groups(columns: Columns) -> dict[str, list[str]]:
    """Columns by the chart they belong to: evaluations beside what they evaluate, families together."""
    groups: dict[str, list[str]] = {}
    for name in columns:
        base = name.removeprefix("eval/").removeprefix("hard/")
        base = next((family[0] for family in FAMILIES if base in family), base)
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
