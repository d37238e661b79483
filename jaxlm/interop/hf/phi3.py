"""Phi 3 and 4 mini: Llama with fused projections, rotating a part of each head, with divisors for long contexts."""

from typing import Any

from jaxlm.interop.hf import llama, rows
from jaxlm.interop.hf.fields import Fields, rope, shape, window, written_rope, written_shape
from jaxlm.interop.hf.rows import Family
from jaxlm.interop.names import Row, Table, linear
from jaxlm.nn.config import ModelConfig

DEFAULTS = llama.DEFAULTS | {
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 32000,
    "pad_token_id": 32000,
}


def read(fields: Fields) -> ModelConfig:
    """Any scaling but `longrope` is refused; `su` and `yarn` are old names for it."""
    raw = dict(fields.raw)
    for name in ("rope_scaling", "rope_parameters"):
        given = raw.get(name)
        if isinstance(given, dict) and given.get("rope_type", given.get("type")) in ("su", "yarn"):
            raw[name] = given | {"rope_type": "longrope"}
    settings = rope(fields._replace(raw=raw), partial=True)
    if settings.kind not in ("default", "longrope"):
        raise fields.error("rope_scaling.rope_type", f"{settings.kind!r} is not supported by Phi 3; use longrope")
    return ModelConfig(**shape(fields), **window(fields), rope=settings)


def write(cfg: ModelConfig) -> dict[str, Any]:
    """The top-level original length is always written, because its default would win over the table's."""
    if cfg.H * cfg.K != cfg.D and cfg.rope.kind == "longrope":
        raise ValueError(f"model.head_dim: {cfg.K} is not model.d_model / model.n_heads, as Phi 3's divisors need")
    original = {"original_max_position_embeddings": cfg.rope.original_length or cfg.max_length}
    return original | written_shape(cfg) | written_rope(cfg.rope) | {"sliding_window": cfg.window}


def table(cfg: ModelConfig) -> Table:
    """Queries, keys and values are rows of one tensor, gate and up of another."""
    layer = [
        *rows.pre_norms(),
        Row("self_attn.qkv_proj.weight", ("attn/q/kernel", "attn/k/kernel", "attn/v/kernel"), transpose=True),
        *linear("self_attn.o_proj", "attn/o"),
        Row("mlp.gate_up_proj.weight", ("mlp/gate/kernel", "mlp/up/kernel"), transpose=True),
        *linear("mlp.down_proj", "mlp/down"),
    ]
    return rows.table(cfg, layer)


FAMILY = Family("phi3", "Phi3ForCausalLM", DEFAULTS, read, write, table)
