"""Values handed out as copies, one for each part of a mesh axis, so that gradients are summed once.

Where a value is used several times, the partitioner sums each use's gradient over devices by itself. Used through
copies, each part adds up its own uses first, and the sum over parts is the gradient of the handing out. The mesh is the
one in force (`jax.set_mesh`); without one nothing is copied.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from jaxlm.nn.panels import Panels
from jaxlm.nn.qtensor import QTensor, dequantise
from jaxlm.types import Array

ROWS = ("data", "fsdp", "expert")
"""Mesh axes over which the rows of a batch are spread."""

POSITIONS = "context"
"""The mesh axis over which positions are spread."""

TENSOR = "tensor"
"""The mesh axis over which heads, feed-forward width and vocabulary are spread."""

FREE = PartitionSpec.UNCONSTRAINED


def parts(axis: str) -> int:
    """Parts of a mesh axis that the partitioner deals with; 1 without a mesh, or inside a part."""
    mesh = jax.sharding.get_abstract_mesh()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return mesh.shape[axis] if types.get(axis) == AxisType.Auto else 1


def table_copies(table_VxD: Array, shape: tuple[int, ...]) -> Array:
    """A table for each group of devices that has rows of its own: [V, D] -> [groups, V, D], for `look_up`.

    Each group looks up its own tokens in a whole table, and the gradient is summed over groups once. The partitioner,
    left alone with a table cut over `fsdp`, may gather the activations of all rows instead. A tied head is to use the
    copies too: then both of its gradients are in that one sum.

    Args:
      table_VxD: the table.
      shape: of the tokens, [B, L].

    Returns:
      The copies, spread over the groups; the table itself with one group, or if rows or positions cannot be spread
      evenly.
    """
    rows = parts(ROWS[0]) * parts(ROWS[1]) * parts(ROWS[2])
    groups = rows * parts(POSITIONS)
    if groups == 1 or shape[0] % rows or shape[1] % parts(POSITIONS):
        return table_VxD
    copies = jnp.broadcast_to(table_VxD[None], (groups, *table_VxD.shape))
    return jax.lax.with_sharding_constraint(copies, PartitionSpec((*ROWS, POSITIONS), FREE, FREE))


def look_up(table: Array, tokens_BxL: Array) -> Array:
    """Rows of the table by token: [B, L, D]. Ids out of range are clipped, as a device cannot raise.

    Args:
      table: [V, D], or the copies of it from `table_copies`.
      tokens_BxL: int32.
    """
    if table.ndim == 2:
        return jnp.take(table, tokens_BxL, axis=0, mode="clip")
    axes = (*ROWS, POSITIONS)
    local = jax.shard_map(
        lambda copy, tokens: jnp.take(copy[0], tokens, axis=0, mode="clip"),
        in_specs=(PartitionSpec(axes), PartitionSpec(ROWS, POSITIONS)),
        out_specs=PartitionSpec(ROWS, POSITIONS),
        axis_names=set(axes),
    )
    return local(table, tokens_BxL)


Kernel = TypeVar("Kernel", Array, QTensor, Array | QTensor)


class Fan(NamedTuple):
    """The input of several projections whose columns are spread over `tensor`.

    Attributes:
      whole: x [..., D].
      copies: x for each part, [T, ..., D], T parts spread over the axis.
    """

    whole: Array
    copies: Array


def fan_out(x: Array) -> Array | Fan:
    """`x` for several projections by `project`: itself where `tensor` has one part."""
    count = parts(TENSOR)
    if count == 1:
        return x
    copies = jnp.broadcast_to(x[None], (count, *x.shape))
    return Fan(x, jax.lax.with_sharding_constraint(copies, PartitionSpec(TENSOR, *(FREE,) * (x.ndim - 1), None)))


def whole(x: Array | Fan) -> Array:
    """The value itself."""
    return x.whole if isinstance(x, Fan) else x


def columns(product: Callable[..., Array], x: Array | Fan, w_DxF: Array | QTensor | Panels) -> Array:
    """`product(x, w)` [..., F]; of a fan, each part makes its own columns from its own copy."""
    if not isinstance(x, Fan) or isinstance(w_DxF, Panels):
        return product(whole(x), w_DxF)
    width, count = w_DxF.shape[1], x.copies.shape[0]

    def split(w_DxF: Array) -> Array:
        return jnp.moveaxis(w_DxF.reshape(-1, count, width // count), 1, 0)

    y_T = _by_part(product, split, x.copies, w_DxF, (TENSOR, None))
    return jnp.moveaxis(y_T, 0, -2).reshape(*x.whole.shape[:-1], width)


def rows(product: Callable[..., Array], x: Array, w_FxD: Array | QTensor | Panels) -> Array:
    """`product(x, w)` [..., D] of x [..., F], F spread over `tensor`: the parts' sums are added in the dtype of x.

    Left to the partitioner, the sums would travel in the float32 in which they were made.
    """
    count = parts(TENSOR)
    if count == 1 or isinstance(w_FxD, Panels):
        return product(x, w_FxD)

    def split(w_FxD: Array) -> Array:
        return w_FxD.reshape(count, -1, w_FxD.shape[1])

    x_T = jnp.moveaxis(x.reshape(*x.shape[:-1], count, -1), -2, 0)
    return jax.lax.reduce_sum(_by_part(product, split, x_T, w_FxD, (None, TENSOR)), axes=(0,))


def packed_whole(w: Kernel, axes: tuple[str | None, str | None] = (None, None)) -> Kernel:
    """A quantised kernel whose parts come together over `fsdp`: its codes travel, not the values they stand for.

    Args:
      w: the kernel; an array is left as it is.
      axes: mesh axes over which rows and columns of codes and scales stay spread.
    """
    if not isinstance(w, QTensor) or parts(ROWS[1]) == 1:
        return w

    def gather(part: Array) -> Array:
        fitting = (a if a is not None and n % parts(a) == 0 else None for a, n in zip(axes, part.shape, strict=True))
        return jax.lax.with_sharding_constraint(part, PartitionSpec(*fitting))

    return dataclasses.replace(w, codes=gather(w.codes), absmax=gather(w.absmax))


def _by_part(
    product: Callable[..., Array],
    split: Callable[[Array], Array],
    x_T: Array,
    w: Array | QTensor,
    packed: tuple[str | None, str | None],
) -> Array:
    """`product` of each part with its kernel. The kernels, not the activations, come together over `fsdp`."""

    def gathered(x_T: Array, w: Array | QTensor) -> Array:
        kernel = dequantise(packed_whole(w, packed), x_T.dtype) if isinstance(w, QTensor) else w
        kernels = jax.lax.with_sharding_constraint(split(kernel), PartitionSpec(TENSOR, None, None))
        return jax.vmap(product)(x_T, kernels)

    # The backward pass gathers again instead of keeping the whole kernels of all layers.
    return jax.checkpoint(gathered, policy=jax.checkpoint_policies.nothing_saveable)(x_T, w)
