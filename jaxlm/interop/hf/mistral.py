"""Mistral: Llama without biases, with a window on every layer or on none."""

from typing import Any

from jaxlm.interop.hf import llama
from jaxlm.interop.hf.fields import Fields, rope, shape, window, written_rope, written_shape
from jaxlm.interop.hf.rows import Family
from jaxlm.nn.config import ModelConfig

DEFAULTS = llama.DEFAULTS | {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}


def read(fields: Fields) -> ModelConfig:
    """A missing `sliding_window` is 4096, a null one is none."""
    return ModelConfig(**shape(fields), **window(fields), rope=rope(fields))


def write(cfg: ModelConfig) -> dict[str, Any]:
    """The inverse of `read`."""
    return written_shape(cfg) | written_rope(cfg.rope) | {"sliding_window": cfg.window}


FAMILY = Family("mistral", "MistralForCausalLM", DEFAULTS, read, write, llama.table)
