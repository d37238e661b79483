"""Llama 1 to 3.x: the block that most other families vary."""

from typing import Any

from jaxlm.interop.hf import rows
from jaxlm.interop.hf.fields import Fields, rope, shape, written_rope, written_shape
from jaxlm.interop.hf.rows import Family
from jaxlm.interop.names import Table
from jaxlm.nn.config import ModelConfig

DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
}


def read(fields: Fields) -> ModelConfig:
    """Biases of attention are all or none."""
    bias = fields.flag("attention_bias")
    return ModelConfig(**shape(fields), rope=rope(fields), qkv_bias=bias, o_bias=bias, mlp_bias=fields.flag("mlp_bias"))


def write(cfg: ModelConfig) -> dict[str, Any]:
    """transformers insists on a width that is a multiple of the heads, whatever the head width."""
    if cfg.D % cfg.H:
        raise ValueError(f"model.d_model: {cfg.D} is not a multiple of model.n_heads {cfg.H}, as Llama needs")
    biases = {"attention_bias": cfg.o_bias, "mlp_bias": cfg.mlp_bias}
    return written_shape(cfg) | written_rope(cfg.rope) | biases


def table(cfg: ModelConfig) -> Table:
    """Also Mistral's, Qwen 2's and Qwen 3's."""
    return rows.table(cfg, [*rows.pre_norms(), *rows.attention(cfg), *rows.mlp(cfg)])


FAMILY = Family("llama", "LlamaForCausalLM", DEFAULTS, read, write, table)
