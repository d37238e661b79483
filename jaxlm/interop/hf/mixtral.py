"""Mixtral: Mistral with a mixture of experts in every layer, gates always renormalised."""

from typing import Any

from jaxlm.interop.hf import llama, rows
from jaxlm.interop.hf.fields import Fields, rope, shape, window, written_rope, written_shape
from jaxlm.interop.hf.rows import Family
from jaxlm.interop.names import Table
from jaxlm.nn.config import ModelConfig, MoEConfig

DEFAULTS = llama.DEFAULTS | {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1_000_000.0,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.001,
}


def balance(fields: Fields, experts: int, top_k: int) -> dict[str, Any]:
    """Size of the mixture, and the balance loss's weight: transformers' is top_k at perfect balance, ours 1."""
    return {"experts": experts, "top_k": top_k, "aux_weight": fields.number("router_aux_loss_coef") * top_k}


def read(fields: Fields) -> ModelConfig:
    """`intermediate_size` is the width of one expert."""
    size = balance(fields, fields.integer("num_local_experts"), fields.integer("num_experts_per_tok"))
    moe = MoEConfig(**size, d_ff=fields.integer("intermediate_size"), renormalize=True)
    return ModelConfig(**shape(fields), **window(fields), rope=rope(fields), moe=moe)


def write(cfg: ModelConfig) -> dict[str, Any]:
    """The inverse of `read`."""
    moe = cfg.moe
    if moe is None:
        raise ValueError("model.moe: null, but this family is a mixture of experts")
    return (
        written_shape(cfg)
        | written_rope(cfg.rope)
        | {
            "intermediate_size": moe.d_ff,
            "sliding_window": cfg.window,
            "num_local_experts": moe.experts,
            "num_experts_per_tok": moe.top_k,
            "router_aux_loss_coef": moe.aux_weight / moe.top_k,
            "output_router_logits": False,
        }
    )


def table(cfg: ModelConfig) -> Table:
    """w1 is the gate, w3 up, w2 down."""
    block = [*rows.pre_norms(), *rows.attention(cfg)]
    sparse = [*block, *rows.experts("block_sparse_moe", "w1", "w3", "w2")]
    return rows.table(cfg, [], sparse, [*block, *rows.fused_experts()])


FAMILY = Family("mixtral", "MixtralForCausalLM", DEFAULTS, read, write, table)
