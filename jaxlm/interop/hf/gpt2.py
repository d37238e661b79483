"""GPT-2: learned positions, layer norms, biases everywhere, and projections stored [in, out]."""

from typing import Any

from jaxlm.interop.hf.fields import WRITTEN_ACTIVATIONS, Fields, tokens, written_tokens
from jaxlm.interop.hf.rows import Family
from jaxlm.interop.names import Row, Table, linear, plain
from jaxlm.nn.config import ModelConfig

DEFAULTS = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
    "tie_word_embeddings": True,
}


def read(fields: Fields) -> ModelConfig:
    """Scores scaled by layer, and cross-attention, are refused."""
    for name in ("scale_attn_by_inverse_layer_idx", "add_cross_attention", "quantization_config"):
        fields.refuse(name)
    width, heads = fields.integer("n_embd"), fields.integer("n_head")
    if not heads or width % heads:
        raise fields.error("n_head", f"{heads} does not divide n_embd {width}")
    return ModelConfig(
        **tokens(fields),
        d_model=width,
        n_layers=fields.integer("n_layer"),
        n_heads=heads,
        n_kv_heads=heads,
        head_dim=width // heads,
        d_ff=4 * width if fields.get("n_inner") is None else fields.integer("n_inner"),
        norm="layernorm",
        norm_eps=fields.number("layer_norm_epsilon"),
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        activation=fields.activation("activation_function"),  # type: ignore[arg-type]
        gated=False,
        positions="learned",
        max_length=fields.integer("n_positions"),
        attention_scale=None if fields.flag("scale_attn_weights") else 1.0,
    )


def write(cfg: ModelConfig) -> dict[str, Any]:
    """The inverse of `read`."""
    activation = "gelu_new" if cfg.activation == "gelu_tanh" else WRITTEN_ACTIVATIONS[cfg.activation]
    return written_tokens(cfg) | {
        "n_embd": cfg.D,
        "n_layer": cfg.N,
        "n_head": cfg.H,
        "n_inner": cfg.F,
        "n_positions": cfg.max_length,
        "n_ctx": cfg.max_length,
        "layer_norm_epsilon": cfg.norm_eps,
        "activation_function": activation,
        "scale_attn_weights": cfg.attention_scale is None,
    }


def table(cfg: ModelConfig) -> Table:
    """Nothing is transposed but an untied head; files from the Hub carry causal masks, which are passed over."""
    top = [
        plain("transformer.wte.weight", "embed/kernel"),
        plain("transformer.wpe.weight", "position_embed/kernel"),
        *_norm("transformer.ln_f", "norm"),
    ]
    if not cfg.tie_embeddings:
        top += linear("lm_head", "unembed")
    layer = [
        *_norm("ln_1", "attn/norm"),
        *_conv("attn.c_attn", "attn/q", "attn/k", "attn/v"),
        *_conv("attn.c_proj", "attn/o"),
        *_norm("ln_2", "mlp/norm"),
        *_conv("mlp.c_fc", "mlp/up"),
        *_conv("mlp.c_proj", "mlp/down"),
    ]
    buffers = (".attn.bias", ".attn.masked_bias")
    return Table("transformer.", "transformer.h.{i}.", tuple(top), tuple(layer), buffers=buffers)


def _norm(theirs: str, ours: str) -> list[Row]:
    return [plain(f"{theirs}.weight", f"{ours}/scale"), plain(f"{theirs}.bias", f"{ours}/bias")]


def _conv(theirs: str, *ours: str) -> list[Row]:
    """A Conv1D: kernels side by side in the columns of one tensor [in, out]."""
    kernels, biases = (tuple(f"{path}/{leaf}" for path in ours) for leaf in ("kernel", "bias"))
    return [Row(f"{theirs}.weight", kernels), Row(f"{theirs}.bias", biases)]


FAMILY = Family("gpt2", "GPT2LMHeadModel", DEFAULTS, read, write, table)
