"""adapter_config.json of PEFT: what of it means something here, and what must be refused."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxlm.interop import safetensors
from jaxlm.nn.config import LoraConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

READ = (
    "peft_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern",
    "alpha_pattern", "modules_to_save", "bias", "init_lora_weights",
)  # fmt: skip
"""Fields that are read."""

SEEN_IN_WEIGHTS = (
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out",
    "target_parameters",
)  # fmt: skip
"""Fields that say which modules are adapted, and how they lie in memory: the names of the tensors say the same."""

IDLE = (
    "task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "megatron_core", "qalora_group_size",
    "runtime_config", "loftq_config", "eva_config", "ephemeral_gpu_offload",
)  # fmt: skip
"""Fields that say nothing about what a finished adapter computes. Those of initialisations count by their result."""

HARMLESS_INIT = (True, False, "gaussian", "eva", "orthogonal", "mica")
"""Initialisations that leave the base as it is."""


def find(path: str | Path) -> Path | None:
    """The adapter directory that `path` is, or that the run directory `path` holds in place of a model; or None."""
    for folder in (Path(path), Path(path) / "hf"):
        if (folder / CONFIG).is_file() and not (folder / "config.json").is_file():
            return folder
    return None


def read(directory: Path) -> LoraConfig:
    """Settings of an adapter, its targets left open: the tensors say which modules it has.

    Raises:
      FileNotFoundError, ValueError: naming the file and the field that is malformed or not supported.
    """
    file = directory / CONFIG
    raw = safetensors.read_json(file)
    if not isinstance(raw, dict):
        raise ValueError(f"{file}: not a JSON object; mend or replace the file")
    if raw.get("peft_type") != "LORA":
        raise ValueError(f"{file}: peft_type: {raw.get('peft_type')!r} is not supported; the only one is LORA")
    for name, value in raw.items():
        if name not in (*READ, *SEEN_IN_WEIGHTS, *IDLE) and value not in (None, False, "", [], {}):
            raise ValueError(f"{file}: {name}: {_short(value)} is not supported; train the adapter without it")
    init = raw.get("init_lora_weights", True)
    if init not in HARMLESS_INIT and init != "pissa":
        raise ValueError(
            f"{file}: init_lora_weights: {init!r} changed the base in a way that cannot be done again; convert the "
            "adapter with PEFT's path_initial_model_for_weight_conversion"
        )
    return LoraConfig(
        r=_number(file, raw, "r", 8, whole=True),
        alpha=_number(file, raw, "lora_alpha", 8.0),
        dropout=_number(file, raw, "lora_dropout", 0.0),
        rslora=bool(raw.get("use_rslora")),
        dora=bool(raw.get("use_dora")),
        init="pissa" if init == "pissa" else "default",
        rank_pattern=_pattern(file, raw, "rank_pattern", whole=True),
        alpha_pattern=_pattern(file, raw, "alpha_pattern"),
        modules_to_save=tuple(raw.get("modules_to_save") or ()),
        base=raw.get("base_model_name_or_path"),
    )


def check_targets(directory: Path, modules: Iterable[str]) -> None:
    """Compare `target_modules`, where they alone say what is adapted, with the modules that have tensors, by their
    names in the base.

    Raises:
      ValueError: naming the file and a module that none of them names. PEFT would leave that one out, so the file is
        of another adapter, or one of its entries is misspelt.
    """
    file = directory / CONFIG
    raw = safetensors.read_json(file)
    targets = raw.get("target_modules")
    if not targets or targets == "all-linear" or raw.get("target_parameters"):
        return
    for module in modules:
        names = (module, module.partition(".")[2])
        if isinstance(targets, str):
            named = any(re.fullmatch(targets, name) for name in names)
        else:
            named = any(name == target or name.endswith(f".{target}") for name in names for target in targets)
        if not named:
            raise ValueError(
                f"{file}: target_modules: {_short(targets)} does not name {module}, which {WEIGHTS} has tensors of; "
                "mend the field, or take the file that belongs to these weights"
            )


def written(
    lora: LoraConfig, targets: Iterable[str], saved: Iterable[str], *, bias: str, fan_in_fan_out: bool, task: str
) -> dict[str, Any]:
    """Contents of adapter_config.json.

    Args:
      lora: the settings. targets: names of adapted modules. saved: names of modules kept whole.
      bias: PEFT's `none`, or `lora_only` where biases of adapted modules are kept.
      fan_in_fan_out: whether the family stores its projections [in, out]. task: PEFT's task_type.
    """
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": lora.base,
        "r": lora.r,
        "lora_alpha": _plain(lora.alpha),
        "lora_dropout": lora.dropout,
        "target_modules": sorted(targets),
        "modules_to_save": sorted(saved) or None,
        "rank_pattern": dict(lora.rank_pattern),
        "alpha_pattern": {key: _plain(value) for key, value in dict(lora.alpha_pattern).items()},
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "init_lora_weights": "pissa" if lora.init == "pissa" else True,
        "bias": bias,
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
    }


def _number(file: Path, raw: Mapping[str, Any], name: str, default: Any, whole: bool = False) -> Any:
    value = raw.get(name, default)
    lowest = 0 if name == "lora_dropout" else 1 if whole else 1e-30
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or value < lowest:
        raise ValueError(f"{file}: {name}: {_short(value)} is not a {'whole ' * whole}number from {lowest} up")
    return value if whole else float(value)


def _pattern(file: Path, raw: Mapping[str, Any], name: str, whole: bool = False) -> tuple[tuple[str, Any], ...]:
    pattern = raw.get(name) or {}
    if not isinstance(pattern, dict):
        raise ValueError(f"{file}: {name}: {_short(pattern)} is no table of pattern -> number; mend the file")
    return tuple((key, _number(file, {name: value}, name, None, whole)) for key, value in pattern.items())


def _plain(value: float) -> float | int:
    """Whole numbers as such, because PEFT declares them so."""
    return int(value) if value == int(value) else value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
