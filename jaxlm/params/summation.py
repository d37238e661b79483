"""A float32 sum in the order in which torch adds on x86 CPUs, for numbers that are to agree with it to the last bit."""

import functools
import operator

import jax.numpy as jnp

from jaxlm.types import Array

LANES, ROWS, STEP, LEVELS = 8, 4, 16, 4
"""Lanes of a vector register, registers added side by side, additions before a sum moves up a level, and levels."""


def torch_sum(x: Array) -> Array:
    """The sum of a vector, as `torch.Tensor.sum` has it with AVX2 kernels up to 32,768 entries.

    Entries go to lanes of registers and four registers are added side by side, in a cascade: sums of 16 rows are added
    by 16, and so on. Above that torch shares the entries among threads, and the order depends on their number.

    Args:
      x: [n] float32.

    Returns:
      A float32 scalar.
    """
    lanes = LANES if x.size >= LANES else 1
    vectors = x.size // lanes
    block = vectors // ROWS * ROWS
    v = x[: vectors * lanes].reshape(vectors, lanes)
    side = _cascade(v[:block].reshape(block // ROWS, ROWS * lanes)).reshape(ROWS, lanes)
    total = _chain([side[0], *v[block:], *side[1:]])
    return _chain([jnp.zeros((), x.dtype), *x[vectors * lanes :], *total])


def _cascade(rows: Array) -> Array:
    """[n, M] -> [M]."""
    left = []
    for _ in range(LEVELS - 1):
        full = len(rows) // STEP * STEP
        left.append(_in_order(rows[None, full:])[0])
        rows = _in_order(rows[:full].reshape(full // STEP, STEP, rows.shape[-1]))
    return _chain([*left, _in_order(rows[None])[0]])


def _in_order(x: Array) -> Array:
    """[k, n, M] -> [k, M], one of n after the other."""
    return _chain([jnp.zeros((x.shape[0], x.shape[2]), x.dtype), *(x[:, i] for i in range(x.shape[1]))])


def _chain(terms: list[Array]) -> Array:
    return functools.reduce(operator.add, terms)
