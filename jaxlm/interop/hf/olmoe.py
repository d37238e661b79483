"""OLMoE: a mixture of experts with norms over whole projections of queries and keys, and an optional clip."""

from typing import Any

from jaxlm.interop.hf import llama, qwen3_moe
from jaxlm.interop.hf.fields import Fields, rope, shape, written_rope, written_shape
from jaxlm.interop.hf.mixtral import balance
from jaxlm.interop.hf.rows import Family
from jaxlm.nn.config import ModelConfig, MoEConfig

DEFAULTS = llama.DEFAULTS | {
    "vocab_size": 50304,
    "hidden_size": 2048,
    "intermediate_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 1,
    "bos_token_id": None,
    "eos_token_id": 50279,
    "num_experts_per_tok": 8,
    "num_experts": 64,
    "norm_topk_prob": False,
    "router_aux_loss_coef": 0.01,
}


def read(fields: Fields) -> ModelConfig:
    """`intermediate_size` is the width of one expert."""
    bias = fields.flag("attention_bias")
    moe = MoEConfig(
        **balance(fields, fields.integer("num_experts"), fields.integer("num_experts_per_tok")),
        d_ff=fields.integer("intermediate_size"),
        renormalize=fields.flag("norm_topk_prob"),
    )
    return ModelConfig(
        **shape(fields),
        rope=rope(fields),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="projection",
        clip_qkv=fields.optional("clip_qkv"),
        moe=moe,
    )


def write(cfg: ModelConfig) -> dict[str, Any]:
    """The inverse of `read`."""
    moe = cfg.moe
    if moe is None:
        raise ValueError("model.moe: null, but this family is a mixture of experts")
    if cfg.H * cfg.K != cfg.D:
        raise ValueError(f"model.head_dim: {cfg.K} is not model.d_model / model.n_heads, as OLMoE's norms need")
    return (
        written_shape(cfg)
        | written_rope(cfg.rope)
        | {
            "attention_bias": cfg.o_bias,
            "clip_qkv": cfg.clip_qkv,
            "intermediate_size": moe.d_ff,
            "num_experts": moe.experts,
            "num_experts_per_tok": moe.top_k,
            "norm_topk_prob": moe.renormalize,
            "router_aux_loss_coef": moe.aux_weight / moe.top_k,
            "output_router_logits": False,
        }
    )


FAMILY = Family("olmoe", "OlmoeForCausalLM", DEFAULTS, read, write, qwen3_moe.table)
