"""Which query may see which key: the description, the test for a tile, and the tiles that can be skipped."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.types import Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("segments_BxL", "segments_BxS", "q_offset"),
    meta_fields=("causal", "window"),
)
@dataclasses.dataclass(frozen=True)
class AttentionMask:
    """Query `i` (array position `q_offset` + row) may see key `j` (array position) if every condition given holds.

    A pytree whose `causal` and `window` are static.

    Attributes:
      causal: `j <= i`.
      window: `j > i - window`, and without `causal` also `j < i + window`; null: no limit. 1 sees itself alone.
      segments_BxL, segments_BxS: int32; equal and not 0 (padding). Null: one segment without padding. Queries' ids
        alone are those of the keys too (L = S); keys' ids alone hide the keys of id 0 from every query.
      q_offset: int, int32 scalar or [B]: array position of the first query, the length of the cache before it.
    """

    causal: bool = True
    window: int | None = None
    segments_BxL: Array | None = None
    segments_BxS: Array | None = None
    q_offset: Array | int = 0


def complete(mask: AttentionMask, q_shape: tuple[int, ...], k_shape: tuple[int, ...]) -> AttentionMask:
    """The mask with the keys' ids filled in, checked against the shapes [B, L, ...] and [B, S, ...].

    Raises:
      ValueError: a window below 1, or ids whose shape does not fit.
    """
    if mask.window is not None and mask.window < 1:
        raise ValueError(f"attention: window {mask.window} is below 1; use 1 (each token alone) or more")
    if mask.segments_BxL is not None and mask.segments_BxS is None:
        mask = dataclasses.replace(mask, segments_BxS=mask.segments_BxL)
    for name, ids, shape in (("queries", mask.segments_BxL, q_shape), ("keys", mask.segments_BxS, k_shape)):
        if ids is not None and ids.shape != shape[:2]:
            raise ValueError(f"attention: segment ids of the {name} are {ids.shape}; give {shape[:2]}")
    return mask


def offset_B(mask: AttentionMask, batch: int) -> Array:
    """The offset of each row of the batch: int32 [B]."""
    return jnp.broadcast_to(jnp.asarray(mask.q_offset, jnp.int32), (batch,))


class Side(NamedTuple):
    """Positions and segment ids of some queries or keys, shaped to be broadcast against the other side's.

    Attributes:
      position: int32 array positions, rank 3.
      ids: int32 segment ids, rank 3, or null.
      fresh: bool, rank 3, or null: false where a tile repeats what the tile before it had.
    """

    position: Array
    ids: Array | None = None
    fresh: Array | None = None


def allowed(mask: AttentionMask, i: Side, j: Side) -> Array | None:
    """Whether each query `i` may see each key `j`: bool, as broad as both; null if all may see all."""
    conditions = [side.fresh for side in (i, j) if side.fresh is not None]
    if mask.causal:
        conditions.append(j.position <= i.position)
    if mask.window is not None:
        conditions.append(j.position > i.position - mask.window)
        if not mask.causal:
            conditions.append(j.position < i.position + mask.window)
    if j.ids is not None:
        conditions.append(j.ids != 0)
        if i.ids is not None:
            conditions.append(i.ids == j.ids)
    return functools.reduce(jnp.logical_and, conditions) if conditions else None


def allowed_BxLxS(mask: AttentionMask, n_queries: int, n_keys: int, batch: int) -> Array:
    """The whole mask, bool [B, L, S]."""
    i_BxL = offset_B(mask, batch)[:, None] + jnp.arange(n_queries, dtype=jnp.int32)[None, :]
    i = Side(i_BxL[:, :, None], None if mask.segments_BxL is None else mask.segments_BxL[:, :, None])
    j_S = jnp.arange(n_keys, dtype=jnp.int32)
    j = Side(j_S[None, None, :], None if mask.segments_BxS is None else mask.segments_BxS[:, None, :])
    result = allowed(mask, i, j)
    return jnp.broadcast_to(True if result is None else result, (batch, n_queries, n_keys))


def needed_BxIxJ(mask: AttentionMask, shape: tuple[int, int, int], blocks: tuple[int, int]) -> Array:
    """Whether a tile of queries x keys can hold an allowed pair, judged by the ranges of positions and ids in it.

    Args:
      mask: complete, see `complete`.
      shape: B, L, S.
      blocks: sides of a tile, at most L and S; the last tiles end with the axis and may overlap those before.
    """
    batch, n_queries, n_keys = shape
    first_I, last_I = _ends(n_queries, blocks[0])
    first_J, last_J = _ends(n_keys, blocks[1])
    offset = offset_B(mask, batch)[:, None, None]
    i_low, i_high = offset + first_I[None, :, None], offset + last_I[None, :, None]
    j_low, j_high = first_J[None, None, :], last_J[None, None, :]
    needed = jnp.ones((batch, first_I.shape[0], first_J.shape[0]), bool)
    if mask.causal:
        needed &= j_low <= i_high
    if mask.window is not None:
        needed &= j_high > i_low - mask.window
        if not mask.causal:
            needed &= j_low < i_high + mask.window
    if mask.segments_BxL is not None:
        i_min, i_max = _id_range(mask.segments_BxL, blocks[0])
        j_min, j_max = _id_range(mask.segments_BxS, blocks[1])
        needed &= (i_min[:, :, None] <= j_max[:, None, :]) & (j_min[:, None, :] <= i_max[:, :, None])
    return needed


def _ends(length: int, block: int) -> tuple[Array, Array]:
    """First and last position of each block; the last block ends with the axis."""
    first = jnp.minimum(jnp.arange(0, length, block, dtype=jnp.int32), length - block)
    return first, first + block - 1


def _id_range(ids_BxL: Array, block: int) -> tuple[Array, Array]:
    """Smallest and largest id of each block, padding aside; an empty range where all is padding. [B, blocks] each."""
    first, _ = _ends(ids_BxL.shape[1], block)
    ids = ids_BxL[:, first[:, None] + jnp.arange(block, dtype=jnp.int32)[None, :]]
    low = jnp.min(jnp.where(ids == 0, jnp.iinfo(jnp.int32).max, ids), axis=-1)
    high = jnp.max(jnp.where(ids == 0, jnp.iinfo(jnp.int32).min, ids), axis=-1)
    return low, high


def bounds(needed: Array) -> tuple[Array, Array]:
    """Along the last axis of [..., n]: the first needed index and one past the last; equal if there is none."""
    index = jax.lax.broadcasted_iota(jnp.int32, needed.shape, needed.ndim - 1)
    stop = jnp.max(jnp.where(needed, index + 1, 0), axis=-1)
    start = jnp.min(jnp.where(needed, index, needed.shape[-1]), axis=-1)
    return jnp.minimum(start, stop), stop
