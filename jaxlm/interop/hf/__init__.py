"""Hugging Face families: the registry, reading config.json, and finding the family that can hold a model."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxlm.interop import scored
from jaxlm.interop.hf import (
    gemma2,
    gemma3,
    gpt2,
    llama,
    mistral,
    mixtral,
    olmo2,
    olmoe,
    own,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    stablelm,
)
from jaxlm.interop.hf.fields import Fields, canonical_rope, pattern
from jaxlm.interop.hf.rows import Family
from jaxlm.nn.config import ModelConfig, RopeConfig

FAMILIES: dict[str, Family] = {
    "llama": llama.FAMILY,
    "mistral": mistral.FAMILY,
    "qwen2": qwen2.FAMILY,
    "qwen3": qwen3.FAMILY,
    "olmo2": olmo2.FAMILY,
    "phi3": phi3.FAMILY,
    "gemma2": gemma2.FAMILY,
    "gemma3_text": gemma3.FAMILY,
    "gpt2": gpt2.FAMILY,
    "stablelm": stablelm.FAMILY,
    "mixtral": mixtral.FAMILY,
    "qwen3_moe": qwen3_moe.FAMILY,
    "olmoe": olmoe.FAMILY,
}
"""By model_type; the order is that of preference when a model is written."""

READABLE = FAMILIES | {"jaxlm": own.FAMILY}
"""What a directory may be: a family, or jaxlm's own form."""

UNWRITTEN = ("family", "dropout", "embed_std", "lora")
UNWRITTEN_MOE = ("balance", "aux_weight", "z_weight", "bias_rate", "capacity_factor", "jitter")
"""Fields that say nothing about what a finished model computes."""


def family_of(raw: Mapping[str, Any], where: str) -> Family:
    """The family that a config.json names, by `model_type` or else by `architectures`.

    Raises:
      ValueError: naming the file and the unknown word.
    """
    architectures = raw.get("architectures") or []
    model_type = raw.get("model_type")
    if model_type is None:
        known = ((f.model_type, {f.architecture, scored.architecture(f.architecture)}) for f in READABLE.values())
        model_type = next((name for name, classes in known if classes & {*architectures}), None)
    if model_type not in READABLE:
        named = model_type if model_type is not None else architectures
        raise ValueError(f"{where}: model_type: {named!r} is unknown; the known ones are {', '.join(FAMILIES)}")
    family = READABLE[model_type]
    backbone = family.architecture.replace("ForCausalLM", "Model").replace("LMHeadModel", "Model")
    classes = {family.architecture, backbone, backbone.replace("3Model", "3TextModel")}
    if architectures and not (classes | {scored.architecture(family.architecture)}) & {*architectures}:
        raise ValueError(f"{where}: architectures: {architectures!r} is not {family.architecture}; not supported")
    return family


def read_config(raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """ModelConfig of a parsed config.json.

    Args:
      raw: its contents. where: what to call it in messages.

    Raises:
      ValueError: naming the field that is malformed, unknown or not supported.
    """
    family = family_of(raw, where)
    cfg = dataclasses.replace(family.read(Fields(raw, family.defaults, where)), family=family.model_type)
    cfg.validate()
    return cfg


def choose(cfg: ModelConfig, own_form: bool = False) -> tuple[Family, dict[str, Any]]:
    """The family that can hold a model exactly, and its config.json; with `own_form`, jaxlm's own where none can.

    The model's own family is tried first, then the others. A family holds a model if reading back what it writes
    gives the same model.

    Raises:
      ValueError: naming the fields that the nearest family cannot express.
    """
    wanted = canonical(cfg)
    first = [FAMILIES[cfg.family]] if cfg.family in FAMILIES else []
    nearest: list[str] | None = None
    reason = ""
    for family in [*first, *FAMILIES.values()]:
        try:
            written = {"architectures": [family.architecture], "model_type": family.model_type} | family.write(wanted)
            got = canonical(family.read(Fields(written, family.defaults, "config.json")))
        except ValueError as error:
            reason = reason or str(error)
            continue
        fields = _differences(wanted, got)
        if not fields:
            return family, written
        if nearest is None or len(fields) < len(nearest):
            nearest = fields
    if own_form:
        family = own.FAMILY
        return family, {"architectures": [family.architecture], "model_type": family.model_type} | family.write(cfg)
    if nearest is None:
        raise ValueError(f"{reason}; no family can hold this model")
    raise ValueError(f"{', '.join(nearest)}: no Hugging Face family can express this; change it before exporting")


def canonical(cfg: ModelConfig) -> ModelConfig:
    """The same model with every derived field filled in and every idle one at its default."""
    types = [cfg.layer_type(i) for i in range(cfg.N)]
    slides = "sliding" in types
    rope = canonical_rope(cfg.rope, cfg.max_length) if cfg.positions == "rope" else RopeConfig()
    local_rope = None
    if cfg.positions == "rope" and slides and cfg.local_rope is not None:
        local_rope = canonical_rope(cfg.local_rope, cfg.max_length)
    moe = cfg.moe
    if moe is not None:
        moe = dataclasses.replace(moe, d_ff=moe.d_ff if moe.d_ff is not None else cfg.F)
    return dataclasses.replace(
        cfg,
        n_heads=cfg.H,
        n_kv_heads=cfg.G,
        head_dim=cfg.K,
        d_ff=moe.d_ff if moe is not None and not moe.dense_layers else cfg.F,
        moe=moe,
        rope=rope,
        local_rope=None if local_rope == rope else local_rope,
        window=cfg.window if slides else None,
        layer_types=pattern(types) if slides else None,  # type: ignore[arg-type]
        attention_scale=None if cfg.attention_scale == cfg.K**-0.5 else cfg.attention_scale,
        embed_scale=None if cfg.embed_scale == 1.0 else cfg.embed_scale,
    )


def _differences(a: ModelConfig, b: ModelConfig) -> list[str]:
    names = [f.name for f in dataclasses.fields(ModelConfig) if f.name not in (*UNWRITTEN, "moe")]
    found = [f"model.{name}" for name in names if getattr(a, name) != getattr(b, name)]
    if a.moe is None or b.moe is None:
        return found if a.moe == b.moe else [*found, "model.moe"]
    fields = [f.name for f in dataclasses.fields(a.moe) if f.name not in UNWRITTEN_MOE]
    return [*found, *(f"model.moe.{name}" for name in fields if getattr(a.moe, name) != getattr(b.moe, name))]
