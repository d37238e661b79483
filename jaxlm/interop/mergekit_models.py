"""The models that go into a merge, as tables of named tensors: whole models, adapters, and models with an adapter."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from jaxlm.interop import safetensors
from jaxlm.interop.load import model_directory

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADAPTER_PREFIX = "base_model.model."
BASE_WEIGHT = ".base_layer.weight"
"""Ending of the frozen weight that PEFT stores beside the adapter of an embedding."""
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
"""Names of the number of layers in config.json, over all families."""

PLAIN = {"peft_type": "LORA", "use_dora": False, "bias": "none", "lora_bias": False, "layer_replication": None}
"""Fields of adapter_config.json that must have this value for an adapter to be added to a model here."""

_LAYER = re.compile(r"(?:^|(?<=\.))(\d+)(?=\.)")
_BUFFER = ".rotary_emb.inv_freq"


class Stored(Protocol):
    """A tensor that can be looked at: a file's entry, or one that is computed when it is asked for."""

    @property
    def dtype(self) -> np.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def view(self) -> np.ndarray:
        """The whole tensor."""


class Parent(NamedTuple):
    """A model of a recipe.

    Attributes:
      name: as the recipe has it.
      directory: where its files are.
      config: its config.json or, of an adapter, adapter_config.json.
      tensors: by name.
      layers: how many it has.
    """

    name: str
    directory: Path
    config: dict[str, Any]
    tensors: Mapping[str, Stored]
    layers: int

    @property
    def is_adapter(self) -> bool:
        return "peft_type" in self.config


class Sum(NamedTuple):
    """A weight [out, in] with an adapter on it: `weight + scale * b a`, added in float32."""

    weight: Stored
    a: Stored
    b: Stored
    scale: float
    transposed: bool

    @property
    def dtype(self) -> np.dtype:
        return self.weight.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def view(self) -> np.ndarray:
        """The sum, in the weight's dtype."""
        added = self.b.view().astype(np.float32) @ self.a.view().astype(np.float32)
        added = added.T if self.transposed else added
        return (self.weight.view().astype(np.float32) + np.float32(self.scale) * added).astype(self.dtype)


def open_parent(name: str) -> Parent:
    """The model that a recipe calls `name`: a model or run directory, an adapter's, or `model+adapter`.

    Raises:
      FileNotFoundError, ValueError: naming the directory, and the file, field or tensor at fault.
    """
    if not Path(name).is_dir() and name.count("+") == 1:
        model, adapter = map(open_parent, name.split("+"))
        return _joined(name, model, adapter)
    found = next((d for d in (Path(name), Path(name) / "hf") if (d / ADAPTER_CONFIG).is_file()), None)
    if found is not None:
        config = _read(found / ADAPTER_CONFIG)
        tensors = safetensors.read_header(found / ADAPTER_WEIGHTS)
        return Parent(name, found, {"peft_type": "LORA"} | config, tensors, _count(tensors))
    directory = model_directory(name)
    config = _read(directory / "config.json")
    if "quantization_config" in config:
        raise ValueError(f"{directory / 'config.json'}: quantization_config: quantised models cannot be merged; "
                         "name the model they were made from")  # fmt: skip
    entries = safetensors.open_directory(directory)
    tensors = {key: entry for key, entry in entries.items() if not key.endswith(_BUFFER)}
    layers, stated = _count(tensors), layer_count(config)
    if stated is not None and layers != stated[1]:
        raise ValueError(
            f"{directory}: {layers} layers of weights, but config.json says {stated[0]} {stated[1]}; one is wrong"
        )
    return Parent(name, directory, config, tensors, layers)


def split(name: str) -> tuple[str, int | None]:
    """A tensor's name with `{}` for the layer, and the layer; None outside of layers.

    model.layers.3.mlp.experts.0.w1.weight  ->  (model.layers.{}.mlp.experts.0.w1.weight, 3)
    """
    found = _LAYER.search(name)
    return (name, None) if found is None else (f"{name[: found.start()]}{{}}{name[found.end() :]}", int(found[1]))


def layer_count(config: Mapping[str, Any]) -> tuple[str, int] | None:
    """The field of config.json that says how many layers there are, and its value."""
    return next(((name, config[name]) for name in LAYER_COUNTS if isinstance(config.get(name), int)), None)


def check_plain(adapter: Parent) -> None:
    """Raise ValueError, naming the field, where an adapter is more than `scale * b a` on each module."""
    for field, wanted in PLAIN.items():
        if adapter.config.get(field, wanted) != wanted:
            file = adapter.directory / ADAPTER_CONFIG
            raise ValueError(f"{file}: {field}: such an adapter cannot be merged here; export the merged model first")


def _count(tensors: Mapping[str, Stored]) -> int:
    return max((layer + 1 for _, layer in map(split, tensors) if layer is not None), default=0)


def _read(file: Path) -> dict[str, Any]:
    config = safetensors.read_json(file)
    if not isinstance(config, dict):
        raise ValueError(f"{file}: not a JSON object; mend or replace the file")
    return config


def _joined(name: str, model: Parent, adapter: Parent) -> Parent:
    """A model with an adapter's contribution added to its weights, each when it is looked at."""
    if not adapter.is_adapter or model.is_adapter:
        raise ValueError(f"{name}: expected model+adapter; {adapter.directory} must have an {ADAPTER_CONFIG}")
    check_plain(adapter)
    tensors = dict(model.tensors)
    for key, entry in adapter.tensors.items():
        path = key.removeprefix(ADAPTER_PREFIX)
        module = re.sub(r"\.lora_(A\.weight|B\.weight|embedding_A|embedding_B)$", "", path)
        weight = path if module == path else f"{module}.weight"
        if path.endswith(BASE_WEIGHT):
            continue
        if weight not in model.tensors or (module == path and entry.shape != model.tensors[weight].shape):
            raise ValueError(f"{adapter.directory / ADAPTER_WEIGHTS}: {key}: {model.directory} has no weight for it")
        if module == path:
            tensors[weight] = entry
        elif path.endswith(("lora_A.weight", "lora_embedding_A")):
            tensors[weight] = _with_adapter(adapter, module, key, model.tensors[weight])
    return Parent(name, model.directory, model.config, tensors, model.layers)


def _with_adapter(adapter: Parent, module: str, a_name: str, weight: Stored) -> Sum:
    file = adapter.directory / ADAPTER_WEIGHTS
    b_name = a_name.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B")
    if b_name not in adapter.tensors:
        raise ValueError(f"{file}: {b_name}: missing; the adapter is not whole")
    a, b = adapter.tensors[a_name], adapter.tensors[b_name]
    embedding = "lora_embedding" in a_name
    transposed = embedding or bool(adapter.config.get("fan_in_fan_out"))
    shape = (b.shape[0], a.shape[-1])
    if (shape[::-1] if transposed else shape) != weight.shape or a.shape[0] != b.shape[-1]:
        shapes = f"{list(a.shape)} and {list(b.shape)} do not fit {list(weight.shape)}"
        raise ValueError(f"{file}: {a_name}: {shapes}; the adapter is another model's")
    return Sum(weight, a, b, adapter_scale(adapter.config, module, a.shape[0]), transposed)


def adapter_scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """`alpha / r`, or `alpha / sqrt(r)` with rsLoRA, alpha by the first pattern that the module's name ends with."""
    patterns = config.get("alpha_pattern") or {}
    alpha = next((a for key, a in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", module)), None)
    alpha = config.get("lora_alpha", 8) if alpha is None else alpha
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)
