"""Rows that most families share: the names of the Llama block."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxlm.interop.hf.fields import Fields
from jaxlm.interop.names import Row, Table, linear, plain
from jaxlm.nn.config import ModelConfig


class Family(NamedTuple):
    """One architecture: its names in config.json, the two directions of the config map, and the name table.

    Attributes:
      model_type, architecture: as config.json spells them.
      defaults: values of fields that a config.json may leave out.
      read: fields -> ModelConfig. write: ModelConfig -> fields, without the two names above; what it cannot say, it
        leaves out, or raises ValueError.
      table: ModelConfig -> name table.
    """

    model_type: str
    architecture: str
    defaults: Mapping[str, Any]
    read: Callable[[Fields], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]
    table: Callable[[ModelConfig], Table]


def attention(cfg: ModelConfig) -> list[Row]:
    """The four projections, and the norms of queries and keys."""
    rows = [
        *linear("self_attn.q_proj", "attn/q", cfg.qkv_bias),
        *linear("self_attn.k_proj", "attn/k", cfg.qkv_bias),
        *linear("self_attn.v_proj", "attn/v", cfg.qkv_bias),
        *linear("self_attn.o_proj", "attn/o", cfg.o_bias),
    ]
    norms = [plain(f"self_attn.{n}_norm.weight", f"attn/{n}_norm/scale") for n in "qk"]
    return [*rows, *norms] if cfg.qk_norm else rows


def mlp(cfg: ModelConfig) -> list[Row]:
    """The gated feed-forward layer."""
    return [
        *linear("mlp.gate_proj", "mlp/gate", cfg.mlp_bias),
        *linear("mlp.up_proj", "mlp/up", cfg.mlp_bias),
        *linear("mlp.down_proj", "mlp/down", cfg.mlp_bias),
    ]


def experts(block: str, gate: str, up: str, down: str) -> list[Row]:
    """Router and experts, one tensor per expert: `block.gate`, `block.experts.{e}.<name>`."""
    return [
        *linear(f"{block}.gate", "mlp/router"),
        *linear(f"{block}.experts.{{e}}.{gate}", "mlp/gate"),
        *linear(f"{block}.experts.{{e}}.{up}", "mlp/up"),
        *linear(f"{block}.experts.{{e}}.{down}", "mlp/down"),
    ]


def fused_experts() -> list[Row]:
    """Router and experts as they lie in the memory of newer transformers: gate and up side by side, gate first."""
    return [
        *linear("mlp.gate", "mlp/router"),
        Row("mlp.experts.gate_up_proj", ("mlp/gate/kernel", "mlp/up/kernel"), transpose=True),
        Row("mlp.experts.down_proj", ("mlp/down/kernel",), transpose=True),
    ]


def pre_norms() -> list[Row]:
    """The two norms of a pre-norm layer."""
    return [
        plain("input_layernorm.weight", "attn/norm/scale"),
        plain("post_attention_layernorm.weight", "mlp/norm/scale"),
    ]


def table(
    cfg: ModelConfig, dense: Sequence[Row], sparse: Sequence[Row] | None = None, fused: Sequence[Row] | None = None
) -> Table:
    """A table with Llama's names outside the layers."""
    top = [plain("model.embed_tokens.weight", "embed/kernel"), plain("model.norm.weight", "norm/scale")]
    if not cfg.tie_embeddings:
        top += linear("lm_head", "unembed")
    layer = "model.layers.{i}."
    return Table("model.", layer, tuple(top), tuple(dense), tuple(sparse or ()), tuple(fused or ()))
