"""Blockwise attention: online softmax over tiles, memory linear in the length, with its own backward pass.

Forward and backward follow Dao et al. (2205.14135, 2307.08691): only q, k, v, the output and the log of the softmax's
denominator are kept. Tiles that no query may use are never visited, through loops with dynamic bounds, which the own
backward pass makes legal.

Tiles are cut from the operands as they come, [B, L, H, K], when they are needed: nothing is laid out anew. The backward
pass works on transposed scores (keys x queries), because then four of its five products have both operands in the order
that matrix units want, and the fifth gives the queries' gradient transposed.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.nn.kernels import masks
from jaxlm.nn.kernels.masks import AttentionMask, Side
from jaxlm.nn.kernels.reference import FAR_BELOW
from jaxlm.types import Array

BLOCK = 256
"""Longest tile side."""

TILE = 4 * 256 * 256
"""Most scores of a tile, all heads together, where one device computes one tile after the other: 1 MiB in float32,
which stays in a CPU core's cache. Tiles of 24 and 48 heads cost 20 and 45 % more time per score."""


class Form(NamedTuple):
    """Static settings of a call.

    Attributes:
      scale, softcap: of the scores.
      blocks: tile sides of queries and keys.
      slots: rows of the batch and key heads that a tile spans.
    """

    scale: float
    softcap: float | None
    blocks: tuple[int, int]
    slots: tuple[int, int]


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
      ValueError: segment ids, a window or a scale that cannot be.
    """
    mask = masks.complete(mask, q_BxLxHxK.shape, k_BxSxGxK.shape)
    return _attention(form_of(q_BxLxHxK, k_BxSxGxK, scale, softcap), q_BxLxHxK, k_BxSxGxK, v_BxSxGxK, mask)


def form_of(q: Array, k: Array, scale: float, softcap: float | None) -> Form:
    """The settings for operands of these shapes."""
    if not scale > 0.0:
        raise ValueError(f"attention: scale {scale} is not positive; use e.g. head_dim ** -0.5")
    (batch, n_queries, heads, _), groups = q.shape, k.shape[2]
    blocks = (_block(n_queries), _block(k.shape[1]))
    slots = (batch, groups)
    if _one_device():
        room = max(1, TILE // (blocks[0] * blocks[1] * (heads // groups)))
        fit = _largest_divisor(groups, room)
        slots = (_largest_divisor(batch, room // groups) if fit == groups else 1, fit)
    return Form(float(scale), softcap, blocks, slots)


def _block(length: int) -> int:
    """The tile side that splits `length` evenly into the fewest tiles of at most `BLOCK`, a multiple of 8."""
    tiles = -(-length // BLOCK)
    return -(-math.ceil(length / tiles) // 8) * 8 if length > 8 else length


def _largest_divisor(number: int, most: int) -> int:
    return max(d for d in range(1, number + 1) if number % d == 0 and d <= max(1, most))


def _one_device() -> bool:
    """Whether the program is for one CPU device, so that cutting the axes of rows and heads moves nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    devices = jax.device_count() if mesh.empty else mesh.size
    return devices == 1 and jax.default_backend() == "cpu"


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(form: Form, q: Array, k: Array, v: Array, mask: AttentionMask) -> Array:
    return forward(form, q, k, v, mask)[0]


def _attention_forward(form: Form, q: Array, k: Array, v: Array, mask: AttentionMask):
    o, lse = forward(form, q, k, v, mask)
    return o, (q, k, v, mask, o, lse)


def _attention_backward(form: Form, saved, do: Array):
    q, k, v, mask, o, lse = saved
    dq, dk, dv = backward(form, (q, k, v, mask), do, lse, delta_of(do, o, lse))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_attention.defvjp(_attention_forward, _attention_backward)


def delta_of(do: Array, o: Array, lse: Array) -> Array:
    """`sum(do * o)` over the head width, [B, G, R, L] as `lse`."""
    delta = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), axis=-1)
    return jnp.moveaxis(delta, 1, 2).reshape(lse.shape)


