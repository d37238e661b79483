"""The one dense product: operands in the compute dtype, sums in float32, forward and in both backward products.

Plain autodiff does not keep this: the float32 cotangent of a product of bfloat16 operands meets a bfloat16 operand, so
that both backward products run at float32 speed on CPU. Here the cotangent is rounded to the compute dtype first, as
the forward result is, and both backward products ask for float32 sums.
"""

import functools

import jax
import jax.numpy as jnp

from jaxlm.types import Array

BACKENDS = ("own", "reference")
"""`own` has its own backward pass; `reference` is plain autodiff, for forward mode and Hessian-vector products."""


def matmul(x: Array, w: Array, *, transposed: bool = False, backend: str | None = None) -> Array:
    """`x @ w` over the last axis of `x`, with float32 sums.

    `w` is cast to the dtype of `x`. The gradient of `w` has the dtype of `w`: with float32 weights and bfloat16 `x` it
    is the float32 sum itself, never rounded.

    Args:
      x: [..., D], floating.
      w: [D, F], or [F, D] if `transposed` (a tied head).
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
    if backend == "reference":
        return _product(x, w, transposed)
    return _matmul(transposed, x, w)


def _dot(a: Array, b: Array, axes_a: tuple[int, ...], axes_b: tuple[int, ...]) -> Array:
    return jax.lax.dot_general(a, b, ((axes_a, axes_b), ((), ())), preferred_element_type=jnp.float32)


def _product(x: Array, w: Array, transposed: bool) -> Array:
    return _dot(x, w.astype(x.dtype), (x.ndim - 1,), (1 if transposed else 0,)).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(transposed: bool, x: Array, w: Array) -> Array:
    return _product(x, w, transposed)


def _forward(transposed: bool, x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return _product(x, w, transposed), (x, w)


def _backward(transposed: bool, saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, w = saved
    rows = tuple(range(x.ndim - 1))
    dy = dy.astype(x.dtype)
    dx = _dot(dy, w.astype(x.dtype), (x.ndim - 1,), (0 if transposed else 1,))
    dw = _dot(dy, x, rows, rows) if transposed else _dot(x, dy, rows, rows)
    return dx.astype(x.dtype), dw.astype(w.dtype)


_matmul.defvjp(_forward, _backward)
