"""Held-out prompts answered by the model, greedily: what share is right, and each answer in a file."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlm.data.prompts import PromptRows
from jaxlm.decode.generation import GREEDY
from jaxlm.dist import multihost, place
from jaxlm.objectives import completions
from jaxlm.training.rollout import Drawn, roller_of, rows_of
from jaxlm.training.setup import Setup
from jaxlm.training.summary import write_whole
from jaxlm.types import Variables

AT_ONCE = 256
"""Prompts that are answered together, at most."""

ANSWER = "answer"
"""The column of a prompt's right answer."""

FILE = "samples_exact_match.jsonl"
FIRST, LATEST = "evals/before", "evals/after"


class Answers(NamedTuple):
    """Of each item: the prompt, the completion, the reward (NaN: not scorable), whether it is right (None: unknown),
    and how many tokens it has."""

    prompts: list[str]
    texts: list[str]
    rewards: np.ndarray
    right: list[bool | None]
    lengths: np.ndarray
    columns: dict[str, list[Any]]


def make(setup: Setup) -> Callable[[Variables, Variables], dict[str, float]]:
    """What evaluates runs whose rows are prompts.

    Values: `exact_match`, the share of `items` whose completion is the text in the column `answer`, spaces around both
    left out; without that column, the share that earned 1 from every function (none with a reward model). `reward`,
    its mean; `mean_length`, tokens; `loss`, 1 - exact_match, or without it -reward, which decides what is best.

    The answers of the first evaluation are written into the run's `evals/before`, those of the latest into
    `evals/after`, for `jaxlm compare`.
    """
    roller, rows = roller_of(setup), held_out(setup)
    models = any(function is None for function in roller.functions)
    entries, apply = roller.objective.rewards, setup.program.recipe.apply
    score = jax.jit(lambda frozen, batch: completions.rewards_of(entries, apply, frozen, batch)[1])

    def rewards_of(frozen: Variables, drawn: Drawn) -> np.ndarray:
        if not models:
            none = np.isnan(drawn.rewards).all(axis=1)
            return np.where(none, np.nan, np.nansum(drawn.rewards, axis=1))
        return np.asarray(place.gather(score(frozen, roller.batch(drawn))))

    def evaluate(params: Variables, frozen: Variables) -> dict[str, float]:
        parts = []
        for chosen in np.array_split(np.arange(len(rows)), -(-len(rows) // AT_ONCE)):
            drawn = roller.draw(rows, chosen.tolist(), params, frozen, GREEDY)
            rewards = rewards_of(frozen, drawn)
            prompts = [rows.prompts[row] for row in chosen]
            right = right_of(drawn, models)
            parts.append(Answers(prompts, drawn.texts, rewards, right, drawn.samples.lengths, drawn.columns))
        if multihost.is_main() and Path(setup.config.run.dir).is_dir():
            _write(Path(setup.config.run.dir), parts)
        return summary(parts)

    return evaluate


def held_out(setup: Setup) -> PromptRows:
    """The held-out prompts that an evaluation asks."""
    rows, train = rows_of(setup.data.validation), setup.config.train
    return rows if train.eval_batches is None else rows.spread(train.eval_batches * train.batch_size)


def right_of(drawn: Drawn, models: bool) -> list[bool | None]:
    """Whether each completion is right, see `make`."""
    answers = drawn.columns.get(ANSWER, [None] * len(drawn.texts))
    full = [None] * len(drawn.texts) if models else [bool(np.all(earned >= 1.0)) for earned in drawn.rewards]
    pairs = zip(drawn.texts, answers, full, strict=True)
    return [text.strip() == str(answer).strip() if answer is not None else other for text, answer, other in pairs]


def summary(parts: Sequence[Answers]) -> dict[str, float]:
    """The values of an evaluation, see `make`."""
    rewards = np.concatenate([part.rewards for part in parts]).astype(np.float64)
    lengths = np.concatenate([part.lengths for part in parts])
    known = [right for part in parts for right in part.right if right is not None]
    reward = float(np.mean(rewards[~np.isnan(rewards)])) if not np.isnan(rewards).all() else math.nan
    values = {"reward": reward, "mean_length": float(np.mean(lengths)), "items": float(len(rewards))}
    if len(known) < len(rewards):
        return {"loss": -reward, **values}
    share = sum(known) / len(known)
    return {"loss": 1.0 - share, "exact_match": share, **values}


def _write(directory: Path, parts: Sequence[Answers]) -> None:
    """The answers in lm-eval's lines, where they are right or wrong."""
    lines: list[dict[str, Any]] = []
    for part in parts:
        for index, (prompt, text, right) in enumerate(zip(part.prompts, part.texts, part.right, strict=True)):
            columns = {name: values[index] for name, values in part.columns.items()}
            lines.append(
                {
                    "doc_id": len(lines),
                    "doc": {"prompt": prompt, **columns},
                    "target": columns.get(ANSWER),
                    "arguments": {"gen_args_0": {"arg_0": prompt}},
                    "resps": [[text]],
                    "filtered_resps": [text.strip()],
                    "filter": "none",
                    "metrics": ["exact_match"],
                    "exact_match": None if right is None else float(right),
                }
            )
    if any(line["exact_match"] is None for line in lines):
        return
    folder = directory / (LATEST if (directory / FIRST / FILE).exists() else FIRST)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / FILE, "".join(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines))
