"""Attention over a sequence that is cut over the mesh axis `context`, as a ring.

Each of n devices holds L / n tokens, in order. Keys and values go round the devices (Liu et al., 2310.01889), and what
each part contributes is merged by its log denominators, so that no device ever holds all of them. A mask that hides
whole parts skips their computation, not their journey.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from jaxlm.nn.copies import POSITIONS
from jaxlm.nn.kernels.blockwise import EMPTY, backward, delta_of, forward
from jaxlm.nn.kernels.masks import AttentionMask, complete
from jaxlm.nn.kernels.reference import FAR_BELOW
from jaxlm.nn.kernels.spread import spread_attention
from jaxlm.nn.kernels.tiles import Form, form_of, restored, stored
from jaxlm.types import Array


def ring_attention(
    q_BxLxHxK: Array,
    k_BxSxGxK: Array,
    v_BxSxGxK: Array,
    *,
    mask: AttentionMask,
    scale: float,
    softcap: float | None = None,
) -> Array:
    """The function of `reference_attention` under a mesh with an axis `context` over which L = S is cut.

    Each device sends n - 1 times: in the forward pass the keys and values that it has, in the backward pass these and,
    in float32, their gradients. Gathering them (`spread_attention`) sends two thirds of that, but holds all S of them.

    Args, Returns: as `reference_attention`; inside a manual region (`jax.shard_map`), of the device's own tokens. What
    else must hold, see `obstacle`.
    """
    if _kind() == AxisType.Auto:
        attend = functools.partial(ring_attention, scale=scale, softcap=softcap)
        return spread_attention(attend, q_BxLxHxK, k_BxSxGxK, v_BxSxGxK, mask, gather=False)
    mask = complete(mask, q_BxLxHxK.shape, k_BxSxGxK.shape)
    form = form_of(q_BxLxHxK, k_BxSxGxK, mask, scale, softcap)
    ids = None if mask.segments_BxL is None else (mask.segments_BxL, mask.segments_BxS)
    return _ring(form, (mask.causal, mask.window), q_BxLxHxK, k_BxSxGxK, v_BxSxGxK, ids)


def obstacle(q: Array, k: Array, mask: AttentionMask, softcap: float | None) -> str | None:
    """Why this call cannot be a ring, or null. `q` and `k` need only shapes."""
    del softcap
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if _kind() is None else mesh.shape[POSITIONS]
    if parts == 1:
        return f"there is no mesh in force whose axis {POSITIONS} has more than one device"
    if q.shape[1] != k.shape[1]:
        return f"it needs as many keys as queries, not {k.shape[1]} and {q.shape[1]}"
    if _kind() == AxisType.Auto and q.shape[1] % parts:
        return f"it needs a length that is a multiple of {parts}, not {q.shape[1]}"
    if mask.segments_BxL is None and mask.segments_BxS is not None:
        return "it needs segments of the queries where the keys have some"
    if not (isinstance(mask.q_offset, int) and mask.q_offset == 0):
        return "it needs queries that start where the keys do"
    return None


def _kind() -> AxisType | None:
    """Who deals with the axis in the mesh in force; null without it."""
    mesh = jax.sharding.get_abstract_mesh()
    return dict(zip(mesh.axis_names, mesh.axis_types, strict=True)).get(POSITIONS)


def _pass_on(x):
    """To the next device of the ring."""
    n = jax.lax.axis_size(POSITIONS)
    ring = [(i, (i + 1) % n) for i in range(n)]
    return jax.tree.map(lambda y: restored(jax.lax.ppermute(stored(y), POSITIONS, ring), y.dtype), x)


def _mask_after(kinds: tuple[bool, int | None], hops: Array | int, length: int, ids) -> AttentionMask:
    """The mask between own queries and the keys that arrive after so many hops."""
    own = jax.lax.axis_index(POSITIONS)
    source = jax.lax.rem(own - hops + jax.lax.axis_size(POSITIONS), jax.lax.axis_size(POSITIONS))
    ids_BxL, ids_BxS = (None, None) if ids is None else ids
    return AttentionMask(*kinds, ids_BxL, ids_BxS, (own - source) * length)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ring(form: Form, kinds: tuple[bool, int | None], q: Array, k: Array, v: Array, ids) -> Array:
    return _ring_forward(form, kinds, q, k, v, ids)[0]


def _ring_forward(form: Form, kinds: tuple[bool, int | None], q: Array, k: Array, v: Array, ids):
    own_ids, key_ids = (None, None) if ids is None else ids

    def hop(index: Array, carry):
        (o, lse), keys = carry
        keys = _pass_on(keys)
        mask = _mask_after(kinds, index, q.shape[1], None if ids is None else (own_ids, keys[2]))
        return _merge((o, lse), forward(form, q, keys[0], keys[1], mask)), keys

    o, lse = forward(form, q, k, v, _mask_after(kinds, 0, q.shape[1], ids))
    first = ((o.astype(jnp.float32), lse), (k, v, key_ids))
    (o, lse), _ = jax.lax.fori_loop(1, jax.lax.axis_size(POSITIONS), hop, first)
    o = o.astype(q.dtype)
    return o, (q, k, v, ids, o, lse)


def _merge(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
    """Outputs [B, L, H, K] and log denominators [B, G, R, L] over two sets of keys -> over both."""
    (o_a, lse_a), (o_b, lse_b) = a, b
    low_a, low_b = (jnp.where(x == EMPTY, FAR_BELOW, x) for x in (lse_a, lse_b))
    top = jnp.maximum(low_a, low_b)
    share_a, share_b = jnp.exp(low_a - top), jnp.exp(low_b - top)
    total = share_a + share_b

    def weigh(share: Array, o: Array) -> Array:
        batch, groups, repeats, length = share.shape
        share = jnp.moveaxis((share / total).reshape(batch, groups * repeats, length), 1, 2)
        return share[..., None] * o.astype(jnp.float32)

    lse = jnp.where(top == FAR_BELOW, EMPTY, top + jnp.log(total))
    return weigh(share_a, o_a) + weigh(share_b, o_b), lse


def _ring_backward(form: Form, kinds: tuple[bool, int | None], saved, do: Array):
    q, k, v, ids, o, lse = saved
    own_ids, key_ids = (None, None) if ids is None else ids
    delta = delta_of(do, o, lse)

    def gradients(hops: Array | int, keys):
        mask = _mask_after(kinds, hops, q.shape[1], None if ids is None else (own_ids, keys[2]))
        dq, dk, dv = backward(form, (q, *keys[:2], mask), do, lse, delta)
        return dq.astype(jnp.float32), (dk, dv)

    def hop(index: Array, carry):
        dq, keys, sums = carry
        # A first hop of empty sums is saved by starting with the second device's contribution.
        keys, sums = _pass_on((keys, sums))
        more, own = gradients(index, keys)
        return dq + more, keys, jax.tree.map(jnp.add, sums, own)

    keys = (k, v, key_ids)
    dq, home = gradients(0, keys)
    if jax.lax.axis_size(POSITIONS) > 1:
        keys = _pass_on(keys)
        more, sums = gradients(1, keys)
        dq, _, sums = jax.lax.fori_loop(2, jax.lax.axis_size(POSITIONS), hop, (dq + more, keys, sums))
        home = jax.tree.map(jnp.add, home, _pass_on(sums))
    return dq.astype(q.dtype), home[0].astype(k.dtype), home[1].astype(v.dtype), None


_ring.defvjp(_ring_forward, _ring_backward)
