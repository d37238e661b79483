"""StableLM: the Llama block with layer norms, rotating a part of each head; holds models with `norm: layernorm`."""

from typing import Any

from jaxlm.interop.hf import rows
from jaxlm.interop.hf.fields import Fields, rope, shape, written_rope, written_shape
from jaxlm.interop.hf.rows import Family
from jaxlm.interop.names import Table, plain
from jaxlm.nn.config import ModelConfig

DEFAULTS = {
    "vocab_size": 50304,
    "hidden_size": 2560,
    "intermediate_size": 6912,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "layer_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.25,
}


def read(fields: Fields) -> ModelConfig:
    """Normalised heads and parallel branches (which share a norm) are refused."""
    for name in ("qk_layernorm", "use_parallel_residual"):
        fields.refuse(name)
    return ModelConfig(
        **shape(fields), rope=rope(fields, partial=True), norm="layernorm", qkv_bias=fields.flag("use_qkv_bias")
    )


def write(cfg: ModelConfig) -> dict[str, Any]:
    """The rotated share is always written, because a missing one is a quarter."""
    if cfg.H * cfg.K != cfg.D:
        raise ValueError(f"model.head_dim: {cfg.K} is not model.d_model / model.n_heads, as StableLM needs")
    written = written_shape(cfg, norm="layer_norm_eps") | written_rope(cfg.rope) | {"use_qkv_bias": cfg.qkv_bias}
    written["rope_parameters"] = written["rope_parameters"] | {"partial_rotary_factor": cfg.rope.partial}
    return written | {"partial_rotary_factor": cfg.rope.partial}


def table(cfg: ModelConfig) -> Table:
    """Every norm has a bias."""
    base = rows.table(cfg, [*rows.pre_norms(), *rows.attention(cfg), *rows.mlp(cfg)])
    biases = [
        plain("input_layernorm.bias", "attn/norm/bias"),
        plain("post_attention_layernorm.bias", "mlp/norm/bias"),
    ]
    return base._replace(top=(*base.top, plain("model.norm.bias", "norm/bias")), dense=(*base.dense, *biases))


FAMILY = Family("stablelm", "StableLmForCausalLM", DEFAULTS, read, write, table)
