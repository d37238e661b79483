"""Token bins: tokens and document offsets as flat binary files that are mapped into memory, with a manifest.

A folder holds

    manifest.json    counts, dtype, smallest and largest id, tokenizer hash, SHA-256 of the two files below
    tokens.bin       uint16 or uint32, little-endian, all documents one after the other
    documents.bin    int64, little-endian: where each document starts, and the number of tokens at the end
    tokenizer.json   the tokenizer that made the ids
    validation/      the same again for a held-out part, where there is one

Reading a row is index arithmetic; nothing is parsed during training.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from jaxlm.data.tokenizer import Tokenizer

FORMAT = "jaxlm-bins-1"
TOKENS, DOCUMENTS, MANIFEST, VALIDATION = "tokens.bin", "documents.bin", "manifest.json", "validation"
DTYPES = {"uint16": "<u2", "uint32": "<u4"}
CHUNK = 1 << 24
VERIFY_BYTES = 1 << 31
"""Files up to this size are hashed whole when they are opened; of larger ones, sizes and 1024 spread blocks."""


@dataclasses.dataclass(frozen=True)
class Bins:
    """An opened folder.

    Attributes:
      folder: where it is.
      tokens: uint16 or uint32 [tokens], mapped.
      documents: int64 [documents + 1], mapped; document d is tokens[documents[d]:documents[d + 1]].
      manifest: what manifest.json says.
      content: hash of the content, for fingerprints.
    """

    folder: Path
    tokens: np.ndarray = dataclasses.field(repr=False)
    documents: np.ndarray = dataclasses.field(repr=False)
    manifest: dict[str, Any] = dataclasses.field(repr=False)
    content: str


def is_bins(path: str | Path | None) -> bool:
    """Whether `path` is a folder of token bins."""
    return path is not None and (Path(path).expanduser() / MANIFEST).is_file()


class BinWriter:
    """Writes the documents given to `append` into a folder; the manifest last, so an unfinished folder is none."""

    def __init__(self, folder: Path, tokenizer: Tokenizer):
        """Open the files; the tokenizer's size chooses the width of a token."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.dtype = "uint16" if tokenizer.size <= 1 << 16 else "uint32"
        self.tokenizer = tokenizer
        self.streams: dict[str, IO[bytes]] = {name: (folder / name).open("wb") for name in (TOKENS, DOCUMENTS)}
        self.hashes = {name: hashlib.sha256() for name in self.streams}
        self.tokens = self.documents = 0
        self.largest, self.smallest = -1, 1 << 32

    def __enter__(self) -> "BinWriter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if kind is None:
            self._write(DOCUMENTS, np.array([self.tokens], "<i8"))
        for stream in self.streams.values():
            stream.close()
        if kind is None:
            (self.folder / MANIFEST).write_text(json.dumps(self._manifest(), indent=1) + "\n", encoding="utf-8")

    def append(self, ids: np.ndarray) -> None:
        """Add one document."""
        if not ids.size:
            return
        self.smallest, self.largest = min(self.smallest, int(ids.min())), max(self.largest, int(ids.max()))
        self._write(DOCUMENTS, np.array([self.tokens], "<i8"))
        self._write(TOKENS, ids.astype(DTYPES[self.dtype]))
        self.tokens += ids.size
        self.documents += 1

    def _write(self, name: str, values: np.ndarray) -> None:
        raw = values.tobytes()
        self.hashes[name].update(raw)
        self.streams[name].write(raw)

    def _manifest(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "dtype": self.dtype,
            "tokens": self.tokens,
            "documents": self.documents,
            "min_id": max(min(self.smallest, self.largest), 0),
            "max_id": max(self.largest, 0),
            "tokenizer_sha256": self.tokenizer.sha256,
            "eos_id": self.tokenizer.eos_id,
            "sha256": {name: state.hexdigest() for name, state in self.hashes.items()},
        }


