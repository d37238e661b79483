"""Attention under a mesh: every device computes its own rows, heads and part of the sequence.

Attention needs no exchange between rows or heads, but the partitioner cannot see that through loops and foreign
kernels. So it is said here. Where sequences are cut, keys and values are gathered first.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxlm.nn.copies import POSITIONS, ROWS, TENSOR, parts
from jaxlm.nn.kernels.masks import AttentionMask
from jaxlm.types import Array


def spread_attention(
    attend: Callable[..., Array], q: Array, k: Array, v: Array, mask: AttentionMask, *, gather: bool = True
) -> Array:
    """`attend(q, k, v, mask=mask)`, each device on its own share.

    Over `context` the queries stay where they are, and every part sees all keys: one gather of keys and values forward,
    one scatter of their gradients' sums backward.

    Args:
      attend: attention of [B, L, H, K] queries over [B, S, G, K] keys and values.
      q, k, v: its operands.
      mask: see `AttentionMask`.
      gather: false leaves keys and values cut over `context`, for an `attend` that passes them on itself (a ring).

    Returns:
      [B, L, H, K].
    """
    if not _fits(q.shape, k.shape):
        return attend(q, k, v, mask=mask)
    ids_q, ids_k, offset = mask.segments_BxL, mask.segments_BxS, mask.q_offset
    if not isinstance(offset, int):
        offset = jnp.asarray(offset, jnp.int32)
    same = q.shape[1] == k.shape[1]

    def share(q: Array, k: Array, v: Array, ids_q: Array | None, ids_k: Array | None, given: Array | None) -> Array:
        offset = mask.q_offset if given is None else given
        if jax.lax.axis_size(POSITIONS) > 1 and gather:
            ids_k = ids_q if ids_k is None else ids_k
            k, v, ids_k = (None if x is None else jax.lax.all_gather(x, POSITIONS, axis=1, tiled=True)
                           for x in (k, v, ids_k))  # fmt: skip
            offset = offset + jax.lax.axis_index(POSITIONS) * q.shape[1]
        return attend(q, k, v, mask=dataclasses.replace(mask, segments_BxL=ids_q, segments_BxS=ids_k, q_offset=offset))

    cut, ids = PartitionSpec(ROWS, POSITIONS, TENSOR), PartitionSpec(ROWS, POSITIONS)
    keys, key_ids = (cut, ids) if same else (PartitionSpec(ROWS, None, TENSOR), PartitionSpec(ROWS))
    specs = (cut, keys, keys, None if ids_q is None else ids, None if ids_k is None else key_ids,
             None if isinstance(offset, int) else PartitionSpec(ROWS) if offset.ndim else PartitionSpec())  # fmt: skip
    # A number that is known stays one, because backends look at it: cuDNN's causal starts at 0.
    offset = None if isinstance(offset, int) else offset
    # Loops inside kernels begin with constants, which the check of varying types would refuse.
    return jax.shard_map(share, in_specs=specs, out_specs=cut, check_vma=False)(q, k, v, ids_q, ids_k, offset)


def _fits(q: tuple[int, ...], k: tuple[int, ...]) -> bool:
    """Whether there is something to share out, in equal shares; a cache is not cut along its length."""
    rows, positions, heads = parts(ROWS[0]) * parts(ROWS[1]) * parts(ROWS[2]), parts(POSITIONS), parts(TENSOR)
    even = not (q[0] % rows or q[1] % positions or q[2] % heads or k[2] % heads)
    return rows * positions * heads > 1 and even and (positions == 1 or q[1] == k[1])
