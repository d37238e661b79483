"""Rotary position embedding in the half-split layout: wavelengths of every kind, tables, and the rotation itself."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.nn.config import RopeConfig
from jaxlm.nn.kernels.tiles import one_cpu_device
from jaxlm.types import Array

BY_LENGTH = ("dynamic", "longrope")
"""Kinds whose wavelengths depend on the length of the call."""


def inverse_frequencies(
    rope: RopeConfig, head_width: int, max_length: int, length: int | Array | None = None
) -> tuple[Array, float]:
    """Angular velocity of each rotated pair, and the factor on cos and sin.

    With `d = int(head_width * partial)` and `k = 0 .. d/2 - 1` the velocity is `theta^(-2k/d)` radians per position
    (Su et al., 2104.09864), then stretched by kind: `linear` (2306.15595) divides by `factor`; `dynamic` raises theta
    with the length of the call; `llama3` divides the long waves alone; `yarn` (2309.00071) blends by rotations per
    original context; `longrope` (2402.13753) divides each by its own number.

    Args:
      rope: settings.
      head_width: K.
      max_length: longest sequence the model is meant for; `dynamic` stretches beyond it.
      length: positions of this call, i.e. largest position + 1; an int, or an int32 scalar under jit. Only `dynamic`
        and `longrope` look at it; null counts as a short call.

    Returns:
      float32 [ceil(d/2)], and a Python float.

    Raises:
      ValueError: naming the field that the kind needs and does not have.
    """
    d = int(head_width * rope.partial)
    k2 = np.arange(0, d, 2, dtype=np.float64)
    inv = rope.theta ** (-k2 / d)
    if rope.kind == "default":
        return jnp.asarray(inv, jnp.float32), 1.0
    if rope.kind == "linear":
        return jnp.asarray(inv / _needed(rope, "factor"), jnp.float32), 1.0
    if rope.kind == "dynamic":
        stretch = _needed(rope, "factor")
        length = max_length if length is None else jnp.maximum(length, max_length)
        growth = 1.0 + stretch * (jnp.asarray(length, jnp.float32) / max_length - 1.0)
        # theta' = theta * growth^(d/(d-2)), written as a correction: the float32 power then acts on a small number.
        return jnp.asarray(inv, jnp.float32) * growth ** jnp.asarray(-k2 / max(d - 2, 1), jnp.float32), 1.0
    if rope.kind == "llama3":
        return jnp.asarray(_llama3(rope, inv, max_length), jnp.float32), 1.0
    if rope.kind == "yarn":
        inv, factor = _yarn(rope, inv, d, max_length)
        return jnp.asarray(inv, jnp.float32), factor
    if rope.kind == "longrope":
        return _longrope(rope, inv, max_length, length)
    raise ValueError(f"model.rope.kind: {rope.kind!r} is unknown; use default, linear, dynamic, llama3, yarn, longrope")


def tables(
    rope: RopeConfig, head_width: int, max_length: int, positions_BxL: Array, length: int | Array | None = None
) -> tuple[Array, Array]:
    """cos and sin of every position's angles, both times the attention factor.

    Args:
      rope, head_width, max_length: as in `inverse_frequencies`.
      positions_BxL: int32.
      length: positions of the call; null: the largest of `positions_BxL` + 1, one number for the whole batch.

    Returns:
      Two float32 [B, L, d/2], d being the rotated width.
    """
    if length is None and rope.kind in BY_LENGTH:
        length = jnp.max(positions_BxL) + 1

    def make() -> tuple[Array, Array]:
        inv, factor = inverse_frequencies(rope, head_width, max_length, length)
        angles_BxLxd = positions_BxL.astype(jnp.float32)[..., None] * inv[None, None, :]
        return jnp.cos(angles_BxLxd) * factor, jnp.sin(angles_BxLxd) * factor

    return _made_once(make, positions_BxL) if one_cpu_device() else make()


def _made_once(make: Callable[[], tuple[Array, Array]], positions_BxL: Array) -> tuple[Array, Array]:
    """`make()`, in a loop of one round. XLA on CPU fuses what has one source into each of its uses, barrier or not, and
    would make the cosines again for every head of every layer, which is 5 % of a small model's step; a loop, if it does
    not know how often it runs, it leaves alone. The sum of integers is never NaN, which XLA does not know."""
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(make))
    rounds = jnp.where(jnp.isnan(jnp.sum(positions_BxL).astype(jnp.float32)), 0, 1)
    return jax.lax.fori_loop(0, rounds, lambda _, tables: make(), zeros)


def rotate(x_BxLxHxK: Array, cos_BxLxd: Array, sin_BxLxd: Array) -> Array:
    """Rotates the pairs (k, k + d/2) of the first d dimensions of each head; the rest passes through.

    Computed in float32, returned in the dtype of `x_BxLxHxK`; `cos_BxLxd`, `sin_BxLxd`: float32 [B, L, d/2].
    """
    half = cos_BxLxd.shape[-1]
    cos, sin = cos_BxLxd[:, :, None, :], sin_BxLxd[:, :, None, :]
    a = x_BxLxHxK[..., :half].astype(jnp.float32)
    b = x_BxLxHxK[..., half : 2 * half].astype(jnp.float32)
    rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BxLxHxK.dtype)
    if 2 * half == x_BxLxHxK.shape[-1]:
        return rotated
    return jnp.concatenate([rotated, x_BxLxHxK[..., 2 * half :]], axis=-1)


def _needed(rope: RopeConfig, field: str):
    value = getattr(rope, field)
    if value is None:
        raise ValueError(f"model.rope.{field}: null, but model.rope.kind {rope.kind} needs it; give a value")
    return value


def _llama3(rope: RopeConfig, inv: np.ndarray, max_length: int) -> np.ndarray:
    factor, original = _needed(rope, "factor"), rope.original_length or max_length
    waves = original * inv / (2 * math.pi)
    smooth = np.clip((waves - rope.low_factor) / (rope.high_factor - rope.low_factor), 0.0, 1.0)
    return (1.0 - smooth) * inv / factor + smooth * inv


def _yarn(rope: RopeConfig, inv: np.ndarray, d: int, max_length: int) -> tuple[np.ndarray, float]:
    original = rope.original_length or max_length
    factor = rope.factor if rope.factor is not None else max_length / original

    def dimension(rotations: float) -> float:
        return d * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, d - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(len(inv)) - low) / (high - low), 0.0, 1.0)
    return inv / factor * ramp + inv * (1.0 - ramp), _yarn_attention(rope, factor)


def _yarn_attention(rope: RopeConfig, factor: float) -> float:
    def scale(a: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * a * math.log(factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)


def _longrope(rope: RopeConfig, inv: np.ndarray, max_length: int, length: int | Array | None) -> tuple[Array, float]:
    original = rope.original_length or max_length
    short, long = (np.asarray(_needed(rope, name), np.float64) for name in ("short_factor", "long_factor"))
    for name, divisors in (("short_factor", short), ("long_factor", long)):
        if divisors.shape != inv.shape:
            raise ValueError(f"model.rope.{name}: {len(divisors)} numbers for {len(inv)} rotated pairs; give one each")
    factor = rope.factor if rope.factor is not None else max_length / original
    attention = rope.attention_factor
    if attention is None:
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    short_inv, long_inv = jnp.asarray(inv / short, jnp.float32), jnp.asarray(inv / long, jnp.float32)
    if length is None:
        return short_inv, attention
    return jnp.where(jnp.asarray(length) > original, long_inv, short_inv), attention
