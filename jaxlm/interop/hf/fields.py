"""config.json in its old and its new spelling: typed look-ups on the way in, both spellings on the way out."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxlm.nn.config import ModelConfig, RopeConfig

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "quick_gelu": "quick_gelu",
}
WRITTEN_ACTIVATIONS = {ours: ours for ours in ("silu", "gelu", "relu", "relu2", "quick_gelu")} | {
    "gelu_tanh": "gelu_pytorch_tanh"
}

ROPE_KEYS = {
    "factor": "factor",
    "original_max_position_embeddings": "original_length",
    "low_freq_factor": "low_factor",
    "high_freq_factor": "high_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
    "truncate": "truncate",
    "short_factor": "short_factor",
    "long_factor": "long_factor",
}
ROPE_READS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        *("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
        *("mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": ("factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"),
}
"""Which keys each kind looks at; keys that other kinds know are harmless, unknown ones are refused."""

ROPE_HARMLESS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned"}


class Fields(NamedTuple):
    """The fields of a config.json, with the family's own defaults for missing ones.

    A field of the wrong type is a ValueError that names the file and the field.
    """

    raw: Mapping[str, Any]
    defaults: Mapping[str, Any]
    where: str

    def get(self, name: str) -> Any:
        """The value, or the family's default, which may be null."""
        return self.raw[name] if name in self.raw else self.defaults.get(name)

    def integer(self, name: str) -> int:
        """A whole number from 0 up."""
        value = self.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self.error(name, f"{value!r} is not a whole number")
        return value

    def number(self, name: str) -> float:
        """A number, as a float."""
        value = self.get(name)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise self.error(name, f"{value!r} is not a number")
        return float(value)

    def optional(self, name: str) -> float | None:
        """A number or null."""
        return None if self.get(name) is None else self.number(name)

    def flag(self, name: str) -> bool:
        """True or false; null counts as false."""
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.error(name, f"{value!r} is not true or false")
        return bool(value)

    def activation(self, name: str) -> str:
        """Our name of an activation function."""
        value = self.get(name)
        if value not in ACTIVATIONS:
            raise self.error(name, f"{value!r} is unknown; the known ones are {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[value]

    def refuse(self, name: str, *harmless: Any) -> None:
        """Raises unless the field is missing, null, false or one of the harmless values."""
        value = self.raw.get(name)
        if value not in (None, False, *harmless):
            raise self.error(name, f"{value!r} is not supported")

    def error(self, name: str, what: str) -> ValueError:
        """An error that names the file and the field."""
        return ValueError(f"{self.where}: {name}: {what}")


def tokens(fields: Fields) -> dict[str, Any]:
    """Special tokens and the tie of the head."""
    ids: dict[str, Any] = {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = fields.get(name)
        value = tuple(value) if isinstance(value, list) else value
        several = value if isinstance(value, tuple) else (value,)
        if any(not isinstance(i, int) for i in several if i is not None):
            raise fields.error(name, f"{value!r} is not a token id")
        ids[name] = value[0] if isinstance(value, tuple) and name != "eos_token_id" else value
    return ids | {"tie_embeddings": fields.flag("tie_word_embeddings"), "vocab_size": fields.integer("vocab_size")}


def shape(fields: Fields) -> dict[str, Any]:
    """The fields that all Llama-like families share."""
    fields.refuse("quantization_config")
    heads, width = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    head_dim = fields.get("head_dim")
    if not heads or (head_dim is None and width % heads):
        raise fields.error("num_attention_heads", f"{heads} does not divide hidden_size {width}")
    return tokens(fields) | {
        "d_model": width,
        "n_layers": fields.integer("num_hidden_layers"),
        "n_heads": heads,
        "n_kv_heads": heads if fields.get("num_key_value_heads") is None else fields.integer("num_key_value_heads"),
        "head_dim": width // heads if head_dim is None else fields.integer("head_dim"),
        "d_ff": fields.integer("intermediate_size"),
        "norm_eps": fields.number("layer_norm_eps" if "layer_norm_eps" in fields.defaults else "rms_norm_eps"),
        "activation": fields.activation(
            "hidden_activation" if "hidden_activation" in fields.defaults else "hidden_act"
        ),
        "max_length": fields.integer("max_position_embeddings"),
    }


def written_shape(cfg: ModelConfig, activation: str = "hidden_act", norm: str = "rms_norm_eps") -> dict[str, Any]:
    """The inverse of `shape`; `activation`, `norm`: what the family calls the two fields."""
    return written_tokens(cfg) | {
        "hidden_size": cfg.D,
        "num_hidden_layers": cfg.N,
        "num_attention_heads": cfg.H,
        "num_key_value_heads": cfg.G,
        "head_dim": cfg.K,
        "intermediate_size": cfg.F,
        norm: cfg.norm_eps,
        activation: WRITTEN_ACTIVATIONS[cfg.activation],
        "max_position_embeddings": cfg.max_length,
    }


def written_tokens(cfg: ModelConfig) -> dict[str, Any]:
    """The inverse of `tokens`."""
    eos = list(cfg.eos_token_id) if isinstance(cfg.eos_token_id, tuple) else cfg.eos_token_id
    return {
        "vocab_size": cfg.V,
        "tie_word_embeddings": cfg.tie_embeddings,
        "bos_token_id": cfg.bos_token_id,
        "eos_token_id": eos,
        "pad_token_id": cfg.pad_token_id,
    }


def rope(fields: Fields, partial: bool = False) -> RopeConfig:
    """Rotary settings from `rope_parameters`, or from `rope_theta` and `rope_scaling`.

    `partial`: whether the family knows `partial_rotary_factor`.
    """
    name = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    given = fields.get(name) or {}
    settings = rope_settings(fields, name, given, fields.get("rope_theta"))
    share = given.get("partial_rotary_factor", fields.get("partial_rotary_factor"))
    if share not in (None, 1, 1.0) and not partial:
        raise fields.error("partial_rotary_factor", f"{share!r} is not supported by this family")
    if share is not None:
        settings["partial"] = float(share)
    return RopeConfig(**settings)


def rope_settings(fields: Fields, name: str, given: Any, theta: Any) -> dict[str, Any]:
    """RopeConfig's fields from one dictionary of rotary parameters called `name`."""
    if not isinstance(given, dict):
        raise fields.error(name, f"{given!r} is not a table")
    kind = given.get("rope_type", given.get("type")) or "default"
    if kind not in ROPE_READS:
        raise fields.error(f"{name}.rope_type", f"{kind!r} is unknown; the known ones are {', '.join(ROPE_READS)}")
    unknown = set(given) - ROPE_KEYS.keys() - ROPE_HARMLESS
    if unknown:
        raise fields.error(f"{name}.{min(unknown)}", "is not supported")
    theta = given.get("rope_theta", theta)
    settings: dict[str, Any] = {"kind": kind}
    for key in ROPE_READS[kind]:
        value = given.get(key)
        if key == "original_max_position_embeddings":
            # The top-level field wins, as in transformers; without either the limit itself counts.
            top = fields.get(key)
            value = (
                top if top is not None else value if value is not None else fields.integer("max_position_embeddings")
            )
        if value is not None:
            settings[ROPE_KEYS[key]] = tuple(value) if isinstance(value, list) else value
    numbers = [theta] + [v for k, v in settings.items() if k != "kind"]
    for value in (x for v in numbers for x in (v if isinstance(v, tuple) else (v,))):
        if not isinstance(value, (int, float)):
            raise fields.error(name, f"{value!r} is not a number")
    return settings | {"theta": float(theta)}


def written_rope(rope: RopeConfig) -> dict[str, Any]:
    """Rotary settings in the new spelling and the old one; readers of either ignore the other."""
    values = {key: getattr(rope, ROPE_KEYS[key]) for key in ROPE_READS[rope.kind]}
    extra = {key: list(v) if isinstance(v, tuple) else v for key, v in values.items() if v is not None}
    parameters = {"rope_type": rope.kind, "rope_theta": rope.theta} | extra
    scaling = None if rope.kind == "default" else {"rope_type": rope.kind, "type": rope.kind} | extra
    written: dict[str, Any] = {"rope_theta": rope.theta, "rope_scaling": scaling, "rope_parameters": parameters}
    if rope.partial != 1.0:
        written["partial_rotary_factor"] = parameters["partial_rotary_factor"] = rope.partial
    if rope.original_length is not None and "original_max_position_embeddings" in extra:
        written["original_max_position_embeddings"] = rope.original_length
    return written


def canonical_rope(rope: RopeConfig, max_length: int) -> RopeConfig:
    """The same wavelengths with what the kind ignores at its default, and a missing original length filled in."""
    kept = {ROPE_KEYS[key]: getattr(rope, ROPE_KEYS[key]) for key in ROPE_READS[rope.kind]}
    if "original_length" in kept:
        kept["original_length"] = kept["original_length"] or max_length
    return RopeConfig(theta=rope.theta, kind=rope.kind, partial=rope.partial, **kept)


def window(fields: Fields) -> dict[str, Any]:
    """A window on all layers, or none."""
    mixed = set(fields.get("layer_types") or ())
    if len(mixed) > 1:
        raise fields.error("layer_types", "this family's layers are all alike; a mixture is not supported")
    width = fields.get("sliding_window")
    return {"window": None if width is None else fields.integer("sliding_window")}


def alternating(fields: Fields, types: list[str], width: int | None) -> dict[str, Any]:
    """Window and layer types from `layer_types`, or from the given older reading of them, in the shortest pattern."""
    given = fields.get("layer_types")
    types = types if given is None else given
    short = {"sliding_attention": "sliding", "full_attention": "full"}
    if (
        not isinstance(types, list)
        or any(t not in short for t in types)
        or len(types) != fields.integer("num_hidden_layers")
    ):
        raise fields.error("layer_types", f"not one of {', '.join(short)} for each layer")
    if width is None or "sliding_attention" not in types:
        return {"window": None, "layer_types": None}
    return {"window": width, "layer_types": pattern([short[t] for t in types])}


def pattern(types: list[str]) -> tuple[str, ...] | None:
    """The shortest repeating pattern of layer types; None where all slide."""
    if set(types) == {"sliding"}:
        return None
    periods = (p for p in range(1, len(types) + 1) if all(t == types[i % p] for i, t in enumerate(types)))
    return tuple(types[: next(periods)])


def written_types(cfg: ModelConfig) -> list[str]:
    """`layer_types` of config.json."""
    return [f"{cfg.layer_type(i)}_attention" for i in range(cfg.N)]
