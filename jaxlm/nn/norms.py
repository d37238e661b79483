"""Normalisation over the last axis, with statistics in float32."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.nn.config import ModelConfig
from jaxlm.types import Array


def _broadcast(weight: Array, x: Array) -> Array:
    return weight.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + weight.shape)


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * w` over the last axis (Zhang and Sennrich, 1910.07467).

    The product with the weight is made in float32 and rounded once, to the dtype of x. With `offset` the weight is
    stored around 0 and used as `1 + w`.
    """

    eps: float = 1e-5
    offset: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        initial = nn.initializers.zeros if self.offset else nn.initializers.ones
        scale = self.param("scale", initial, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        weight = _broadcast(scale, x)
        return (wide * (1.0 + weight if self.offset else weight)).astype(x.dtype)


class LayerNorm(nn.Module):
    """`(x - mean(x)) / sqrt(var(x) + eps) * w + b` over the last axis (Ba et al., 1607.06450)."""

    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        normal = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + self.eps)
        return (normal * _broadcast(scale, x) + _broadcast(bias, x)).astype(x.dtype)


def make_norm(cfg: ModelConfig, name: str) -> nn.Module:
    """The normalisation that `cfg.norm` names, as a submodule called `name`."""
    if cfg.norm == "layernorm":
        return LayerNorm(cfg.norm_eps, name=name)
    return RMSNorm(cfg.norm_eps, cfg.norm_offset, name=name)
