"""More tokens than a model has rows for: new rows that begin as the mean of the old ones."""

import jax.numpy as jnp

from jaxlm.types import Array, Tree


def extended(params: Tree, size: int) -> Tree:
    """Parameters with rows of the embedding, and columns of the head, for more tokens.

    Each new one is the mean of all the old ones, so that at first a new token is as likely as the geometric mean of the
    others and changes no prediction by much (Hewitt 2021). Pure; what is large enough already is returned as it is.

    Args:
      params: base parameters, `embed/kernel` [V, D]; where not tied `unembed/kernel` [D, V] and `unembed/bias` [V].
      size: the new V.

    Raises:
      ValueError: fewer rows than there are.
    """
    rows = params["embed"]["kernel"].shape[0]
    if size < rows:
        raise ValueError(f"model.vocab_size: {size} is less than the model's {rows}; rows can be added only")
    if size == rows:
        return params
    tables: Tree = {"embed": {"kernel": _longer(params["embed"]["kernel"], size, 0)}}
    if "unembed" in params:
        tables["unembed"] = {name: _longer(leaf, size, leaf.ndim - 1) for name, leaf in params["unembed"].items()}
    return {**params, **tables}


def _longer(leaf: Array, size: int, axis: int) -> Array:
    """`leaf` with its mean, taken in float32, repeated at the end of an axis."""
    mean = jnp.mean(leaf, axis=axis, keepdims=True, dtype=jnp.float32).astype(leaf.dtype)
    return jnp.concatenate([leaf, jnp.repeat(mean, size - leaf.shape[axis], axis=axis)], axis=axis)
