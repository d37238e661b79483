"""Putting arrays on the mesh and taking them off: batches, activations, states, host copies."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm.dist import rules
from jaxlm.dist.mesh import ROWS, check_rows
from jaxlm.types import Array, Batch, Tree


def batch_sharding(mesh: Mesh, ndim: int = 2, positions: int = 1) -> NamedSharding:
    """How an array of rows lies: rows over data, fsdp and expert; its axis `positions`, if it has one, over context."""
    axes: list[Any] = [ROWS, *[None] * (ndim - 1)]
    if positions < ndim:
        axes[positions] = "context"
    return NamedSharding(mesh, PartitionSpec(*axes))


def host_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """The rows of the global batch that this process must read, ascending, int64.

    Where tensor or context parallelism crosses processes, several processes read the same rows.

    Raises:
      ValueError: if the rows cannot be spread evenly.
    """
    check_rows(mesh.shape, batch_size)
    spans = batch_sharding(mesh, 1).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in spans]))


def place_batch(batch: Mapping[str, np.ndarray], mesh: Mesh, batch_size: int | None = None) -> Batch:
    """Global arrays out of each process's own rows; row r of the result is global row r on any number of processes.

    Args:
      batch: arrays with a leading axis of rows: those of `host_rows`, in that order; whole rows, all positions.
      mesh: the mesh.
      batch_size: rows over all processes; null: this process has them all.

    Returns:
      The same names with `jax.Array`s over the mesh.

    Raises:
      ValueError: naming the column, if rows or positions cannot be spread evenly or are not this process's share.
    """
    result: Batch = {}
    for name, column in batch.items():
        rows = len(column) if batch_size is None else batch_size
        mine = host_rows(mesh, rows)
        if len(column) != len(mine):
            raise ValueError(
                f"{name}: {len(column)} rows, but this process holds {len(mine)} of the {rows} rows of a batch; "
                "read the rows that host_rows names"
            )
        axis = _positions(batch, column)
        if axis < column.ndim and column.shape[axis] % mesh.shape["context"]:
            raise ValueError(
                f"data.sequence_length: {column.shape[axis]} (of {name}) is not a multiple of mesh.context "
                f"{mesh.shape['context']}; change one of them"
            )
        sharding = batch_sharding(mesh, column.ndim, axis)
        cut = functools.partial(_cut, column, mine)
        result[name] = jax.make_array_from_callback((rows, *column.shape[1:]), sharding, cut)
    return result


def _positions(batch: Mapping[str, np.ndarray], column: np.ndarray) -> int:
    """The axis of a column that runs over positions: the last of the tokens; beyond its axes if it has none."""
    tokens = batch.get("tokens")
    if tokens is None:
        return 1
    axis = tokens.ndim - 1
    return axis if column.ndim > axis and column.shape[axis] == tokens.shape[axis] else column.ndim


def _cut(column: np.ndarray, mine: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
    """The part of the local rows that one device holds, given its index into the global array."""
    first = 0 if index[0].start is None else int(np.searchsorted(mine, index[0].start))
    last = len(mine) if index[0].stop is None else int(np.searchsorted(mine, index[0].stop))
    return column[(slice(first, last), *index[1:])]


def microbatches(batch: Batch, count: int) -> Batch:
    """Batches of `count` equal parts on a new leading axis: {name: [B, ...]} -> {name: [count, B / count, ...]}.

    Part i takes every count-th row, so that a device's own rows are cut and none moves to another device.
    """
    return jax.tree.map(lambda x: x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1), batch)


def constrain(mesh: Mesh) -> Callable[[Array], Array]:
    """The constraint for activations [B, L, D] between blocks: rows and positions cut as in the batch, D whole.

    Without it the partitioner may cut D instead, which is right in value and several times the traffic.
    """
    sharding = NamedSharding(mesh, PartitionSpec(ROWS, "context", None))
    return lambda x_BxLxD: jax.lax.with_sharding_constraint(x_BxLxD, sharding)


def build(function: Callable[..., Tree], *args: Any, mesh: Mesh, params: Tree | None = None) -> Tree:
    """`function(*args)`, compiled so that its result is made in place, no device ever holding all of it.

    Without explicit output shardings, an optimizer's state comes out replicated whatever its parameters are.

    Args:
      function: makes parameters from a key, or a state from parameters; traced.
      *args: its arguments.
      mesh: the mesh.
      params: the parameters that the result is a state of (see `rules.shardings_like`); null: it is parameters itself.

    Returns:
      The result of `function`, spread over the mesh by the rules.
    """
    shapes = jax.eval_shape(function, *args)
    placed = rules.shardings(shapes, mesh) if params is None else rules.shardings_like(shapes, params, mesh)
    return jax.jit(function, out_shardings=placed)(*args)


def put(tree: Tree, shardings: Tree) -> Tree:
    """Arrays on the host, the same in every process, -> arrays that lie as `shardings` (a tree or one) says."""
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, tree)

    def place(x: Any, sharding: NamedSharding) -> Array:
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(place, tree, shardings)


def replicate(tree: Tree, mesh: Mesh) -> Tree:
    """The same arrays, whole on every device."""
    return put(tree, NamedSharding(mesh, PartitionSpec()))


def gather(tree: Tree) -> Tree:
    """Whole copies on the host, as NumPy arrays, in every process; all processes must call it together."""

    def whole(x: Any) -> np.ndarray:
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))

    return jax.tree.map(whole, tree)
