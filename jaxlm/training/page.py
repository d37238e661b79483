"""One self-contained HTML page: frame, tables, folds. No scripts; for light and dark, paper and phones."""

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import NamedTuple

from jaxlm.training import charts, units

STYLE = """
:root{color-scheme:light dark;--paper:#f7f6f3;--card:#fff;--ink:#1d1f23;--soft:#5f6368;--line:#dedcd6;--mark:#eaf1fb}
@media (prefers-color-scheme:dark){:root{--paper:#121417;--card:#1a1d21;--ink:#e8e8e6;--soft:#a2a8b0;--line:#2e3238;
--mark:#1c2a3c}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1180px;margin:0 auto;padding:1.75rem 1.25rem 3rem}
h1{font-size:1.75rem;line-height:1.2;margin:0;letter-spacing:-.015em;overflow-wrap:anywhere}
h2{font-size:1.1875rem;margin:2.25rem 0 .75rem;letter-spacing:-.005em}
h3{font-size:1rem;margin:1rem 0 .4rem}
.card>h3:first-child{margin-top:0}
p{margin:.4rem 0}
.soft{color:var(--soft)}
nav{display:flex;flex-wrap:wrap;gap:.25rem 1.1rem;margin:.9rem 0 0;font-size:.9375rem}
nav a{color:var(--c0);text-decoration:none;padding:.2rem 0}
nav a:hover,nav a:focus{text-decoration:underline}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:1rem 1.1rem;min-width:0}
.grid{display:grid;gap:.9rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,21rem),1fr))}
.card+.card,.grid+.grid,.card+.grid,.grid+.card,.grid+details,.card+details,.card+.pair,details+details{margin-top:.9rem}
.grid>.card{margin:0}
@media (min-width:900px){.pair{display:grid;gap:.9rem;grid-template-columns:2fr 3fr}.pair>.card{margin:0}}
.figures{display:flex;flex-wrap:wrap;overflow:hidden;padding:0}
.figures div{flex:1 1 9.75rem;padding:.75rem 1rem;box-shadow:1px 1px 0 var(--line)}
.figures dt{color:var(--soft);font-size:.875rem}
.figures dd{margin:0}
.figures .value{font-size:1.375rem;font-weight:600;line-height:1.3;font-variant-numeric:tabular-nums}
.figures .value small{font-size:.875rem;font-weight:400;color:var(--soft)}
.figures .aside{color:var(--soft);font-size:.8125rem;line-height:1.35}
dl{margin:0}
.facts{display:grid;grid-template-columns:minmax(7rem,auto) 1fr;gap:.3rem 1.25rem;font-size:.9375rem}
.facts dt{color:var(--soft)}
.facts dd{margin:0;overflow-wrap:anywhere}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.9375rem;min-width:min(100%,30rem)}
th,td{padding:.35rem .75rem;text-align:left;border-bottom:1px solid var(--line);white-space:nowrap}
tbody tr:last-child td{border-bottom:0}
th{font-weight:600;color:var(--soft);font-size:.8125rem}
.n{text-align:right;font-variant-numeric:tabular-nums}
tr.best td{font-weight:600;background:var(--mark)}
.small{font-size:.8125rem}
pre{margin:0;font:.8125rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;overflow-x:auto;
white-space:pre}
pre.text{white-space:pre-wrap;overflow-wrap:anywhere}
pre.text+pre.text{margin-top:.9rem;padding-top:.9rem;border-top:1px solid var(--line)}
pre b{color:var(--c0);font-weight:600}
details{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:.7rem 1.1rem}
summary{cursor:pointer;font-weight:600}
summary span{font-weight:400;color:var(--soft)}
details[open]>summary{margin-bottom:.6rem}
.bars{display:grid;grid-template-columns:auto 1fr auto;gap:.45rem .8rem;align-items:center;font-size:.9375rem}
.bars i{display:block;height:12px;border-radius:0 4px 4px 0;background:var(--c7);opacity:.45}
.bars .own{font-weight:600}
.bars i.own{background:var(--c0);opacity:1}
.alert{border-left:4px solid var(--bad)}
.tabs{display:flex;flex-wrap:wrap;gap:.3rem 1rem;align-items:center}
.tabs>label{font-size:.875rem;padding:.15rem .1rem;cursor:pointer}
.tabs>input{margin:0;accent-color:var(--c0)}
.tabs>label{margin-left:-.55rem}
.tabs>div{flex-basis:100%;min-width:0}
.tabs>input:nth-of-type(1):not(:checked)~div:nth-of-type(1),
.tabs>input:nth-of-type(2):not(:checked)~div:nth-of-type(2){display:none}
footer{margin-top:2.5rem;color:var(--soft);font-size:.8125rem}
@media (max-width:480px){main{padding:1.1rem .8rem 2rem}h1{font-size:1.4375rem}.card,details{padding:.8rem .85rem}
.figures{padding:0}.figures div{flex-basis:45%;padding:.6rem .85rem}.figures .value{font-size:1.1875rem}
.facts{grid-template-columns:1fr;gap:0}.facts dd{margin-bottom:.5rem}}
@media print{body{background:#fff}.card,details{break-inside:avoid}nav{display:none}}
"""


class Section(NamedTuple):
    """A part of a page: a heading and its content as HTML (made by this file's functions, or escaped by its author)."""

    title: str
    html: str


class Figure(NamedTuple):
    """A key figure: `Throughput`, `12.3k`, `tokens/s`, `median of the run`."""

    label: str
    value: str
    unit: str = ""
    aside: str = ""


