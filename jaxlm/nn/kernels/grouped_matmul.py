"""One product for many groups: consecutive rows of `x`, sorted by group, each group with a matrix of its own.

Operands in the compute dtype, sums in float32, forward and in both backward products, as in `matmul`. The cost is that
of the rows there are, not of rows times groups.
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.nn.kernels import grouped_gpu
from jaxlm.nn.kernels.matmul import matmul, outer
from jaxlm.types import Array

Backend = Literal["reference", "blocks", "ragged", "pallas"]
BACKENDS: tuple[Backend, ...] = ("reference", "blocks", "ragged", "pallas")
"""`reference` multiplies every row with every matrix, plain autodiff; `blocks` loops over groups and takes each one's
rows in blocks of a few fixed sizes; `ragged` is `jax.lax.ragged_dot`; `pallas` is an own kernel for NVIDIA's GPUs."""

UNIT = 16
"""Rows that groups of `blocks` are multiples of."""

BLOCKS = (512, 128, 32, 16)
"""Rows of one product of `blocks`: as many of the first as there are, then at most 3, 3 and 1 of the others. Measured
on CPU: each product lays its matrix out anew, which small blocks pay for; more sizes change nothing but
the time to compile."""


class Form(NamedTuple):
    """Static settings of a product.

    Attributes:
      backend: one of `BACKENDS`.
      transposed: whether matrices are [F, D].
    """

    backend: Backend
    transposed: bool


def choose() -> Backend:
    """The backend of this platform. `ragged_dot` is dense where no kernel stands behind it, as on CPU (measured: 8.8
    times the time with 8 groups) and for the weights' gradient on GPUs: the own kernel does that work once."""
    if jax.default_backend() == "cpu":
        return "blocks"
    return "pallas" if grouped_gpu.runs_on(jax.devices()[0]) else "ragged"


def unit(backend: Backend) -> int:
    """What the sizes of groups must be multiples of."""
    return {"blocks": UNIT, "pallas": grouped_gpu.ROWS}.get(backend, 1)


def grouped_matmul(
    x_TxD: Array, w_ExDxF: Array, sizes_E: Array, *, transposed: bool = False, backend: Backend | None = None
) -> Array:
    """Rows of the first group times the first matrix, and so on: `y[t] = x[t] @ w[group of t]`.

    `w` is cast to the dtype of `x`; the gradient of `w` has the dtype of `w`. Rows behind the last group give 0, and
    their cotangents are not looked at.

    Args:
      x_TxD: rows, those of a group together, groups in order.
      w_ExDxF: the matrices, [E, D, F], or [E, F, D] if `transposed`.
      sizes_E: int32, rows of each group; multiples of `unit(backend)`, in all not more than T.
      backend: one of `BACKENDS`; null: `choose()`.

    Returns:
      [T, F] in the dtype of `x`.

    Raises:
      ValueError: shapes that do not fit, or an unknown backend.
    """
    backend = choose() if backend is None else backend
    if backend not in BACKENDS:
        raise ValueError(f"grouped_matmul backend: {backend!r} is unknown; use one of {', '.join(BACKENDS)}")
    inner = 2 if transposed else 1
    if x_TxD.ndim != 2 or w_ExDxF.ndim != 3 or x_TxD.shape[1] != w_ExDxF.shape[inner]:
        layout = "[E, F, D]" if transposed else "[E, D, F]"
        raise ValueError(f"grouped_matmul: x {x_TxD.shape} does not fit w {w_ExDxF.shape}; give [T, D] and {layout}")
    if sizes_E.shape != w_ExDxF.shape[:1]:
        raise ValueError(f"grouped_matmul: {sizes_E.shape} sizes for {w_ExDxF.shape[0]} matrices; give one for each")
    if backend == "reference":
        return _reference(x_TxD, w_ExDxF, sizes_E, transposed)
    return _grouped(Form(backend, transposed), x_TxD, w_ExDxF, sizes_E)


def group_of(rows: int, sizes_E: Array) -> Array:
    """int32 [rows]: which group each row is in, E behind the last."""
    ends_E = jnp.cumsum(sizes_E)
    return jnp.searchsorted(ends_E, jnp.arange(rows, dtype=ends_E.dtype), side="right").astype(jnp.int32)


