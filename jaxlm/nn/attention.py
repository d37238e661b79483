"""The attention branch of a layer: norms, projections, rotary positions, cache, and the kernel's call."""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from jaxlm.nn import cache as kv
from jaxlm.nn.compute import Compute
from jaxlm.nn.config import ModelConfig
from jaxlm.nn.copies import fan_out
from jaxlm.nn.kernels.attention import AttentionMask, attention
from jaxlm.nn.kernels.reference import mean_attention
from jaxlm.nn.kernels.spread import spread_attention
from jaxlm.nn.linear import Linear
from jaxlm.nn.mlp import residual_init
from jaxlm.nn.norms import RMSNorm, make_norm
from jaxlm.nn.rope import rotate
from jaxlm.types import Array


class Context(NamedTuple):
    """What all layers of one call share.

    Attributes:
      rope: (cos, sin) tables by layer type (`full`, `sliding`); empty without rotary positions.
      segments: int32 [B, L] of the new tokens, or None.
      kv_segments: int32 [B, S] of the cached tokens with the new ones, or None without a cache.
      index: array position of the first new token in the cache, or None.
    """

    rope: dict[str, tuple[Array, Array]]
    segments: Array | None = None
    kv_segments: Array | None = None
    index: Array | None = None  # type: ignore[assignment]


class Attention(nn.Module):
    """Causal grouped-query attention over x [B, L, D] with its norms.

    Returns y [B, L, D], the cached (k, v) or None, and what `compute.collect` asks for.
    """

    cfg: ModelConfig
    compute: Compute
    layer_type: str = "full"

    @nn.compact
    def __call__(
        self, x: Array, context: Context, cached: tuple[Array, Array] | None = None
    ) -> tuple[Array, tuple[Array, Array] | None, dict[str, Array]]:
        cfg = self.cfg
        if cfg.norm_placement != "post":
            x = make_norm(cfg, "norm")(x)
        q, k, v = self._project(x)
        if context.rope:
            cos, sin = context.rope[self.layer_type]
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cached is not None and context.index is not None:
            keys = kv.write(cached[0], k, context.index, kv.KEYS)
            values = kv.write(cached[1], v, context.index, kv.VALUES)
            k, v, cached = kv.read(keys, k, kv.KEYS), kv.read(values, v, kv.VALUES), (keys, values)
        scale = cfg.K**-0.5 if cfg.attention_scale is None else cfg.attention_scale
        scale, softcap, mask = scale * cfg.attention_multiplier, cfg.attention_softcap, self._mask(context)
        attend = functools.partial(attention, scale=scale, softcap=softcap, backend=self.compute.attention)
        gather = self.compute.attention != "ring"
        mixed = spread_attention(attend, q, k, v, mask, gather=gather)
        mixed = mixed.reshape(*x.shape[:-1], cfg.H * cfg.K)
        y = Linear(cfg.D, cfg.o_bias, residual_init(cfg), cfg.lora, inward=True, name="o")(mixed)
        kept = {}
        if "attention" in self.compute.collect:
            kept["attention"] = mean_attention(q, k, mask=mask, scale=scale, softcap=softcap)
        return (y if cfg.norm_placement == "pre" else make_norm(cfg, "post_norm")(y)), cached, kept

    def _project(self, x: Array) -> tuple[Array, Array, Array]:
        cfg = self.cfg
        fan = fan_out(x)
        parts = {
            name: Linear(heads * cfg.K, cfg.qkv_bias, lora=cfg.lora, name=name)(fan)
            for name, heads in (("q", cfg.H), ("k", cfg.G), ("v", cfg.G))
        }
        if cfg.qk_norm == "projection":
            parts |= {n: RMSNorm(cfg.norm_eps, cfg.norm_offset, name=f"{n}_norm")(parts[n]) for n in "qk"}
        if cfg.clip_qkv is not None:
            parts = {n: jnp.clip(part, -cfg.clip_qkv, cfg.clip_qkv) for n, part in parts.items()}
        heads = {n: part.reshape(*x.shape[:-1], -1, cfg.K) for n, part in parts.items()}
        if cfg.qk_norm == "head":
            heads |= {n: RMSNorm(cfg.norm_eps, cfg.norm_offset, name=f"{n}_norm")(heads[n]) for n in "qk"}
        return heads["q"], heads["k"], heads["v"]

    def _mask(self, context: Context) -> AttentionMask:
        window = self.cfg.window if self.layer_type == "sliding" else None
        if context.index is None:
            return AttentionMask(window=window, segments_BxL=context.segments, segments_BxS=context.segments)
        return AttentionMask(
            window=window,
            segments_BxL=context.segments,
            segments_BxS=context.kv_segments,
            q_offset=context.index,
        )
