"""The one attention: a function, its backends with what each can do, and which of them a call gets."""

import functools
import logging
from collections.abc import Callable
from typing import NamedTuple

import jax

from jaxlm.nn.kernels import cudnn, ring, splash
from jaxlm.nn.kernels.blockwise import blockwise_attention
from jaxlm.nn.kernels.masks import AttentionMask
from jaxlm.nn.kernels.reference import reference_attention
from jaxlm.types import Array

__all__ = ["BACKENDS", "AttentionMask", "attention", "blockwise_attention", "choose", "reference_attention"]


def _none(q: Array, k: Array, mask: AttentionMask, softcap: float | None) -> None:
    """No obstacle."""


class Backend(NamedTuple):
    """A way to compute attention.

    Attributes:
      compute: takes q, k, v, mask, scale, softcap, as `reference_attention`.
      obstacle: takes q, k, mask, softcap; says why `compute` cannot do this call, or null.
      platform: where it runs; null is everywhere.
    """

    compute: Callable[..., Array]
    obstacle: Callable[..., str | None] = _none
    platform: str | None = None


BACKENDS = {
    "reference": Backend(reference_attention),
    "blockwise": Backend(blockwise_attention),
    "cudnn": Backend(cudnn.cudnn_attention, cudnn.obstacle, "gpu"),
    "splash": Backend(splash.splash_attention, splash.obstacle, "tpu"),
    "ring": Backend(ring.ring_attention, ring.obstacle),
}

PREFERENCE = {"gpu": ("cudnn", "blockwise"), "tpu": ("splash", "blockwise")}
"""Backends by platform, best first; elsewhere it is `blockwise`."""


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
    """`reference_attention` by the best backend for these operands, or by the one named.

    Args:
      q_BxLxHxK: queries, [B, L, H, K].
      k_BxSxGxK, v_BxSxGxK: keys and values, [B, S, G, K], G a divisor of H; never repeated in memory.
      mask: who sees whom.
      scale: multiplies the scores; static, positive.
      softcap: null, or the cap `c` of `c * tanh(scores / c)`, applied before the mask; static.
      backend: null, or a name in `BACKENDS`; see `choose`.

    Returns:
      [B, L, H, K] in the dtype of `q`; 0 for queries that see no key.

    Raises:
      ValueError: operands that do not fit, or a named backend that cannot do this call.
    """
    _check(q_BxLxHxK, k_BxSxGxK, v_BxSxGxK)
    name = choose(q_BxLxHxK, k_BxSxGxK, mask=mask, softcap=softcap, backend=backend)
    return BACKENDS[name].compute(q_BxLxHxK, k_BxSxGxK, v_BxSxGxK, mask=mask, scale=scale, softcap=softcap)


def choose(
    q: Array | jax.ShapeDtypeStruct,
    k: Array | jax.ShapeDtypeStruct,
    *,
    mask: AttentionMask,
    softcap: float | None = None,
    backend: str | None = None,
    platform: str | None = None,
) -> str:
    """The name of the backend for operands of these shapes and dtypes.

    `reference` for a single query, else the first of the platform's `PREFERENCE` without an obstacle; what the obstacle
    of a better one was is logged once.

    Args:
      q, k: arrays, or only their shapes and dtypes.
      mask, softcap: as for `attention`.
      backend: a name that is to be used, or null.
      platform: `cpu`, `gpu` or `tpu`; null: the default of this process.

    Raises:
      ValueError: `backend` is unknown or cannot do this; the reason is said.
    """
    platform = platform or jax.default_backend()
    if backend is None and q.shape[1] == 1:
        # One query has one row of scores: nothing to cut, and plain products read cached keys and values as they lie.
        return "reference"
    if backend is None:
        candidates = PREFERENCE.get(platform, ("blockwise",))
        obstacles = {}
        for name in candidates:
            obstacles[name] = BACKENDS[name].obstacle(q, k, mask, softcap)
            if obstacles[name] is None:
                _log_once(tuple(f"{n}: {why}" for n, why in obstacles.items() if why), name)
                return name
        return "blockwise"
    if backend not in BACKENDS:
        raise ValueError(f"attention backend: {backend!r} is unknown; use one of {', '.join(BACKENDS)}, or null")
    needs = BACKENDS[backend].platform
    if needs not in (None, platform):
        raise ValueError(f"attention backend {backend}: it runs on {needs}, not on {platform}; use null for the best")
    why = BACKENDS[backend].obstacle(q, k, mask, softcap)
    if why is not None:
        raise ValueError(f"attention backend {backend}: {why}; change that, or use null for the best that can")
    return backend


def _check(q: Array, k: Array, v: Array) -> None:
    fits = q.ndim == k.ndim == 4 and k.shape == v.shape and q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3]
    if not fits or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"attention: q {q.shape}, k {k.shape}, v {v.shape} do not fit; "
            "give q [B, L, H, K], k and v [B, S, G, K], with H a multiple of G"
        )


@functools.cache
def _log_once(obstacles: tuple[str, ...], name: str) -> None:
    if obstacles:
        logging.getLogger(__name__).warning("attention uses %s; passed over %s", name, "; ".join(obstacles))
