"""Logits of whole sequences, for inspection and comparison."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.nn import transformer
from jaxlm.nn.compute import Compute
from jaxlm.nn.config import ModelConfig
from jaxlm.types import Array, Variables


def logits(
    cfg: ModelConfig,
    variables: Variables,
    tokens_BxL: Array,
    positions: Array | None = None,
    segments: Array | None = None,
) -> Array:
    """Float32 logits [B, L, V].

    Args:
      cfg, variables: a model, as from `jaxlm.load`.
      tokens_BxL: int32.
      positions: int32 [B, L]; None is 0..L-1 in every row.
      segments: int32 [B, L]; 0 is padding, on either side; equal ids may attend to each other.

    Raises:
      ValueError: a token outside the vocabulary, by its position, or shapes that do not fit.
    """
    tokens = jnp.asarray(tokens_BxL, jnp.int32)
    if tokens.ndim != 2:
        raise ValueError(f"tokens: shape {tokens.shape}; give rows of tokens, [B, L]")
    outside = (tokens < 0) | (tokens >= cfg.V)
    if not isinstance(tokens, jax.core.Tracer) and bool(jnp.any(outside)):
        row, column = (int(i[0]) for i in jnp.nonzero(outside))
        raise ValueError(
            f"tokens[{row}][{column}]: token id {int(tokens[row, column])} is outside the vocabulary of {cfg.V}; "
            "encode with the model's own tokenizer"
        )
    inputs: dict[str, Any] = {}
    for name, value in (("positions", positions), ("segments", segments)):
        inputs[name] = None if value is None else jnp.asarray(value, jnp.int32)
        if value is not None and inputs[name].shape != tokens.shape:
            raise ValueError(
                f"{name}: shape {inputs[name].shape}, but tokens are {tokens.shape}; give one for each token"
            )
    dtype = variables["params"]["embed"]["kernel"].dtype
    compute = Compute(dtype="float32" if jax.default_backend() == "cpu" else str(dtype))
    return _logits(cfg, compute, variables, tokens, inputs)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _logits(cfg: ModelConfig, compute: Compute, variables: Variables, tokens: Array, inputs: dict) -> Array:
    return transformer.logits(cfg, variables, tokens, compute=compute, **inputs)
