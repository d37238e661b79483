"""Training with tasks that are scored before and after it: the list `train.tasks`."""

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING

from jaxlm.dist import multihost
from jaxlm.evals import compare
from jaxlm.evals.run import Tasks, evaluate_subject, read_tasks
from jaxlm.evals.subject import Subject, ends
from jaxlm.interop.load import load_config, text_directory
from jaxlm.training import loop
from jaxlm.training.setup import Setup
from jaxlm.types import Variables

if TYPE_CHECKING:
    from jaxlm.config import RunConfig


def train(config: "RunConfig") -> int:
    """`training.loop.train`, with `train.tasks` scored before the first step and after the last one.

    What is scored is the model in memory, its base quantised as in training, so the two differ by the training alone.
    Results are in `evals/before` and `evals/after` of the run directory, in the form of `jaxlm eval`.

    Raises:
      ValueError, FileNotFoundError: also for a task that cannot be read, before anything else is done.
    """
    if not config.train.tasks:
        return loop.train(config)
    if multihost.initialize():
        raise ValueError(
            "train.tasks: tasks are scored by one process, and this job has several; leave them out and use jaxlm eval"
        )
    if config.model.path is not None:
        load_config(config.model.path)  # a missing model is said before tasks are fetched, perhaps over a network
    tasks = read_tasks(config.train.tasks, field="train.tasks")
    return loop.train(config, functools.partial(score, tasks))


def before_and_after(directory: str | Path) -> str | None:
    """The comparison of a run's items before and after training, as `jaxlm compare` says it; None where it has none."""
    folders = [Path(directory) / "evals" / when for when in ("before", "after")]
    if not all(folder.is_dir() and list(folder.glob("samples_*.jsonl")) for folder in folders):
        return None
    return compare.describe(*folders)


def score(tasks: Tasks, setup: Setup, variables: Variables, directory: Path) -> dict[str, float]:
    """Score a run's model on tasks.

    Args:
      tasks: what is asked.
      setup: the run.
      variables: the model as it is now.
      directory: gets results.json and samples_<task>.jsonl.

    Returns:
      Values by `<task>/<metric>`.
    """
    path, compute = setup.config.model.path, setup.program.compute
    files = Path(setup.config.run.dir) if path is None else text_directory(path)
    cfg, tokenizer = setup.program.cfg, setup.data.tokenizer
    prefix, end = ends(cfg, tokenizer, files)
    subject = Subject(
        cfg,
        variables,
        tokenizer,
        files,
        dataclasses.replace(compute, remat="none"),
        prefix_id=prefix,
        end_id=end,
    )
    outcome = evaluate_subject(subject, tasks, str(directory))
    return {
        f"{task}/{name.partition(',')[0]}": float(value)
        for task, values in outcome.results.items()
        for name, value in values.items()
        if name.endswith(",none") and "_stderr" not in name and isinstance(value, int | float)
    }
