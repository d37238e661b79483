"""The directories under `checkpoints/`: which are steps, which are leftovers, and whether one can write there."""

import errno
import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jaxlm.training import integrity

TEMPORARY = ".orbax-checkpoint-tmp"
REMOVED = ".removed"
SPARE = 1.05
"""Free space asked for, relative to the bytes of the state: manifests and descriptions come on top of the arrays."""


def steps(directory: Path) -> list[int]:
    """Finished steps in a directory, ascending; see `foreign` for what is left out."""
    return sorted(int(path.name) for path in _numbered(directory) if _is_step(path))


def foreign(directory: Path) -> list[Path]:
    """Directories that have a step's name but hold nothing of a step, an empty `999/` say."""
    return sorted(path for path in _numbered(directory) if not _is_step(path))


def metric(root: Path) -> float | None:
    """The metric a step was saved with; None where there is none, or where it cannot be trusted."""
    try:
        return integrity.read(root).metric
    except integrity.Damaged:
        return None


def require_writable(directory: Path) -> None:
    """Make the directory and write a file in it; ValueError where that fails."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        raise ValueError(f"{directory}: cannot be written ({error.strerror}); choose another run.dir") from None


def require_space(directory: Path, leaves: Iterable[Any]) -> None:
    """Raise OSError where the disk has less free space than the arrays need."""
    needed, free = int(SPARE * sum(leaf.nbytes for leaf in leaves)), shutil.disk_usage(directory).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"no space left on device ({needed / 1e9:.3f} GB needed, {free / 1e9:.3f} GB free)")


def remove(root: Path) -> None:
    """Delete a step; renamed first, so that a process killed meanwhile leaves no half step under its number."""
    going = root.with_name(root.name + REMOVED)
    root.rename(going)
    shutil.rmtree(going, ignore_errors=True)


def remove_leftovers(directory: Path) -> None:
    """Delete what saves and deletions that did not finish left behind."""
    for path in directory.iterdir():
        if TEMPORARY in path.name or path.name.endswith(REMOVED):
            shutil.rmtree(path, ignore_errors=True)


def temporary(directory: Path, step: int) -> Path:
    """Where Orbax is writing a step; there is one, as leftovers are removed before a save begins."""
    (found,) = directory.glob(f"{step}{TEMPORARY}*")
    return found


def set_aside(root: Path) -> Path:
    """Rename a directory that stands where a step is to be saved, keeping its contents; returns the new path."""
    number = 1
    while (aside := root.with_name(f"{root.name}.damaged" + (f"-{number}" if number > 1 else ""))).exists():
        number += 1
    return root.rename(aside)


def _numbered(directory: Path) -> list[Path]:
    paths = directory.iterdir() if directory.is_dir() else ()
    return [path for path in paths if re.fullmatch(r"0|[1-9]\d*", path.name)]


def _is_step(path: Path) -> bool:
    return any((path / name).exists() for name in ("state", integrity.FILE))
