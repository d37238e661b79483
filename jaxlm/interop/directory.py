"""Writing a model directory as a whole: beside its path first, then renamed over it."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def refuse_occupied(path: Path) -> None:
    """Raise ValueError where `path` is a file, or a directory with something in it that is no model directory."""
    if path.is_dir():
        models = ("config.json", "adapter_config.json")
        if any(path.iterdir()) and not any((path / name).is_file() for name in models):
            raise ValueError(f"{path}: not empty and no model directory, so it is not replaced; choose another path")
    elif path.exists():
        raise ValueError(f"{path}: a file is in the way; choose another path")


@contextlib.contextmanager
def replacement(path: Path) -> Iterator[Path]:
    """An empty directory beside `path`, which takes its place when the block ends well and is removed otherwise."""
    temporary = path.parent / f".{path.name}.{os.getpid()}.part"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        _rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(file: Path, contents: Mapping[str, Any]) -> None:
    """Writes a JSON object, indented."""
    file.write_text(json.dumps(contents, indent=2) + "\n")


def _rename(temporary: Path, path: Path) -> None:
    """Two renames where a directory is replaced, so that `path` is never half of one and half of the other."""
    if not path.exists():
        temporary.rename(path)
        return
    old = path.parent / f".{path.name}.{os.getpid()}.old"
    path.rename(old)
    temporary.rename(path)
    shutil.rmtree(old)
