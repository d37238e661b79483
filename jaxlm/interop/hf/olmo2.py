"""OLMo 2: norms after each branch instead of before, and over whole projections of queries and keys."""

from typing import Any

from jaxlm.interop.hf import llama, rows
from jaxlm.interop.hf.fields import Fields, rope, shape, written_rope, written_shape
from jaxlm.interop.hf.rows import Family
from jaxlm.interop.names import Table, plain
from jaxlm.nn.config import ModelConfig

DEFAULTS = llama.DEFAULTS | {
    "vocab_size": 50304,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 1,
    "bos_token_id": None,
    "eos_token_id": 50279,
}


def read(fields: Fields) -> ModelConfig:
    """Biases of attention are all or none."""
    bias = fields.flag("attention_bias")
    return ModelConfig(
        **shape(fields),
        rope=rope(fields),
        qkv_bias=bias,
        o_bias=bias,
        norm_placement="post",
        qk_norm="projection",
    )


def write(cfg: ModelConfig) -> dict[str, Any]:
    """The inverse of `read`."""
    return written_shape(cfg) | written_rope(cfg.rope) | {"attention_bias": cfg.o_bias}


def table(cfg: ModelConfig) -> Table:
    """No norm before a branch."""
    norms = [
        plain("post_attention_layernorm.weight", "attn/post_norm/scale"),
        plain("post_feedforward_layernorm.weight", "mlp/post_norm/scale"),
    ]
    return rows.table(cfg, [*norms, *rows.attention(cfg), *rows.mlp(cfg)])


FAMILY = Family("olmo2", "Olmo2ForCausalLM", DEFAULTS, read, write, table)
