"""Qwen 3: Qwen 2 with normalised heads of queries and keys, and biases by field."""

from typing import Any

from jaxlm.interop.hf import llama, qwen2
from jaxlm.interop.hf.fields import Fields, rope, shape, written_rope, written_shape
from jaxlm.interop.hf.rows import Family
from jaxlm.nn.config import ModelConfig

DEFAULTS = qwen2.DEFAULTS | {"head_dim": 128}


def read(fields: Fields) -> ModelConfig:
    """A missing `head_dim` is 128, not width over heads."""
    bias = fields.flag("attention_bias")
    return ModelConfig(
        **shape(fields), **qwen2.windows(fields), rope=rope(fields), qkv_bias=bias, o_bias=bias, qk_norm="head"
    )


def write(cfg: ModelConfig) -> dict[str, Any]:
    """The inverse of `read`."""
    fields = written_shape(cfg) | written_rope(cfg.rope) | qwen2.written_windows(cfg)
    return fields | {"attention_bias": cfg.o_bias}


FAMILY = Family("qwen3", "Qwen3ForCausalLM", DEFAULTS, read, write, llama.table)
