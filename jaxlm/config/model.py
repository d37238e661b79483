"""The model section: where a model comes from, or the shape of a new one."""

import dataclasses
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from jaxlm.nn.config import LoraConfig, ModelConfig, MoEConfig, RopeConfig

Count = Annotated[int, msgspec.Meta(ge=1)]
Above0 = Annotated[float, msgspec.Meta(gt=0)]


@dataclasses.dataclass(frozen=True)
class RopeSection:
    """What a user says of rotary positions; the finer numbers of a kind are its paper's, or the directory's.

    Attributes:
      theta, kind, factor, partial, original_length: those of `jaxlm.nn.config.RopeConfig`.
    """

    theta: Above0 = 10000.0
    kind: Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"] = "default"
    factor: Above0 | None = None
    partial: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    original_length: Count | None = None

    def over(self, rope: RopeConfig) -> RopeConfig:
        """`rope` with these settings in it."""
        changes: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return dataclasses.replace(rope, **changes)


@dataclasses.dataclass(frozen=True)
class ModelSection:
    """What a user says of the model; without `path` the fields make a Llama-like one.

    With `path` the directory's shape holds, and a field that is given must agree with it (`adopt`). Only `vocab_size`
    may be larger: the embedding and the head then get rows for more tokens (`params.vocabulary`).

    Attributes:
      path: a Hugging Face or run directory to start from.
      d_model, n_layers, n_heads, n_kv_heads, head_dim, d_ff, vocab_size: the shape. Null: `n_heads = d_model /
        head_dim`, `n_kv_heads = n_heads`, `head_dim = d_model / n_heads`, `d_ff` = 8/3 (gated) or 4 times d_model
        rounded up, `vocab_size` is the tokenizer's.
      rope: rotary settings; null: the directory's, or the defaults. With `path`, given fields replace the directory's
        one by one; `rope.factor` alone stretches the context by YaRN.
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
    rope: RopeSection | None = None
    window: Count | None = None
    layer_types: tuple[Literal["sliding", "full"], ...] | None = None
    attention_softcap: Above0 | None = None
    logit_softcap: Above0 | None = None
    parallel_residual: bool = False
    moe: MoEConfig | None = None

    def architecture(self, *, max_length: int, dropout: float = 0.0, lora: LoraConfig | None = None) -> ModelConfig:
        """The model that the fields describe; `vocab_size` may still be open."""
        shared = {name: getattr(self, name) for name in _SHARED}
        shared["rope"] = (self.rope or RopeSection()).over(RopeConfig())
        return ModelConfig(**shared, max_length=max_length, dropout=dropout, lora=lora)


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
      given: dotted names of the fields in the configuration (`jaxlm.config.given_fields`). A mixture of experts and
        rotary settings replace the directory's field by field; of the rest, nothing may contradict the directory.
      directory: what the directory at `path` holds.

    Raises:
      ValueError: naming a given field that contradicts the directory.
    """
    theirs = {name: getattr(directory, name) for name in _SHARED if name not in ("moe", "rope")}
    theirs["vocab_size"] = max(section.vocab_size or 0, directory.V)
    for name, value in theirs.items():
        ours, held = getattr(section, name), getattr(directory, _DERIVED[name]) if name in _DERIVED else value
        if name == "vocab_size" and ours is not None and ours < directory.V:
            raise ValueError(
                f"model.vocab_size: {ours} contradicts {directory.V} in {section.path}; remove the field, or give more "
                "to add tokens"
            )
        if f"model.{name}" in given and ours is not None and ours != held:
            raise ValueError(f"model.{name}: {ours} contradicts {held} in {section.path}; remove the field")
    moe = _of_same_size(_merged("moe", section.moe, given, directory.moe), directory.moe, section.path)
    return dataclasses.replace(section, **theirs, moe=moe, rope=_adopt_rope(section.rope, given, directory))


def _of_same_size(ours: MoEConfig | None, theirs: MoEConfig | None, path: str | None) -> MoEConfig | None:
    """The settings of a mixture, whose sizes its weights say already."""
    if ours is None or theirs is None:
        return ours
    ours = dataclasses.replace(ours, d_ff=theirs.d_ff if ours.d_ff is None else ours.d_ff)
    for name in ("experts", "d_ff", "n_shared_experts", "dense_layers"):
        given, held = getattr(ours, name), getattr(theirs, name)
        if given != held:
            raise ValueError(f"model.moe.{name}: {given} contradicts {held} in {path}; remove the field")
    return ours


def _adopt_rope(ours: RopeSection | None, given: frozenset[str], directory: ModelConfig) -> RopeSection:
    names = [field.name for field in dataclasses.fields(RopeSection)]
    theirs = RopeSection(**{name: getattr(directory.rope, name) for name in names})
    rope = _merged("rope", ours, given, theirs)
    assert rope is not None
    if rope.factor is not None and rope.kind == "default":
        rope = dataclasses.replace(rope, kind="yarn")
    if rope != theirs and rope.kind != "default" and rope.original_length is None:
        rope = dataclasses.replace(rope, original_length=directory.max_length)
    return rope


Section = TypeVar("Section", MoEConfig, RopeSection)


def _merged(name: str, ours: Section | None, given: frozenset[str], theirs: Section | None) -> Section | None:
    """A directory's sub-section with the given fields of the configuration's in it."""
    if ours is None or theirs is None:
        return theirs if ours is None else ours
    names = [field.name for field in dataclasses.fields(theirs) if f"model.{name}.{field.name}" in given]
    changes: dict[str, Any] = {field: getattr(ours, field) for field in names}
    return dataclasses.replace(theirs, **changes)
