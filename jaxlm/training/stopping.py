"""Early stopping as pure functions over a small state that goes into the checkpoint as JSON."""

import math
from typing import Any, NamedTuple


class Stopping(NamedTuple):
    """What early stopping remembers.

    Attributes:
      best: the best value so far, None before the first finite one.
      best_step: the step of `best`, None before it.
      bad: evaluations in a row without an improvement.
    """

    best: float | None = None
    best_step: int | None = None
    bad: int = 0


def update(state: Stopping, step: int, value: float, *, mode: str = "min", min_delta: float = 0.0) -> Stopping:
    """The state after one evaluation; NaN and infinities are never an improvement.

    Args:
      state: before the evaluation.
      step: the step the value belongs to.
      value: the monitored metric.
      mode: "min" where smaller is better, "max" where larger is.
      min_delta: an improvement must exceed this, in units of the metric.

    Raises:
      ValueError: for another mode.
    """
    if mode not in ("min", "max"):
        raise ValueError(f"mode: {mode!r} is unknown; use min or max")
    sign = 1.0 if mode == "min" else -1.0
    improved = math.isfinite(value) and (state.best is None or sign * value < sign * state.best - min_delta)
    return Stopping(float(value), step, 0) if improved else state._replace(bad=state.bad + 1)


def should_stop(state: Stopping, patience: int | None) -> bool:
    """Whether `patience` evaluations in a row brought no improvement; None never stops."""
    return patience is not None and state.bad >= patience


def to_json(state: Stopping) -> dict[str, Any]:
    """The state as a JSON object; floats survive to the last bit."""
    return state._asdict()


def from_json(saved: dict[str, Any] | None) -> Stopping:
    """The inverse of `to_json`; None (a run that had no early stopping) is a fresh state."""
    return Stopping(**saved) if saved else Stopping()
