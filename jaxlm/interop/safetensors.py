"""The safetensors format: memory-mapped reading with every claim of the header checked, and streamed writing.

A file is an 8-byte little-endian length, that many bytes of JSON (`name -> dtype, shape, data_offsets`), then the data.
The safetensors package reads the same; here a tensor is mapped by itself, so that its pages leave the process with it,
can be cut for a device before anything is copied, and a broken file is named together with the tensor at fault.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

HEADER_LIMIT = 100_000_000
"""Bytes; the reference implementation refuses longer headers too."""

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Entry(NamedTuple):
    """Where a tensor lies: file, dtype, shape, and the offset of its first byte in the file."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    def view(self) -> np.ndarray:
        """The tensor, read-only, mapped from the file; nothing is read before it is looked at."""
        if not math.prod(self.shape):
            return np.empty(self.shape, self.dtype)
        return np.memmap(self.file, self.dtype, "r", self.offset, self.shape)


class Tensor(NamedTuple):
    """A tensor to be written: its name, dtype, shape, and a function that makes it when its turn comes."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_json(path: Path) -> Any:
    """The JSON value in a file; a repeated key is an error.

    Raises:
      FileNotFoundError, ValueError: naming the file, and the line or key.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"{path}: {twice} appears twice; keep one of them")
        return result

    try:
        return json.loads(path.read_bytes(), object_pairs_hook=unique)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; check the path") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        where = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise ValueError(f"{path}{where}: not valid JSON; mend or replace the file") from None


def read_header(file: Path) -> dict[str, Entry]:
    """All tensors of one safetensors file by name.

    Raises:
      FileNotFoundError, ValueError: naming the file and, where one is at fault, the tensor.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; download it again")
    total = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if total < 8 or length > min(HEADER_LIMIT, total - 8):
            raise ValueError(f"{file}: header of {length} bytes in a file of {total}; truncated or not safetensors")
        text = stream.read(length)
    try:
        header = json.loads(text)
        assert isinstance(header, dict)
    except (ValueError, AssertionError, RecursionError):
        raise ValueError(f"{file}: header is not a JSON object; the file is damaged or not safetensors") from None
    header.pop("__metadata__", None)
    entries = {name: _entry(file, name, fields, 8 + length, total) for name, fields in header.items()}
    _check_layout(file, entries, 8 + length, total)
    return entries


def _entry(file: Path, name: str, fields: Any, start: int, total: int) -> Entry:
    try:
        dtype, shape, (begin, end) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
        numbers = (*shape, begin, end)
        assert all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers)
    except (KeyError, TypeError, ValueError, AssertionError):
        raise ValueError(f"{file}: {name}: header entry is malformed; the file is damaged") from None
    if dtype not in DTYPES:
        raise ValueError(f"{file}: {name}: dtype {dtype!r} is unknown; the known ones are {', '.join(DTYPES)}")
    size = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != size:
        raise ValueError(f"{file}: {name}: offsets span {end - begin} bytes but its shape needs {size}; damaged file")
    if start + end > total:
        raise ValueError(f"{file}: {name}: ends {start + end - total} bytes after the end of the file; truncated file")
    return Entry(file, DTYPES[dtype], shape, start + begin)


def _check_layout(file: Path, entries: dict[str, Entry], start: int, total: int) -> None:
    """Tensors must fill the data one after the other: neither overlap nor gap, as the format demands."""
    position = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, math.prod(item[1].shape))):
        if entry.offset != position:
            what = "overlaps another tensor" if entry.offset < position else "follows a gap"
            raise ValueError(f"{file}: {name}: {what} at byte {entry.offset}; the file is damaged")
        position += math.prod(entry.shape) * entry.dtype.itemsize
    if position != total:
        raise ValueError(f"{file}: {total - position} bytes after the last tensor; the file is damaged")


def open_directory(path: Path) -> dict[str, Entry]:
    """All tensors of a model directory: `model.safetensors`, or the shards that the index file names.

    Raises:
      FileNotFoundError, ValueError: naming the file and the tensor at fault. Pickled weights are never opened.
    """
    if (path / SINGLE).is_file():
        return read_header(path / SINGLE)
    if not (path / INDEX).is_file():
        pickles = sorted(p.name for p in path.iterdir() if p.suffix in PICKLES)
        if pickles:
            raise ValueError(
                f"{path / pickles[0]}: pickled weights can run code and are not read; convert them to {SINGLE}"
            )
        raise FileNotFoundError(f"{path / SINGLE}: no such file, nor {INDEX}; is this a model directory?")
    index = path / INDEX
    contents = read_json(index)
    where = contents.get("weight_map") if isinstance(contents, dict) else None
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise ValueError(f"{index}: weight_map: not a table of tensor -> file; mend or replace the file")
    entries: dict[str, Entry] = {}
    for shard in sorted(set(where.values())):
        if Path(shard).name != shard:
            raise ValueError(f"{index}: weight_map: {shard!r} is not a file name inside the directory; mend the file")
        for name, entry in read_header(path / shard).items():
            if name in entries:
                raise ValueError(f"{entry.file}: {name}: also in {entries[name].file.name}; remove one of them")
            entries[name] = entry
    for name, shard in where.items():
        if name not in entries or entries[name].file.name != shard:
            raise ValueError(f"{path / shard}: {name}: named in {INDEX} but not in the file; replace the file")
    return entries


def write_directory(path: Path, tensors: Sequence[Tensor], shard_size: int) -> None:
    """Writes `model.safetensors`, or shards of at most `shard_size` bytes with their index, one tensor in memory at a
    time. A tensor larger than that has a shard of its own."""
    shards: list[list[Tensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.size for t in shards[-1]) + tensor.size > shard_size:
            shards.append([])
        shards[-1].append(tensor)
    if len(shards) == 1:
        write(path / SINGLE, shards[0])
        return
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write(path / file, shard)
        where |= {tensor.name: file for tensor in shard}
    metadata = {"total_size": sum(t.size for t in tensors)}
    text = json.dumps({"metadata": metadata, "weight_map": dict(sorted(where.items()))}, indent=2)
    (path / INDEX).write_text(text + "\n")


def write(file: Path, tensors: Iterable[Tensor]) -> None:
    """Writes one safetensors file, wide dtypes first so that every tensor is aligned."""
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in ordered:
        offsets = [position, position + tensor.size]
        header[tensor.name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        position += tensor.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little"))
        stream.write(text)
        for tensor in ordered:
            array = tensor.make()
            assert array.shape == tensor.shape and array.dtype == tensor.dtype, tensor.name
            stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
