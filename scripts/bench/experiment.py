"""Small trainings on a piece of the embedded corpus, for experiments that keep a record."""

import json
import pathlib
import shlex
import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import config as configs
from jaxlm.data import corpus
from jaxlm.data.dataset import Dataset
from jaxlm.data.splits import is_held_out
from jaxlm.training.evaluate import text_metrics, text_sums
from jaxlm.training.setup import Program, Setup, global_batch, prepare, start
from jaxlm.training.step import State, train_step
from jaxlm.types import Variables
from scripts.bench import alternate

RESULTS = pathlib.Path(__file__).parent / "results"


Look = Callable[[Variables], dict[str, float]]
Step = Callable[..., tuple[State, dict[str, jax.Array]]]


class Curve(NamedTuple):
    """A finished training.

    Attributes:
      losses: training loss of every step.
      looks: what `look` returned, each with its step.
      state: after the last step.
    """

    losses: list[float]
    looks: list[dict[str, float]]
    state: State


def write_texts(folder: pathlib.Path, train: int, validation: int) -> dict[str, str]:
    """Write the first characters of both sides of the corpus's split; the paths, as fields of the data section."""
    sides: dict[bool, list[str]] = {False: [], True: []}
    for document in corpus.standard_library():
        sides[is_held_out(document.group or document.text)].append(document.text)
    paths = {}
    for name, side, size in (("path", False, train), ("validation", True, validation)):
        file = folder / f"{name}.txt"
        file.write_text("\n".join(sides[side])[:size])
        paths[name] = str(file)
    return paths


def open_run(raw: dict[str, Any]) -> Setup:
    """A configuration with its data and its program; writes nothing but caches."""
    return prepare(configs.build(raw))


def train(setup: Setup, program: Program, every: int, look: Look, step: Step | None = None) -> Curve:
    """Train for the configured steps, looking at the parameters at step 0, every so many steps, and at the end.

    Without dropout a step does not depend on the seed, so runs that differ in it alone can share one compiled `step`.
    """
    step = step or compiled_step(program)
    steps = setup.config.train.steps
    with jax.set_mesh(program.mesh):
        state = start(None, program)
        losses, looks = [], [{"step": 0} | look(state.params)]
        for index in range(steps):
            batch = global_batch(setup.data.train, setup.loader.rows(index), program.mesh)
            state, metrics = step(state, {}, batch)
            losses.append(metrics["loss"])
            if (index + 1) % every == 0 or index + 1 == steps:
                looks.append({"step": index + 1} | look(state.params))
    return Curve([float(loss) for loss in losses], looks, state)


def compiled_step(program: Program) -> Step:
    """The training step under `jit`, its state donated."""
    return jax.jit(
        lambda state, frozen, batch: train_step(program.recipe, state, frozen, batch),
        donate_argnums=0,
        out_shardings=(program.shardings, None),
    )


def scorer(setup: Setup, program: Program, size: int) -> Callable[[Variables, Dataset], float]:
    """(params, rows) -> nats per token over all rows, `size` of them at a time."""
    bytes_V = jnp.asarray(setup.data.token_bytes, jnp.float32)
    score = jax.jit(lambda variables, batch: text_sums(program.recipe.apply, bytes_V, variables, batch))

    def loss(params: Variables, rows: Dataset) -> float:
        parts = np.pad(np.arange(len(rows)), (0, -len(rows) % size), constant_values=-1).reshape(-1, size)
        return text_metrics(score, params, (global_batch(rows, part, program.mesh) for part in parts))["loss"]

    return loss


def mean_and_deviation(values: Iterable[float]) -> dict[str, float]:
    """Mean, and standard deviation between the values (n - 1)."""
    found = np.array(list(values))
    return {"mean": float(found.mean()), "deviation": float(found.std(ddof=1)) if len(found) > 1 else 0.0}


def keep(name: str, result: dict[str, Any]) -> pathlib.Path:
    """Write a result with the command and the surroundings that made it."""
    RESULTS.mkdir(exist_ok=True)
    command = shlex.join(["python", "-m", f"scripts.bench.{name}", *sys.argv[1:]])
    file = RESULTS / f"{name}.json"
    file.write_text(
        json.dumps({"command": command, "environment": alternate.surroundings(), **result}, indent=1) + "\n"
    )
    return file
