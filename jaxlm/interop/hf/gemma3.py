"""Gemma 3, text: Gemma 2 with normalised heads, no cap on scores, and another wavelength base in sliding layers."""

from typing import Any

from jaxlm.interop.hf import gemma2
from jaxlm.interop.hf.fields import Fields, alternating, rope_settings, written_rope
from jaxlm.interop.hf.rows import Family
from jaxlm.nn.config import ModelConfig, RopeConfig

DEFAULTS = gemma2.DEFAULTS | {
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "sliding_window_pattern": 6,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
}


def read(fields: Fields) -> ModelConfig:
    """Without `layer_types` every sixth layer is full. A cap on scores is ignored, as transformers does."""
    period = fields.integer("sliding_window_pattern")
    count = fields.integer("num_hidden_layers")
    types = ["sliding_attention" if period and (i + 1) % period else "full_attention" for i in range(count)]
    windows = alternating(fields, types, fields.get("sliding_window"))
    given = fields.get("rope_parameters") or {}
    # Scaling in the old spelling is for full layers alone.
    full = (given.get("full_attention") or {}) | (fields.get("rope_scaling") or {})
    local = given.get("sliding_attention") or {}
    rope = RopeConfig(**rope_settings(fields, "rope_parameters.full_attention", full, fields.get("rope_theta")))
    local_rope = RopeConfig(
        **rope_settings(fields, "rope_parameters.sliding_attention", local, fields.get("rope_local_base_freq"))
    )
    return ModelConfig(
        **gemma2.block(fields),
        **windows,
        rope=rope,
        local_rope=None if windows["window"] is None or local_rope == rope else local_rope,
        qk_norm="head",
    )


def write(cfg: ModelConfig) -> dict[str, Any]:
    """The inverse of `read`; the old spelling cannot scale sliding layers."""
    full, local = written_rope(cfg.rope), written_rope(cfg.local_rope or cfg.rope)
    if full["rope_scaling"] is not None:
        full["rope_scaling"] |= {"rope_theta": cfg.rope.theta}
    both = {"full_attention": full["rope_parameters"], "sliding_attention": local["rope_parameters"]}
    period = len(cfg.layer_types) if cfg.layer_types is not None else cfg.N + 1
    return (
        gemma2.written_block(cfg)
        | {name: value for name, value in full.items() if name != "original_max_position_embeddings"}
        | {"rope_parameters": both, "rope_local_base_freq": local["rope_theta"], "sliding_window_pattern": period}
        | {"attn_logit_softcapping": None}
    )


FAMILY = Family("gemma3_text", "Gemma3ForCausalLM", DEFAULTS, read, write, gemma2.table)
