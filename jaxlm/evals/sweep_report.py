"""A sweep as JSON, plot, page and table."""

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from jaxlm.evals import plots, transfer
from jaxlm.evals.transfer import Curve, Result, Transfer
from jaxlm.training import charts, page
from jaxlm.training.page import Section
from jaxlm.training.summary import write_whole

JSON_FILE, PNG_FILE, HTML_FILE = "sweep.json", "sweep.png", "sweep.html"
NAMES = {"mup": "muP", "sp": "standard parametrisation"}
LOSS = "mean training loss of the last tenth of the steps"


def to_json(results: Sequence[Result]) -> dict[str, Any]:
    """Cells with their losses, and what they say about transfer."""
    cells = [{"parametrisation": r.parametrisation, **r.values, "loss": r.loss} for r in results]
    found = [
        {**one._asdict(), "optima": [optimum._asdict() for optimum in one.optima]}
        for one in transfer.transfers(results)
    ]
    return {"cells": cells, "transfer": found} if found else {"cells": cells}


def table(results: Sequence[Result]) -> str:
    """Losses for a terminal, a line a curve with its lowest marked, and a sentence about transfer each."""
    field = transfer.main_field(results)
    lines = [f"{LOSS}, by {field}"]
    found = transfer.curves(results, field)
    labels = [_label(curve) for curve in found]
    wide = max(map(len, labels))
    last: tuple[Any, ...] | None = None
    for curve, label in zip(found, labels, strict=True):
        if curve.x != last:
            lines.append(" " * wide + "".join(f"  {_short(x):>9}" for x in curve.x))
            last = curve.x
        marks = ["*" if loss == min(curve.losses) else " " for loss in curve.losses]
        lines.append(label.ljust(wide) + "".join(f"  {v:8.4f}{m}" for v, m in zip(curve.losses, marks, strict=True)))
    return "\n".join([*lines, *map(sentence, transfer.transfers(results))])


def sentence(found: Transfer) -> str:
    """`muP: from model.d_model 64 to 256 the best learning rate moves by -0.45 octaves (0 steps of the grid); ...`"""
    first, last = found.optima[0], found.optima[-1]
    return (
        f"{NAMES[found.parametrisation]}: from {found.field} {_short(first.size)} to {_short(last.size)} the best "
        f"learning rate moves by {found.octaves:+.2f} octaves ({found.grid_steps:+d} steps of the grid); at "
        f"{_short(last.size)} the rate that is best at {_short(first.size)} ({_short(first.rate)}) costs "
        f"{found.regret:.3f} nats; larger is no worse at {found.wider_is_better} of {found.rates} rates"
    )


def write(results: Sequence[Result], directory: str | Path) -> list[Path]:
    """Write JSON, page and, where matplotlib is installed, PNG; returns their paths."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(directory / JSON_FILE, json.dumps(to_json(results), indent=1) + "\n")
    write_whole(directory / HTML_FILE, html(results))
    paths = [directory / JSON_FILE, directory / HTML_FILE]
    if plots.available():
        plots.write(directory / PNG_FILE, _panels(results))
        paths.append(directory / PNG_FILE)
    return paths


def html(results: Sequence[Result]) -> str:
    """The sweep as one self-contained page."""
    said = "".join(f"<p>{escape(sentence(one))}</p>" for one in transfer.transfers(results))
    return page.page("Sweep", said, sections(results))


def sections(results: Sequence[Result]) -> list[Section]:
    """The sweep as parts of a page: curves, and tables of losses and optima."""
    drawn = []
    for panel in _panels(results):
        series = [charts.Series(line.name, line.x, line.y, style="points", shown="") for line in panel.lines]
        axis = charts.Axis(panel.x_label, log=panel.x_log)
        drawn.append(charts.line_chart(panel.title, series, axis, charts.Axis("loss"), height=260))
    fields = transfer.swept_fields(results)
    rows: list[list[str | float | None]] = [
        [r.parametrisation, *(_short(r.values[f]) for f in fields), r.loss] for r in results
    ]
    optima: list[list[str | float | None]] = [
        [one.parametrisation, _short(at.size), _short(at.rate), 2.0**at.octave, at.loss, at.regret]
        for one in transfer.transfers(results)
        for at in one.optima
    ]
    headers = ["parametrisation", "size", "best rate", "by parabola", "loss", "regret of the smallest's rate"]
    return [
        Section("Loss", page.grid(drawn)),
        Section("Best learning rates", page.card(page.table(headers, optima)) if optima else ""),
        Section("Cells", page.card(page.table(["parametrisation", *fields, "loss"], rows, note=f"Loss: {LOSS}."))),
    ]


def _panels(results: Sequence[Result]) -> list[plots.Panel]:
    field = transfer.main_field(results)
    found = transfer.curves(results, field)
    numeric = all(transfer.is_number(x) and x > 0 for curve in found for x in curve.x)
    panels = []
    for parametrisation in dict.fromkeys(curve.parametrisation for curve in found):
        mine = [curve for curve in found if curve.parametrisation == parametrisation]
        lines = [
            plots.Line(_values(curve) or field, curve.x if numeric else range(len(curve.x)), curve.losses)
            for curve in mine
        ]
        names = None if numeric else [str(x) for x in mine[0].x]
        panels.append(plots.Panel(NAMES[parametrisation], field, LOSS, lines, x_log=numeric, x_names=names))
    return panels


def _label(curve: Curve) -> str:
    return f"{curve.parametrisation}  {_values(curve)}".rstrip()


def _values(curve: Curve) -> str:
    return ", ".join(f"{name}={_short(value)}" for name, value in curve.values.items())


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
