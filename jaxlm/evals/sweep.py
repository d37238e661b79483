"""A grid of short training runs, one after another in this process: no checkpoints, no evaluations, losses alone."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
import msgspec
import numpy as np

from jaxlm.data.bins import is_bins, open_bins
from jaxlm.data.loader import Loader
from jaxlm.data.sources import content_hash
from jaxlm.data.tokenizer import DEFAULT_VOCABULARY
from jaxlm.optim import chain, schedules
from jaxlm.training import lock, setup, signals, units
from jaxlm.training.progress import open_progress
from jaxlm.training.setup import Program, Setup
from jaxlm.training.step import State, train_step
from jaxlm.training.throughput import flops_per_token
from jaxlm.types import Array, Batch, Variables

if TYPE_CHECKING:
    from jaxlm.config import RunConfig

STATE_FILE = "sweep_state.jsonl"
TAIL = 0.1
LOOK = 25
"""Steps between looks at the losses; in between, steps are dispatched without waiting for each other."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of the grid.

    Attributes:
      parametrisation: `mup` or `sp`.
      values: the swept fields, by dotted name.
      config: the whole run.
    """

    parametrisation: str
    values: Mapping[str, Any]
    config: "RunConfig"

    @property
    def name(self) -> str:
        """`mup model.d_model=64 optimizer.learning_rate=0.001`"""
        return " ".join([self.parametrisation, *(f"{field}={value}" for field, value in self.values.items())])


def parametrised(values: Mapping[str, Any], config: "RunConfig") -> list[Cell]:
    """A point of the grid as cells: under muP and the standard parametrisation if `mup` is set, else the latter."""
    plain = Cell("sp", values, dataclasses.replace(config, mup=None))
    return [plain] if config.mup is None else [Cell("mup", values, config), plain]


class Interrupted(Exception):
    """A signal ended the sweep; `code` is the exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def known_losses(directory: str | Path) -> dict[str, float]:
    """Losses of the runs that a sweep in this directory has finished, by key; a line cut short is left out."""
    path = Path(directory) / STATE_FILE
    losses = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
            losses[str(entry["key"])] = float(entry["loss"])
        except (ValueError, KeyError, TypeError):
            continue
    return losses


def sweep(cells: Sequence[Cell], directory: str | Path) -> list[float]:
    """The loss of each cell, in order. In a directory with a sweep's state, runs that are done are not run again.

    Args:
      cells: the grid. Those that differ in learning rate and seed alone share one compiled step.
      directory: where the state is kept, one sweep at a time.

    Returns:
      The mean training loss of the last tenth of the steps, or infinity where the run diverged.

    Raises:
      ValueError, FileNotFoundError: a cell cannot be run; if it is the first, no directory is left behind.
      Interrupted: by a signal; what is done is kept.
    """
    directory, content = Path(directory), functools.cache(_content)
    keys = [key_of(cell.config, content) for cell in cells]
    losses = known_losses(directory)
    todo = {key: cell for key, cell in zip(keys, cells, strict=True) if key not in losses}
    # Runs of one shape follow each other, so that each shape is compiled once.
    shapes = {_digest(_shape(cell.config)): None for cell in todo.values()}
    order = sorted(todo.items(), key=lambda item: list(shapes).index(_digest(_shape(item[1].config))))
    shared = _share(order[0][1].config, None) if order else None
    with contextlib.ExitStack() as stack:
        clock = _Clock(list(todo.values()))
        stack.callback(clock.progress.close)
        stack.enter_context(lock.hold(directory, clock.progress.message))
        stop = stack.enter_context(signals.catch(clock.progress.message))
        if len(todo) < len(set(keys)):
            clock.progress.message(f"{len(set(keys)) - len(todo)} of {len(set(keys))} runs were done before")
        for key, cell in order:
            shared = _share(cell.config, shared)
            losses[key] = _train(cell.config, shared, clock, stop)
            with (directory / STATE_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "cell": cell.name, "loss": losses[key]}) + "\n")
            clock.cell(cell, losses[key])
    return [losses[key] for key in keys]


def key_of(config: "RunConfig", content: Callable[[str | None], str | None]) -> str:
    """What a run's loss depends on, as a hash: the configuration but its directory, and the content of its data."""
    plain = msgspec.to_builtins(config)
    del plain["run"]["dir"]
    return _digest([plain, content(config.data.path), content(config.data.tokenizer)])


@dataclasses.dataclass(frozen=True)
class _Shared:
    """What the last cell leaves to the next.

    Attributes:
      shape: the configuration without learning rate and seed: what the compiled step belongs to.
      seed: of the fresh state.
      setup: of this shape. step: (rate, seed, state, frozen, batch) -> (state, metrics).
      frozen: what is used and not trained. fresh: the state before the first step.
    """

    shape: Any
    seed: int
    setup: Setup
    step: Callable
    frozen: Variables
    fresh: State