def _reference(x: Array, w: Array, sizes: Array, transposed: bool) -> Array:
    own_T = group_of(x.shape[0], sizes)

    def add(total: Array, expert: tuple[Array, Array]) -> tuple[Array, None]:
        index, w_DxF = expert
        y = matmul(jnp.where((own_T == index)[:, None], x, jnp.zeros((), x.dtype)), w_DxF, transposed=transposed)
        return total + y, None

    start = jnp.zeros((x.shape[0], w.shape[1 if transposed else 2]), x.dtype)
    return jax.lax.scan(add, start, (jnp.arange(w.shape[0]), w))[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(form: Form, x: Array, w: Array, sizes: Array) -> Array:
    return _product(form, x, w, sizes)


def _forward(form: Form, x: Array, w: Array, sizes: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return _product(form, x, w, sizes), (x, w, sizes)


def _backward(form: Form, saved: tuple[Array, Array, Array], dy: Array) -> tuple[Array, Array, None]:
    x, w, sizes = saved
    dy = dy.astype(x.dtype)
    dx = _product(form._replace(transposed=not form.transposed), dy, w, sizes)
    a, b = (dy, x) if form.transposed else (x, dy)
    outers = {"ragged": _ragged_outer, "pallas": grouped_gpu.outer, "blocks": _block_outer}
    dw = outers[form.backend](a, b, sizes)
    return dx, dw.astype(w.dtype), None


_grouped.defvjp(_forward, _backward)


def _product(form: Form, x: Array, w: Array, sizes: Array) -> Array:
    product = {"ragged": _ragged, "pallas": grouped_gpu.product, "blocks": _blocks}[form.backend]
    return product(x, w, sizes, form.transposed)


def _ragged(x: Array, w: Array, sizes: Array, transposed: bool) -> Array:
    contract = (((1,), (2 if transposed else 1,)), ((), ()))
    numbers = jax.lax.RaggedDotDimensionNumbers(contract, lhs_ragged_dimensions=(0,), rhs_group_dimensions=(0,))
    y = jax.lax.ragged_dot_general(x, w.astype(x.dtype), sizes, numbers, preferred_element_type=jnp.float32)
    # Kernels may leave rows of no group as they found them.
    inside_T = jnp.arange(x.shape[0], dtype=sizes.dtype) < jnp.sum(sizes)
    return jnp.where(inside_T[:, None], y, 0.0).astype(x.dtype)


def _ragged_outer(a: Array, b: Array, sizes: Array) -> Array:
    contract = (((0,), (0,)), ((), ()))
    numbers = jax.lax.RaggedDotDimensionNumbers(contract, lhs_ragged_dimensions=(0,), rhs_group_dimensions=())
    return jax.lax.ragged_dot_general(a, b, sizes, numbers, preferred_element_type=jnp.float32)


def _cover(start: Array, size: Array, limit: int, take: Callable[..., Array], carry: Array) -> Array:
    """`carry = take(carry, first row, rows)` for blocks over rows start..start+size-1; size is a multiple of UNIT."""
    end, state = start + size, (start, carry)

    def fits(rows: int, state: tuple[Array, Array]) -> Array:
        return state[0] + rows <= end

    def step(rows: int, state: tuple[Array, Array]) -> tuple[Array, Array]:
        return state[0] + rows, take(state[1], state[0], rows)

    before = 0
    for rows in (b for b in BLOCKS if b <= max(limit, UNIT)):
        if before == 2 * rows:
            state = jax.lax.cond(fits(rows, state), functools.partial(step, rows), lambda s: s, state)
        else:
            state = jax.lax.while_loop(functools.partial(fits, rows), functools.partial(step, rows), state)
        before = rows
    return state[1]


def _blocks(x: Array, w: Array, sizes: Array, transposed: bool) -> Array:
    starts = jnp.cumsum(sizes) - sizes
    features = w.shape[1 if transposed else 2]
    contract = (((1,), (1 if transposed else 0,)), ((), ()))

    def group(e: Array, y: Array) -> Array:
        def product(y: Array) -> Array:
            w_e = jax.lax.dynamic_index_in_dim(w, e, 0, keepdims=False).astype(x.dtype)

            def take(y: Array, first: Array, rows: int) -> Array:
                block = jax.lax.dynamic_slice_in_dim(x, first, rows, 0)
                out = jax.lax.dot_general(block, w_e, contract, preferred_element_type=jnp.float32)
                return jax.lax.dynamic_update_slice_in_dim(y, out.astype(y.dtype), first, 0)

            return _cover(starts[e], sizes[e], x.shape[0], take, y)

        return jax.lax.cond(sizes[e] > 0, product, lambda y: y, y)

    return jax.lax.fori_loop(0, w.shape[0], group, jnp.zeros((x.shape[0], features), x.dtype))


def _block_outer(a: Array, b: Array, sizes: Array) -> Array:
    starts = jnp.cumsum(sizes) - sizes
    shape = (a.shape[1], b.shape[1])

    def group(e: Array, dw: Array) -> Array:
        def take(total: Array, first: Array, rows: int) -> Array:
            part = (jax.lax.dynamic_slice_in_dim(z, first, rows, 0) for z in (a, b))
            return total + outer(*part)

        total = _cover(starts[e], sizes[e], a.shape[0], take, jnp.zeros(shape, jnp.float32))
        return jax.lax.dynamic_update_index_in_dim(dw, total, e, 0)

    return jax.lax.fori_loop(0, sizes.shape[0], group, jnp.zeros((sizes.shape[0], *shape), jnp.float32))
