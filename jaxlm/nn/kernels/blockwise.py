"""Blockwise attention: online softmax over tiles, memory linear in the length, with its own backward pass.

Forward and backward follow Dao et al. (2205.14135, 2307.08691): only q, k, v, the output and the log of the softmax's
denominator are kept. Tiles that no query may use are never visited, through loops with dynamic bounds, which the own
backward pass makes legal.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.nn.kernels import masks
from jaxlm.nn.kernels.masks import AttentionMask
from jaxlm.nn.kernels.reference import FAR_BELOW
from jaxlm.types import Array

BLOCK = 256
"""Longest tile side: a float32 score tile of 4 heads is then 1 MiB, which stays in a CPU core's cache."""


class Form(NamedTuple):
    """Static settings of a call: score scale, cap, and the tile sides of queries and keys."""

    scale: float
    softcap: float | None
    q_block: int
    k_block: int


def blockwise_attention(
    q_BxLxHxK: Array,
    k_BxSxGxK: Array,
    v_BxSxGxK: Array,
    *,
    mask: AttentionMask,
    scale: float,
    softcap: float | None = None,
) -> Array:
    """The function of `reference_attention`, tile by tile; not for forward mode.

    Args, Returns: as `reference_attention`.

    Raises:
      ValueError: segment ids or a window that cannot be.
    """
    mask = masks.complete(mask, q_BxLxHxK.shape, k_BxSxGxK.shape)
    form = Form(float(scale), softcap, block_size(q_BxLxHxK.shape[1]), block_size(k_BxSxGxK.shape[1]))
    return _attention(form, q_BxLxHxK, k_BxSxGxK, v_BxSxGxK, mask)


def block_size(length: int) -> int:
    """The tile side that splits `length` evenly into the fewest tiles of at most `BLOCK`, a multiple of 8."""
    tiles = -(-length // BLOCK)
    return -(-math.ceil(length / tiles) // 8) * 8


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(form: Form, q: Array, k: Array, v: Array, mask: AttentionMask) -> Array:
    return forward(form, q, k, v, mask)[0]


def _attention_forward(form: Form, q: Array, k: Array, v: Array, mask: AttentionMask):
    o, lse = forward(form, q, k, v, mask)
    return o, (q, k, v, mask, o, lse)


def _attention_backward(form: Form, saved, do: Array):
    q, k, v, mask, o, lse = saved
    delta = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), axis=-1)
    dq, dk, dv = backward(form, (q, k, v, mask), do, lse, delta)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_attention.defvjp(_attention_forward, _attention_backward)


class Tiles(NamedTuple):
    """Queries, keys and values cut into tiles, with what the mask needs of each tile.

    Attributes:
      q: [I, B, G, R, l, K], I tiles of l queries, R = H / G query heads a key head.
      k, v: [J, B, G, s, K], J tiles of s keys.
      i, j: int32 array positions, [I, B, l] and [J, s].
      i_ids, j_ids: segment ids, [I, B, l] and [J, B, s], or null.
    """

    q: Array
    k: Array
    v: Array
    i: Array
    j: Array
    i_ids: Array | None
    j_ids: Array | None


def _split(x: Array, block: int) -> Array:
    """[B, L, ...] -> [tiles, B, block, ...], zeros at the end."""
    tiles = -(-x.shape[1] // block)
    rest = tiles * block - x.shape[1]
    if rest:
        x = jnp.pad(x, [(0, 0), (0, rest)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], tiles, block, *x.shape[2:]), 1, 0)


def _split_heads(x_BxLxHxK: Array, groups: int, block: int) -> Array:
    """[B, L, H, K] -> [tiles, B, G, R, block, K]."""
    x = _split(x_BxLxHxK, block)
    x = x.reshape(*x.shape[:3], groups, -1, x.shape[-1])
    return jnp.transpose(x, (0, 1, 3, 4, 2, 5))


