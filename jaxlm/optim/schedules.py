"""Learning rates over the course of a run: closed forms of the update's index, counted from 0.

With T steps, W = round(warmup T) of warm-up, P the peak and R = end P, and p = (i - W) / (T - W) the progress:

    i < W            P i / W
    warmup_cosine    R + (P - R) (1 + cos(pi p)) / 2
    linear           P + (R - P) p
    constant         P
    wsd, wsd_sqrt    P up to step T - C, C = round(decay T); then R + (P - R) (1 - q), or (1 - sqrt(q)), with
                     q = (i - T + C) / C
    rsqrt            max(R, P sqrt(max(W, 1) / i))
    restarts         warmup_cosine's form, `cycles` times over

From step T on the value stays what it is at T.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxlm.optim.config import OptimizerConfig
from jaxlm.types import Array

Schedule = Callable[[Array | int], Array]


def make(config: OptimizerConfig, steps: int) -> Schedule:
    """The learning rate as a function of the number of updates done, a float32 scalar.

    Args:
      config: `learning_rate`, `schedule`, `warmup`, `end`, `decay`, `cycles` count.
      steps: updates in the whole run, T.

    Raises:
      ValueError: `steps` is not positive.
    """
    if steps < 1:
        raise ValueError(f"train.steps: {steps} is not positive; use a whole number from 1 up")
    shape = SHAPES[config.schedule](config, steps)
    peak, end, warmup = config.learning_rate, config.end, warmup_steps(config, steps)

    def schedule(count: Array | int) -> Array:
        i = jnp.minimum(jnp.asarray(count), steps)
        rest = end + (1.0 - end) * shape(i)
        return peak * jnp.where(i < warmup, _divide(i, max(warmup, 1)), rest)

    return schedule


def warmup_steps(config: OptimizerConfig, steps: int) -> int:
    """Number of steps below the peak."""
    return round(config.warmup * steps)


def _divide(i: Array, whole: int) -> Array:
    """A quotient in the default precision: int32 by itself would give float32 under x64 too."""
    return i.astype(jnp.result_type(float)) / whole


def _remaining(config: OptimizerConfig, steps: int) -> Callable[[Array], Array]:
    """1 - p. Counted from the end, it keeps its relative precision where the rate is small."""
    length = max(steps - warmup_steps(config, steps), 1)
    return lambda i: jnp.clip(_divide(steps - i, length), 0.0, 1.0)


def _half_cosine(remaining: Array) -> Array:
    """(1 + cos(pi (1 - remaining))) / 2, without the cancellation."""
    return jnp.square(jnp.sin(0.5 * jnp.pi * remaining))


def _cosine(config: OptimizerConfig, steps: int) -> Callable[[Array], Array]:
    remaining = _remaining(config, steps)
    return lambda i: _half_cosine(remaining(i))


def _linear(config: OptimizerConfig, steps: int) -> Callable[[Array], Array]:
    return _remaining(config, steps)


def _constant(config: OptimizerConfig, steps: int) -> Callable[[Array], Array]:
    return lambda i: jnp.ones_like(_divide(i, steps))


def _wsd(config: OptimizerConfig, steps: int) -> Callable[[Array], Array]:
    length = max(round(config.decay * steps), 1)
    return lambda i: jnp.clip(_divide(steps - i, length), 0.0, 1.0)


def _wsd_sqrt(config: OptimizerConfig, steps: int) -> Callable[[Array], Array]:
    falling = _wsd(config, steps)
    return lambda i: 1.0 - jnp.sqrt(1.0 - falling(i))


def _rsqrt(config: OptimizerConfig, steps: int) -> Callable[[Array], Array]:
    scale = max(warmup_steps(config, steps), 1)

    def shape(i: Array) -> Array:
        value = jax.lax.rsqrt(_divide(jnp.maximum(i, scale), scale))
        # `make` mixes in the end value; here it is a floor instead.
        return (jnp.maximum(value, config.end) - config.end) / (1.0 - config.end) if config.end < 1 else value

    return shape


def _restarts(config: OptimizerConfig, steps: int) -> Callable[[Array], Array]:
    warmup = warmup_steps(config, steps)
    length = max(steps - warmup, 1)

    def shape(i: Array) -> Array:
        # In whole numbers, so that no rounding puts the start of a cycle at the end of the one before.
        phase = (jnp.maximum(i - warmup, 0) * config.cycles) % length
        return jnp.where(i < steps, _half_cosine(_divide(length - phase, length)), 0.0)

    return shape


SHAPES: dict[str, Callable[[OptimizerConfig, int], Callable[[Array], Array]]] = {
    "warmup_cosine": _cosine,
    "linear": _linear,
    "constant": _constant,
    "wsd": _wsd,
    "wsd_sqrt": _wsd_sqrt,
    "rsqrt": _rsqrt,
    "restarts": _restarts,
}
"""From 1 at the peak to 0 at the end value, after the warm-up."""
