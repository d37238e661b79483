"""jaxlm's own form, for models that no Hugging Face family can express: our fields, our leaf paths, one file format."""

import dataclasses
from typing import Any

import msgspec

from jaxlm.interop import names
from jaxlm.interop.hf.fields import Fields
from jaxlm.interop.hf.rows import Family
from jaxlm.interop.names import Row, Table, plain
from jaxlm.nn.config import ModelConfig

FIELD = "model"
"""Where config.json holds the fields of ModelConfig."""


def read(fields: Fields) -> ModelConfig:
    """Every field by its own name; what is missing has its default."""
    try:
        return msgspec.convert(fields.get(FIELD), ModelConfig)
    except msgspec.ValidationError as error:
        raise fields.error(FIELD, str(error)) from None


def write(cfg: ModelConfig) -> dict[str, Any]:
    """All fields that say what the model computes."""
    finished = dataclasses.replace(cfg, family=None, dropout=0.0, embed_std=None, lora=None)
    return {FIELD: msgspec.to_builtins(finished), "vocab_size": cfg.V}


def table(cfg: ModelConfig) -> Table:
    """Our paths with dots, layers by number; the experts of a layer share a tensor."""
    top: list[Row] = []
    layer: dict[str, list[Row]] = {"layers": [], "dense_layers": []}
    for path in names.abstract(cfg):
        stack, _, rest = path.partition("/")
        if stack in layer:
            layer[stack].append(plain(rest.replace("/", "."), rest))
        else:
            top.append(plain(path.replace("/", "."), path))
    mixed = tuple(layer["layers"])
    dense = mixed if cfg.moe is None or not layer["dense_layers"] else tuple(layer["dense_layers"])
    return Table("", "layers.{i}.", tuple(top), dense, mixed)


FAMILY = Family("jaxlm", "JaxlmForCausalLM", {}, read, write, table)
