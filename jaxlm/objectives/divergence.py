"""Divergences of a student from a teacher over the vocabulary, as functions of log-probabilities."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.types import Array

FLOOR = -80.0
"""Log-probability of what has no mass: its product with the mass is 0, where that of minus infinity would be NaN."""


class Divergence(NamedTuple):
    """Static settings: the fields of the same names of `DistillConfig`."""

    loss: str = "forward_kl"
    temperature: float = 1.0
    beta: float = 0.5
    skew: float = 0.1

    def between(self, log_p: Array, log_q: Array) -> Array:
        """The divergence of student q from teacher p, in nats: [..., V] each -> [...].

        With KL(p || q) = sum p (log p - log q), log-probabilities at the temperature T:

            forward_kl   KL(p || q)
            hinton       T^2 KL(p || q), so that its gradient does not fade with T (Hinton et al., 1503.02531)
            reverse_kl   KL(q || p)
            jsd          b KL(p || m) + (1 - b) KL(q || m), m = b p + (1 - b) q, b = beta; at b = 0 KL(p || q) and at
                         b = 1 KL(q || p), which are its limits up to the factor b (1 - b) (GKD, 2306.13649)
            skew_kl      KL(p || m), m = s p + (1 - s) q, s = skew (DistiLLM, 2402.03898)
        """
        if self.loss == "hinton":
            return self.temperature**2 * kl(log_p, log_q)
        if self.loss == "forward_kl" or (self.loss == "jsd" and self.beta == 0.0):
            return kl(log_p, log_q)
        if self.loss == "reverse_kl" or (self.loss == "jsd" and self.beta == 1.0):
            return kl(log_q, log_p)
        if self.loss == "jsd":
            log_m = _mixture(log_p, log_q, self.beta)
            return self.beta * kl(log_p, log_m) + (1.0 - self.beta) * kl(log_q, log_m)
        return kl(log_p, _mixture(log_p, log_q, self.skew) if self.skew else log_q)


def kl(log_p: Array, log_q: Array) -> Array:
    """KL(p || q) over the last axis, in nats: [..., V] each -> [...]."""
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def _mixture(log_p: Array, log_q: Array, share: float) -> Array:
    """log(share * p + (1 - share) * q)."""
    return jnp.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))


def with_tail(log_q: Array, ids: Array) -> Array:
    """The distribution over the entries `ids` and, as one more entry, all others together.

    Coarsening both sides alike makes every divergence smaller or leaves it, never larger: what is found is a lower
    bound, where a renormalised top of the distribution would be biased.

    Args:
      log_q: [..., V].
      ids: int32 [..., K], all different.

    Returns:
      [..., K + 1].
    """
    top = jnp.take_along_axis(log_q, ids, axis=-1)
    others = jnp.put_along_axis(log_q, ids, -jnp.inf, axis=-1, inplace=False)
    return jnp.concatenate([top, log_sum(others)[..., None]], axis=-1)


def log_sum(log_q: Array) -> Array:
    """log sum exp over the last axis, with `FLOOR` for nothing, in value and gradient."""
    top = jax.lax.stop_gradient(jnp.maximum(jnp.max(log_q, axis=-1, keepdims=True), FLOOR))
    mass = jnp.sum(jnp.exp(log_q - top), axis=-1)
    return jnp.maximum(jnp.log(jnp.maximum(mass, 1e-30)) + top[..., 0], FLOOR)
