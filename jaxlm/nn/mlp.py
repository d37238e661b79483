"""The dense feed-forward branch of a layer, its norms included."""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.nn.config import ModelConfig
from jaxlm.nn.copies import fan_out
from jaxlm.nn.linear import Linear
from jaxlm.nn.norms import make_norm
from jaxlm.types import Array

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


def residual_init(cfg: ModelConfig) -> float:
    """Init scale of projections into the residual stream: 2N of them add up to unit variance (GPT-2)."""
    return 1.0 / math.sqrt(2 * cfg.N)


class Mlp(nn.Module):
    """`x [B, L, D] -> down(act(gate x) * up x)`, or `down(act(up x))` without a gate; `bare` leaves out the norms."""

    cfg: ModelConfig
    bare: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        cfg = self.cfg
        act = ACTIVATIONS[cfg.activation]
        if cfg.norm_placement != "post" and not self.bare:
            x = make_norm(cfg, "norm")(x)
        shared = fan_out(x)
        hidden = Linear(cfg.F, cfg.mlp_bias, lora=cfg.lora, name="up")(shared)
        gate = Linear(cfg.F, cfg.mlp_bias, lora=cfg.lora, name="gate")(shared) if cfg.gated else None
        hidden = act(hidden) if gate is None else act(gate) * hidden
        y = Linear(cfg.D, cfg.mlp_bias, residual_init(cfg), cfg.lora, inward=True, name="down")(hidden)
        return y if cfg.norm_placement == "pre" or self.bare else make_norm(cfg, "post_norm")(y)
