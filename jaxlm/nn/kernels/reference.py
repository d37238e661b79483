"""Attention as the formula says it, with every score in memory: what the other forms are held to."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxlm.nn.kernels.masks import AttentionMask, allowed_BxLxS, complete
from jaxlm.types import Array

QUERIES = 128
"""Queries whose scores `mean_attention` holds at a time."""

FAR_BELOW = -1e30
"""Stands for minus infinity among scores: finite, so that a row without any key gives no NaN."""


def reference_attention(
    q_BxLxHxK: Array,
    k_BxSxGxK: Array,
    v_BxSxGxK: Array,
    *,
    mask: AttentionMask,
    scale: float,
    softcap: float | None = None,
) -> Array:
    """`softmax(cap(scale q k^T), where allowed) v`, by operations that can be differentiated any number of times.

    `cap(s) = softcap * tanh(s / softcap)`. Query head h uses key head `h // (H / G)`. Scores and softmax are float32;
    probabilities are rounded to the dtype of `v` for the last product, which sums in float32. Memory B * H * L * S.

    Args:
      q_BxLxHxK: queries, [B, L, H, K].
      k_BxSxGxK, v_BxSxGxK: keys and values, [B, S, G, K], G a divisor of H.
      mask: who sees whom.
      scale: multiplies the scores, usually `K ** -0.5`.
      softcap: null, or the cap.

    Returns:
      [B, L, H, K] in the dtype of `q`; 0 for queries that see no key.
    """
    p = probabilities(q_BxLxHxK, k_BxSxGxK, mask=mask, scale=scale, softcap=softcap)
    o = _weighted(p.astype(v_BxSxGxK.dtype), v_BxSxGxK)
    return o.reshape(q_BxLxHxK.shape).astype(q_BxLxHxK.dtype)


def _scores(q_BxLxGxRxK: Array, k_BxSxGxK: Array) -> Array:
    """[B, G, R, L, S], bare. For a single query keys come on the right, as the cache has them: with any other form of
    the product XLA's CPU compiler copies them all."""
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    if q_BxLxGxRxK.shape[1] == 1:
        return product("bgrk,bgks->bgrs", q_BxLxGxRxK[:, 0], jnp.moveaxis(k_BxSxGxK, 1, -1))[..., None, :]
    return product("blgrk,bsgk->bgrls", q_BxLxGxRxK, k_BxSxGxK)


def _weighted(p_BxGxRxLxS: Array, v_BxSxGxK: Array) -> Array:
    """[B, L, G, R, K]; for a single query as in `_scores`."""
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    if p_BxGxRxLxS.shape[3] == 1:
        return product("bgrs,bgsk->bgrk", p_BxGxRxLxS[:, :, :, 0], jnp.moveaxis(v_BxSxGxK, 1, 2))[:, None]
    return product("bgrls,bsgk->blgrk", p_BxGxRxLxS, v_BxSxGxK)


def probabilities(
    q_BxLxHxK: Array, k_BxSxGxK: Array, *, mask: AttentionMask, scale: float, softcap: float | None = None
) -> Array:
    """The softmax of `reference_attention`: float32 [B, G, H / G, L, S]; 0 for queries that see no key."""
    batch, n_queries, heads, width = q_BxLxHxK.shape
    groups = k_BxSxGxK.shape[2]
    mask = complete(mask, q_BxLxHxK.shape, k_BxSxGxK.shape)
    q = q_BxLxHxK.reshape(batch, n_queries, groups, heads // groups, width)
    s = _scores(q, k_BxSxGxK) * scale
    if softcap is not None:
        s = softcap * jnp.tanh(s / softcap)
    allowed = jnp.broadcast_to(allowed_BxLxS(mask, n_queries, s.shape[-1], batch)[:, None, None], s.shape)
    s = jnp.where(allowed, s, FAR_BELOW)
    top = jax.lax.stop_gradient(jnp.max(s, axis=-1, keepdims=True))
    p = jnp.where(allowed, jnp.exp(s - top), 0.0)
    total = jnp.sum(p, axis=-1, keepdims=True)
    return p / jnp.where(total == 0.0, 1.0, total)


def mean_attention(
    q_BxLxHxK: Array, k_BxSxGxK: Array, *, mask: AttentionMask, scale: float, softcap: float | None = None
) -> Array:
    """Who attends to whom, mean over heads: float32 [B, L, S]; 0 for queries that see no key.

    The scores of `QUERIES` queries at a time are in memory, in the backward pass too. The queries are whole rows (no
    cache). Arguments as in `reference_attention`.
    """
    mask = complete(mask, q_BxLxHxK.shape, k_BxSxGxK.shape)
    length = q_BxLxHxK.shape[1]
    count = next(n for n in range(-(-length // QUERIES), length + 1) if length % n == 0)
    size = length // count

    @jax.checkpoint
    def part(index: Array) -> Array:
        start = index * size

        def cut(x: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(x, start, size, 1)

        ids = None if mask.segments_BxL is None else cut(mask.segments_BxL)
        here = dataclasses.replace(mask, segments_BxL=ids, q_offset=start)
        p = probabilities(cut(q_BxLxHxK), k_BxSxGxK, mask=here, scale=scale, softcap=softcap)
        return jnp.mean(p, axis=(1, 2))

    parts = jax.lax.map(part, jnp.arange(count, dtype=jnp.int32))
    return jnp.moveaxis(parts, 0, 1).reshape(-1, length, k_BxSxGxK.shape[1])
