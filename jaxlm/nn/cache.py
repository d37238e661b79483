"""The key/value cache of decoding: plain arrays, passed in and returned."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.nn.config import ModelConfig
from jaxlm.types import Array


class Cache(NamedTuple):
    """Keys and values of the tokens seen so far.

    Attributes:
      k, v: one array [B, S, G, K] a layer.
      segments: int32 [B, S]; 0 where nothing may be attended to (padding, or not yet written).
      index: int32 scalar, the array position of the next token; the same for all rows.
    """

    k: tuple[Array, ...]
    v: tuple[Array, ...]
    segments: Array
    index: Array


def empty(cfg: ModelConfig, rows: int, length: int, dtype: str = "float32") -> Cache:
    """A cache for `rows` sequences of at most `length` tokens."""
    shape = (rows, length, cfg.G, cfg.K)
    zeros = tuple(jnp.zeros(shape, dtype) for _ in range(cfg.N))
    return Cache(zeros, zeros, jnp.zeros((rows, length), jnp.int32), jnp.zeros((), jnp.int32))


def write(buffer_BxSxGxK: Array, new_BxLxGxK: Array, index: Array) -> Array:
    """`new` at array positions index .. index + L - 1 of `buffer`."""
    zero = jnp.zeros((), index.dtype)
    return jax.lax.dynamic_update_slice(
        buffer_BxSxGxK, new_BxLxGxK.astype(buffer_BxSxGxK.dtype), (zero, index, zero, zero)
    )


def mark(segments_BxS: Array, new_BxL: Array, index: Array) -> Array:
    """Segment ids of the newly written positions."""
    return jax.lax.dynamic_update_slice(segments_BxS, new_BxL, (jnp.zeros((), index.dtype), index))
