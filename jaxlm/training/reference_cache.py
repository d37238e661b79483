"""Log-probabilities under the reference, made once before training, so that no reference needs memory during it.

They are kept in the cache's folder under a fingerprint of model, rows and tokenizer: whatever changes one of them has
them made again.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np

from jaxlm.data.cache import cached
from jaxlm.data.dataset import Dataset, Rows
from jaxlm.data.packing import Row
from jaxlm.data.sources import digest
from jaxlm.dist import place
from jaxlm.objectives.config import DpoConfig, Reference
from jaxlm.objectives.forward import reference
from jaxlm.objectives.sequences import frozen_log_probs
from jaxlm.training import frozen
from jaxlm.training.setup import Setup, global_batch
from jaxlm.types import Batch, Variables

VERSION = 1
COLUMN = "reference_log_probs"


@dataclasses.dataclass(frozen=True)
class ReferredRows:
    """Rows with the column `reference_log_probs` beside their own; float32 [rows] or [rows, 2]."""

    rows: Rows
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index] | {COLUMN: self.values[index]}

    @property
    def input_tokens(self) -> int:
        """Input tokens over all rows, padding left out."""
        return self.rows.input_tokens


def referred(setup: Setup, tell: Callable[[str], None]) -> Setup:
    """The run with the reference's log-probabilities on its rows, where `objective.reference` is `precomputed`.

    Rows that the run will not see are left out; theirs are NaN.

    Args:
      setup: the run; its mesh is in force.
      tell: is given what the user should know.

    Raises:
      ValueError: the objective needs the reference for more than that.
    """
    objective = setup.config.objective
    if getattr(objective, "reference", None) != "precomputed":
        return setup
    if objective.kind != "dpo":
        raise ValueError(
            f"objective.reference: precomputed, but {objective.kind} compares rows with the reference that only a "
            "step makes; use copy, or adapter-off with lora"
        )
    steps, size = setup.config.train.steps, setup.config.train.batch_size
    train, data = setup.data.train, setup.data
    seen = np.arange(len(train))
    if steps * size < len(train):
        seen = np.unique(np.concatenate([setup.loader.rows(step) for step in range(steps)]))
    sets = {"train": (train, seen), "validation": (data.validation, np.arange(len(data.validation)))}
    sets |= {name: (rows, np.arange(len(rows))) for name, rows in data.others.items()}
    model: list[Variables] = []
    made = {}
    for name, (rows, wanted) in sets.items():
        values = _values(setup, rows, wanted, model, tell)
        made[name] = dataclasses.replace(rows, rows=ReferredRows(rows.rows, values))
    train, validation = made.pop("train"), made.pop("validation")
    return setup._replace(
        data=data._replace(train=train, validation=validation, others=made),
        loader=dataclasses.replace(setup.loader, dataset=train),
    )


def described(setup: Setup, data: Dataset, wanted: np.ndarray) -> dict[str, Any]:
    """What the numbers depend on; JSON values."""
    config, program = setup.config, setup.program
    fresh = None if config.model.path is not None else f"{config.model} {config.mup} {config.run.seed}"
    return {
        "version": VERSION,
        "model": setup.identity["base"],
        "fresh": fresh,
        "settings": f"{program.cfg} {config.quantize} {program.compute.dtype} {frozen.frozen_dtype(program.mesh)}",
        "data": data.fingerprint,
        "rows": digest(wanted.astype("<i8").tobytes()),
        "count": len(data),
        "tokenizer": setup.data.tokenizer.sha256,
    }


def _values(
    setup: Setup, data: Dataset, wanted: np.ndarray, model: list[Variables], tell: Callable[[str], None]
) -> np.ndarray:
    """The column of one set of rows; `model` is filled where it is needed."""

    def make() -> np.ndarray:
        if not model:
            tell("computing the reference's log-probabilities")
            model.append(_model(setup))
        return _computed(setup, data, wanted, model[0])

    if jax.process_count() > 1:
        return make()  # processes with different caches would wait for each other
    description = json.dumps(described(setup, data, wanted), sort_keys=True)

    def write(folder: Path) -> None:
        np.save(folder / "values.npy", make())

    return cached(f"reference-{digest(description)[:32]}", write, lambda folder: np.load(folder / "values.npy"))


def _model(setup: Setup) -> Variables:
    """The reference itself: the base under adapters, or what training starts from."""
    config, objective = setup.config, cast(DpoConfig, setup.config.objective)
    kind: Reference = "copy" if config.lora is None else "adapter-off"
    alone = dataclasses.replace(config, objective=dataclasses.replace(objective, reference=kind))
    program = setup.program
    wanted = frozen.abstract(alone, program.cfg, {}, program.mesh)
    return reference({}, frozen.make(alone, program.cfg, wanted, program.mesh, program.base))


def _computed(setup: Setup, data: Dataset, wanted: np.ndarray, model: Variables) -> np.ndarray:
    @jax.jit
    def score(model: Variables, batch: Batch) -> jax.Array:
        return frozen_log_probs(setup.program.recipe.apply, model, batch)

    size = setup.config.train.batch_size
    parts = np.pad(wanted, (0, -len(wanted) % size), constant_values=-1).reshape(-1, size)
    shape = data.rows[0]["tokens"].shape[:-1]
    values = np.full((len(data), *shape), np.nan, np.float32)
    for part in parts:
        found = place.gather(score(model, global_batch(data, part, setup.program.mesh)))
        values[part[part >= 0]] = found[part >= 0]
    return values
