"""Charts as inline SVG: line charts and heat maps that keep their text size at every width.

The curves lie in an inner drawing that is stretched to the chart's width with strokes that are not, the labels lie at
percentages of it. So one drawing serves a phone and a wide screen, and nothing runs at reading time. A page that shows
charts includes `STYLE` once.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Literal

from jaxlm.training import scales, units
from jaxlm.training.scales import LARGEST, SPAN, Scale

COLOURS = 8
POINTS = 600
MARKS = 60

STYLE = """
:root{--c0:#1d5fae;--c1:#c4500a;--c2:#0f7b54;--c3:#8a3fa8;--c4:#b0235f;--c5:#7a6a00;--c6:#0b7285;--c7:#5c5f66;
--grid:#e4e2dc;--axis:#6a6a66;--bad:#c81e1e}
@media (prefers-color-scheme:dark){:root{--c0:#79b4ff;--c1:#ffa15c;--c2:#56d6a0;--c3:#d3a0f0;--c4:#ff8fb8;--c5:#dcc94f;
--c6:#5fd0e0;--c7:#b3b8c0;--grid:#2e3238;--axis:#9aa0a8;--bad:#ff7b72}}
.chart{margin:0;min-width:0}
.chart figcaption{font-weight:600;margin:0 0 .15rem;overflow-wrap:anywhere}
.chart figcaption span,.chart .note,.chart .across{font-weight:400;color:var(--axis);font-size:.8125rem}
.chart .note{margin:.1rem 0 0}
.chart .across{text-align:right;margin:0;line-height:1}
.chart ul{display:flex;flex-wrap:wrap;gap:.1rem 1rem;list-style:none;margin:0 0 .2rem;padding:0;font-size:.8125rem}
.chart li{display:flex;align-items:center;gap:.4rem;overflow-wrap:anywhere;font-variant-numeric:tabular-nums}
.chart li svg{width:22px;height:10px;flex:none}
.chart .plot{padding:10px 18px 22px 0}
.chart .plot>svg{display:block;max-width:100%;overflow:visible}
.chart text{fill:var(--axis);font-size:12px;font-variant-numeric:tabular-nums}
.chart .up{text-anchor:end}.chart .on{text-anchor:middle}
.chart .grid{stroke:var(--grid);stroke-width:1}
.chart path{fill:none;stroke:currentColor;stroke-width:2;stroke-linejoin:round;stroke-linecap:round;
vector-effect:non-scaling-stroke}
.chart .faint{stroke-width:1;opacity:.35}.chart .dots{stroke-width:7}.chart .single{stroke-width:5}
.chart .dashed{stroke-dasharray:7 5;stroke-width:1.75;stroke-linecap:butt}
.chart .dotted{stroke-dasharray:1.5 5;stroke-width:2.25}
.chart .mixed{stroke-dasharray:9 4 1.5 4;stroke-width:1.75}
.chart .bad{stroke:var(--bad);stroke-width:1.5}
.chart rect{fill:currentColor}
""" + "".join(f".c{i}{{color:var(--c{i})}}" for i in range(COLOURS))


Style = Literal["line", "faint", "points", "dashed", "dotted", "mixed"]


@dataclasses.dataclass(frozen=True)
class Series:
    """One curve.

    Attributes:
      name: its entry in the legend; empty: no entry.
      x, y: coordinates, x ascending. Values of y that are not finite leave a gap and are marked above.
      style: `line`; `faint` (a thin line behind); `points` (a line with dots, each with its value as a tooltip);
        `dashed`, `dotted` and `mixed` (references).
      colour: index of the palette; null: by position among the series.
      shown: what the legend says after the name; null: the last value.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: Style = "line"
    colour: int | None = None
    shown: str | None = None


@dataclasses.dataclass(frozen=True)
class Axis:
    """One axis.

    Attributes:
      label: the quantity; the unit, if any, in it.
      log: whether it is logarithmic.
      include: values that must lie on it.
      at: ticks; null: round values.
    """

    label: str = ""
    log: bool = False
    include: Sequence[float] = ()
    at: Sequence[float] | None = None


def line_chart(
    title: str, series: Sequence[Series], x: Axis = Axis("step"), y: Axis = Axis(), height: int = 190, note: str = ""
) -> str:
    """A figure with one curve per series, as HTML.

    Args:
      title: heading above the chart; `y.label` follows it.
      series: drawn in order, the first behind.
      x, y: the axes.
      height: of the drawing, in CSS pixels; the width is that of its place.
      note: a remark below.
    """
    x_scale = scales.fit((v for s in series for v in s.x), log=x.log, include=x.include)
    series = [_on_axis(one, x_scale) for one in series]
    y_scale = scales.fit((v for s in series for v in s.y), log=y.log, margin=0.05, include=y.include)
    colours = [i if one.colour is None else one.colour for i, one in enumerate(series)]
    curves = [_curve(one, f"c{c % COLOURS}", x_scale, y_scale) for one, c in zip(series, colours, strict=True)]
    missing = [point for one in series for point in zip(one.x, one.y, strict=True) if not y_scale.shows(point[1])]
    curves.append(_bad_marks({at for at, _ in missing}, x_scale))
    entries = [_legend(one, f"c{c % COLOURS}") for one, c in zip(series, colours, strict=True) if one.name]
    remarks = [note, _missing_note([value for _, value in missing])]
    return _figure(
        Frame(title, y.label, x.label, height, tuple(entries), tuple(filter(None, remarks)), _spoken(title, series)),
        "".join(curves),
        _horizontal(x_scale, x.at or _whole(x_scale, series)) + _vertical(y_scale, y.at),
        _left_width(scales.labels(y.at or scales.ticks(y_scale))),
    )


def heat_map(
    title: str, rows: Sequence[str], x: Sequence[float], values: Sequence[Sequence[float]], unit: str = ""
) -> str:
    """A figure with one band per row, darker where the value is higher, as HTML.

    Args:
      title: heading above; `unit` follows it.
      rows: names of the bands, from the top.
      x: positions (steps), ascending. values: [rows][x].
      unit: of the values.
    """
    columns = _stretches(len(x), 120)
    cells = [[_mean(line[a:b]) for a, b in columns] for line in values]
    finite = [v for line in cells for v in line if math.isfinite(v)] or [0.0]
    low, high = min(finite), max(finite)
    wide, tall = SPAN / max(len(columns), 1), SPAN / max(len(rows), 1)
    drawn = []
    for i, line in enumerate(cells):
        for j, value in enumerate(line):
            if math.isfinite(value):
                strength = 0.06 + 0.94 * ((value - low) / (high - low) if high > low else 0.5)
                drawn.append(
                    f'<rect x="{j * wide:.1f}" y="{i * tall:.1f}" width="{wide + 0.6:.1f}" height="{tall * 0.94:.1f}" '
                    f'opacity="{strength:.2f}"/>'
                )
    every = math.ceil(len(rows) / 12) or 1
    names = "".join(
        f'<text class="up" x="0" dx="-8" y="{100 * (i + 0.5) / len(rows):.2f}%" dy=".35em">{escape(name)}</text>'
        for i, name in enumerate(rows)
        if i % every == 0
    )
    note = f"from {units.significant(low)} (pale) to {units.significant(high)} (full)"
    scale = scales.fit(x or [0.0, 1.0])
    frame = Frame(title, unit, "step", max(90, min(24 * len(rows), 260)), (), (note,), f"{title}: {note}")
    return _figure(frame, f'<g class="c0">{"".join(drawn)}</g>', names + _horizontal(scale, None), _left_width(rows))


@dataclasses.dataclass(frozen=True)
class Frame:
    """What stands around a drawing: texts that are not escaped yet, and legend entries that are HTML."""

    title: str
    unit: str
    across: str
    height: int
    entries: tuple[str, ...]
    notes: tuple[str, ...]
    spoken: str


def _figure(frame: Frame, curves: str, labels: str, left: int) -> str:
    unit = f" <span>{escape(frame.unit)}</span>" if frame.unit else ""
    legend = f"<ul>{''.join(frame.entries)}</ul>" if frame.entries else ""
    across = f'<p class="across">{escape(frame.across)}</p>' if frame.across else ""
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in frame.notes)
    return (
        f'<figure class="chart"><figcaption>{escape(frame.title)}{unit}</figcaption>{legend}'
        f'<div class="plot" style="padding-left:{left}px">'
        f'<svg width="100%" height="{frame.height}" role="img" aria-label="{escape(frame.spoken)}">{labels}'
        f'<svg width="100%" height="100%" viewBox="0 0 {SPAN:g} {SPAN:g}" preserveAspectRatio="none" '
        'overflow="visible">'
        f"{curves}</svg></svg></div>{across}{notes}</figure>\n"
    )


def _on_axis(one: Series, x_scale: Scale) -> Series:
    points = [(x, float(y)) for x, y in zip(one.x, one.y, strict=True) if x_scale.shows(x)]
    values = [y if abs(y) < LARGEST else math.copysign(math.inf, y) if y == y else y for _, y in points]
    return dataclasses.replace(one, x=[x for x, _ in points], y=values)


def _curve(one: Series, colour: str, x_scale: Scale, y_scale: Scale) -> str:
    points = [(x, y if y_scale.shows(y) else math.nan) for x, y in zip(one.x, one.y, strict=True)]
    drawn = [(x_scale.place(x), y) for x, y in scales.thin(points, x_scale, POINTS)]
    place = _down(y_scale)
    parts: list[str] = []
    single: list[str] = []
    pen = "M"
    for i, (x, y) in enumerate(drawn):
        if not math.isfinite(y):
            pen = "M"
            continue
        alone = pen == "M" and (i + 1 == len(drawn) or not math.isfinite(drawn[i + 1][1]))
        # A stroke without length has round ends: a dot, which the stretched drawing does not distort.
        (single if alone else parts).append(f"{pen}{x:.1f} {place(y):.1f}{'h0' if alone else ''}")
        pen = "L"
    style = {"points": "line"}.get(one.style, one.style)
    path = f'<path class="{colour} {style}" d="{"".join(parts)}"/>' if parts else ""
    path += f'<path class="{colour} single" d="{"".join(single)}"/>' if single else ""
    if one.style != "points" or len(points) > MARKS:
        return path
    dots = (
        f'<path class="{colour} dots" d="M{x_scale.place(x):.1f} {place(y):.1f}h0">'
        f"<title>{escape(f'{units.significant(x)}: {one.name} {units.significant(y, 5)}')}</title></path>"
        for x, y in points
        if math.isfinite(y)
    )
    return path + "".join(dots)


def _down(scale: Scale) -> Callable[[float], float]:
    """Positions from the top, kept near the drawing."""
    return lambda value: min(max(SPAN - scale.place(value), -SPAN), 2 * SPAN)


def _bad_marks(places: Iterable[float], scale: Scale) -> str:
    steps = sorted({round(scale.place(x)) for x in places})
    return f'<path class="bad" d="{"".join(f"M{x} 0v45" for x in steps)}"/>' if steps else ""


def _missing_note(values: Sequence[float]) -> str:
    finite = sum(math.isfinite(v) for v in values)
    notes = []
    if len(values) > finite:
        notes.append(f"{_count(len(values) - finite)} not finite")
    if finite:
        notes.append(f"{_count(finite)} not positive, which a logarithmic axis cannot show")
    return f"Marked at the top: {'; '.join(notes)}." if notes else ""


def _count(number: int) -> str:
    return f"{number:,} value{'s' if number > 1 else ''}"


def _legend(one: Series, colour: str) -> str:
    shown = one.shown if one.shown is not None else (units.significant(one.y[-1]) if one.y else "")
    kind = {"points": "line", "faint": "line"}.get(one.style, one.style)
    dot = '<path class="dots" d="M11 5h0"/>' if one.style == "points" else ""
    line = f'<path class="{kind}" d="M1 5H21"/>{dot}'
    value = f" <b>{escape(shown)}</b>" if shown else ""
    return (
        f'<li><svg viewBox="0 0 22 10" class="{colour}" aria-hidden="true">{line}</svg>'
        f"<span>{escape(one.name)}{value}</span></li>"
    )


def _horizontal(scale: Scale, at: Sequence[float] | None) -> str:
    values = list(at) if at else scales.ticks(scale, 5)
    return "".join(
        f'<text class="on" x="{scale.place(v) / SPAN:.2%}" y="100%" dy="18">{escape(label)}</text>'
        for v, label in zip(values, scales.labels(values), strict=True)
    )


def _whole(scale: Scale, series: Sequence[Series]) -> list[float] | None:
    """Ticks without fractions, where all coordinates are such (steps)."""
    if any(isinstance(x, float) and not x.is_integer() for one in series for x in one.x if one.name):
        return None
    return [v for v in scales.ticks(scale) if float(v).is_integer()] or None


def _vertical(scale: Scale, at: Sequence[float] | None) -> str:
    values = list(at) if at else scales.ticks(scale, 5)
    place = _down(scale)
    parts = []
    for v, label in zip(values, scales.labels(values), strict=True):
        y = f"{place(v) / SPAN:.2%}"
        parts.append(f'<line class="grid" x1="0" x2="100%" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="up" x="0" dx="-8" y="{y}" dy=".35em">{escape(label)}</text>')
    return "".join(parts)


def _left_width(texts: Sequence[str]) -> int:
    """Room for labels in front of the drawing, in pixels: digits of 12 px text are about 7 px wide."""
    return 14 + 7 * max((len(text) for text in texts), default=1)


def _spoken(title: str, series: Sequence[Series]) -> str:
    ends = []
    for one in series:
        shown = [y for y in one.y if math.isfinite(y)]
        if one.name and shown:
            ends.append(f"{one.name} from {units.significant(shown[0])} to {units.significant(shown[-1])}")
    return f"{title}: {'; '.join(ends)}" if ends else title


def _stretches(length: int, limit: int) -> list[tuple[int, int]]:
    count = min(length, limit)
    edges = [round(i * length / count) for i in range(count + 1)] if count else []
    return list(itertools.pairwise(edges))


def _mean(values: Sequence[float]) -> float:
    finite = [v for v in values if math.isfinite(v)]
    return sum(finite) / len(finite) if finite else math.nan
