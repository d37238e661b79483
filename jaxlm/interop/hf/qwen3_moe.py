"""Qwen 3 with mixtures of experts in all or some layers."""

from typing import Any

from jaxlm.interop.hf import llama, qwen2, rows
from jaxlm.interop.hf.fields import Fields, rope, shape, window, written_rope, written_shape
from jaxlm.interop.hf.mixtral import balance
from jaxlm.interop.hf.rows import Family
from jaxlm.interop.names import Table
from jaxlm.nn.config import ModelConfig, MoEConfig

DEFAULTS = qwen2.DEFAULTS | {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 24,
    "num_key_value_heads": 4,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 768,
    "num_experts_per_tok": 8,
    "num_experts": 128,
    "norm_topk_prob": False,
    "router_aux_loss_coef": 0.001,
}


def read(fields: Fields) -> ModelConfig:
    """A layer is dense if `mlp_only_layers` names it or `decoder_sparse_step` skips it."""
    step, named = fields.integer("decoder_sparse_step"), fields.get("mlp_only_layers") or []
    layers = range(fields.integer("num_hidden_layers"))
    dense = tuple(i for i in layers if i in named or not step or (i + 1) % step)
    experts = fields.integer("num_local_experts" if "num_local_experts" in fields.raw else "num_experts")
    if not experts or len(dense) == len(layers):
        raise fields.error("num_experts", "no layer has experts; such a model is a qwen3")
    moe = MoEConfig(
        **balance(fields, experts, fields.integer("num_experts_per_tok")),
        d_ff=fields.integer("moe_intermediate_size"),
        renormalize=fields.flag("norm_topk_prob"),
        dense_layers=dense,
    )
    bias = fields.flag("attention_bias")
    windows = window(fields) if fields.flag("use_sliding_window") else {}
    return ModelConfig(
        **shape(fields), **windows, rope=rope(fields), qkv_bias=bias, o_bias=bias, qk_norm="head", moe=moe
    )


def write(cfg: ModelConfig) -> dict[str, Any]:
    """The inverse of `read`. The Hub says `num_experts`, newer transformers `num_local_experts`."""
    moe = cfg.moe
    if moe is None:
        raise ValueError("model.moe: null, but this family is a mixture of experts")
    return (
        written_shape(cfg)
        | written_rope(cfg.rope)
        | {
            "attention_bias": cfg.o_bias,
            "use_sliding_window": cfg.window is not None,
            "sliding_window": cfg.window,
            "moe_intermediate_size": moe.d_ff,
            "num_experts": moe.experts,
            "num_local_experts": moe.experts,
            "num_experts_per_tok": moe.top_k,
            "norm_topk_prob": moe.renormalize,
            "mlp_only_layers": list(moe.dense_layers),
            "decoder_sparse_step": 1,
            "router_aux_loss_coef": moe.aux_weight / moe.top_k,
            "output_router_logits": False,
        }
    )


def table(cfg: ModelConfig) -> Table:
    """Also OLMoE's."""
    block = [*rows.pre_norms(), *rows.attention(cfg)]
    sparse = [*block, *rows.experts("mlp", "gate_proj", "up_proj", "down_proj")]
    return rows.table(cfg, llama.table(cfg).dense, sparse, [*block, *rows.fused_experts()])


FAMILY = Family("qwen3_moe", "Qwen3MoeForCausalLM", DEFAULTS, read, write, table)
