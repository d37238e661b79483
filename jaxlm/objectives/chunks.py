"""Heads in chunks: how positions are grouped and cut so that the logits [B, L, V] never exist at once.

Rows are grouped as the mesh shards them, and each group sums its own gradient of the head, so that nothing but the
final sum crosses devices. Within a group, chunks of positions are walked one after the other.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxlm.nn.kernels.matmul import outer
from jaxlm.types import Array, Head

CHUNK = {"cpu": 256}
"""Rows of logits at a time and device, by platform. CPU's is measured: 512 to 128 differ by 6 % either way with the
vocabulary. Elsewhere it is `LONG_CHUNK`, because each chunk also reads and writes the whole gradient of the head."""

LONG_CHUNK = 2048

BATCH_AXES = ("data", "fsdp", "expert")
SEQUENCE_AXES = ("context",)
"""Mesh axes over which the two leading axes of a batch are sharded."""


class Layout(NamedTuple):
    """What is static about a head: see `types.Head`."""

    softcap: float | None
    tied: bool


def chunk_rows() -> int:
    """Rows of logits that each device makes at a time on this platform."""
    return CHUNK.get(jax.default_backend(), LONG_CHUNK)


def row_groups(shape: tuple[int, ...]) -> int:
    """How many groups of rows a batch [B, L, ...] has under the mesh in force: 1 without a mesh."""
    return row_split(shape).count


class Split(NamedTuple):
    """How [B, L] is cut into groups of rows, one for each device that has rows of its own."""

    batch: int = 1
    sequence: int = 1
    axes: tuple[str, ...] = ()

    @property
    def count(self) -> int:  # type: ignore[override]
        return self.batch * self.sequence


def row_split(shape: tuple[int, ...]) -> Split:
    """The groups of a batch [B, L, ...] under the mesh in force; one where they would not be equal."""
    mesh = jax.sharding.get_abstract_mesh()
    auto = [n for n, t in zip(mesh.axis_names, mesh.axis_types, strict=True) if t == jax.sharding.AxisType.Auto]
    batch_axes = tuple(a for a in BATCH_AXES if a in auto)
    sequence_axes = tuple(a for a in SEQUENCE_AXES if a in auto)
    batch = sequence = 1
    for a in batch_axes:
        batch *= mesh.shape[a]
    for a in sequence_axes:
        sequence *= mesh.shape[a]
    if shape[0] % batch or shape[1] % sequence:
        return Split()
    return Split(batch, sequence, (*batch_axes, *sequence_axes))


def _place(x: Array, split: Split) -> Array:
    """Shards the leading axis of groups, leaving the others to the partitioner."""
    rest = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(split.axes, *rest))


def group(x: Array, split: Split) -> Array:
    """[B, L, ...] -> [groups, B / batch, L / sequence, ...]; unchanged if there is one group."""
    if split.count == 1:
        return x
    b, s = split.batch, split.sequence
    x = x.reshape(b, x.shape[0] // b, s, x.shape[1] // s, *x.shape[2:])
    x = jnp.moveaxis(x, 2, 1)
    return _place(x.reshape(b * s, *x.shape[2:]), split)


def ungroup(x: Array, split: Split) -> Array:
    """The inverse of `group`."""
    if split.count == 1:
        return x
    b, s = split.batch, split.sequence
    x = jnp.moveaxis(x.reshape(b, s, *x.shape[1:]), 1, 2)
    return x.reshape(b * x.shape[1], s * x.shape[3], *x.shape[4:])


def head_copies(head: Head, split: Split) -> tuple[Array, Array | None]:
    """Kernel and bias with one copy for each group: the sum of their gradients is then the transpose of this."""
    kernel = head.kernel if head.copies is None else head.copies
    copies = kernel.ndim == 3
    if split.count == 1:
        return (kernel[0] if copies else kernel), head.bias

    def copy(x: Array) -> Array:
        return _place(jnp.broadcast_to(x[None], (split.count, *x.shape)), split)

    return (kernel if copies else copy(kernel)), (None if head.bias is None else copy(head.bias))


def over_groups(function: Callable[..., Any], split: Split) -> Callable[..., Any]:
    """`function` of one group, over the leading axis of groups where there are several."""
    return function if split.count == 1 else jax.vmap(function)


def chunked(rows: int, arrays: tuple[Array, ...]) -> tuple[int, int, tuple[Array, ...]]:
    """How many chunks, of how many positions, and the arrays [B, L, ...] padded by zeros along L to that."""
    batch, length = arrays[0].shape[:2]
    step = max(1, min(length, rows // batch))
    count = -(-length // step)
    step = -(-length // count)
    rest = count * step - length
    if rest:
        arrays = tuple(jnp.pad(x, [(0, 0), (0, rest)] + [(0, 0)] * (x.ndim - 2)) for x in arrays)
    return count, step, arrays


def take(x: Array, index: Array, step: int) -> Array:
    """The chunk of this number: [B, L, ...] -> [B, step, ...]."""
    return jax.lax.dynamic_slice_in_dim(x, index * step, step, 1)


def logits_of(layout: Layout, hidden: Array, kernel: Array, bias: Array | None) -> Array:
    """Float32 logits [B, step, V] of hidden states [B, step, D]."""
    axis = 1 if layout.tied else 0
    logits = jax.lax.dot_general(hidden, kernel, (((2,), (axis,)), ((), ())), preferred_element_type=jnp.float32)
    if bias is not None:
        logits += bias.astype(jnp.float32)[None, None, :]
    return logits if layout.softcap is None else layout.softcap * jnp.tanh(logits / layout.softcap)


def uncap(layout: Layout, dlogits: Array, logits: Array) -> Array:
    """The gradient before the soft cap, of that after it."""
    return dlogits if layout.softcap is None else dlogits * (1.0 - jnp.square(logits / layout.softcap))


class Gradients(NamedTuple):
    """Of hidden states (dtype of theirs), kernel [D, V] (tied or not) and bias (float32); grown chunk by chunk."""

    hidden: Array
    kernel: Array
    bias: Array | None

    def add(self, layout: Layout, dlogits: Array, hidden: Array, kernel: Array, index: Array) -> "Gradients":
        """With those of the chunk of number `index`."""
        bias = None if self.bias is None else self.bias + jnp.sum(dlogits, axis=(0, 1))
        dlogits = dlogits.astype(hidden.dtype)
        dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
        dhidden = dot(dlogits, kernel, (((2,), (0 if layout.tied else 1,)), ((), ())))
        dkernel = outer(hidden, dlogits)
        start = (0, index * dhidden.shape[1], 0)
        whole = jax.lax.dynamic_update_slice(self.hidden, dhidden.astype(self.hidden.dtype), start)
        return Gradients(whole, self.kernel + dkernel, bias)

    def scaled(
        self, layout: Layout, scale: Array, kernel: Array, bias: Array | None
    ) -> tuple[Array, Array, Array | None]:
        """All three times `scale`, of the layout of the head and the dtypes of `kernel` and `bias`."""
        dhidden = (self.hidden.astype(jnp.float32) * scale).astype(self.hidden.dtype)
        # The barrier keeps the transpose out of the product, where XLA on CPU has no form for it in low precision.
        summed = jax.lax.optimization_barrier(self.kernel) if self.hidden.dtype.itemsize == 2 else self.kernel
        dkernel = (summed.T if layout.tied else summed) * scale
        dbias = None if bias is None or self.bias is None else (self.bias * scale).astype(bias.dtype)
        return dhidden, dkernel.astype(kernel.dtype), dbias


def no_gradients(hidden: Array, kernel: Array, bias: Array | None) -> Gradients:
    """Zeros to begin with."""
    zeros = None if bias is None else jnp.zeros(bias.shape, jnp.float32)
    width = (hidden.shape[-1], kernel.size // hidden.shape[-1])
    return Gradients(jnp.zeros(hidden.shape, hidden.dtype), jnp.zeros(width, jnp.float32), zeros)
