"""What a coordinate check says: a verdict for each activation, and the files and the table that show it."""

import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.evals import plots
from jaxlm.evals.activations import ACTIVATION_NAMES
from jaxlm.evals.coordinates import DEPTH, PARAMETRISATIONS, STEPS, WIDTH, Check, Parametrisation
from jaxlm.training import charts, page
from jaxlm.training.page import Section
from jaxlm.training.summary import write_whole

JSON_FILE, PNG_FILE, HTML_FILE = "coord_check.json", "coord_check.png", "coord_check.html"

LIMIT = 0.15
"""Largest |slope| of a hidden activation under muP over widths."""

DEPTH_LIMIT = 0.2
WHOLE = ("embedding", "final_residual")
"""Activations that are judged over depths: the last layer of a deep model is not the last of a shallow one."""

LOGITS = (-0.6, 0.15)
"""Slopes that logits of attention and of the head may have: those of a random readout shrink by up to width^-0.5 before
what is learned dominates, so only growth, or a shrinking beyond that, is a fault."""

GROWTH = 0.6
"""Slope that the final residual has at least under the standard parametrisation, if the check can tell at all."""

JUDGED_STEPS = (1, STEPS)
NAMES = {"mup": "muP", "sp": "standard parametrisation"}
LETTERS = {WIDTH: "widths", DEPTH: "depths"}


class Verdict(NamedTuple):
    """Whether an activation's change stays the same over sizes under muP, and the worst slope."""

    activation: str
    passed: bool
    slope: float


def verdicts(check: Check, parametrisation: Parametrisation = "mup") -> list[Verdict]:
    """The verdict on each activation, from its slopes after the first and the last step."""
    found = []
    for name in ACTIVATION_NAMES:
        low, high = _range(check, name)
        slopes = [check.slope(parametrisation, name, step) for step in JUDGED_STEPS]
        excess = [math.inf if math.isnan(slope) else max(low - slope, slope - high) for slope in slopes]
        found.append(Verdict(name, max(excess) <= 0, slopes[excess.index(max(excess))]))
    return found


def discriminates(check: Check) -> bool:
    """Whether the standard parametrisation fails as it should, so that passing means something."""
    return check.slope("sp", "final_residual", STEPS) >= (GROWTH if check.over == WIDTH else DEPTH_LIMIT)


def to_json(check: Check) -> dict[str, Any]:
    """Sizes and slopes as numbers."""
    slopes = [
        {"parametrisation": p, "activation": name, "step": step, "slope": check.slope(p, name, step)}
        for p in PARAMETRISATIONS
        for name in ACTIVATION_NAMES
        for step in range(1, STEPS + 1)
    ]
    return {LETTERS[check.over]: list(check.sizes), "slopes": slopes}


def table(check: Check) -> str:
    """Slopes and verdicts for a terminal."""
    steps = "".join(f"  step {step}" for step in range(1, STEPS + 1))
    lines = [
        f"slope of log2 mean|x_t - x_0| on log2 {check.over} over {', '.join(map(str, check.sizes))}, "
        f"learning rate {check.learning_rate:g}",
        f"{'':18}  {'muP':^{len(steps)}}  {'standard':^{len(steps)}}",
        f"{'activation':18}  {steps}  {steps}  muP",
    ]
    for verdict in verdicts(check):
        cells = [
            "".join(f"  {check.slope(p, verdict.activation, step):+6.2f}" for step in range(1, STEPS + 1))
            for p in PARAMETRISATIONS
        ]
        lines.append(f"{verdict.activation:18}  {'  '.join(cells)}  {_word(check, verdict)}")
    return "\n".join([*lines, conclusion(check)])


def conclusion(check: Check) -> str:
    """The result in a sentence."""
    failed = [verdict.activation for verdict in verdicts(check) if not verdict.passed]
    said = f"muP fails for {', '.join(failed)}" if failed else "muP passes"
    slope = check.slope("sp", "final_residual", STEPS)
    if discriminates(check):
        return f"{said}; the standard parametrisation grows (final residual {slope:+.2f}), so the check can tell"
    return (
        f"{said}, but the standard parametrisation does not grow either (final residual {slope:+.2f}): the check "
        "cannot tell; raise optimizer.learning_rate"
    )


def write(check: Check, directory: str | Path) -> list[Path]:
    """Write JSON, page and, where matplotlib is installed, PNG; returns their paths."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(directory / JSON_FILE, json.dumps(to_json(check), indent=1) + "\n")
    write_whole(directory / HTML_FILE, html(check))
    paths = [directory / JSON_FILE, directory / HTML_FILE]
    if plots.available():
        plots.write(directory / PNG_FILE, _panels(check))
        paths.append(directory / PNG_FILE)
    return paths


def html(check: Check) -> str:
    """The check as one self-contained page."""
    return page.page("Coordinate check", f"<p>{escape(conclusion(check))}</p>", sections(check))


def sections(check: Check) -> list[Section]:
    """The check as parts of a page: curves and the table of slopes."""
    drawn = []
    for panel in _panels(check):
        series = [charts.Series(line.name, line.x, line.y, style="points", shown="") for line in panel.lines]
        x = charts.Axis(check.over, log=True, at=check.sizes)
        drawn.append(charts.line_chart(panel.title, series, x, charts.Axis("mean |x_t - x_0|", log=True), height=260))
    steps = range(1, STEPS + 1)
    headers = ["activation", *(f"{NAMES[p]}, step {step}" for p in PARAMETRISATIONS for step in steps), "muP"]
    rows: list[Sequence[str | float | None]] = [
        [
            verdict.activation,
            *(f"{check.slope(p, verdict.activation, step):+.2f}" for p in PARAMETRISATIONS for step in steps),
            _word(check, verdict),
        ]
        for verdict in verdicts(check)
    ]
    note = f"Slopes of log2 mean |x_t - x_0| on log2 {check.over}; learning rate {check.learning_rate:g}."
    return [
        Section(f"Change after {STEPS} steps", page.grid(drawn)),
        Section("Slopes", page.card(page.table(headers, rows, note=note))),
    ]


def _range(check: Check, activation: str) -> tuple[float, float]:
    if activation == "logits" or (activation == "attention_logits" and check.over == WIDTH):
        return LOGITS
    if check.over == DEPTH:
        return (-DEPTH_LIMIT, DEPTH_LIMIT) if activation in WHOLE else (-math.inf, math.inf)
    return -LIMIT, LIMIT


def _word(check: Check, verdict: Verdict) -> str:
    low, high = _range(check, verdict.activation)
    if verdict.passed:
        return "passes" if math.isfinite(high) else "not judged"
    return f"FAILS: {verdict.slope:+.2f} is not in {low:g}..{high:g}"


def _panels(check: Check) -> list[plots.Panel]:
    return [
        plots.Panel(
            NAMES[p],
            check.over,
            f"mean |x_t - x_0| after {STEPS} steps",
            [plots.Line(name, check.sizes, check.changes[p, name][:, STEPS - 1].tolist()) for name in ACTIVATION_NAMES],
            y_log=True,
        )
        for p in PARAMETRISATIONS
    ]
