"""Line plots as PNG files, by matplotlib, which is imported when one is drawn."""

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

MISSING = "matplotlib is not installed; install jaxlm[plots] and run the command again to have it"


class Line(NamedTuple):
    """A named curve; values of y that are not finite leave a gap."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


class Panel(NamedTuple):
    """A drawing with axes.

    Attributes:
      title, x_label, y_label: texts.
      lines: curves, in order.
      x_log, y_log: whether the axes are logarithmic, to base 2.
      x_names: labels at x = 0, 1, ...; None: x is a number.
    """

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    x_log: bool = True
    y_log: bool = False
    x_names: Sequence[str] | None = None


def available() -> bool:
    """Whether matplotlib can be imported."""
    return importlib.util.find_spec("matplotlib") is not None


def write(path: str | os.PathLike[str], panels: Sequence[Panel]) -> None:
    """Draw panels beside each other, with one y axis, into a PNG file.

    Raises:
      ValueError: matplotlib is missing; the text names the extra.
    """
    if not available():
        raise ValueError(f"{Path(path).name}: {MISSING}")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(panels), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    places = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for place, panel in zip(places, panels, strict=True):
        _draw(place, panel)
    places[0].set_ylabel(panels[0].y_label)
    handles, names = places[0].get_legend_handles_labels()
    if names:
        figure.legend(handles, names, loc="outside right center", frameon=False)
    figure.savefig(path, dpi=110)


def _draw(place: Any, panel: Panel) -> None:
    for line in panel.lines:
        place.plot(line.x, line.y, marker="o", markersize=4, label=line.name)
    if panel.x_log:
        place.set_xscale("log", base=2)
    if panel.y_log:
        place.set_yscale("log", base=2)
    if panel.x_names is not None:
        place.set_xticks(range(len(panel.x_names)), panel.x_names)
    elif panel.lines and len({x for line in panel.lines for x in line.x}) <= 8:
        ticks = sorted({x for line in panel.lines for x in line.x})
        place.set_xticks(ticks, [f"{x:g}" if x >= 1 else f"{x:.2g}" for x in ticks])
        place.minorticks_off()
    place.set_title(panel.title)
    place.set_xlabel(panel.x_label)
    place.grid(alpha=0.3)
