"""Model directories -> configuration and parameters, tensor by tensor, straight to where each piece shall live."""

import dataclasses
import functools
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import tree
from jaxlm.dist import rules
from jaxlm.interop import bitsandbytes, hf, names, peft, safetensors, scored, selection
from jaxlm.interop.bitsandbytes import Packed
from jaxlm.interop.hf.rows import Family
from jaxlm.interop.names import Target
from jaxlm.interop.safetensors import Entry
from jaxlm.nn.config import ModelConfig
from jaxlm.nn.qtensor import QTensor, check_kind
from jaxlm.types import Array, Tree, Variables

DTYPES = ("float32", "bfloat16", "float16", "auto")
HEAD = "lm_head.weight"
SCORE = "score.weight"
COMPARED = 1 << 24
"""Elements at a time, where two tensors are compared."""
SMALL = 1 << 24
"""Bytes up to which a leaf is put together on the host, whatever the device."""
ALIGNMENT = 64
"""Bytes; host memory aligned so becomes an array of the CPU backend without a copy."""
ROWS = 64
"""Rows that are transposed together."""


def load(
    path: str | Path,
    dtype: str = "float32",
    adapter: str | Path | None = None,
    quantize: str | None = None,
    *,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[ModelConfig, Variables]:
    """Reads a model.

    Tensors are mapped from the file, cut to what each device holds, and converted and rearranged on the device, one at
    a time: host memory holds one tensor besides what the devices (on CPU: the result) hold.

    Args:
      path: a Hugging Face model directory, or a run directory, whose `hf/` is read.
      dtype: of the parameters: `float32`, `bfloat16`, `float16`, or `auto`, which keeps each leaf as it is stored.
      adapter: a PEFT directory, or a run directory that holds one, for the model at `path`. What `path` is itself, with
        the base that it names, needs no second argument.
      quantize: `nf4`, `nf4-double` or `int8`: the projections of all layers become QTensors, one tensor after another.
        Null keeps what is there: in a directory that bitsandbytes quantised they are QTensors already.
      mesh: devices over which the parameters are spread by the sharding rules; null: the default device.

    Returns:
      The configuration, and {"params": tree}; with an adapter its settings in the configuration, and its tree, `lora`.

    Raises:
      FileNotFoundError, ValueError: one line naming file, tensor, field or word. Nothing is unpickled, no code of the
        directory is run.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: {dtype!r} is unknown; the known ones are {', '.join(DTYPES)}")
    if quantize is not None:
        check_kind(quantize)
    path, found = peft.locate(path, adapter)
    if found is not None:
        return peft.attach(*load(path, dtype, quantize=quantize, mesh=mesh), found, mesh)
    directory = model_directory(path)
    cfg, family = _read_config(directory)
    entries = bitsandbytes.gathered(safetensors.open_directory(directory))
    cfg = _settle_head(cfg, family, entries)
    choice = selection.take(cfg, family.table(cfg), entries)
    return cfg, {"params": _read_params(cfg, family, entries, directory, Want(dtype, quantize, mesh))} | choice


def load_config(path: str | Path) -> ModelConfig:
    """The configuration alone; `path` and errors as in `load`.

    Weights need not be there, and are looked at only to see whether a tied model has a second head.
    """
    path, found = peft.locate(path, None)
    if found is not None:
        return peft.configure(load_config(path), found)
    directory = model_directory(path)
    cfg, family = _read_config(directory)
    if not cfg.tie_embeddings:
        return cfg
    try:
        entries = bitsandbytes.gathered(safetensors.open_directory(directory))
    except (FileNotFoundError, ValueError):
        return cfg
    return _settle_head(cfg, family, entries)


def load_routing(path: str | Path) -> Variables:
    """{"moe_state": ...} with the selection bias of a directory's routers alone; {} without one, or without a file.

    Path and other errors as in `load`.
    """
    try:
        directory = model_directory(peft.locate(path, None)[0])
        cfg, family = _read_config(directory)
        return {} if cfg.moe is None else selection.take(cfg, family.table(cfg), safetensors.open_directory(directory))
    except FileNotFoundError:
        return {}


def stored_kind(path: str | Path | None) -> str | None:
    """How the weights of a directory, or of an adapter's base, are quantised; None if not, or if it is not here."""
    if path is None or not Path(path).is_dir():
        return None
    return bitsandbytes.stated_kind(safetensors.read_json(model_directory(peft.locate(path, None)[0]) / "config.json"))


def model_directory(path: str | Path) -> Path:
    """The Hugging Face directory that `path` is, or that the run directory `path` holds."""
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such directory; give a model directory or a run directory")
    if (path / "config.json").is_file():
        return path
    if (path / "hf" / "config.json").is_file():
        return path / "hf"
    if (path / "config.yaml").is_file():
        raise FileNotFoundError(f"{path / 'hf'}: this run has no exported model yet; let it finish, or export it")
    raise FileNotFoundError(f"{path / 'config.json'}: no such file; is this a model directory?")


def text_directory(path: str | Path) -> Path:
    """The directory with the tokenizer and the chat template of a model: its own; of an adapter that has none, the
    base's. `path` and errors as in `load`."""
    base, found = peft.locate(path, None)
    return found if found is not None and (found / "tokenizer.json").is_file() else model_directory(base)


def _read_config(directory: Path) -> tuple[ModelConfig, Family]:
    file = directory / "config.json"
    raw = safetensors.read_json(file)
    if not isinstance(raw, dict):
        raise ValueError(f"{file}: not a JSON object; mend or replace the file")
    raw = bitsandbytes.without_quantisation(raw, str(file))
    cfg = hf.read_config(raw, str(file))
    cfg = scored.headless(cfg) if scored.is_scored(raw) else cfg
    return _generation_ends(cfg, directory), hf.family_of(raw, str(file))


def _generation_ends(cfg: ModelConfig, directory: Path) -> ModelConfig:
    """The ends of generation_config.json, where it has any: they are what generation stops at. That of config.json, if
    among them, comes first."""
    raw = read_generation_config(directory)
    ends = raw.get("eos_token_id")
    if ends is None:
        return cfg
    ends = ends if isinstance(ends, list) else [ends]
    if not ends or not all(isinstance(end, int) for end in ends):
        raise ValueError(f"{directory / 'generation_config.json'}: eos_token_id: {ends!r} is not a token id or a list")
    known = cfg.eos_token_id if isinstance(cfg.eos_token_id, tuple) else (cfg.eos_token_id,)
    ordered = sorted(dict.fromkeys(ends), key=lambda end: (end not in known, ends.index(end)))
    return dataclasses.replace(cfg, eos_token_id=ordered[0] if len(ordered) == 1 else tuple(ordered))


def read_generation_config(directory: Path) -> Mapping[str, Any]:
    """generation_config.json, or nothing where there is none."""
    file = directory / "generation_config.json"
    if not file.is_file():
        return {}
    raw = safetensors.read_json(file)
    if not isinstance(raw, dict):
        raise ValueError(f"{file}: not a JSON object; mend or replace the file")
    return raw


def _settle_head(cfg: ModelConfig, family: Family, entries: dict[str, Entry | Packed]) -> ModelConfig:
    """A tied model whose file has a head too: equal to the embedding it is dropped, different it is kept, untied."""
    if SCORE in entries:
        entries.pop(HEAD, None)
        return scored.headless(cfg)
    if not cfg.tie_embeddings or HEAD not in entries:
        return cfg
    table = family.table(cfg)
    embedding = next(row.theirs for row in table.top if row.ours == ("embed/kernel",))
    other = entries.get(embedding, entries.get(embedding.removeprefix(table.prefix)))
    head = entries[HEAD]
    if other is None:
        # Some writers keep the other name of the shared tensor.
        entries[embedding] = entries.pop(HEAD)
        return cfg
    if _equal(head, other):
        del entries[HEAD]
        return cfg
    warnings.warn(
        f"{head.file}: {HEAD}: differs from the embedding although config.json says tie_word_embeddings; kept apart",
        stacklevel=3,
    )
    return dataclasses.replace(cfg, tie_embeddings=False)


def _equal(a: Entry | Packed, b: Entry | Packed) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    x, y = (entry.view().reshape(-1) for entry in (a, b))
    return all(np.array_equal(x[i : i + COMPARED], y[i : i + COMPARED]) for i in range(0, x.size, COMPARED))


class Want(NamedTuple):
    """What `load` was asked for; see there."""

    dtype: str
    quantize: str | None
    mesh: jax.sharding.Mesh | None


def _read_params(
    cfg: ModelConfig, family: Family, entries: dict[str, Entry | Packed], directory: Path, want: Want
) -> Tree:
    table, leaves = family.table(cfg), names.abstract(cfg)
    if SCORE in entries:
        table, leaves = scored.table(table), scored.leaves(leaves, cfg)
    fused = bool(table.fused) and any(name.endswith(".experts.gate_up_proj") for name in entries)
    wanted = names.targets(cfg, table, leaves, fused)
    matched = names.match(entries, wanted, table, str(directory)).items()
    found = [(bitsandbytes.fitted(entries[name], wanted[full]), wanted[full]) for name, full in matched]
    for (name, _), (entry, target) in zip(matched, found, strict=True):
        _check(entry, name, target)
    stored = [(part.path, entry.dtype) for entry, target in found for part in target.parts]
    dtypes = _widest(stored) if want.dtype == "auto" else dict.fromkeys(leaves, want.dtype)
    forms = bitsandbytes.forms(found, leaves, want.quantize, dtypes)
    floats = {path: jax.ShapeDtypeStruct(leaf.shape, dtypes[path]) for path, leaf in leaves.items()}
    abstract = names.nest(floats | forms)
    parts = tree.leaves(abstract)
    places = dict.fromkeys(parts) if want.mesh is None else tree.leaves(rules.shardings(abstract, want.mesh))
    buffers = {path: _buffer(leaf, places[path]) for path, leaf in parts.items()}
    # In the order of the file, so that a disk is read in one pass.
    for entry, target in sorted(found, key=lambda pair: (pair[0].file, pair[0].offset)):
        _fill(buffers, entry, target, forms)
    placed = [_placed(buffers.pop(path), places[path]) for path in parts]
    return jax.tree.unflatten(jax.tree.structure(abstract), placed)


def _widest(stored: Iterable[tuple[str, np.dtype]]) -> dict[str, np.dtype]:
    """For each leaf the dtype that holds all of its pieces exactly."""
    found: dict[str, np.dtype] = {}
    for path, dtype in stored:
        found[path] = jnp.promote_types(found.get(path, dtype), dtype)
    return found


def _buffer(leaf: jax.ShapeDtypeStruct, place: jax.sharding.NamedSharding | None) -> np.ndarray | Array:
    """Room for a leaf: on its devices; or on the host, if that is where it stays, or if it is small, which saves
    compiling a program for its shape."""
    size = leaf.size * leaf.dtype.itemsize
    if size > SMALL and (place is not None or jax.default_backend() != "cpu"):
        return jnp.zeros(leaf.shape, leaf.dtype, device=place)
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(leaf.dtype).reshape(leaf.shape)


def _placed(buffer: np.ndarray | Array, place: jax.sharding.NamedSharding | None) -> Array:
    if isinstance(buffer, jax.Array):
        return buffer
    if place is None:
        return jax.device_put(buffer)
    return jax.make_array_from_callback(buffer.shape, place, lambda index: buffer[index])


def _check(entry: Entry | Packed, name: str, target: Target) -> None:
    if entry.shape != target.shape:
        shapes = f"shape {list(entry.shape)}, but config.json asks for {list(target.shape)}"
        raise ValueError(f"{entry.file}: {name}: {shapes}; the weights do not fit config.json")
    if not jnp.issubdtype(entry.dtype, jnp.floating):
        raise ValueError(
            f"{entry.file}: {name}: dtype {entry.dtype} is no float, and nothing beside it says what it is"
        )


def _fill(
    buffers: dict[str, np.ndarray | Array], entry: Entry | Packed, target: Target, forms: Mapping[str, QTensor]
) -> None:
    """Copies one tensor of a file into the leaves that it belongs to."""
    if target.parts[0].path in forms:
        for path, index, piece in bitsandbytes.pieces(entry, target, forms):
            _store(buffers, path, index, piece, False)
        return
    start, tensor = 0, entry.view()
    for part in target.parts:
        width = part.shape[-1] if part.shape else 1
        piece = tensor
        if len(target.parts) > 1:
            where = slice(start, start + width)
            piece = tensor[..., where, :] if target.transpose else tensor[..., where]
        start += width
        _store(buffers, part.path, part.index, piece, target.transpose)


def _store(
    buffers: dict[str, np.ndarray | Array], path: str, index: tuple[int, ...], piece: np.ndarray, transpose: bool
) -> None:
    """`buffers[path][index] = piece`, transposed and converted."""
    buffer = buffers[path]
    if isinstance(buffer, np.ndarray):
        entry: Any = (*index, ...)  # a view even where the entry is a scalar
        _copy(buffer[entry], piece, transpose)
        return
    placed = _put(piece, buffer, len(index), transpose)
    where = tuple(np.int32(i) for i in index)
    # One at a time: a mapped tensor leaves memory before the next is touched.
    buffers[path] = _update(buffer, placed, where, transpose=transpose).block_until_ready()


def _copy(out: np.ndarray, piece: np.ndarray, transpose: bool) -> None:
    """`out[...] = piece`, transposed a few rows at a time, because a whole transposed matrix would miss every cache."""
    if not transpose:
        out[...] = piece
        return
    for start in range(0, piece.shape[-2], ROWS):
        rows = slice(start, start + ROWS)
        out[..., rows] = np.swapaxes(piece[..., rows, :], -1, -2)


def _put(piece: np.ndarray, like: Array, skipped: int, transpose: bool) -> Array:
    """`piece` on the devices of `like`, laid out as one entry of it, so that every device gets its cut alone."""
    place = like.sharding
    if not isinstance(place, jax.sharding.NamedSharding):
        return jax.device_put(piece, place)
    spec = list(place.spec) + [None] * (like.ndim - len(place.spec))
    spec = spec[skipped:]
    if transpose:
        spec[-2:] = spec[:-3:-1]
    cut = jax.sharding.NamedSharding(place.mesh, jax.sharding.PartitionSpec(*spec))
    return jax.make_array_from_callback(piece.shape, cut, lambda index: np.ascontiguousarray(piece[index]))


@functools.partial(jax.jit, donate_argnums=0, static_argnames="transpose")
def _update(buffer: Array, piece: Array, index: tuple[Array, ...], *, transpose: bool) -> Array:
    """`buffer` with `piece`, transposed and converted, at `buffer[index]`; in place, since the buffer is donated."""
    piece = jnp.swapaxes(piece, -1, -2) if transpose else piece
    piece = jnp.expand_dims(piece.astype(buffer.dtype), tuple(range(len(index))))
    zeros = [jnp.int32(0)] * (buffer.ndim - len(index))
    return jax.lax.dynamic_update_slice(buffer, piece, (*index, *zeros))