def page(title: str, head: str, sections: Sequence[Section]) -> str:
    """A whole HTML document.

    Args:
      title: plain text.
      head: HTML under the title, above the table of contents.
      sections: in order; those without content are left out.
    """
    sections = [one for one in sections if one.html]
    names = _anchors([one.title for one in sections])
    links = "".join(f'<a href="#{name}">{escape(one.title)}</a>' for name, one in zip(names, sections, strict=True))
    body = "".join(
        f'<section id="{name}"><h2>{escape(one.title)}</h2>\n{one.html}</section>\n'
        for name, one in zip(names, sections, strict=True)
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title>\n<style>{charts.STYLE}{STYLE}</style></head>\n"
        f"<body><main><header><h1>{escape(title)}</h1>\n{head}<nav>{links}</nav></header>\n{body}</main></body>"
        "</html>\n"
    )


def card(html: str) -> str:
    """A framed box around HTML."""
    return f'<div class="card">{html}</div>\n'


def grid(parts: Iterable[str]) -> str:
    """Boxes side by side where there is room, below each other on a phone; empty without parts."""
    boxes = "".join(card(part) for part in parts)
    return f'<div class="grid">{boxes}</div>\n' if boxes else ""


def pair(first: str, second: str) -> str:
    """Two boxes beside each other where there is room, the second the wider."""
    return f'<div class="pair">{first}{second}</div>\n'


def key_figures(figures: Iterable[Figure]) -> str:
    """Large numbers with their labels."""
    cells = []
    for label, value, unit, aside in figures:
        unit = f" <small>{escape(unit)}</small>" if unit else ""
        aside = f'<dd class="aside">{escape(aside)}</dd>' if aside else ""
        cells.append(f'<div><dt>{escape(label)}</dt><dd class="value">{escape(value)}{unit}</dd>{aside}</div>')
    return f'<dl class="card figures">{"".join(cells)}</dl>\n' if cells else ""


def facts(pairs: Mapping[str, str]) -> str:
    """Labels and texts below each other."""
    return card(_list(pairs)) if pairs else ""


def table(
    headers: Sequence[str], rows: Sequence[Sequence[str | float | None]], best: int | None = None, note: str = ""
) -> str:
    """A table that scrolls sideways in its box where it has to; numbers are aligned right.

    Args:
      headers: one a column.
      rows: cells; None is an empty one.
      best: index of the row to stress.
      note: a remark below.
    """
    numeric = [all(isinstance(row[i], int | float | None) for row in rows) for i in range(len(headers))]
    marks = [' class="n"' if n else "" for n in numeric]
    head = "".join(f"<th{mark}>{escape(text)}</th>" for text, mark in zip(headers, marks, strict=True))
    body = []
    for i, row in enumerate(rows):
        cells = "".join(f"<td{mark}>{escape(_cell(value))}</td>" for value, mark in zip(row, marks, strict=True))
        mark = ' class="best"' if i == best else ""
        body.append(f"<tr{mark}>{cells}</tr>")
    note = f'<p class="soft small">{escape(note)}</p>' if note else ""
    inside = f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody>"
    return f'<div class="scroll" tabindex="0"><table>{inside}</table></div>{note}\n'


def fold(title: str, html: str, aside: str = "", opened: bool = False) -> str:
    """Content behind a heading that opens it."""
    aside = f" <span>{escape(aside)}</span>" if aside else ""
    return f"<details{' open' if opened else ''}><summary>{escape(title)}{aside}</summary>{html}</details>\n"


def verbatim(text: str) -> str:
    """Text in fixed width, its lines kept; long ones scroll sideways."""
    return f'<pre tabindex="0">{escape(text)}</pre>'


def prose(start: str, rest: str) -> str:
    """Text in fixed width that wraps, with its start stressed."""
    return f'<pre class="text"><b>{escape(start)}</b>{escape(rest)}</pre>'


def bars(title: str, values: Mapping[str, float], own: str, note: str = "") -> str:
    """Horizontal bars from 0, the smallest first, that of `own` stressed."""
    top = max(values.values(), default=1.0)
    cells = []
    for name, value in sorted(values.items(), key=lambda item: item[1]):
        mark = "own" if name == own else ""
        width = 100 * max(value / top, 0.0) if top > 0 else 0.0
        cells.append(
            f'<span class="{mark}">{escape(name)}</span><div><i class="{mark}" style="width:{width:.1f}%"></i></div>'
            f'<span class="n {mark}">{value:.3f}</span>'
        )
    note = f'<p class="soft">{escape(note)}</p>' if note else ""
    return f'<h3>{escape(title)}</h3><div class="bars">{"".join(cells)}</div>{note}'


def either(name: str, first: tuple[str, str], second: tuple[str, str]) -> str:
    """Two views of one thing, of which a click shows the other: (label, html) each. No script needed."""
    inputs = "".join(
        f'<input type="radio" name="{name}" id="{name}{i}"{" checked" if i == 0 else ""}>'
        f'<label for="{name}{i}">{escape(label)}</label>'
        for i, (label, _) in enumerate((first, second))
    )
    return f'<div class="tabs">{inputs}<div>{first[1]}</div><div>{second[1]}</div></div>'


def _list(pairs: Mapping[str, str]) -> str:
    cells = "".join(f"<dt>{escape(str(name))}</dt><dd>{escape(str(text))}</dd>" for name, text in pairs.items())
    return f'<dl class="facts">{cells}</dl>'


def _cell(value: str | float | None) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else units.significant(value, 5)


def _anchors(titles: Sequence[str]) -> list[str]:
    """Names that links can point to, each another."""
    names: list[str] = []
    for index, title in enumerate(titles):
        name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
        names.append(name if name and name not in names else f"{name}-section-{index}")
    return names
