"""The key/value cache of decoding: plain arrays, passed in and returned."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.nn.config import ModelConfig
from jaxlm.types import Array

KEYS, VALUES = -1, -2
"""The axes of keys and of values that positions lie on."""


class Cache(NamedTuple):
    """Keys and values of the tokens seen so far.

    Attributes:
      k, v: one array [B, G, K, S] and one [B, G, S, K] a layer, without axes of a single row or head. Heads come before
        positions, and keys lie by columns, so that a step's products read both as they are. With axes of length 1 XLA's
        CPU compiler would look at another shape than is written to, and make copies of both in every step.
      segments: int32 [B, S]; 0 where nothing may be attended to (padding, or not yet written).
      index: int32 scalar, the array position of the next token; the same for all rows.
    """

    k: tuple[Array, ...]
    v: tuple[Array, ...]
    segments: Array
    index: Array  # type: ignore[assignment]


def empty(cfg: ModelConfig, rows: int, length: int, dtype: str = "float32") -> Cache:
    """A cache for `rows` sequences of at most `length` tokens."""
    lead = tuple(n for n in (rows, cfg.G) if n > 1)

    def zeros(*shape: int) -> tuple[Array, ...]:
        return tuple(jnp.zeros((*lead, *shape), dtype) for _ in range(cfg.N))

    k, v = zeros(cfg.K, length), zeros(length, cfg.K)
    return Cache(k, v, jnp.zeros((rows, length), jnp.int32), jnp.zeros((), jnp.int32))


def write(buffer: Array, new_BxLxGxK: Array, index: Array, axis: int) -> Array:
    """`new` at array positions index .. index + L - 1 of `buffer`, positions being on `axis` (`KEYS` or `VALUES`)."""
    new = jnp.moveaxis(new_BxLxGxK, 1, axis).astype(buffer.dtype)
    new = new.reshape(*buffer.shape[:-2], *new.shape[2:])
    return jax.lax.dynamic_update_slice_in_dim(buffer, new, index, axis)


def read(buffer: Array, like_BxLxGxK: Array, axis: int) -> Array:
    """All of a buffer as attention takes it, [B, S, G, K], in the dtype of `like`; `axis` as in `write`."""
    rows, heads = like_BxLxGxK.shape[0], like_BxLxGxK.shape[2]
    whole = buffer.reshape(rows, heads, *buffer.shape[-2:])
    return jnp.moveaxis(whole, axis, 1).astype(like_BxLxGxK.dtype)


def mark(segments_BxS: Array, new_BxL: Array, index: Array) -> Array:
    """Segment ids of the newly written positions."""
    return jax.lax.dynamic_update_slice(segments_BxS, new_BxL, (jnp.zeros((), index.dtype), index))
