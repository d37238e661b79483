"""Gemma 2: norms around each branch with weights stored around 0, soft caps, and every other layer sliding."""

import math
from typing import Any

from jaxlm.interop.hf import rows
from jaxlm.interop.hf.fields import (
    Fields,
    alternating,
    rope,
    shape,
    written_rope,
    written_shape,
    written_types,
)
from jaxlm.interop.hf.rows import Family
from jaxlm.interop.names import Table, plain
from jaxlm.nn.config import ModelConfig

DEFAULTS = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "tie_word_embeddings": True,
    "rope_theta": 10000.0,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}


def block(fields: Fields) -> dict[str, Any]:
    """What Gemma 2 and 3 share."""
    fields.refuse("use_bidirectional_attention")
    bias = fields.flag("attention_bias")
    return shape(fields) | {
        "norm_offset": True,
        "norm_placement": "both",
        "qkv_bias": bias,
        "o_bias": bias,
        "embed_scale": math.sqrt(fields.integer("hidden_size")),
        "attention_scale": fields.number("query_pre_attn_scalar") ** -0.5,
        "logit_softcap": fields.optional("final_logit_softcapping"),
    }


def written_block(cfg: ModelConfig) -> dict[str, Any]:
    """The inverse of `block`."""
    if cfg.D % cfg.H:
        raise ValueError(f"model.d_model: {cfg.D} is not a multiple of model.n_heads {cfg.H}, as Gemma needs")
    scale = cfg.K**-0.5 if cfg.attention_scale is None else cfg.attention_scale
    return written_shape(cfg, "hidden_activation") | {
        "attention_bias": cfg.o_bias,
        "query_pre_attn_scalar": round(scale**-2),
        "final_logit_softcapping": cfg.logit_softcap,
        # transformers builds a sliding mask even where no layer slides.
        "sliding_window": cfg.max_length if cfg.window is None else cfg.window,
        "layer_types": written_types(cfg),
    }


def read(fields: Fields) -> ModelConfig:
    """Without `layer_types` even layers slide."""
    types = ["full_attention" if i % 2 else "sliding_attention" for i in range(fields.integer("num_hidden_layers"))]
    return ModelConfig(
        **block(fields),
        **alternating(fields, types, fields.get("sliding_window")),
        rope=rope(fields),
        attention_softcap=fields.optional("attn_logit_softcapping"),
    )


def write(cfg: ModelConfig) -> dict[str, Any]:
    """The inverse of `read`."""
    return written_block(cfg) | written_rope(cfg.rope) | {"attn_logit_softcapping": cfg.attention_softcap}


def table(cfg: ModelConfig) -> Table:
    """Also Gemma 3's."""
    norms = [
        plain("input_layernorm.weight", "attn/norm/scale"),
        plain("post_attention_layernorm.weight", "attn/post_norm/scale"),
        plain("pre_feedforward_layernorm.weight", "mlp/norm/scale"),
        plain("post_feedforward_layernorm.weight", "mlp/post_norm/scale"),
    ]
    return rows.table(cfg, [*norms, *rows.attention(cfg), *rows.mlp(cfg)])


FAMILY = Family("gemma2", "Gemma2ForCausalLM", DEFAULTS, read, write, table)
