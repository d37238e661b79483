"""Configuration and parameters -> a Hugging Face model directory that appears whole or not at all."""

import functools
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxlm import tree
from jaxlm.dist import multihost, place
from jaxlm.interop import bitsandbytes, hf, names, peft, safetensors, scored, selection
from jaxlm.interop.directory import refuse_occupied, replacement, write_json
from jaxlm.interop.fold import fold
from jaxlm.interop.names import Target
from jaxlm.interop.safetensors import NAMES, Tensor
from jaxlm.nn.config import ModelConfig
from jaxlm.nn.qtensor import is_qtensor
from jaxlm.params.lora import merge, merged_config
from jaxlm.params.quantize import dequantize
from jaxlm.types import Array, Tree, Variables

SHARD_SIZE = 5_000_000_000
"""Bytes of one file."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)


def save(
    path: str | Path,
    cfg: ModelConfig,
    variables: Variables,
    tokenizer: str | Path | None = None,
    *,
    shard_size: int = SHARD_SIZE,
    own_form: bool = False,
) -> None:
    """Writes a directory that transformers' from_pretrained loads: config.json, generation_config.json, safetensors.

    Arrays keep their dtype and get the family's names; a tied head is left out. The forward scalars of muP, which no
    family knows, are multiplied into weights. A model with a score head is written as a sequence classifier of one
    label, without a vocabulary head. Everything is written beside `path` and renamed at the end. A `path`
    that holds a model directory already (a config.json) is replaced as a whole; any other that is not empty is
    refused. Of several processes, which must all call this, the first one writes.

    Args:
      path: directory to make.
      cfg, variables: the model; {"params": tree}, its quantised kernels in bitsandbytes' form. With `lora` too, the
        adapter is merged into it; {"lora": tree} alone is written as a PEFT directory, whose base is `cfg.lora.base`.
      tokenizer: a tokenizer.json, or a directory with one; it is copied, with its configuration and chat template.
      shard_size: largest size of one weight file in bytes; more is spread over several with an index.
      own_form: whether a model that no family can express is written in a form that only `jaxlm.load` reads.

    Raises:
      ValueError: naming the field that no family can express, the missing part, or the path in the way.
    """
    path = Path(path)
    refuse_occupied(path)
    source = _tokenizer_files(tokenizer)
    if set(variables) == {"lora"}:
        return _save_adapter(path, cfg, variables["lora"], source)
    variables, selection_bias = selection.split(variables)
    cfg, variables = _merged(cfg, variables)
    folds, plain_cfg = fold(cfg)
    leaves = tree.leaves(variables["params"], is_leaf=is_qtensor)
    if has_score := "score/kernel" in leaves:
        plain_cfg = scored.headless(plain_cfg)
        leaves = {path: leaf for path, leaf in leaves.items() if not path.startswith("unembed/")}
    family, written = hf.choose(plain_cfg, own_form)
    table, shapes = family.table(plain_cfg), names.abstract(plain_cfg)
    if has_score:
        table, shapes, written = scored.table(table), scored.leaves(shapes, cfg), scored.written(written, cfg)
    tensors = _tensors(names.targets(plain_cfg, table, shapes), leaves, folds)
    tensors += selection.tensors(plain_cfg, table, selection_bias)
    dtype = _common_dtype(tensors)
    written |= {"dtype": dtype, "torch_dtype": dtype} | bitsandbytes.quantization_config(leaves, dtype)
    if not multihost.is_main():
        for tensor in tensors:
            tensor.make()
        return
    with replacement(path) as temporary:
        write_json(temporary / "config.json", written)
        write_json(temporary / "generation_config.json", generation_config(cfg))
        for name, file in source.items():
            shutil.copyfile(file, temporary / name)
        if "tokenizer.json" in source and "tokenizer_config.json" not in source:
            write_json(temporary / "tokenizer_config.json", tokenizer_config(source["tokenizer.json"], cfg))
        safetensors.write_directory(temporary, tensors, shard_size)


def _merged(cfg: ModelConfig, variables: Variables) -> tuple[ModelConfig, Variables]:
    """Parameters alone, an adapter merged into them."""
    if not {"params"} <= set(variables) <= {"params", "lora"}:
        extra = ", ".join(sorted(set(variables) ^ {"params"}))
        raise ValueError(f"variables: {extra}: only parameters, with or without lora, or lora alone can be saved")
    if "lora" not in variables:
        return cfg, variables
    params = dequantize(merge(cfg, variables["params"], variables["lora"]))
    return merged_config(cfg, params), {"params": params}


def _save_adapter(path: Path, cfg: ModelConfig, lora: Tree, source: Mapping[str, Path]) -> None:
    lora = place.gather(lora)
    if not multihost.is_main():
        return
    with replacement(path) as temporary:
        for name, file in source.items():
            shutil.copyfile(file, temporary / name)
        peft.save(temporary, cfg, lora)


def generation_config(cfg: ModelConfig) -> dict[str, Any]:
    """Contents of generation_config.json: the special tokens that generation needs."""
    eos = list(cfg.eos_token_id) if isinstance(cfg.eos_token_id, tuple) else cfg.eos_token_id
    ids = {"bos_token_id": cfg.bos_token_id, "eos_token_id": eos, "pad_token_id": cfg.pad_token_id}
    return {"_from_model_config": True} | {name: value for name, value in ids.items() if value is not None}


def tokenizer_config(file: Path, cfg: ModelConfig) -> dict[str, Any]:
    """tokenizer_config.json for a bare tokenizer.json: the class that reads it, and the special tokens as text."""
    contents = safetensors.read_json(file)
    try:
        vocabulary = contents["model"]["vocab"]
        # Unigram models list (text, score), the others map text to id.
        pairs = vocabulary.items() if isinstance(vocabulary, dict) else ((v[0], i) for i, v in enumerate(vocabulary))
        texts = {i: text for text, i in pairs}
        texts |= {token["id"]: token["content"] for token in contents.get("added_tokens") or ()}
    except (KeyError, TypeError, IndexError):
        raise ValueError(f"{file}: not a tokenizer.json; give one that the tokenizers library wrote") from None
    eos = cfg.eos_token_id[0] if isinstance(cfg.eos_token_id, tuple) else cfg.eos_token_id
    named = {"bos_token": cfg.bos_token_id, "eos_token": eos, "pad_token": cfg.pad_token_id}
    special = {name: texts[i] for name, i in named.items() if i in texts}
    # Without this, decoding would glue " ." to "." and the like.
    return {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | special


def _tensors(
    targets: Mapping[str, Target], leaves: Mapping[str, Array], folds: Mapping[str, Callable[[np.ndarray], np.ndarray]]
) -> list[Tensor]:
    known = {part.path for target in targets.values() for part in target.parts}
    missing, unexpected = sorted(known - leaves.keys()), sorted(leaves.keys() - known)
    if missing or unexpected:
        raise ValueError(f"params: missing {missing}, unexpected {unexpected}; the tree does not fit the configuration")
    for part in (part for target in targets.values() for part in target.parts):
        if leaves[part.path].shape[len(part.index) :] != part.shape:
            shape = list(leaves[part.path].shape)
            raise ValueError(f"{part.path}: shape {shape} does not fit the configuration, which asks for {part.shape}")

    def make(target: Target) -> np.ndarray:
        pieces = []
        for part in target.parts:
            piece = _host(leaves[part.path], part.index)
            pieces.append(folds[part.path](piece) if part.path in folds else piece)
        whole = pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=-1)
        return np.swapaxes(whole, -1, -2) if target.transpose else whole

    found = []
    for name, target in targets.items():
        if any(is_qtensor(leaves[part.path]) for part in target.parts):
            found += bitsandbytes.tensors(name, target, leaves, folds)
            continue
        dtype = np.dtype(leaves[target.parts[0].path].dtype)
        if dtype not in NAMES:
            raise ValueError(f"{target.parts[0].path}: dtype {dtype} cannot be written; convert it first")
        found.append(Tensor(name, dtype, target.shape, functools.partial(make, target)))
    return found


def _host(leaf: Array, index: tuple[int, ...]) -> np.ndarray:
    """One entry of a leaf on the host, without moving the rest."""
    return place.gather(leaf[index] if index else leaf)


def _common_dtype(tensors: list[Tensor]) -> str:
    """The floating dtype that holds most bytes, by transformers' name."""
    sizes: dict[str, int] = {}
    for tensor in (t for t in tensors if jnp.issubdtype(t.dtype, jnp.floating)):
        sizes[str(tensor.dtype)] = sizes.get(str(tensor.dtype), 0) + tensor.size
    return max(sizes, key=lambda name: sizes[name])


def _tokenizer_files(tokenizer: str | Path | None) -> dict[str, Path]:
    if tokenizer is None:
        return {}
    given = Path(tokenizer)
    if given.is_file():
        return {"tokenizer.json": given}
    found = {name: given / name for name in TOKENIZER_FILES if (given / name).is_file()}
    if not found:
        raise FileNotFoundError(f"{given / 'tokenizer.json'}: no such file; give a tokenizer.json or its directory")
    return found