def open_bins(folder: str | Path, vocab_size: int | None = None) -> Bins:
    """Open a folder of token bins and check it.

    Args:
      folder: see the module's description.
      vocab_size: V; with it, ids that are not below it are refused.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: the manifest is broken, a file differs from it, or an id is outside the vocabulary (the position is
        named).
    """
    folder = Path(folder).expanduser()
    manifest = _read_manifest(folder / MANIFEST)
    tokens = _map(folder / TOKENS, DTYPES[manifest["dtype"]], manifest["tokens"])
    documents = _map(folder / DOCUMENTS, "<i8", manifest["documents"] + 1)
    content = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode())
    bins = Bins(folder, tokens, documents, manifest, "")
    if vocab_size is not None:
        check_ids(bins, vocab_size)
    for name in (TOKENS, DOCUMENTS):
        if (folder / name).stat().st_size <= VERIFY_BYTES:
            with (folder / name).open("rb") as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() != manifest["sha256"][name]:
                    raise ValueError(f"{folder / name}: its content differs from {MANIFEST}; prepare the folder again")
        else:
            content.update(_sampled_hash(folder / name))
    return dataclasses.replace(bins, content=content.hexdigest())


def check_ids(bins: Bins, vocab_size: int, name: str | None = None) -> None:
    """Raise ValueError, naming the position (in the file, or in what is called `name`), if an id is too large.

    Files too large to read at every start are searched only if their manifest says that there is such an id; their rows
    are checked as they are read.
    """
    if bins.tokens.nbytes > VERIFY_BYTES and bins.manifest["max_id"] < vocab_size:
        return
    for start in range(0, len(bins.tokens), CHUNK):
        refuse_ids(bins, vocab_size, start, min(start + CHUNK, len(bins.tokens)), name)


def refuse_ids(bins: Bins, vocab_size: int, start: int, stop: int, name: str | None = None) -> None:
    """Raise ValueError, naming the position, if one of the tokens [start, stop) is not below `vocab_size`."""
    tokens = bins.tokens[start:stop]
    if tokens.size and tokens.max() >= vocab_size:
        position = start + int(np.argmax(tokens >= vocab_size))
        document = int(np.searchsorted(bins.documents, position, "right"))
        raise ValueError(
            f"{name or bins.folder / TOKENS}: token {position} (in document {document}, from 1) is id "
            f"{bins.tokens[position]}, outside the vocabulary of {vocab_size}; "
            "use the model's tokenizer or a larger model.vocab_size"
        )


def _read_manifest(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; point data.path at a folder of token bins or at text")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        known = (
            manifest["format"] == FORMAT
            and manifest["dtype"] in DTYPES
            and {TOKENS, DOCUMENTS} <= set(manifest["sha256"])
        )
        counts = [manifest[name] for name in ("tokens", "documents", "max_id")]
    except (ValueError, KeyError, TypeError):
        known, counts = False, []
    if not known or not all(isinstance(count, int) and count >= 0 for count in counts):
        raise ValueError(f"{file}: not a manifest of {FORMAT}; prepare the folder again")
    return manifest


def _map(file: Path, dtype: str, count: int) -> np.ndarray:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; prepare the folder again")
    expected = count * np.dtype(dtype).itemsize
    if file.stat().st_size != expected:
        raise ValueError(
            f"{file}: {file.stat().st_size} bytes, {MANIFEST} says {expected}; the copy is incomplete or was changed, "
            "prepare the folder again"
        )
    if not count:
        return np.zeros(0, dtype)
    return np.asarray(np.memmap(file, dtype=dtype, mode="r", shape=(count,)))  # a plain view is quicker to slice


def _sampled_hash(file: Path, blocks: int = 1024, block_bytes: int = 1 << 16) -> bytes:
    state = hashlib.sha256()
    size = file.stat().st_size
    with file.open("rb") as stream:
        for index in range(blocks):
            stream.seek((size - block_bytes) * index // (blocks - 1))
            state.update(stream.read(block_bytes))
    return state.digest()
