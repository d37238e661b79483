"""Numbers as people read them: significant digits, thousands, bytes, times."""

import math

PREFIXES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
BYTES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def significant(value: float, digits: int = 4) -> str:
    """A number with this many significant digits: `1.642`, `12,345`, `3.0e-04`, `nan`."""
    if not math.isfinite(value):
        return str(value)
    if isinstance(value, int) or (value == int(value) and abs(value) < 1e6):
        return f"{int(value):,}"
    size = math.floor(math.log10(abs(value)))
    if size < -3 or size >= 9:
        return f"{value:.{max(digits - 2, 1)}e}"
    return f"{value:,.{max(digits - 1 - size, 0)}f}"


def compact(value: float) -> str:
    """A count with a suffix: `950`, `12.3k`, `4.2M`, `1.1B`, `3.0T`."""
    return _scaled(value, PREFIXES, "")


def size(count: float) -> str:
    """A number of bytes in decimal units: `1.2 GB`."""
    return _scaled(count, BYTES, " ") if abs(count) >= 1e3 else f"{count:.0f} B"


def clock(seconds: float) -> str:
    """A length of time for a progress line: `1:23`, `1:02:03`, `2d 03:04`."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d {hours % 24:02}:{minutes:02}"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def duration(seconds: float) -> str:
    """A length of time in words: `8.4 s`, `2 min 51 s`, `3 h 12 min`, `2 d 5 h`."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _scaled(value: float, steps: tuple[tuple[float, str], ...], space: str) -> str:
    if not math.isfinite(value):
        return str(value)
    for step, suffix in steps:
        # 999,950 is 1.0M, not 1000.0k: compare what would be printed.
        if abs(value) >= step * 0.99995:
            return f"{value / step:.1f}{space}{suffix}"
    return f"{value:.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.1f}"
