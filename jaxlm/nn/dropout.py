"""Noise of training: dropout from sixteen random bits an element, half the generator's work of a float32 draw; and
uniform noise on embeddings."""

import jax
import jax.numpy as jnp

from jaxlm.types import Array

LEVELS = 1 << 16


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Zero each element with probability `rate` (to 1/65536) and divide the rest by what is kept; without a key, x."""
    if key is None or rate == 0.0:
        return x
    dropped = round(rate * LEVELS)
    keep = jax.random.bits(key, x.shape, jnp.uint16) >= dropped
    return jnp.where(keep, x * (LEVELS / (LEVELS - dropped)), jnp.zeros_like(x))


def embedding_noise(x_BxLxD: Array, segments_BxL: Array | None, alpha: float, key: Array) -> Array:
    """Add noise from U(-1, 1) * alpha / sqrt(L D) to each document (NEFTune, 2310.05914).

    L is the length of the token's own document, without padding: a document gets the same noise packed or alone.

    Args:
      x_BxLxD: embeddings.
      segments_BxL: int32, or None for one document a row.
      alpha: the paper tries 5, 10 and 15.
      key: of the noise.
    """
    rows, length, width = x_BxLxD.shape
    sizes = jnp.full((rows, length), length, jnp.float32)
    if segments_BxL is not None:
        same = segments_BxL[:, :, None] == segments_BxL[:, None, :]
        sizes = jnp.sum(same, axis=-1, dtype=jnp.float32)
    scale = alpha * jax.lax.rsqrt(sizes * width)
    noise = jax.random.uniform(key, x_BxLxD.shape, jnp.float32, -1.0, 1.0)
    return x_BxLxD + (noise * scale[:, :, None]).astype(x_BxLxD.dtype)