def _tiles(form: Form, q: Array, k: Array, v: Array, mask: AttentionMask) -> Tiles:
    batch, n_queries, _, _ = q.shape
    groups = k.shape[2]
    i_BxL = masks.offset_B(mask, batch)[:, None] + jnp.arange(n_queries, dtype=jnp.int32)[None, :]
    j_S = jnp.arange(-(-k.shape[1] // form.k_block) * form.k_block, dtype=jnp.int32)
    return Tiles(
        q=_split_heads(q, groups, form.q_block),
        k=_split_heads(k, groups, form.k_block)[:, :, :, 0],
        v=_split_heads(v, groups, form.k_block)[:, :, :, 0],
        i=_split(i_BxL, form.q_block),
        j=j_S.reshape(-1, form.k_block),
        i_ids=None if mask.segments_BxL is None else _split(mask.segments_BxL, form.q_block),
        j_ids=None if mask.segments_BxS is None else _split(mask.segments_BxS, form.k_block),
    )


def _needed_IxJ(form: Form, t: Tiles, mask: AttentionMask, n_queries: int) -> Array:
    """Whether a tile can have any allowed pair, judged by the ranges of positions and ids in it."""
    batch = t.i.shape[1]
    first_I = jnp.arange(t.i.shape[0], dtype=jnp.int32) * form.q_block
    last_I = jnp.minimum(first_I + form.q_block, n_queries) - 1
    offset = masks.offset_B(mask, batch)
    i_low = (first_I + jnp.min(offset))[:, None]
    i_high = (last_I + jnp.max(offset))[:, None]
    j_low, j_high = t.j[None, :, 0], t.j[None, :, -1]
    needed = jnp.ones((t.i.shape[0], t.j.shape[0]), bool)
    if mask.causal:
        needed &= j_low <= i_high
    if mask.window is not None:
        needed &= j_high > i_low - mask.window
        if not mask.causal:
            needed &= j_low < i_high + mask.window
    if t.i_ids is not None and t.j_ids is not None:
        (i_min, i_max), (j_min, j_max) = _id_range(t.i_ids), _id_range(t.j_ids)
        overlap = (i_min[:, None] <= j_max[None]) & (j_min[None] <= i_max[:, None])
        needed &= jnp.any(overlap, axis=-1)
    return needed


def _id_range(ids: Array) -> tuple[Array, Array]:
    """Smallest and largest id that is not padding, over the last axis; an empty range where all is padding."""
    low = jnp.min(jnp.where(ids == 0, jnp.iinfo(jnp.int32).max, ids), axis=-1)
    high = jnp.max(jnp.where(ids == 0, jnp.iinfo(jnp.int32).min, ids), axis=-1)
    return low, high


def _bounds(needed: Array) -> tuple[Array, Array]:
    """For each row of [n, m]: the first needed column and one past the last; (0, 0) if there is none."""
    columns = jnp.arange(needed.shape[1], dtype=jnp.int32)[None, :]
    stop = jnp.max(jnp.where(needed, columns + 1, 0), axis=1)
    start = jnp.min(jnp.where(needed, columns, needed.shape[1]), axis=1)
    return jnp.minimum(start, stop), stop


def _scores(form: Form, q: Array, k: Array) -> Array:
    """Capped scores of a tile: [B, G, R, l, s], float32."""
    s = jnp.einsum("bgrlk,bgsk->bgrls", q, k, preferred_element_type=jnp.float32) * form.scale
    return s if form.softcap is None else form.softcap * jnp.tanh(s / form.softcap)


def _at(x: Array | None, index: Array) -> Array | None:
    return None if x is None else jax.lax.dynamic_index_in_dim(x, index, 0, keepdims=False)


def _allowed(mask: AttentionMask, t: Tiles, i: Array, j: Array, n_keys: int) -> Array:
    """[B, 1, 1, l, s], to be broadcast over heads."""
    allowed = masks.tile_allowed(mask, _at(t.i, i), _at(t.j, j), _at(t.i_ids, i), _at(t.j_ids, j), n_keys)
    return allowed[:, None, None]


def forward(form: Form, q: Array, k: Array, v: Array, mask: AttentionMask) -> tuple[Array, Array]:
    """Output [B, L, H, K] in the dtype of `q`, and the log of the denominator [B, L, H] in float32.

    Rows without any key have output 0 and log denominator `FAR_BELOW`.
    """
    batch, n_queries, heads, width = q.shape
    n_keys = k.shape[1]
    t = _tiles(form, q, k, v, mask)
    start, stop = _bounds(_needed_IxJ(form, t, mask, n_queries))

    def rows(i: Array) -> tuple[Array, Array]:
        q_tile = _at(t.q, i)

        def visit(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            top, total, o = carry
            s = _scores(form, q_tile, _at(t.k, j))
            allowed = jnp.broadcast_to(_allowed(mask, t, i, j, n_keys), s.shape)
            s = jnp.where(allowed, s, FAR_BELOW)
            new_top = jnp.maximum(top, jnp.max(s, axis=-1))
            p = jnp.where(allowed, jnp.exp(s - new_top[..., None]), 0.0)
            shrink = jnp.exp(top - new_top)
            total = total * shrink + jnp.sum(p, axis=-1)
            pv = jnp.einsum("bgrls,bgsk->bgrlk", p.astype(v.dtype), _at(t.v, j), preferred_element_type=jnp.float32)
            return new_top, total, o * shrink[..., None] + pv

        shape = q_tile.shape[:-1]
        first = (jnp.full(shape, FAR_BELOW), jnp.zeros(shape), jnp.zeros(q_tile.shape, jnp.float32))
        top, total, o = jax.lax.fori_loop(start[i], stop[i], visit, first)
        empty = total == 0.0
        total = jnp.where(empty, 1.0, total)
        return (o / total[..., None]).astype(q.dtype), jnp.where(empty, FAR_BELOW, top + jnp.log(total))

    o, lse = jax.lax.map(rows, jnp.arange(t.q.shape[0], dtype=jnp.int32))
    return _join(o, n_queries), _join(lse[..., None], n_queries)[..., 0]


def _join(x: Array, length: int) -> Array:
    """The inverse of `_split_heads`: [tiles, B, G, R, block, K] -> [B, L, H, K]."""
    tiles, batch, groups, repeats, block, width = x.shape
    x = jnp.transpose(x, (1, 0, 4, 2, 3, 5)).reshape(batch, tiles * block, groups * repeats, width)
    return x[:, :length]


def backward(
    form: Form, inputs: tuple[Array, Array, Array, AttentionMask], do: Array, lse: Array, delta: Array
) -> tuple[Array, Array, Array]:
    """Gradients of q, k and v in float32.

    Args:
      form: static settings.
      inputs: q, k, v and the mask of the forward pass.
      do: gradient of the output, [B, L, H, K].
      lse: log of the softmax's denominator, [B, L, H].
      delta: `sum(do * o)` over the head width, [B, L, H].
    """
    q, k, v, mask = inputs
    n_queries, n_keys, groups = q.shape[1], k.shape[1], k.shape[2]
    t = _tiles(form, q, k, v, mask)
    start, stop = _bounds(_needed_IxJ(form, t, mask, n_queries).T)
    do_tiles = _split_heads(do.astype(q.dtype), groups, form.q_block)
    lse_tiles = _split_heads(lse[..., None], groups, form.q_block)
    delta_tiles = _split_heads(delta[..., None], groups, form.q_block)

    def columns(dq: Array, j: Array) -> tuple[Array, tuple[Array, Array]]:
        k_tile, v_tile = _at(t.k, j), _at(t.v, j)

        def visit(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            dq, dk, dv = carry
            q_tile, do_tile = _at(t.q, i), _at(do_tiles, i)
            s = _scores(form, q_tile, k_tile)
            allowed = jnp.broadcast_to(_allowed(mask, t, i, j, n_keys), s.shape)
            p = jnp.where(allowed, jnp.exp(s - _at(lse_tiles, i)), 0.0)
            dv += jnp.einsum("bgrls,bgrlk->bgsk", p.astype(v.dtype), do_tile, preferred_element_type=jnp.float32)
            dp = jnp.einsum("bgrlk,bgsk->bgrls", do_tile, v_tile, preferred_element_type=jnp.float32)
            ds = p * (dp - _at(delta_tiles, i)) * form.scale
            if form.softcap is not None:
                ds *= 1.0 - jnp.square(s / form.softcap)
            ds = ds.astype(q.dtype)
            dk += jnp.einsum("bgrls,bgrlk->bgsk", ds, q_tile, preferred_element_type=jnp.float32)
            dq_tile = jnp.einsum("bgrls,bgsk->bgrlk", ds, k_tile, preferred_element_type=jnp.float32)
            dq = jax.lax.dynamic_update_index_in_dim(dq, _at(dq, i) + dq_tile, i, 0)
            return dq, dk, dv

        zeros = jnp.zeros(k_tile.shape, jnp.float32)
        dq, dk, dv = jax.lax.fori_loop(start[j], stop[j], visit, (dq, zeros, zeros))
        return dq, (dk, dv)

    dq = jnp.zeros(t.q.shape, jnp.float32)
    dq, (dk, dv) = jax.lax.scan(columns, dq, jnp.arange(t.k.shape[0], dtype=jnp.int32))
    return _join(dq, n_queries), _join(dk[:, :, :, None], n_keys), _join(dv[:, :, :, None], n_keys)
