"""One evaluation from names to files: a model, tasks or a text, a directory."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

import jaxlm
from jaxlm.evals import choice, docstrings, harness, perplexity, results
from jaxlm.evals.choice import Question, read_questions
from jaxlm.evals.results import Outcome
from jaxlm.evals.subject import BATCH_SIZE, Subject, load_subject, silent


@dataclasses.dataclass(frozen=True)
class Settings:
    """How an evaluation is run.

    Attributes:
      dtype: of parameters and computation, `float32` or `bfloat16`.
      batch_size: rows of a batch.
      limit: only so many items of each task.
      num_fewshot: see `harness.Settings`.
      chat: see `harness.Settings`.
      report: called with the requests that are done, and with all there are.
    """

    dtype: str = "float32"
    batch_size: int = BATCH_SIZE
    limit: int | None = None
    num_fewshot: int | None = None
    chat: bool = False
    report: Callable[[int, int], None] = silent


class Tasks(NamedTuple):
    """What is asked: choice questions by task, and lm-eval's tasks as loaded."""

    questions: dict[str, list[Question]]
    loaded: dict[str, Any]


def read_tasks(tasks: Sequence[str], settings: Settings = Settings(), field: str = "--tasks") -> Tasks:
    """Tasks by name, read and checked.

    Args:
      tasks: `.jsonl` files of choice questions, names of built-in tasks (`docstrings.TASKS`), task YAMLs or names of
        lm-eval.
      settings: how they are going to be asked.
      field: what the list is called in messages.

    Raises:
      FileNotFoundError, ValueError: whatever is wrong with them.
    """
    plain = [task for task in tasks if task.endswith(".jsonl") or task in docstrings.TASKS]
    others = [task for task in tasks if task not in plain]
    if (settings.chat or settings.num_fewshot) and plain:
        raise ValueError(f"{field}: {plain[0]}: questions are asked plainly; write a task's YAML for chat or examples")
    read = [(Path(task).stem, docstrings.TASKS.get(task, functools.partial(read_questions, task))) for task in plain]
    questions = [(name, questions()[: settings.limit]) for name, questions in read]
    loaded = harness.load_tasks(others) if others else {"tasks": {}}
    names = [name for name, _ in questions] + list(loaded["tasks"])
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{field}: two tasks are called {twice}; rename a file")
    return Tasks(dict(questions), loaded)


def evaluate_tasks(model: str, tasks: Sequence[str], output: str, settings: Settings = Settings()) -> Outcome:
    """Score a model on tasks and write DIR/results.json and DIR/samples_<task>.jsonl.

    Args:
      model: a Hugging Face model directory or a run directory.
      tasks: see `read_tasks`.
      output: DIR.
      settings: how.

    Raises:
      FileNotFoundError, ValueError: whatever is wrong with the input, before anything is scored or written.
    """
    asked = read_tasks(tasks, settings)
    return evaluate_subject(_load(model, settings), asked, output, settings)


def evaluate_subject(subject: Subject, tasks: Tasks, output: str, settings: Settings = Settings()) -> Outcome:
    """`evaluate_tasks` of a model and tasks that are in memory already."""
    directory = results.make_directory(output)
    outcomes = [choice.evaluate(subject, questions, name) for name, questions in tasks.questions.items()]
    if tasks.loaded["tasks"]:
        how = harness.Settings(settings.limit, settings.num_fewshot, settings.chat)
        outcomes.append(harness.evaluate(subject, tasks.loaded, how))
    return _write(directory, outcomes, str(subject.directory), settings)


def evaluate_text(model: str, data: str, output: str, settings: Settings = Settings()) -> Outcome:
    """Perplexity of a text; writes DIR/results.json. Arguments and errors as in `evaluate_tasks`."""
    documents = perplexity.read_texts(data)[: settings.limit]
    subject = _load(model, settings)
    directory = results.make_directory(output)
    return _write(directory, [perplexity.evaluate(subject, documents, Path(data).stem)], model, settings)


def _load(model: str, settings: Settings) -> Subject:
    return load_subject(model, dtype=settings.dtype, batch_size=settings.batch_size, report=settings.report)


def _write(directory: Path, outcomes: list[Outcome], model: str, settings: Settings) -> Outcome:
    outcome = results.merge(outcomes)
    config: dict[str, Any] = {
        "model": "jaxlm",
        "model_args": {"path": model, "dtype": settings.dtype, "version": jaxlm.__version__},
        "batch_size": settings.batch_size,
        "device": jax.default_backend(),
        "limit": settings.limit,
    }
    outcome = outcome._replace(details=outcome.details | {"config": config})
    results.write(directory, outcome)
    return outcome
