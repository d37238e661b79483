"""Axes of a chart: where a value lies, which ticks to draw, which points are worth drawing."""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from jaxlm.training import units

SPAN = 1000.0
"""Length of an axis in drawing units."""

LARGEST = 1e100
"""Values beyond it count as infinite, and as 0 below its inverse: the length of their axis could not be computed."""


class Scale(NamedTuple):
    """A linear or logarithmic axis from `low` to `high`, drawn on 0 to `SPAN`."""

    low: float
    high: float
    log: bool = False

    def shows(self, value: float) -> bool:
        """Whether the value can be drawn: finite, and positive on a logarithmic axis."""
        return abs(value) < LARGEST and (value > 1 / LARGEST or not self.log)

    def place(self, value: float) -> float:
        """Position on the axis; outside 0 to `SPAN` for values beyond its ends."""
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return SPAN * (value - low) / (high - low)


def fit(values: Iterable[float], *, log: bool = False, margin: float = 0.0, include: Sequence[float] = ()) -> Scale:
    """The axis that holds all values that can be drawn.

    Args:
      values: non-finite ones, and on a logarithmic axis those that are not positive, are passed over.
      log: whether the axis is logarithmic.
      margin: free space at both ends as a share of the length. A linear axis of values >= 0 does not go below 0 by it.
      include: values that must lie on the axis, such as 0.
    """
    probe = Scale(1.0, 2.0, log)
    shown = [float(v) for v in (*values, *include) if probe.shows(v)]
    low, high = (min(shown), max(shown)) if shown else (1.0, 10.0)
    if low == high == 0.0:
        low, high, margin = 0.0, 1.0, 0.0
    if low == high:
        low, high = (low / 2, low * 2) if log else (low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2)
        margin = 0.0
    if log:
        room = (high / low) ** margin
        return Scale(low / room, high * room, True)
    room = (high - low) * margin
    return Scale(max(low - room, 0.0) if low >= 0 else low - room, high + room)


def ticks(scale: Scale, count: int = 5) -> list[float]:
    """About `count` round values on the axis, ascending."""
    if scale.log:
        found = _log_ticks(scale, count)
        if len(found) >= 3:
            return found
    # Steps of 1, 2, 2.5 or 5 times a power of ten: the one whose number of ticks comes nearest.
    rough = (scale.high - scale.low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    choices = [_steps(scale, factor * power) for factor in (1, 2, 2.5, 5, 10)]
    return min(choices, key=lambda found: abs(len(found) - count))


def labels(values: Sequence[float]) -> list[str]:
    """Tick labels that are all written alike, with the digits it takes to tell them apart.

    `0`, `0.5`, `1.0`; `10k`, `20k`; `1e-4`, `2e-4`
    """
    written: list[str] = []
    for digits in range(3, 16):
        written = _written(values, digits)
        if len(set(written)) == len(set(values)):
            break
    return written


def thin(points: Sequence[tuple[float, float]], scale: Scale, limit: int = 600) -> list[tuple[float, float]]:
    """At most `limit` points that draw the same line.

    The axis is cut into stretches of equal length on paper; of each the lowest and the highest point stay, and of the
    whole the first and the last. Points without a finite value end a stretch only where it has no other.

    Args:
      points: (x, y), x ascending; all x can be drawn on `scale`.
      scale: the horizontal axis.
      limit: at least 4.
    """
    if len(points) <= limit:
        return list(points)
    stretches = (limit - 2) // 2
    kept = {0, len(points) - 1}
    members: dict[int, list[int]] = {}
    for index, (x, _) in enumerate(points):
        members.setdefault(min(int(scale.place(x) / SPAN * stretches), stretches - 1), []).append(index)
    for indices in members.values():
        finite = [i for i in indices if math.isfinite(points[i][1])]
        if finite:
            kept |= {min(finite, key=lambda i: points[i][1]), max(finite, key=lambda i: points[i][1])}
        else:
            kept.add(indices[0])
    return [points[i] for i in sorted(kept)]


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Centred mean over `window` values; those that are not finite are left out of every mean.

    Towards the start the window narrows, since a steep beginning would be bent otherwise; at the end it stays, so the
    last value is the mean of the last `window`.
    """
    half = window // 2
    totals, counts = [0.0], [0]
    for value in values:
        finite = math.isfinite(value)
        totals.append(totals[-1] + (value if finite else 0.0))
        counts.append(counts[-1] + finite)
    means = []
    for index in range(len(values)):
        reach = min(half, index)
        start = max(0, min(index - reach, len(values) - window))
        stop = min(index + reach + 1, len(values))
        count = counts[stop] - counts[start]
        means.append((totals[stop] - totals[start]) / count if count else math.nan)
    return means


def _steps(scale: Scale, step: float) -> list[float]:
    first, last = math.ceil(scale.low / step - 1e-9), math.floor(scale.high / step + 1e-9)
    # Rounding takes 0.30000000000000004 back to 0.3.
    digits = max(0, 2 - math.floor(math.log10(step)))
    return [round(k * step, digits) for k in range(first, last + 1)]


def _log_ticks(scale: Scale, count: int) -> list[float]:
    low, high = math.floor(math.log10(scale.low)), math.ceil(math.log10(scale.high))
    stride = max(1, math.ceil((high - low) / (count + 1)))
    found: list[float] = []
    for factors in ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 5, 7)):
        if stride > 1 and len(factors) > 1:
            break
        values = [f * 10.0**p for p in range(low, high + 1, stride) for f in factors]
        values = [float(f"{v:.6g}") for v in values if scale.low * 0.999 <= v <= scale.high * 1.001]
        if found and len(values) > count + 2:
            break
        found = values
    return found


def _written(values: Sequence[float], digits: int) -> list[str]:
    sizes = [abs(v) for v in values if v] or [1.0]
    if max(sizes) < 1e-2 or (min(sizes) < 1e-2 and max(sizes) / min(sizes) > 100):
        return [_scientific(v, digits) for v in values]
    if max(sizes) >= 1e4:
        unit, suffix = next(step for step in units.PREFIXES if max(sizes) >= step[0])
        return [_suffixed(v, unit, suffix, digits) for v in values]
    gaps = [b - a for a, b in itertools.pairwise(values)]
    even = len(gaps) > 1 and max(gaps) < 1.01 * min(gaps)
    decimals = max((_decimals(v, digits) for v in values), default=0)
    return [f"{v:.{decimals if even else _decimals(v, digits)}f}" for v in values]


def _scientific(value: float, digits: int) -> str:
    if not value:
        return "0"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def _suffixed(value: float, unit: float, suffix: str, digits: int) -> str:
    if not value:
        return "0"
    if abs(value) < unit:
        return units.compact(value)
    text = f"{value / unit:.{digits}g}"
    return f"{float(text):.0f}{suffix}" if "e" in text else text + suffix


def _decimals(value: float, digits: int) -> int:
    text = f"{value:.{digits + 1}f}".rstrip("0")
    return len(text) - text.index(".") - 1
