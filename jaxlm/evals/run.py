"""One evaluation from names to files: a model, tasks or a text, a directory."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

import jaxlm
from jaxlm.evals import choice, harness, perplexity, results
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


def evaluate_tasks(model: str, tasks: Sequence[str], output: str, settings: Settings = Settings()) -> Outcome:
    """Score a model on tasks and write DIR/results.json and DIR/samples_<task>.jsonl.

    Args:
      model: a Hugging Face model directory or a run directory.
      tasks: `.jsonl` files of choice questions; task YAMLs or names of lm-eval.
      output: DIR.
      settings: how.

    Raises:
      FileNotFoundError, ValueError: whatever is wrong with the input, before anything is scored or written.
    """
    files = [task for task in tasks if task.endswith(".jsonl")]
    others = [task for task in tasks if task not in files]
    names = [Path(file).stem for file in files]
    questions = {name: choice.read_questions(file)[: settings.limit] for name, file in zip(names, files, strict=True)}
    if (settings.chat or settings.num_fewshot) and files:
        raise ValueError(f"--tasks: {files[0]}: questions are asked plainly; write a task's YAML for chat or examples")
    loaded = harness.load_tasks(others) if others else {"tasks": {}}
    names += loaded["tasks"]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"--tasks: two tasks are called {twice}; rename a file")
    subject = _load(model, settings)
    directory = results.make_directory(output)
    outcomes = [choice.evaluate(subject, asked, name) for name, asked in questions.items()]
    if others:
        how = harness.Settings(settings.limit, settings.num_fewshot, settings.chat)
        outcomes.append(harness.evaluate(subject, loaded, how))
    return _write(directory, outcomes, model, settings)


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
