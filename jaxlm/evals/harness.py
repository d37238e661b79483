"""Tasks of lm-evaluation-harness: YAML files of one's own, without a network, or the tasks it knows by name."""

import contextlib
import dataclasses
import importlib.util
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxlm.evals.results import Outcome, Sample
from jaxlm.evals.subject import Subject

RESAMPLES = 1000
"""For the standard errors that have no formula."""
KEPT = ("groups", "configs", "versions", "n-shot", "higher_is_better", "n-samples")
"""What results.json has of lm-eval's results besides the values."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How tasks are run.

    Attributes:
      limit: only so many items of each task; for trying things out.
      num_fewshot: worked examples before each item, where the task leaves it open.
      chat: whether prompts go through the model's chat template.
    """

    limit: int | None = None
    num_fewshot: int | None = None
    chat: bool = False


def need_lm_eval(task: str) -> None:
    """Check that the optional package is there.

    Raises:
      ValueError: it is not.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(f"--tasks: {task}: needs an optional package; pip install 'jaxlm[eval]'")


def load_tasks(tasks: Sequence[str]) -> dict[str, Any]:
    """lm-eval's tasks: paths of YAML files, which need no network if their data is local, or names that it knows.

    Raises:
      FileNotFoundError: no such file.
      ValueError: lm-eval is missing, an unknown name, a broken task.
    """
    for task in tasks:
        need_lm_eval(task)
        if is_file_name(task) and not Path(task).is_file():
            raise FileNotFoundError(
                f"{task}: no such file; give a task's YAML, a .jsonl of questions, or a task's name"
            )
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=not all(map(is_file_name, tasks)))
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}}
    for task in tasks:
        if not is_file_name(task) and task not in manager.all_tasks:
            raise ValueError(
                f"--tasks: {task}: not a task that lm-eval knows; give a .yaml or .jsonl file, or such a name"
            )
        try:
            with _quiet(logging.ERROR):
                found = manager.load([task])
        except Exception as error:  # of YAML, of the datasets library, of the task's own code
            raise ValueError(f"{task}: not a task that can be loaded ({_short(error)}); mend the file") from error
        twice = set(found["tasks"]) & set(loaded["tasks"])
        if twice:
            raise ValueError(f"{task}: a second task called {min(twice)}; rename one of them")
        loaded["tasks"] |= found["tasks"]
        loaded["groups"] |= found["groups"]
    return loaded


def evaluate(subject: Subject, loaded: dict[str, Any], settings: Settings = Settings()) -> Outcome:
    """Run tasks.

    Args:
      subject: the model.
      loaded: as from `load_tasks`.
      settings: how.

    Returns:
      lm-eval's results, and per-item results as in its samples, numbers kept as numbers.
    """
    from lm_eval.evaluator import evaluate as run

    from jaxlm.evals.adapter import JaxLM

    for task in loaded["tasks"].values():
        given = task.get_config("num_fewshot")
        if given is None or (settings.num_fewshot is not None and given != 0):
            task.set_config(key="num_fewshot", value=settings.num_fewshot or 0)
        task.set_fewshot_seed(seed=1234)
    with _quiet(logging.WARNING):
        found = run(
            JaxLM(subject),
            loaded,
            limit=settings.limit,
            bootstrap_iters=RESAMPLES,
            apply_chat_template=settings.chat,
            fewshot_as_multiturn=settings.chat,
        )
    samples = {task: [_sample(line) for line in lines] for task, lines in found["samples"].items()}
    return Outcome(found["results"], samples, {name: found[name] for name in KEPT if name in found})


def is_file_name(task: str) -> bool:
    """Whether a task is named by a file, rather than by its name."""
    return "/" in task or task.endswith((".yaml", ".yml", ".jsonl"))


def _sample(line: Sample) -> Sample:
    """A line as lm-eval writes it: arguments by name, the target as text; numbers stay numbers."""
    arguments = {
        f"gen_args_{i}": {f"arg_{j}": part for j, part in enumerate(parts)} for i, parts in enumerate(line["arguments"])
    }
    return line | {"arguments": arguments, "target": str(line["target"])}


@contextlib.contextmanager
def _quiet(level: int) -> Iterator[None]:
    """lm-eval without lines on stdout, messages below a level, bars of data that is read, and forked processes.

    Forking does not go with JAX's threads.
    """
    import datasets

    forking, logger, bars = os.environ.get("DISABLE_MULTIPROC"), logging.getLogger("lm_eval"), datasets.utils
    before, hidden = logger.level, bars.are_progress_bars_disabled()
    os.environ["DISABLE_MULTIPROC"] = "1"
    logger.setLevel(level)
    bars.disable_progress_bars()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(before)
        if not hidden:
            bars.enable_progress_bars()
        if forking is None:
            del os.environ["DISABLE_MULTIPROC"]


def _short(error: Exception) -> str:
    """The first line of a message, which may hold whole dumps."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"
