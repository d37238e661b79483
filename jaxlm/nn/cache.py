"""The key/value cache of decoding: plain arrays, passed in and returned."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.nn.config import ModelConfig
from jaxlm.types import Array

LENGTH = 2
"""The axis of keys and values that positions lie on."""


class Cache(NamedTuple):
    """Keys and values of the tokens seen so far.

    Attributes:
      k, v: one array [B, G, S, K] a layer: heads before positions, so that a step's products need no transposition.
      segments: int32 [B, S]; 0 where nothing may be attended to (padding, or not yet written).
      index: int32 scalar, the array position of the next token; the same for all rows.
    """

    k: tuple[Array, ...]
    v: tuple[Array, ...]
    segments: Array
    index: Array  # type: ignore[assignment]


def empty(cfg: ModelConfig, rows: int, length: int, dtype: str = "float32") -> Cache:
    """A cache for `rows` sequences of at most `length` tokens."""
    shape = (rows, cfg.G, length, cfg.K)
    zeros = tuple(jnp.zeros(shape, dtype) for _ in range(cfg.N))
    return Cache(zeros, zeros, jnp.zeros((rows, length), jnp.int32), jnp.zeros((), jnp.int32))


def write(buffer_BxGxSxK: Array, new_BxLxGxK: Array, index: Array) -> Array:
    """`new` at array positions index .. index + L - 1 of `buffer`."""
    zero = jnp.zeros((), index.dtype)
    new_BxGxLxK = jnp.swapaxes(new_BxLxGxK, 1, LENGTH).astype(buffer_BxGxSxK.dtype)
    return jax.lax.dynamic_update_slice(buffer_BxGxSxK, new_BxGxLxK, (zero, zero, index, zero))


def read(buffer_BxGxSxK: Array, dtype: jnp.dtype) -> Array:
    """All of a buffer as attention takes it, [B, S, G, K]."""
    return jnp.swapaxes(buffer_BxGxSxK, 1, LENGTH).astype(dtype)


def mark(segments_BxS: Array, new_BxL: Array, index: Array) -> Array:
    """Segment ids of the newly written positions."""
    return jax.lax.dynamic_update_slice(segments_BxS, new_BxL, (jnp.zeros((), index.dtype), index))
