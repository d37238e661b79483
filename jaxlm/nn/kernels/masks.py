"""Which query may see which key: the description, the test for a tile, and the tiles that can be skipped."""

import dataclasses
import functools

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


def allowed_BxLxS(mask: AttentionMask, q_shape: tuple[int, ...], n_keys: int) -> Array:
    """The whole mask, bool [B, L, S]: for the reference and for short sequences."""
    batch, n_queries = q_shape[:2]
    i_BxL = offset_B(mask, batch)[:, None] + jnp.arange(n_queries, dtype=jnp.int32)[None, :]
    j_S = jnp.arange(n_keys, dtype=jnp.int32)
    return tile_allowed(mask, i_BxL, j_S, mask.segments_BxL, mask.segments_BxS, n_keys)


def tile_allowed(
    mask: AttentionMask, i_BxL: Array, j_S: Array, segments_BxL: Array | None, segments_BxS: Array | None, n_keys: int
) -> Array:
    """The mask of one tile, bool [B, L, S], from the positions and segments of its rows and columns.

    Args:
      mask: gives `causal` and `window`.
      i_BxL, j_S: int32 array positions of the tile's queries and keys.
      segments_BxL, segments_BxS: ids of the tile's queries and keys, or null.
      n_keys: keys from here on are padding of the last tile.
    """
    i, j = i_BxL[:, :, None], j_S[None, None, :]
    allowed = jnp.broadcast_to(j < n_keys, (*i_BxL.shape, j_S.shape[0]))
    if mask.causal:
        allowed &= j <= i
    if mask.window is not None:
        allowed &= j > i - mask.window
        if not mask.causal:
            allowed &= j < i + mask.window
    if segments_BxS is not None:
        allowed &= segments_BxS[:, None, :] != 0
        if segments_BxL is not None:
            allowed &= segments_BxL[:, :, None] == segments_BxS[:, None, :]
    return allowed
