"""Blockwise attention: online softmax over tiles, memory linear in the length, with its own backward pass.

Forward and backward follow Dao et al. (2205.14135, 2307.08691): only q, k, v, the output and the log of the softmax's
denominator are kept. Tiles that no query may use are never visited, through loops with dynamic bounds, which the own
backward pass makes legal.

Tiles are cut from the operands as they come, [B, L, H, K]: only the keys are laid out anew, transposed. The backward
pass works on transposed scores (keys x queries), because then all its five products have both operands in the order
that matrix units want.
"""

import functools

import jax
import jax.numpy as jnp

from jaxlm.nn.kernels import masks
from jaxlm.nn.kernels.masks import AttentionMask, Side
from jaxlm.nn.kernels.reference import FAR_BELOW
from jaxlm.nn.kernels.tiles import DECODE, Form, Operands, Spot, cut, form_of, restored, stored
from jaxlm.types import Array

EMPTY = 1e30
"""Log denominator of a row that sees no key: so far above every score that its probabilities are 0 in the backward
pass."""


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
      ValueError: segment ids, a window, a scale or a cap that cannot be.
    """
    mask = masks.complete(mask, q_BxLxHxK.shape, k_BxSxGxK.shape)
    form = form_of(q_BxLxHxK, k_BxSxGxK, mask, scale, softcap)
    return _attention(form, q_BxLxHxK, k_BxSxGxK, v_BxSxGxK, mask)


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


def _product(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _capped(form: Form, s: Array) -> tuple[Array, float]:
    """Scores, and the factor that is still to be applied: folding it into the exponent saves a pass over the tile."""
    if form.softcap is None:
        return s, form.scale
    return form.softcap * jnp.tanh(s * (form.scale / form.softcap)), 1.0


def _masked(s: Array, allowed: Array | None) -> Array:
    return s if allowed is None else jnp.where(jnp.broadcast_to(allowed, s.shape), s, FAR_BELOW)


def _expand(side: Side, axis: int) -> Side:
    return Side(*(None if x is None else jnp.expand_dims(x, axis) for x in side))


def forward(form: Form, q: Array, k: Array, v: Array, mask: AttentionMask) -> tuple[Array, Array]:
    """Output [B, L, H, K] in the dtype of `q`, and the log of the denominator [B, G, R, L] in float32.

    Rows without any key have output 0 and log denominator `EMPTY`.
    """
    x = Operands.of(form, q, k, v, mask)

    def row_of_tiles(index: Array, out: tuple[Array, Array]) -> tuple[Array, Array]:
        spot, i, span = x.row_of_tiles(index)
        top, total, o = _softmax_over(x, spot, i, span)
        empty = total == 0.0
        total = jnp.where(empty, 1.0, total)
        lse = jnp.where(empty, EMPTY, top + jnp.log(total))
        at = tuple(jnp.asarray(s, jnp.int32) for s in (spot.b, spot.g, 0, i * form.blocks[0]))
        return x.put_queries(out[0], o / total[..., None], spot, i), jax.lax.dynamic_update_slice(out[1], lse, at)

    lse = jnp.zeros((q.shape[0], k.shape[2], x.repeats, q.shape[1]), jnp.float32)
    o, lse = jax.lax.fori_loop(0, x.rows_of_tiles, row_of_tiles, (stored(jnp.zeros_like(q)), lse))
    return restored(o, q.dtype), lse


def _softmax_over(x: Operands, spot: Spot, i: Array, span: tuple[Array, Array]) -> tuple[Array, Array, Array]:
    """Largest score, denominator and unnormalised output of a tile of queries over the keys of `span`."""
    q_tile = x.queries(x.q, spot, i)
    queries = _expand(x.query_side(spot, i)._replace(fresh=None), 2)

    def visit(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, o = carry
        v_tile = x.keys(x.v, spot, j)
        s, factor = _capped(x.form, _scores(x, q_tile, spot, j))
        allowed = masks.allowed(x.mask, queries, _expand(x.key_side(spot, j), 1))
        s = _masked(s, None if allowed is None else allowed[:, None, None])
        new_top = jnp.maximum(top, factor * jnp.max(s, axis=-1))
        p = jnp.exp(factor * s - new_top[..., None])
        shrink = jnp.exp(top - new_top)
        o = o * shrink[..., None] + _product("bgrls,bgsk->bgrlk", p.astype(v_tile.dtype), v_tile)
        return new_top, total * shrink + jnp.sum(p, axis=-1), o

    shape = q_tile.shape[:-1]
    # The first maximum lies far above a masked score, so that rows of nothing but masked scores get p = exp(-inf) = 0.
    least = FAR_BELOW * min(1.0, x.form.scale) / 10
    first = (jnp.full(shape, least), jnp.zeros(shape), jnp.zeros(q_tile.shape, jnp.float32))
    return jax.lax.fori_loop(*span, visit, first)


def _scores(x: Operands, q_tile: Array, spot: Spot, j: Array) -> Array:
    """Bare scores of a tile, [b, g, R, l, s]."""
    if q_tile.shape[3] > DECODE[0]:
        return _product("bgrlk,bgks->bgrls", q_tile, x.keys_T(spot, j))
    # Few queries: transposing the keys would cost more than the product, which for a single query is a fourth of it.
    return jnp.moveaxis(_product("bgsk,bgrlk->bgsrl", x.keys(x.k, spot, j), q_tile), 2, -1)


def backward(
    form: Form, inputs: tuple[Array, Array, Array, AttentionMask], do: Array, lse: Array, delta: Array
) -> tuple[Array, Array, Array]:
    """Gradients of q (in its dtype), k and v (float32).

    Args:
      form: static settings.
      inputs: q, k, v and the mask of the forward pass.
      do: gradient of the output, [B, L, H, K].
      lse: log of the softmax's denominator, [B, G, R, L].
      delta: see `delta_of`.
    """
    x = Operands.of(form, *inputs)
    do = stored(do.astype(x.dtype))

    def row_of_tiles(index: Array, out: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        spot, i, span = x.row_of_tiles(index)
        dq, dk, dv = _gradients_over(x, (do, lse, delta), (spot, i), span, out[1:])
        return x.add_to_queries(out[0], jnp.transpose(dq, (0, 1, 3, 4, 2)) * form.scale, spot, i), dk, dv

    zeros = (jnp.zeros_like(x.q), *(jnp.zeros(y.shape, jnp.float32) for y in (x.k, x.v)))
    dq, dk, dv = jax.lax.fori_loop(0, x.rows_of_tiles, row_of_tiles, zeros)
    return restored(dq, x.dtype), dk, dv


def _gradients_over(x: Operands, rows, at: tuple[Spot, Array], span: tuple[Array, Array], out: tuple[Array, Array]):
    """Gradient of a tile of queries over the keys of `span`, transposed; adds the keys' and values' own to `out`."""
    (do, lse, delta), (spot, i), form = rows, at, x.form
    q_tile, do_tile = x.queries(x.q, spot, i), x.queries(do, spot, i)
    q_T, do_T = (jnp.transpose(y, (0, 1, 4, 2, 3)) for y in (q_tile, do_tile))
    start, sizes = (spot.b, spot.g, 0, i * form.blocks[0]), (*form.slots, x.repeats, form.blocks[0])
    lse_tile, delta_tile = (cut(y, start, sizes)[:, :, None] for y in (lse, delta))
    queries = _expand(x.query_side(spot, i), 1)

    def visit(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        dq, dk, dv = carry
        s, factor = _capped(form, _product("bgsk,bgkrl->bgsrl", x.keys(x.k, spot, j), q_T))
        allowed = masks.allowed(x.mask, queries, _expand(x.key_side(spot, j), 2))
        masked = _masked(s, None if allowed is None else allowed[:, None, :, None])
        p = jnp.exp(factor * masked - lse_tile)
        dv = x.add_to_keys(dv, _product("bgsrl,bgrlk->bgsk", p.astype(do_tile.dtype), do_tile), spot, j)
        ds = p * (_product("bgsk,bgkrl->bgsrl", x.keys(x.v, spot, j), do_T) - delta_tile)
        if form.softcap is not None:
            ds *= 1.0 - jnp.square(s / form.softcap)
        ds = ds.astype(q_tile.dtype)
        dk = x.add_to_keys(dk, _product("bgsrl,bgrlk->bgsk", ds, q_tile) * form.scale, spot, j)
        return dq + _product("bgks,bgsrl->bgkrl", x.keys_T(spot, j), ds), dk, dv

    return jax.lax.fori_loop(*span, visit, (jnp.zeros(q_T.shape, jnp.float32), *out))
