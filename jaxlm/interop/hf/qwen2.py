"""Qwen 2 and 2.5: Llama with biases on queries, keys and values, and windows on the upper layers if at all."""

from typing import Any

from jaxlm.interop.hf import llama
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
from jaxlm.nn.config import ModelConfig

DEFAULTS = llama.DEFAULTS | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "bos_token_id": None,
    "eos_token_id": None,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def windows(fields: Fields) -> dict[str, Any]:
    """`layer_types`, or layers from `max_window_layers` on; none without `use_sliding_window`."""
    width = fields.get("sliding_window") if fields.flag("use_sliding_window") else None
    first, count = fields.integer("max_window_layers"), fields.integer("num_hidden_layers")
    types = ["sliding_attention" if width is not None and i >= first else "full_attention" for i in range(count)]
    return alternating(fields, types, width)


def written_windows(cfg: ModelConfig) -> dict[str, Any]:
    """The inverse of `windows`; readers that know no `layer_types` go by the first sliding layer."""
    types = written_types(cfg)
    first = types.index("sliding_attention") if "sliding_attention" in types else cfg.N
    return {
        "use_sliding_window": cfg.window is not None,
        "sliding_window": cfg.window,
        "max_window_layers": first,
        "layer_types": types,
    }


def read(fields: Fields) -> ModelConfig:
    """The biases have no field."""
    return ModelConfig(**shape(fields), **windows(fields), rope=rope(fields), qkv_bias=True)


def write(cfg: ModelConfig) -> dict[str, Any]:
    """The inverse of `read`."""
    return written_shape(cfg) | written_rope(cfg.rope) | written_windows(cfg)


FAMILY = Family("qwen2", "Qwen2ForCausalLM", DEFAULTS, read, write, llama.table)
