"""The one dense product: operands in the compute dtype, sums in float32, forward and in both backward products.

Plain autodiff does not keep this: the float32 cotangent of a product of bfloat16 operands meets a bfloat16 operand, so
that both backward products run at float32 speed on CPU. Here the cotangent is rounded to the compute dtype first, as
the forward result is, and both backward products ask for float32 sums.

A quantised weight is dequantised where it is used, in the forward and again in the backward pass: nothing but its codes
is kept in between, so one dequantised matrix is alive at a time.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxlm.nn import panels
from jaxlm.nn.copies import packed_whole
from jaxlm.nn.kernels.tiles import one_cpu_device
from jaxlm.nn.panels import Panels
from jaxlm.nn.qtensor import QTensor, dequantise_rows, is_qtensor
from jaxlm.types import Array

BACKENDS = ("own", "reference")
"""`own` has its own backward pass; `reference` is plain autodiff, for forward mode and Hessian-vector products."""


def matmul(x: Array, w: Array | QTensor | Panels, *, transposed: bool = False, backend: str | None = None) -> Array:
    """`x @ w` over the last axis of `x`, with float32 sums.

    `w` is cast to the dtype of `x`. The gradient of `w` has the dtype of `w`: with float32 weights and bfloat16 `x` it
    is the float32 sum itself, never rounded. A quantised `w` is a constant.

    Args:
      x: [..., D], floating.
      w: [D, F], or [F, D] if `transposed` (a tied head); one quantised matrix [D, F], or one in panels.
      transposed: the layout of `w`.
      backend: `own` (null: this), or `reference`.

    Returns:
      [..., F] in the dtype of `x`.

    Raises:
      ValueError: shapes that do not fit, or an unknown backend.
    """
    if backend not in (None, *BACKENDS):
        raise ValueError(f"matmul backend: {backend!r} is unknown; use one of {', '.join(BACKENDS)}")
    if w.ndim != 2 or x.ndim < 1 or x.shape[-1] != w.shape[1 if transposed else 0]:
        layout = "[F, D]" if transposed else "[D, F]"
        raise ValueError(f"matmul: x {x.shape} does not fit w {w.shape}; give x [..., D] and w {layout}")
    if is_qtensor(w):
        if transposed:
            raise ValueError("matmul: a quantised w cannot be transposed; give w [D, F]")
        return _dequantised(x, w, True) if backend == "reference" else _quantised(x, w)
    if isinstance(w, Panels):
        return _panelled(x, w)
    if backend == "reference":
        return _product(x, w, transposed)
    return _matmul(transposed, x, w)


def _panelled(x: Array, w: Panels) -> Array:
    if x.size > panels.ROWS * x.shape[-1]:
        return _product(x, panels.whole(w), False)
    return panels.product(x.reshape(-1, x.shape[-1]), w).reshape(*x.shape[:-1], -1).astype(x.dtype)


def _dot(a: Array, b: Array, axes_a: tuple[int, ...], axes_b: tuple[int, ...]) -> Array:
    return jax.lax.dot_general(a, b, ((axes_a, axes_b), ((), ())), preferred_element_type=jnp.float32)


def _product(x: Array, w: Array, transposed: bool) -> Array:
    if x.size == x.shape[-1] and x.dtype.itemsize == 2 and one_cpu_device():
        # A single row of low precision takes a scalar path in XLA's CPU compiler, six times slower than two rows.
        twice = jnp.broadcast_to(x.reshape(1, -1), (2, x.size))
        return _wide(twice, w, transposed)[:1].reshape(*x.shape[:-1], -1)
    return _wide(x, w, transposed)


def _wide(x: Array, w: Array, transposed: bool) -> Array:
    return _dot(x, w.astype(x.dtype), (x.ndim - 1,), (1 if transposed else 0,)).astype(x.dtype)


def outer(a: Array, b: Array) -> Array:
    """The sum over rows of outer products, `a^T b`: [..., M], [..., N] -> [M, N] in float32.

    On CPU a product whose left operand is to be read by columns misses XLA's fast kernels: in bfloat16 always, which
    then costs twice the time or more, in float32 where M is a large power of two, a quarter more. There one operand,
    the narrower, is laid out anew first.
    """
    m, n = a.shape[-1], b.shape[-1]
    rows = tuple(range(a.ndim - 1))
    low_precision = a.dtype.itemsize == 2
    if not one_cpu_device() or not (low_precision or (m % 512 == 0 and m > n)):
        return _dot(a, b, rows, rows)
    a, b = a.reshape(-1, m), b.reshape(-1, n)
    # XLA would undo a plain transpose, of an operand as of the result; before the latter only a barrier stops it, and
    # a bfloat16 product changed so late fails when it runs.
    if low_precision and m <= 2 * n:
        return jax.lax.optimization_barrier(_dot(_turned(a), b, (1,), (0,)))
    return jax.lax.optimization_barrier(_dot(_turned(b), a, (1,), (0,))).T


def _turned(x_TxM: Array) -> Array:
    """The transpose, [M, T], in two parts: that is no transpose to XLA, which therefore leaves it as it is."""
    half = x_TxM.shape[0] // 2
    return jnp.concatenate([x_TxM[:half].T, x_TxM[half:].T], axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(transposed: bool, x: Array, w: Array) -> Array:
    return _product(x, w, transposed)


def _forward(transposed: bool, x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return _product(x, w, transposed), (x, w)


def _backward(transposed: bool, saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, w = saved
    dy = dy.astype(x.dtype)
    dx = _dot(dy, w.astype(x.dtype), (x.ndim - 1,), (0 if transposed else 1,))
    dw = outer(dy, x) if transposed else outer(x, dy)
    return dx.astype(x.dtype), dw.astype(w.dtype)


_matmul.defvjp(_forward, _backward)


def _dequantised(x: Array, q: QTensor, forward: bool) -> Array:
    """`x W`, or `x W^T` backwards. Quantised matrices lie as [F, D]."""
    q = packed_whole(q)
    # Bound to x, the dequantised weight neither leaves a loop nor is shared between the passes.
    codes, x = jax.lax.optimization_barrier((q.codes, x))
    return _product(x, dequantise_rows(dataclasses.replace(q, codes=codes), x.dtype), forward)


@jax.custom_vjp
def _quantised(x: Array, q: QTensor) -> Array:
    return _dequantised(x, q, True)


def _quantised_forward(x: Array, q: QTensor) -> tuple[Array, QTensor]:
    return _dequantised(x, q, True), q


def _quantised_backward(q: QTensor, dy: Array) -> tuple[Array, None]:
    return _dequantised(dy, q, False), None


_quantised.defvjp(_quantised_forward, _quantised_backward)
