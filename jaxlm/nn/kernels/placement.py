"""Running a kernel on each device's own rows, heads and tokens, where the partitioner cannot cut it."""

import math
from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec

from jaxlm.types import Array

ROWS = ("data", "fsdp", "expert")
HEADS = "tensor"
"""Mesh axes over which the batch and the heads are sharded."""


def auto_axes() -> dict[str, int]:
    """Size of each axis of the mesh in force that the partitioner handles; none without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name: mesh.shape[name] for name, kind in kinds if kind == jax.sharding.AxisType.Auto}


def on_each_device(
    local: Callable[..., Array], q: Array, k: Array, ids: tuple[Array, Array] | None, tokens: str | None = None
) -> Callable[..., Array]:
    """`local(q, k, v, ids) -> o` as a function of whole arrays, each device computing its own part.

    Args:
      local: takes q [b, l, h, K], k and v [b, s, g, K] and ids ([b, l], [b, s]) or null; gives o as q.
      q, k: [B, L, H, K] and [B, S, G, K]; an axis of rows or heads that does not divide evenly stays whole.
      ids: segment ids [B, L] and [B, S], or null.
      tokens: the mesh axis over which L and S are sharded, or null.
    """
    axes = auto_axes()
    rows = tuple(a for a in ROWS if a in axes)
    if q.shape[0] % math.prod(axes[a] for a in rows):
        rows = ()
    heads = HEADS if HEADS in axes and k.shape[2] % axes[HEADS] == 0 else None
    used = {*rows, *(a for a in (heads, tokens) if a is not None)}
    if not used:
        return local
    data = PartitionSpec(rows, tokens, heads, None)
    specs = (data, data, data, None if ids is None else (PartitionSpec(rows, tokens),) * 2)
    return jax.shard_map(local, in_specs=specs, out_specs=data, axis_names=used, check_vma=False)
