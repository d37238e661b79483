"""The grouped product as a kernel for NVIDIA's GPUs, written with Pallas for Triton.

Groups are filled up to whole tiles of rows, so that a tile of the result belongs to one group and the product is a
plain tiled one that looks up which matrix it needs. Elsewhere than on a GPU the same kernels are interpreted, which is
slow but says whether they are right.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.types import Array

ROWS = 128
"""Rows of a tile; groups are multiples of it."""

COLUMNS = 128
"""Columns of a tile of the result."""


def depth(dtype: Any) -> int:
    """How much of the contracted axis is multiplied at a time: 128 bytes of a row, a line of shared memory."""
    return 128 // jnp.dtype(dtype).itemsize


def runs_on(device: Any) -> bool:
    """Whether `device` has the tensor cores and shared memory that the tiles are made for: NVIDIA's since Ampere."""
    capability = getattr(device, "compute_capability", None)
    return device.platform == "gpu" and "NVIDIA" in device.device_kind and float(capability or 0) >= 8.0


def product(x_TxD: Array, w_ExDxF: Array, sizes_E: Array, transposed: bool) -> Array:
    """`x[t] @ w[group of t]` in the dtype of `x`, 0 behind the last group: [T, F]. `w` is [E, F, D] if `transposed`."""
    rows, features = x_TxD.shape[0], w_ExDxF.shape[1 if transposed else 2]
    tiles = -(-rows // ROWS)
    ends_E = jnp.cumsum(sizes_E)
    group_I = jnp.searchsorted(ends_E, jnp.arange(tiles) * ROWS, side="right").astype(jnp.int32)
    kernel = functools.partial(_product_kernel, transposed)
    # Tiles of rows go first, so that those that share columns of a matrix run together and read them from the cache.
    grid, out = (tiles, -(-features // COLUMNS)), jax.ShapeDtypeStruct((rows, features), x_TxD.dtype)
    return _call(kernel, grid, out, (group_I, x_TxD, w_ExDxF.astype(x_TxD.dtype)))


def outer(a_TxM: Array, b_TxN: Array, sizes_E: Array) -> Array:
    """`sum over rows t of a group of a[t]^T b[t]`, for each group: [E, M, N] in float32."""
    ends_E = jnp.cumsum(sizes_E).astype(jnp.int32)
    starts_E = ends_E - sizes_E.astype(jnp.int32)
    columns = (a_TxM.shape[1], b_TxN.shape[1])
    grid = (*(-(-n // COLUMNS) for n in columns), len(sizes_E))
    out = jax.ShapeDtypeStruct((len(sizes_E), *columns), jnp.float32)
    return _call(_outer_kernel, grid, out, (starts_E, ends_E, a_TxM, b_TxN))


def _call(kernel: Callable[..., None], grid: tuple[int, ...], out: jax.ShapeDtypeStruct, operands: tuple) -> Array:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    def call(*operands: Array, interpret: bool) -> Array:
        settings = triton.CompilerParams(num_warps=8, num_stages=3)
        return pl.pallas_call(kernel, out, grid=grid, compiler_params=settings, interpret=interpret)(*operands)

    on = {interpret: functools.partial(call, interpret=interpret) for interpret in (False, True)}
    return jax.lax.platform_dependent(*operands, cuda=on[False], default=on[True])


def _load(ref: Any, lead: tuple, corner: tuple[Array, Array], sizes: tuple[int, int]) -> Array:
    """A tile of the last two axes, 0 beyond their ends."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    spans = tuple(pl.ds(at, size) for at, size in zip(corner, sizes, strict=True))
    return triton.load(ref.at[(*lead, *spans)], mask=_inside(ref.shape[-2:], corner, sizes), other=0.0)


def _store(ref: Any, lead: tuple, corner: tuple[Array, Array], tile: Array) -> None:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    spans = tuple(pl.ds(at, size) for at, size in zip(corner, tile.shape, strict=True))
    inside = _inside(ref.shape[-2:], corner, tile.shape)
    triton.store(ref.at[(*lead, *spans)], tile.astype(ref.dtype), mask=inside)


def _inside(shape: tuple[int, ...], corner: tuple[Array, Array], sizes: tuple[int, ...]) -> Array:
    rows, columns = (at + jnp.arange(size) < end for at, size, end in zip(corner, sizes, shape, strict=True))
    return rows[:, None] & columns[None, :]


def _dot(a: Array, b: Array, **transposed: bool) -> Array:
    """Sums in float32; float32 operands are not shortened to TensorFloat-32."""
    from jax.experimental.pallas import triton

    return triton.dot(a, b, allow_tf32=False, **transposed)


def _product_kernel(transposed: bool, group_I: Any, x: Any, w: Any, y: Any) -> None:
    from jax.experimental import pallas as pl

    row, column = pl.program_id(0) * ROWS, pl.program_id(1) * COLUMNS
    group, step = group_I[pl.program_id(0)], depth(x.dtype)

    def add(index: Array, total: Array) -> Array:
        at = index * step
        x_tile = _load(x, (), (row, at), (ROWS, step))
        if transposed:
            return total + _dot(x_tile, _load(w, (group,), (column, at), (COLUMNS, step)), trans_b=True)
        return total + _dot(x_tile, _load(w, (group,), (at, column), (step, COLUMNS)))

    steps = -(-x.shape[1] // step) * (group < w.shape[0]).astype(jnp.int32)
    _store(y, (), (row, column), jax.lax.fori_loop(0, steps, add, jnp.zeros((ROWS, COLUMNS), jnp.float32)))


def _outer_kernel(starts_E: Any, ends_E: Any, a: Any, b: Any, total: Any) -> None:
    from jax.experimental import pallas as pl

    group, step = pl.program_id(2), depth(a.dtype)
    corner = (pl.program_id(0) * COLUMNS, pl.program_id(1) * COLUMNS)

    def add(index: Array, total: Array) -> Array:
        a_tile, b_tile = (_load(z, (), (index * step, at), (step, COLUMNS)) for z, at in zip((a, b), corner))
        return total + _dot(a_tile, b_tile, trans_a=True)

    span = (starts_E[group] // step, ends_E[group] // step)
    _store(total, (group,), corner, jax.lax.fori_loop(*span, add, jnp.zeros((COLUMNS, COLUMNS), jnp.float32)))
