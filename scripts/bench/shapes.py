"""Model shapes that the cases share; Llama-like, weights random."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model and the batch that it is measured on.

    Attributes:
      width, layers, heads, kv_heads, hidden, vocabulary: of the model; embeddings are tied.
      rows, length: of a batch.
      prompt, new: tokens of a generation.
    """

    width: int
    layers: int
    heads: int
    kv_heads: int
    hidden: int
    vocabulary: int
    rows: int
    length: int
    prompt: int = 64
    new: int = 64


SHAPES = {
    "tiny": Shape(64, 2, 4, 4, 192, 512, 4, 64, 16, 16),
    "small": Shape(384, 6, 6, 6, 1024, 8192, 4, 256),
    "m50": Shape(640, 8, 10, 10, 1728, 16384, 4, 256),
    "1b": Shape(2048, 20, 16, 16, 5504, 32768, 8, 2048),
    "7b": Shape(4096, 32, 32, 8, 14336, 32000, 1, 2048, 128, 128),
}


def jaxlm_config(shape: Shape):
    """The shape as jaxlm's ModelConfig."""
    from jaxlm.nn.config import ModelConfig

    return ModelConfig(
        d_model=shape.width,
        n_layers=shape.layers,
        n_heads=shape.heads,
        n_kv_heads=shape.kv_heads,
        d_ff=shape.hidden,
        vocab_size=shape.vocabulary,
        max_length=max(shape.length, shape.prompt + shape.new),
    )


def hugging_face_model(shape: Shape, dtype: str = "float32"):
    """The shape as transformers' Llama, random weights, scaled-dot-product attention."""
    import torch
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.hidden,
        vocab_size=shape.vocabulary,
        max_position_embeddings=max(shape.length, shape.prompt + shape.new),
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    with torch.device(torch_device()):
        return transformers.LlamaForCausalLM(config).to(getattr(torch, dtype))


def random_batch(shape: Shape) -> Any:
    """Random tokens, every one a label."""
    import jax
    import numpy as np

    tokens = np.random.default_rng(0).integers(0, shape.vocabulary, (shape.rows, shape.length + 1), dtype=np.int32)
    columns = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "mask": np.ones((shape.rows, shape.length), np.float32),
        "segments": np.ones((shape.rows, shape.length), np.int32),
        "positions": np.tile(np.arange(shape.length, dtype=np.int32), (shape.rows, 1)),
    }
    return jax.device_put(columns)


def torch_device() -> str:
    """Where the torch side runs: the GPU, if there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
