"""Adam with moments in 8 bits, one float32 scale per block of up to 256 entries (Dettmers et al., 2110.02861).

Codes are spaced by a power, so that small entries of a block keep their precision: with s the block's largest value,

    first moment    x = s sign(c) (c / 127)^4,  c in -127..127
    second moment   x = s (c / 255)^8,          c in 0..255, at least 2 where x > 0

The first moment is off by at most s / 60, the root of the second by at most sqrt(s) / 120, and entries a thousand times
smaller than the largest by about a tenth of themselves. A denominator that was not zero never becomes zero, nor
smaller than the smallest numerator: that is what would make blockwise moments dangerous.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlm.types import Array, Tree

BLOCK = 256


class Adam8bitState(NamedTuple):
    """Moments as codes of the parameters' shapes, and float32 scales with the last axis counted in blocks."""

    steps: Array
    mu: Tree
    mu_scale: Tree
    nu: Tree
    nu_scale: Tree


def scale_by_adam8bit(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """`optax.scale_by_adam` with a quarter of its memory.

    Blocks lie within the last axis, so layers stay apart and codes can be sharded as their parameters are.
    """

    def init(params: Tree) -> Adam8bitState:
        scale = jax.tree.map(lambda w: jnp.zeros(_scale_shape(w), jnp.float32), params)
        return Adam8bitState(
            steps=jnp.zeros((), jnp.int32),
            mu=jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.int8), params),
            mu_scale=scale,
            nu=jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.uint8), params),
            nu_scale=jax.tree.map(jnp.copy, scale),
        )

    def update(grads: Tree, state: Adam8bitState, params: Tree | None = None) -> tuple[Tree, Adam8bitState]:
        steps = optax.safe_increment(state.steps)
        mu = jax.tree.map(lambda g, c, s: b1 * decode_signed(c, s) + (1 - b1) * g, grads, state.mu, state.mu_scale)
        nu = jax.tree.map(
            lambda g, c, s: b2 * decode_positive(c, s) + (1 - b2) * jnp.square(g), grads, state.nu, state.nu_scale
        )
        updates = jax.tree.map(
            lambda m, n, g: ((m / (1 - b1**steps)) / (jnp.sqrt(n / (1 - b2**steps)) + eps)).astype(g.dtype),
            mu,
            nu,
            grads,
        )
        mu_codes, mu_scale = _split(mu, encode_signed)
        nu_codes, nu_scale = _split(nu, encode_positive)
        return updates, Adam8bitState(steps, mu_codes, mu_scale, nu_codes, nu_scale)

    return optax.GradientTransformation(init, update)


def encode_signed(x: Array) -> tuple[Array, Array]:
    """[..., F] -> codes int8 [..., F] and scales float32 [..., blocks]."""
    scale = _largest(x)
    root = jnp.sqrt(jnp.sqrt(jnp.abs(x) / _spread(jnp.where(scale > 0, scale, 1.0), x.shape[-1])))
    return (jnp.sign(x) * jnp.round(127.0 * root)).astype(jnp.int8), scale


def decode_signed(codes: Array, scale: Array) -> Array:
    """The inverse of `encode_signed`, float32 [..., F]."""
    part = codes.astype(jnp.float32) / 127.0
    return jnp.sign(part) * part**4 * _spread(scale, codes.shape[-1])


def encode_positive(x: Array) -> tuple[Array, Array]:
    """[..., F], nowhere negative -> codes uint8 [..., F] and scales float32 [..., blocks]."""
    scale = _largest(x)
    root = jnp.sqrt(jnp.sqrt(jnp.sqrt(x / _spread(jnp.where(scale > 0, scale, 1.0), x.shape[-1]))))
    codes = jnp.where(x > 0, jnp.maximum(jnp.round(255.0 * root), 2.0), 0.0)
    return codes.astype(jnp.uint8), scale


def decode_positive(codes: Array, scale: Array) -> Array:
    """The inverse of `encode_positive`, float32 [..., F]."""
    return (codes.astype(jnp.float32) / 255.0) ** 8 * _spread(scale, codes.shape[-1])


def _scale_shape(w: Array) -> tuple[int, ...]:
    return (*w.shape[:-1], -(-w.shape[-1] // BLOCK))


def _largest(x: Array) -> Array:
    """The largest magnitude of each block, [..., blocks]."""
    width = x.shape[-1]
    size = min(BLOCK, width)
    padded = jnp.pad(jnp.abs(x), [(0, 0)] * (x.ndim - 1) + [(0, -width % size)])
    return jnp.max(padded.reshape(*x.shape[:-1], -1, size), axis=-1).astype(jnp.float32)


def _spread(scale: Array, width: int) -> Array:
    """[..., blocks] -> [..., width]."""
    return jnp.repeat(scale, min(BLOCK, width), axis=-1)[..., :width]


def _split(tree: Tree, encode: Callable[[Array], tuple[Array, Array]]) -> tuple[Tree, Tree]:
    pairs = [encode(leaf) for leaf in jax.tree.leaves(tree)]
    treedef = jax.tree.structure(tree)
    return tuple(jax.tree.unflatten(treedef, part) for part in zip(*pairs, strict=True))