class _Spot(NamedTuple):
    """Where a tile's slots begin: row of the batch, key head."""

    b: Array | int
    g: Array | int


class _Operands(NamedTuple):
    """Padded operands and the parts of the mask, cut into tiles on demand.

    Attributes:
      q: [B, L, H, K]. k, v: [B, S, G, K].
      mask: whose ids are padded too.
      n_keys: keys without padding, or null if there is none.
      needed: [B, I, J].
    """

    q: Array
    k: Array
    v: Array
    mask: AttentionMask
    n_keys: int | None
    needed: Array

    @classmethod
    def of(cls, form: Form, q: Array, k: Array, v: Array, mask: AttentionMask) -> "_Operands":
        block_q, block_k = form.blocks
        needed = masks.needed_BxIxJ(mask, (q.shape[0], q.shape[1], k.shape[1]), form.blocks)
        ids = (mask.segments_BxL, block_q), (mask.segments_BxS, block_k)
        ids_BxL, ids_BxS = (None if x is None else masks.pad_to(x, block) for x, block in ids)
        mask = AttentionMask(mask.causal, mask.window, ids_BxL, ids_BxS, masks.offset_B(mask, q.shape[0]))
        n_keys = k.shape[1] if k.shape[1] % block_k else None
        return cls(masks.pad_to(q, block_q), masks.pad_to(k, block_k), masks.pad_to(v, block_k), mask, n_keys, needed)

    def spot(self, form: Form, index: Array) -> _Spot:
        batch, groups = self.k.shape[0], self.k.shape[2]
        wide = groups // form.slots[1]
        b = 0 if form.slots[0] == batch else index // wide * form.slots[0]
        return _Spot(b, 0 if wide == 1 else index % wide * form.slots[1])

    def spots(self, form: Form) -> int:
        return (self.k.shape[0] // form.slots[0]) * (self.k.shape[2] // form.slots[1])

    def needed_at(self, form: Form, spot: _Spot) -> Array:
        """[I, J] for the rows of the batch at the spot."""
        return jnp.any(_cut(self.needed, (spot.b, 0, 0), (form.slots[0], *self.needed.shape[1:])), axis=0)

    def queries(self, form: Form, spot: _Spot, i: Array) -> Side:
        rows, block = form.slots[0], form.blocks[0]
        position = _cut(self.mask.q_offset, (spot.b,), (rows,))[:, None]
        position += (i * block + jnp.arange(block, dtype=jnp.int32))[None, :]
        ids = self.mask.segments_BxL
        return Side(position, None if ids is None else _cut(ids, (spot.b, i * block), (rows, block)))

    def keys(self, form: Form, spot: _Spot, j: Array) -> Side:
        rows, block = form.slots[0], form.blocks[1]
        position = (j * block + jnp.arange(block, dtype=jnp.int32))[None, :]
        ids = self.mask.segments_BxS
        return Side(position, None if ids is None else _cut(ids, (spot.b, j * block), (rows, block)))


def _cut(x: Array, start: tuple[Array | int, ...], sizes: tuple[int, ...]) -> Array:
    return jax.lax.dynamic_slice(x, tuple(jnp.asarray(s, jnp.int32) for s in start), sizes)


def _tile(x: Array, form: Form, spot: _Spot, index: Array, block: int, repeats: int) -> Array:
    """A tile of [B, L, H, K], as [b, g, R, l, K]; `repeats` is R, the heads of `x` for each key head."""
    rows, groups = form.slots
    x = _cut(x, (spot.b, index * block, spot.g * repeats, 0), (rows, block, groups * repeats, x.shape[3]))
    return jnp.transpose(x, (0, 2, 1, 3)).reshape(rows, groups, repeats, block, -1)


def _put(whole: Array, tile: Array, spot: _Spot, index: Array) -> Array:
    """The inverse of `_tile`: writes [b, g, R, l, K] into [B, L, H, K]."""
    rows, groups, repeats, block, width = tile.shape
    tile = jnp.transpose(tile.reshape(rows, groups * repeats, block, width), (0, 2, 1, 3)).astype(whole.dtype)
    start = (spot.b, index * block, spot.g * repeats, 0)
    return jax.lax.dynamic_update_slice(whole, tile, tuple(jnp.asarray(s, jnp.int32) for s in start))


def _product(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _capped(form: Form, s: Array) -> tuple[Array, float]:
    """Scores, and the factor that is still to be applied: folding it into the exponent saves a pass over the tile."""
    if form.softcap is None:
        return s, form.scale
    return form.softcap * jnp.tanh(s * (form.scale / form.softcap)), 1.0


def _masked(s: Array, allowed: Array | None) -> Array:
    return s if allowed is None else jnp.where(jnp.broadcast_to(allowed, s.shape), s, FAR_BELOW)


def forward(form: Form, q: Array, k: Array, v: Array, mask: AttentionMask) -> tuple[Array, Array]:
    """Output [B, L, H, K] in the dtype of `q`, and the log of the softmax's denominator [B, G, R, L] in float32.

    Rows without any key have output 0 and log denominator 0, which makes their probabilities 0 in the backward pass.
    """
    x = _Operands.of(form, q, k, v, mask)
    (batch, length, heads, _), groups = x.q.shape, k.shape[2]
    tiles, repeats = length // form.blocks[0], heads // groups

    def row_of_tiles(index: Array, out: tuple[Array, Array]) -> tuple[Array, Array]:
        spot, i = x.spot(form, index // tiles), index % tiles
        start, stop = masks.bounds(x.needed_at(form, spot))
        q_tile, queries = _tile(x.q, form, spot, i, form.blocks[0], repeats), x.queries(form, spot, i)
        top, total, o = _softmax_over(form, x, spot, q_tile, queries, (start[i], stop[i]))
        empty = total == 0.0
        total = jnp.where(empty, 1.0, total)
        lse = jnp.where(empty, 0.0, top + jnp.log(total))
        at = tuple(jnp.asarray(s, jnp.int32) for s in (spot.b, spot.g, 0, i * form.blocks[0]))
        return _put(out[0], o / total[..., None], spot, i), jax.lax.dynamic_update_slice(out[1], lse, at)

    lse = jnp.zeros((batch, groups, repeats, length), jnp.float32)
    out = (jnp.zeros(x.q.shape, q.dtype), lse)
    o, lse = jax.lax.fori_loop(0, x.spots(form) * tiles, row_of_tiles, out)
    return o[:, : q.shape[1]], lse[..., : q.shape[1]]


def _softmax_over(
    form: Form, x: _Operands, spot: _Spot, q_tile: Array, queries: Side, span: tuple[Array, Array]
) -> tuple[Array, Array, Array]:
    """Largest score, denominator and unnormalised output of a tile of queries over the keys of `span`."""

    def visit(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, o = carry
        k_tile = _tile(x.k, form, spot, j, form.blocks[1], 1)[:, :, 0]
        v_tile = _tile(x.v, form, spot, j, form.blocks[1], 1)[:, :, 0]
        s, factor = _capped(form, _product("bgrlk,bgsk->bgrls", q_tile, k_tile))
        keys = x.keys(form, spot, j)
        allowed = masks.allowed(x.mask, _expand(queries, 2), _expand(keys, 1), x.n_keys)
        s = _masked(s, None if allowed is None else allowed[:, None, None])
        new_top = jnp.maximum(top, factor * jnp.max(s, axis=-1))
        p = jnp.exp(factor * s - new_top[..., None])
        shrink = jnp.exp(top - new_top)
        o = o * shrink[..., None] + _product("bgrls,bgsk->bgrlk", p.astype(v_tile.dtype), v_tile)
        return new_top, total * shrink + jnp.sum(p, axis=-1), o

    shape = q_tile.shape[:-1]
    # The first maximum lies far above a masked score, so that rows with nothing but masked scores get p = exp(-inf) = 0.
    first = (jnp.full(shape, FAR_BELOW * form.scale / 10), jnp.zeros(shape), jnp.zeros(q_tile.shape, jnp.float32))
    return jax.lax.fori_loop(*span, visit, first)


def _expand(side: Side, axis: int) -> Side:
    return Side(*(None if x is None else jnp.expand_dims(x, axis) for x in side))


def backward(
    form: Form, inputs: tuple[Array, Array, Array, AttentionMask], do: Array, lse: Array, delta: Array
) -> tuple[Array, Array, Array]:
    """Gradients of q, k and v in float32.

    Args:
      form: static settings.
      inputs: q, k, v and the mask of the forward pass.
      do: gradient of the output, [B, L, H, K].
      lse: log of the softmax's denominator, [B, G, R, L].
      delta: see `delta_of`.
    """
    q, k, v, mask = inputs
    x = _Operands.of(form, q, k, v, mask)
    block_q, block_k = form.blocks
    do = masks.pad_to(do.astype(q.dtype), block_q)
    rest = [(0, 0)] * 3 + [(0, x.q.shape[1] - q.shape[1])]
    rows = tuple(jnp.pad(y, rest) for y in (lse, delta))
    tiles = x.k.shape[1] // block_k

    def column_of_tiles(index: Array, out: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        spot, j = x.spot(form, index // tiles), index % tiles
        start, stop = masks.bounds(x.needed_at(form, spot).T)
        dq, dk, dv = _gradients_over(form, (x, do, *rows), spot, j, (start[j], stop[j]), out[0])
        return dq, _put(out[1], dk[:, :, None] * form.scale, spot, j), _put(out[2], dv[:, :, None], spot, j)

    zeros = tuple(jnp.zeros(y.shape, jnp.float32) for y in (x.q, x.k, x.v))
    dq, dk, dv = jax.lax.fori_loop(0, x.spots(form) * tiles, column_of_tiles, zeros)
    return dq[:, : q.shape[1]], dk[:, : k.shape[1]], dv[:, : k.shape[1]]


def _gradients_over(form: Form, operands, spot: _Spot, j: Array, span: tuple[Array, Array], dq: Array):
    """Gradients of a tile of keys and values from the queries of `span`, whose own are added to `dq`."""
    x, do, lse, delta = operands
    (rows, groups), (block_q, block_k) = form.slots, form.blocks
    repeats = x.q.shape[2] // x.k.shape[2]
    k_tile = _tile(x.k, form, spot, j, block_k, 1)[:, :, 0]
    v_tile = _tile(x.v, form, spot, j, block_k, 1)[:, :, 0]
    keys = _expand(x.keys(form, spot, j), 2)

    def visit(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        dq, dk, dv = carry
        q_tile, do_tile = (_tile(y, form, spot, i, block_q, repeats) for y in (x.q, do))
        at, sizes = (spot.b, spot.g, 0, i * block_q), (rows, groups, repeats, block_q)
        s, factor = _capped(form, _product("bgsk,bgrlk->bgsrl", k_tile, q_tile))
        allowed = masks.allowed(x.mask, _expand(x.queries(form, spot, i), 1), keys, x.n_keys)
        masked = _masked(s, None if allowed is None else allowed[:, None, :, None])
        p = jnp.exp(factor * masked - _cut(lse, at, sizes)[:, :, None])
        dv += _product("bgsrl,bgrlk->bgsk", p.astype(do_tile.dtype), do_tile)
        dp = _product("bgsk,bgrlk->bgsrl", v_tile, do_tile)
        ds = p * (dp - _cut(delta, at, sizes)[:, :, None])
        if form.softcap is not None:
            ds *= 1.0 - jnp.square(s / form.softcap)
        ds = ds.astype(q_tile.dtype)
        dk += _product("bgsrl,bgrlk->bgsk", ds, q_tile)
        dq_tile = _product("bgsk,bgsrl->bgkrl", k_tile, ds)
        dq_tile = jnp.transpose(dq_tile, (0, 1, 3, 4, 2)) * form.scale
        return _put(dq, _tile(dq, form, spot, i, block_q, repeats) + dq_tile, spot, i), dk, dv

    zeros = jnp.zeros(k_tile.shape, jnp.float32)
    return jax.lax.fori_loop(*span, visit, (dq, zeros, zeros))
