"""What a teacher says about the training rows, on disk: its most likely tokens at each position, the others as one.

A folder holds

    manifest.json     what the numbers depend on: teacher, rows, tokenizer, temperature, K
    ids.npy           uint16 or int32 [rows, L, K]
    log_probs.npy     float16 [rows, L, K + 1]; the last is the log-probability of all other tokens together

The arrays are mapped into memory. The manifest is written last, so an unfinished folder is none.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlm.data.dataset import Rows
from jaxlm.data.packing import Row
from jaxlm.dist import multihost, place
from jaxlm.interop.load import load
from jaxlm.objectives.config import DistillConfig
from jaxlm.objectives.distill import COLUMNS
from jaxlm.objectives.distill_loss import TopK, top_k
from jaxlm.training import frozen
from jaxlm.training.setup import Setup, global_batch
from jaxlm.training.summary import write_whole
from jaxlm.training.teacher import distillation
from jaxlm.types import Array, Batch, Variables

FORMAT = "jaxlm-teacher-1"
MANIFEST = "manifest.json"
FILES = ("ids.npy", "log_probs.npy")


@dataclasses.dataclass(frozen=True)
class TaughtRows:
    """Rows with the columns of `objectives.distill.COLUMNS` beside their own."""

    rows: Rows
    columns: tuple[np.ndarray, np.ndarray]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index] | {name: column[index] for name, column in zip(COLUMNS, self.columns, strict=True)}

    @property
    def input_tokens(self) -> int:
        """Input tokens over all rows, padding left out."""
        return self.rows.input_tokens


def taught(setup: Setup, tell: Callable[[str], None]) -> Setup:
    """The run with the teacher's columns on its training rows, where `objective.cache` asks for it.

    A folder that is missing is made first, by a pass of the teacher over all rows.

    Args:
      setup: the run; its mesh is in force.
      tell: is given what the user should know.

    Raises:
      ValueError: the folder is of another teacher, other rows or other settings, naming what differs; or damaged.
    """
    objective = distillation(setup.config)
    if objective is None or objective.cache is None or not objective.kd_weight:
        return setup
    folder, wanted = Path(objective.cache), described(setup, objective)
    missing = not (folder / MANIFEST).is_file()
    if missing and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"objective.cache: {folder} is there and no cache of a teacher; name another folder")
    if multihost.all_hosts(np.array(missing)).any():
        tell(f"writing what {objective.teacher} says about {wanted['rows']:,} rows to {folder}")
        write(setup, objective, folder, wanted)
    data = setup.data.train
    rows = TaughtRows(data.rows, read(folder, wanted))
    train = dataclasses.replace(data, rows=rows)
    return setup._replace(
        data=setup.data._replace(train=train), loader=dataclasses.replace(setup.loader, dataset=train)
    )


def described(setup: Setup, objective: DistillConfig) -> dict[str, Any]:
    """What the numbers of a cache depend on; JSON values."""
    data, vocabulary = setup.data.train, shared_vocabulary(setup)
    return {
        "format": FORMAT,
        "teacher": setup.identity["base"]["teacher"],
        "data": data.fingerprint,
        "tokenizer": setup.data.tokenizer.sha256,
        "temperature": objective.temperature,
        "top_k": min(objective.top_k, vocabulary),
        "vocabulary": vocabulary,
        "rows": len(data),
        "length": setup.config.data.sequence_length,
    }


def shared_vocabulary(setup: Setup) -> int:
    """Ids that student and teacher both have."""
    return min(setup.program.cfg.V, frozen.others(setup.config)["teacher"].V)


def read(folder: Path, wanted: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The two arrays of a folder, mapped, if it is the one wanted.

    Raises:
      ValueError: naming what differs or is damaged.
    """
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        differing = [name for name, value in wanted.items() if found.get(name) != value]
    except (OSError, ValueError, AttributeError):
        raise ValueError(f"objective.cache: {folder / MANIFEST} cannot be read; remove the folder") from None
    if differing:
        raise ValueError(
            f"objective.cache: {folder} was made for another {', '.join(differing)}; name another folder, or remove "
            "this one and it is made again"
        )
    shape = (wanted["rows"], wanted["length"])
    try:
        ids, log_probs = (np.load(folder / name, mmap_mode="r") for name in FILES)
        fits = ids.shape == (*shape, wanted["top_k"]) and log_probs.shape == (*shape, wanted["top_k"] + 1)
    except (OSError, ValueError, EOFError):
        fits = False
    if not fits:
        raise ValueError(f"objective.cache: {folder}: its arrays are damaged; remove the folder and it is made again")
    return ids, log_probs


def write(setup: Setup, objective: DistillConfig, folder: Path, wanted: dict[str, Any]) -> None:
    """Fill a folder by a pass of the teacher over the training rows. All processes call it together; one writes."""
    program, k = setup.program, wanted["top_k"]
    variables = load(objective.teacher, frozen.frozen_dtype(program.mesh), mesh=program.mesh)[1]

    @jax.jit
    def ask(variables: Variables, batch: Batch) -> TopK:
        output = program.recipe.apply(
            variables, batch["tokens"], model="teacher", positions=batch["positions"], segments=batch["segments"]
        )
        return top_k(output.hidden, output.head, k, wanted["vocabulary"], objective.temperature)

    size, count = setup.config.train.batch_size, wanted["rows"]
    parts = np.pad(np.arange(count), (0, -count % size), constant_values=-1).reshape(-1, size)
    staging = folder.with_name(f".{folder.name}.part")
    columns = _columns(staging, wanted) if multihost.is_main() else ()
    for part in parts:
        found: tuple[Array, ...] = place.gather(ask(variables, global_batch(setup.data.train, part, program.mesh)))
        here = part[part >= 0]
        for column, values in zip(columns, found, strict=False):
            column[here[0] : here[-1] + 1] = values[: len(here)]
    if multihost.is_main():
        for column in columns:
            column.flush()
        write_whole(staging / MANIFEST, json.dumps(wanted, indent=1) + "\n")
        staging.rename(folder)
    multihost.all_hosts(np.zeros(1))


def _columns(folder: Path, wanted: dict[str, Any]) -> tuple[np.memmap, ...]:
    """Empty arrays on disk."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shape, k = (wanted["rows"], wanted["length"]), wanted["top_k"]
    kinds = (("uint16" if wanted["vocabulary"] <= 1 << 16 else "int32", k), ("float16", k + 1))
    return tuple(
        np.lib.format.open_memmap(folder / name, "w+", dtype, (*shape, width))
        for name, (dtype, width) in zip(FILES, kinds, strict=True)
    )
