"""Reading users' data: text files, JSONL, parquet, folders, globs and Hugging Face datasets, as records or documents.

Everything wrong with a row is said as `file:line: what; what to do`, lines (rows in parquet) counted from 1.
"""

import glob
import hashlib
import importlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple


class Record(NamedTuple):
    """One row of data: where it stands (`file:line`) and its columns."""

    where: str
    fields: dict[str, Any]


class Document(NamedTuple):
    """A text, where it stands, and the group that must stay on one side of a split (None: the text is its own)."""

    where: str
    text: str
    group: str | None = None


def digest(*parts: str | bytes) -> str:
    """SHA-256, in hexadecimal, of the parts and their lengths."""
    state = hashlib.sha256()
    for part in parts:
        raw = part if isinstance(part, bytes) else part.encode("utf-8")
        state.update(len(raw).to_bytes(8, "little") + raw)
    return state.hexdigest()


def find_files(path: str, field: str = "data.path") -> list[Path]:
    """The files that `path` (a file, a folder, a glob) stands for, sorted; of a folder, those of a known kind.

    Raises:
      FileNotFoundError: nothing is there.
      ValueError: nothing there is of a kind that can be read.
    """
    expanded = os.path.expanduser(path)
    if os.path.isdir(expanded):
        inside = sorted(Path(expanded).rglob("*"))
        files = [file for file in inside if file.suffix in READERS and file.is_file() and file.name[0] != "."]
        if not files:
            raise ValueError(f"{field}: {path} holds no {_kinds()} file; point it at a folder that does")
        return files
    found = [expanded] if os.path.exists(expanded) else sorted(glob.glob(expanded, recursive=True))
    files = [Path(name) for name in found if os.path.isfile(name)]
    if not files:
        raise FileNotFoundError(f"{field}: {path}: no such file or folder; check the name and the current directory")
    for file in files:
        if file.suffix not in READERS:
            raise ValueError(f"{field}: {file} is no {_kinds()} file; convert or rename it")
    return files


def is_dataset_name(path: str) -> bool:
    """Whether `path` can only be the name of a Hugging Face dataset: nothing is there, and it looks like one."""
    return (
        not os.path.exists(os.path.expanduser(path))
        and re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.+\[\]%-]+)?", path) is not None
        and Path(path).suffix not in READERS
    )


def content_hash(path: str, field: str = "data.path") -> str:
    """SHA-256 over the bytes of all files that `path` stands for; one changed byte changes it."""
    if is_dataset_name(path):
        return digest(path, str(getattr(_dataset(path, field), "_fingerprint", "")))
    hashes = []
    for file in find_files(path, field):
        with file.open("rb") as stream:
            hashes.append(hashlib.file_digest(stream, "sha256").digest())
    return digest(*hashes)


def is_plain_text(path: str, field: str = "data.path") -> bool:
    """Whether `path` stands for .txt files alone, which have no columns."""
    return not is_dataset_name(path) and all(file.suffix == ".txt" for file in find_files(path, field))


def read_records(path: str, text_field: str = "text", field: str = "data.path") -> Iterator[Record]:
    """All rows, file after file; a .txt file is one row whose text is in the column `text_field`.

    Raises:
      FileNotFoundError: nothing is there.
      ValueError: `file:line: what; what to do` for a row that cannot be read.
    """
    if is_dataset_name(path):
        for number, fields in enumerate(_dataset(path, field), 1):
            yield Record(f"{path}:{number}", dict(fields))
        return
    for file in find_files(path, field):
        yield from READERS[file.suffix](file, text_field)


def read_documents(path: str, text_field: str = "text", field: str = "data.path") -> Iterator[Document]:
    """The text of each row; rows whose text is empty or blank are passed over.

    Raises:
      ValueError: as `read_records`; also for a row without the column, or with something else than text in it.
    """
    for record in read_records(path, text_field, field):
        text = text_of(record, text_field, "set data.text_field to the column that holds the text")
        if text.strip():
            yield Document(record.where, text)


def text_of(record: Record, name: str, remedy: str) -> str:
    """The text in the column `name`, which must be valid Unicode."""
    if name not in record.fields:
        raise ValueError(f'{record.where}: no field "{name}" (there are: {", ".join(record.fields)}); {remedy}')
    value = record.fields[name]
    if not isinstance(value, str):
        raise ValueError(f'{record.where}: field "{name}" is {type(value).__name__}, not text; {remedy}')
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f'{record.where}: field "{name}" has half of a surrogate pair at character {error.start}; '
            "write the character whole"
        ) from None
    return value


def _decode(raw: bytes, file: Path, first_line: int = 1) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + raw.count(b"\n", 0, error.start)
        raise ValueError(
            f"{file}:{line}: byte 0x{raw[error.start]:02x} is not valid UTF-8; convert the file, e.g. with iconv"
        ) from None


def _read_text(file: Path, text_field: str) -> Iterator[Record]:
    yield Record(f"{file}:1", {text_field: _decode(file.read_bytes(), file).removeprefix("\ufeff")})


def _read_jsonl(file: Path, text_field: str) -> Iterator[Record]:
    del text_field
    with file.open("rb") as stream:
        for number, raw in enumerate(stream, 1):
            line = _decode(raw, file, number)
            if number == 1:
                line = line.removeprefix("\ufeff")
            if not line.strip():
                continue
            try:
                fields = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise ValueError(f"{file}:{number}: broken JSON ({error}); one object a line is needed") from None
            if not isinstance(fields, dict):
                kind = type(fields).__name__
                raise ValueError(f"{file}:{number}: a JSON {kind}, not an object; one object a line is needed")
            yield Record(f"{file}:{number}", fields)


def _read_parquet(file: Path, text_field: str) -> Iterator[Record]:
    del text_field
    parquet = _optional("pyarrow.parquet", "parquet", str(file))
    try:
        batches = parquet.ParquetFile(file).iter_batches()
        number = 0
        for batch in batches:
            for fields in batch.to_pylist():
                number += 1
                yield Record(f"{file}:{number}", fields)
    except (OSError, ValueError) as error:  # pyarrow's own errors are among these
        raise ValueError(f"{file}: not a readable parquet file ({error}); write it again") from None


READERS: dict[str, Callable[[Path, str], Iterator[Record]]] = {
    ".txt": _read_text,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def _kinds() -> str:
    return ", ".join(list(READERS)[:-1]) + f" or {list(READERS)[-1]}"


def _dataset(path: str, field: str) -> Any:
    """The split of a Hugging Face dataset; `owner/name:split`, the split being `train` where it is not given."""
    name, _, split = path.partition(":")
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise FileNotFoundError(
            f"{field}: {path}: no such file or folder; to read the Hugging Face dataset of that name, "
            "install the datasets package"
        ) from None
    try:
        return datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # the library raises many kinds, network errors among them
        raise ValueError(
            f"{field}: {path}: no such file, and the Hugging Face dataset cannot be read: {error}"
        ) from None


def _optional(module: str, extra: str, what: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ValueError(f"{what}: reading it needs an optional package; pip install 'jaxlm[{extra}]'") from None
