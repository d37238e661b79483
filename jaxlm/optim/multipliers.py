"""Factors per leaf, or per layer of a stacked leaf, as stateless transformations."""

from typing import Any

import jax
import numpy as np
import optax

from jaxlm.types import Array, Tree


def scale_by_multipliers(multipliers: Tree) -> optax.GradientTransformation:
    """Multiply each update by its factor.

        multipliers {"w": 0.5, "layers": {"w": [N, 1, 1]}}, updates {"w": u, "layers": {"w": v [N, D, F]}}
        ->  {"w": 0.5 u, "layers": {"w": v with layer l times factor l}}

    Place it behind Adam's scaling, which would cancel it.

    Args:
      multipliers: a tree of the parameters' structure; Python floats, or arrays of the leaf's rank that broadcast
        over it.
    """

    def update(updates: Tree, state: Any, params: Tree | None = None) -> tuple[Tree, Any]:
        return jax.tree.map(_times, updates, multipliers), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def add_decayed_weights(rates: Tree) -> optax.GradientTransformation:
    """Add `rate * parameter` to each update, with a rate per leaf; 0 leaves the update alone.

    Args:
      rates: Python floats in a tree of the parameters' structure.
    """

    def update(updates: Tree, state: Any, params: Tree | None = None) -> tuple[Tree, Any]:
        if params is None:
            raise ValueError("add_decayed_weights: update was called without parameters; pass them")
        return jax.tree.map(lambda u, w, rate: u if rate == 0 else u + rate * w, updates, params, rates), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def _times(update: Array, factor: float | np.ndarray) -> Array:
    if isinstance(factor, np.ndarray):
        return update * factor.astype(update.dtype)
    return update if factor == 1 else update * factor