def _share(config: "RunConfig", last: _Shared | None) -> _Shared:
    shape, seed = _shape(config), config.run.seed
    if last is not None and (last.shape, last.seed) == (shape, seed):
        return last
    prepared = setup.prepare(config)
    step = last.step if last is not None and last.shape == shape else _step(config, prepared.program)
    frozen = setup.load_frozen(config, prepared.program)
    return _Shared(shape, seed, prepared, step, frozen, setup.start(config.model.path, prepared.program, frozen))


def _step(config: "RunConfig", program: Program) -> Callable:
    """The training step with learning rate and seed as arguments, so that they cost no compilation."""

    def step(rate: Array, seed: Array, state: State, frozen: Variables, batch: Batch) -> tuple[State, dict[str, Array]]:
        traced: dict[str, Any] = {"learning_rate": rate}
        optimizer = dataclasses.replace(config.optimizer, **traced)
        steps = config.train.steps
        recipe = program.recipe._replace(
            optimizer=chain.make(optimizer, program.cfg, program.abstract.params, steps, program.plan),
            schedule=schedules.make(optimizer, steps),
            seed=cast(int, seed),
        )
        return train_step(recipe, state, frozen, batch)

    return jax.jit(step, donate_argnums=2, out_shardings=(program.shardings, None))


def _train(config: "RunConfig", shared: _Shared, clock: "_Clock", stop: signals.Stop) -> float:
    """The loss of one run."""
    data, program = shared.setup.data.train, shared.setup.program
    loader = Loader(data, config.train.batch_size, config.run.seed)
    rate, seed = jnp.float32(config.optimizer.learning_rate), jnp.uint32(config.run.seed)
    state = jax.tree.map(jnp.copy, shared.fresh)
    losses: list[float] = []
    pending: list[Array] = []
    for step in range(config.train.steps):
        batch = setup.global_batch(data, loader.rows(step), program.mesh)
        state, metrics = shared.step(rate, seed, state, shared.frozen, batch)
        pending.append(metrics["loss"])
        if len(pending) == LOOK or step + 1 == config.train.steps:
            losses += [float(loss) for loss in jax.device_get(pending)]
            clock.steps(len(pending), losses[-1], config.optimizer.learning_rate)
            pending = []
            if (code := stop(step)) is not None:
                raise Interrupted(code)
            if _failures(losses) >= config.train.max_skips:
                break
    return summary_loss(losses, config.train.steps)


def summary_loss(losses: Sequence[float], steps: int) -> float:
    """The mean over the last tenth of the steps (one at least); infinity if it is not finite or steps are missing."""
    tail = losses[-max(round(TAIL * steps), 1) :]
    mean = float(np.mean(np.asarray(tail, np.float64)))
    return mean if len(losses) == steps and math.isfinite(mean) else math.inf


def _failures(losses: Sequence[float]) -> int:
    """How many losses at the end are not finite."""
    finite = np.isfinite(losses)
    return len(losses) if not finite.any() else int(np.argmax(finite[::-1]))


class _Clock:
    """Progress over all cells, with the time left by the work that they are."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        self.progress = open_progress(sum(cell.config.train.steps for cell in cells))
        self.count, self.work = len(cells), sum(_work(cell.config) for cell in cells)
        self.steps_done, self.cells_done, self.work_done, self.begun = 0, 0, 0.0, time.monotonic()

    def steps(self, count: int, loss: float, learning_rate: float) -> None:
        self.steps_done += count
        values = {"loss": loss, "learning_rate": learning_rate}
        self.progress.step(self.steps_done, values | ({"eta": self._left()} if self.work_done else {}))

    def cell(self, cell: Cell, loss: float) -> None:
        self.cells_done += 1
        self.work_done += _work(cell.config)
        eta = f"  eta {units.clock(self._left())}" if self.cells_done < self.count else ""
        self.progress.message(f"cell {self.cells_done}/{self.count}  {cell.name}  loss {loss:.4f}{eta}")

    def _left(self) -> float:
        return (time.monotonic() - self.begun) * (self.work / self.work_done - 1)


def _work(config: "RunConfig") -> float:
    """FLOPs of a run, about: a vocabulary that is still open counts as the default one."""
    length, train = config.data.sequence_length, config.train
    return flops_per_token(config.architecture(DEFAULT_VOCABULARY), length) * length * train.batch_size * train.steps


def _shape(config: "RunConfig") -> Any:
    plain = msgspec.to_builtins(config)
    del plain["optimizer"]["learning_rate"], plain["run"]
    return plain


def _content(path: str | None) -> str | None:
    """A hash of the text or tokens at a path of `data`, None for the embedded corpus."""
    if path is None:
        return None
    file = Path(path)
    if file.is_file() and file.suffix == ".json":
        return hashlib.sha256(file.read_bytes()).hexdigest()
    return str(open_bins(path).content) if is_bins(path) else content_hash(path)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
