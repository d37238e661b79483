"""The model section: where a model comes from, or the shape of a new one."""

import dataclasses
from typing import Annotated, Any, Literal

import msgspec

from jaxlm.nn.config import LoraConfig, ModelConfig, MoEConfig, RopeConfig

Count = Annotated[int, msgspec.Meta(ge=1)]
Above0 = Annotated[float, msgspec.Meta(gt=0)]


@dataclasses.dataclass(frozen=True)
class ModelSection:
    """What a user says of the model; without `path` the fields make a Llama-like one.

    With `path` the directory's shape holds, and a field that is given must agree with it (`adopt`).

    Attributes:
      path: a Hugging Face or run directory to start from.
      d_model, n_layers, n_heads, n_kv_heads, head_dim, d_ff, vocab_size: the shape. Null: `n_heads = d_model /
        head_dim`, `n_kv_heads = n_heads`, `head_dim = d_model / n_heads`, `d_ff` = 8/3 (gated) or 4 times d_model
        rounded up, `vocab_size` is the tokenizer's.
      rope_theta: base of the rotary wavelengths.
      The others are those of `jaxlm.nn.config.ModelConfig`, under the same names.
    """

    path: str | None = None
    d_model: Count = 256
    n_layers: Count = 4
    n_heads: Count | None = 4
    n_kv_heads: Count | None = None
    head_dim: Count | None = None
    d_ff: Count | None = None
    vocab_size: Count | None = None
    tie_embeddings: bool = True
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_placement: Literal["pre", "post", "both"] = "pre"
    qk_norm: Literal["head", "projection"] | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    activation: Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "quick_gelu"] = "silu"
    gated: bool = True
    positions: Literal["rope", "learned", "none"] = "rope"
    rope_theta: Above0 = 10000.0
    window: Count | None = None
    layer_types: tuple[Literal["sliding", "full"], ...] | None = None
    attention_softcap: Above0 | None = None
    logit_softcap: Above0 | None = None
    parallel_residual: bool = False
    moe: MoEConfig | None = None

    def architecture(self, *, max_length: int, dropout: float = 0.0, lora: LoraConfig | None = None) -> ModelConfig:
        """The model that the fields describe; `vocab_size` may still be open."""
        shared = {name: getattr(self, name) for name in _SHARED}
        return ModelConfig(
            **shared, rope=RopeConfig(theta=self.rope_theta), max_length=max_length, dropout=dropout, lora=lora
        )


_SHARED = tuple(
    field.name for field in dataclasses.fields(ModelSection) if field.name in ModelConfig.__dataclass_fields__
)
"""Fields that mean the same in a ModelSection and a ModelConfig."""

_DERIVED = {"n_heads": "H", "n_kv_heads": "G", "head_dim": "K", "d_ff": "F"}
"""Fields that may be null, and the property with the value that then holds."""


def adopt(section: ModelSection, given: frozenset[str], directory: ModelConfig) -> ModelSection:
    """The section with a directory's shape in place of what was not given.

    Args:
      section: with `path`.
      given: dotted names of the fields in the configuration (`jaxlm.config.given_fields`). A mixture of experts that
        is given replaces the directory's field by field; of the rest, nothing may contradict the directory.
      directory: what the directory at `path` holds.

    Raises:
      ValueError: naming a given field that contradicts the directory.
    """
    theirs = {name: getattr(directory, name) for name in _SHARED if name != "moe"} | {
        "rope_theta": directory.rope.theta
    }
    for name, value in theirs.items():
        ours, held = getattr(section, name), getattr(directory, _DERIVED[name]) if name in _DERIVED else value
        if f"model.{name}" in given and ours is not None and ours != held:
            raise ValueError(f"model.{name}: {ours} contradicts {held} in {section.path}; remove the field")
    return dataclasses.replace(section, **theirs, moe=_adopt_moe(section.moe, given, directory.moe))


def _adopt_moe(ours: MoEConfig | None, given: frozenset[str], theirs: MoEConfig | None) -> MoEConfig | None:
    if ours is None or theirs is None:
        return theirs if ours is None else ours
    names = [field.name for field in dataclasses.fields(MoEConfig) if f"model.moe.{field.name}" in given]
    changes: dict[str, Any] = {name: getattr(ours, name) for name in names}
    return dataclasses.replace(theirs, **changes)
