"""The one attention: a function, its backends, and which of them a call gets."""

import jax

from jaxlm.nn.kernels.blockwise import blockwise_attention
from jaxlm.nn.kernels.masks import AttentionMask
from jaxlm.nn.kernels.reference import reference_attention
from jaxlm.types import Array

__all__ = ["AttentionMask", "attention", "blockwise_attention", "choose", "reference_attention"]

BACKENDS = {"reference": reference_attention, "blockwise": blockwise_attention}


def choose(
    q: jax.Array, k: jax.Array, *, mask: AttentionMask, softcap: float | None, backend: str | None = None
) -> str:
    """The name of the backend that `attention` uses for operands of these shapes and dtypes."""
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"attention backend: {backend!r} is unknown; use one of {', '.join(BACKENDS)}")
    # One query has one row of scores: nothing to cut, and the plain products read keys and values as they lie.
    return backend or ("reference" if q.shape[1] == 1 else "blockwise")


def attention(
    q_BxLxHxK: Array,
    k_BxSxGxK: Array,
    v_BxSxGxK: Array,
    *,
    mask: AttentionMask,
    scale: float,
    softcap: float | None = None,
    backend: str | None = None,
) -> Array:
    """`reference_attention` by the best backend for these operands, or the one named."""
    name = choose(q_BxLxHxK, k_BxSxGxK, mask=mask, softcap=softcap, backend=backend)
    return BACKENDS[name](q_BxLxHxK, k_BxSxGxK, v_BxSxGxK, mask=mask, scale=scale, softcap=softcap)
