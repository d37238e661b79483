"""What a checkpoint says about the run that wrote it, and whether another run may continue it."""

import json
from collections.abc import Iterator
from importlib import metadata
from typing import Any

SCHEMA = 1
"""Raised whenever the layout of the state or of this description changes."""

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")

CONFIG_FIELDS = (
    "model", "data", "run.seed", "objective.kind", "optimizer.name", "lora", "mup", "quantize",
    "train.batch_size",
)  # fmt: skip
"""Settings that decide what the saved state means; all others may change between two starts of a run."""

HASHES = {"base": "base model", "tokenizer": "tokenizer", "data": "data content"}
"""Keys of the description that hold content hashes, with their names in messages."""

MODELS = {"model": "model.path", "teacher": "objective.teacher", "reward": "objective.rewards"}
"""The fields that name the models whose hashes are under `base`."""


def versions() -> dict[str, str]:
    """Installed versions of the packages that write or read a state; absent ones are left out."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def compare_meta(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Refuses to continue a run under settings or data that its state does not belong to.

    Both arguments have `config` (the resolved configuration as nested dicts), `tokenizer`, `data` and `base` (content
    hashes, strings or JSON values; None where there is none). The number of devices, `train.steps` and the like are
    not compared, neither is a configuration field that `saved` does not know.

    Args:
      saved: read from a checkpoint.
      current: of the run that starts.

    Raises:
      ValueError: naming the first field that differs with both values, and the others by name.
    """
    saved, current = (json.loads(json.dumps(meta)) for meta in (saved, current))
    differences = [
        difference
        for field in CONFIG_FIELDS
        for difference in _differing(field, _at(saved["config"], field), _at(current["config"], field))
    ]
    for key, name in HASHES.items():
        found = _differing("", saved.get(key), current.get(key))
        differences.extend((_hashed(name, part), before, now) for part, before, now in found)
    if not differences:
        return
    (field, before, now), *rest = differences
    others = f" (also changed: {', '.join(sorted({name for name, _, _ in rest}))})" if rest else ""
    raise ValueError(
        f"{field}: {_short(before)} in the checkpoint, {_short(now)} now{others}; "
        "go back to the settings of the run, or choose another run.dir"
    )


def _hashed(name: str, part: str) -> str:
    """`base model`, or `base model (objective.teacher)` where there are several, for messages."""
    part = part.removeprefix(".")
    return f"{name} ({MODELS.get(part, part)})" if part else name


def _at(config: Any, field: str) -> Any:
    for key in field.split("."):
        config = config.get(key) if isinstance(config, dict) else None
    return config


def _differing(field: str, before: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in before:
            yield from _differing(f"{field}.{key}", before[key], now.get(key))
    elif before != now:
        yield field, before, now


def _short(value: Any, length: int = 60) -> str:
    text = json.dumps(value)
    return text if len(text) <= length else text[: length - 3] + "..."
