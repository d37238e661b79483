"""What a merge did: how far its models are from each other and from the result, layer by layer, as page and JSON."""

import json
import math
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from jaxlm.interop.mergekit import Recipe
from jaxlm.interop.mergekit_write import Distances
from jaxlm.training import charts, page
from jaxlm.training.page import Section
from jaxlm.training.summary import write_whole

HTML_FILE, JSON_FILE = "merge_report.html", "merge_report.json"
MEANING = "|a - b| / |b|, over all weights of the layer"


def relative(distances: Distances) -> dict[int | str, dict[tuple[str, str], float]]:
    """`|a - b| / |b|` by layer and pair (a, b): each model with the result, and with the base or first model."""
    found: dict[int | str, dict[tuple[str, str], float]] = {}
    for layer, sums in distances.sums.items():
        pairs = {pair: total for pair, total in sums.items() if pair[0] != pair[1]}
        found[layer] = {(a, b): _ratio(total, sums[b, b]) for (a, b), total in pairs.items()}
    return found


def write(distances: Distances, out: str | Path, recipe: str) -> list[Path]:
    """Write page and JSON into the directory of the result; `recipe` is the text of its file. Returns their paths."""
    out = Path(out)
    found = relative(distances)
    write_whole(out / JSON_FILE, json.dumps(to_json(distances.recipe, found), indent=1) + "\n")
    write_whole(out / HTML_FILE, html(distances.recipe, found, recipe))
    return [out / HTML_FILE, out / JSON_FILE]


def to_json(recipe: Recipe, found: Mapping[int | str, Mapping[tuple[str, str], float]]) -> dict[str, Any]:
    """Method, models, and a list of layers with the distance of each pair."""
    layers = [
        {"layer": layer, "distances": [{"from": a, "to": b, "relative": d} for (a, b), d in pairs.items()]}
        for layer, pairs in found.items()
    ]
    return {"merge_method": recipe.method, "base_model": recipe.base, "models": list(recipe.models), "layers": layers}


def html(recipe: Recipe, found: Mapping[int | str, Mapping[tuple[str, str], float]], text: str) -> str:
    """One self-contained page."""
    layers = sorted(layer for layer in found if isinstance(layer, int))
    pairs = list(dict.fromkeys(pair for values in found.values() for pair in values))
    to_result = [pair for pair in pairs if pair[1] == Distances.RESULT]
    apart = [pair for pair in pairs if pair[1] != Distances.RESULT]
    drawn = [
        _chart(title, chosen, layers, found)
        for title, chosen in (("From the models to the result", to_result), ("Between the models", apart))
        if chosen and layers
    ]
    rows: list[list[str | float | None]] = [
        [str(layer), *(found[layer].get(pair) for pair in pairs)] for layer in found
    ]
    headers = ["layer", *(f"{a} to {b}" for a, b in pairs)]
    said = f"{recipe.method} of {', '.join(recipe.models)}"
    return page.page(
        "Merge",
        f'<p class="soft">{escape(said)}</p>\n',
        [
            Section("Distances by layer", page.grid(drawn)),
            Section("All distances", page.card(page.table(headers, rows, note=f"{MEANING}."))),
            Section("Recipe", page.card(page.verbatim(text))),
        ],
    )


def _chart(
    title: str,
    pairs: list[tuple[str, str]],
    layers: list[int],
    found: Mapping[int | str, Mapping[tuple[str, str], float]],
) -> str:
    series = []
    for a, b in pairs:
        points = [(layer, found[layer][a, b]) for layer in layers if (a, b) in found[layer]]
        if points:
            xs, ys = zip(*points, strict=True)
            series.append(charts.Series(f"{a} to {b}", xs, ys, style="points", shown=""))
    if not series:
        return ""
    return charts.line_chart(
        title, series, charts.Axis("layer"), charts.Axis("relative distance", include=(0.0,)), height=260, note=MEANING
    )


def _ratio(total: float, size: float) -> float:
    return math.sqrt(total / size) if size > 0 else math.inf if total > 0 else 0.0
