"""Preferences without a download: what a docstring says of its function, against lines that do not.

Chosen is the true first line of a function's docstring. Rejected is the same line with its words shuffled, which a tiny
model learns to tell in a minute without understanding the function; or, much harder, the first line of another
function, of the same module where it has one. Neither is what people prefer: they are named for what they are.
"""

import hashlib
import random
from collections import defaultdict
from typing import Any

from jaxlm.data.corpus import Split, docstring_tasks

Row = dict[str, Any]


def shuffled_words(split: Split) -> list[Row]:
    """Rows with `prompt` (the function and a heading), `chosen` (the true line) and `rejected` (its words shuffled)."""
    found = []
    for task in _tasks(split):
        wrong = _shuffled(task["completion"], task["prompt"])
        if wrong is not None:
            found.append({"prompt": task["prompt"], "chosen": task["completion"], "rejected": wrong})
    return found


def other_functions(split: Split) -> list[Row]:
    """The same rows, but `rejected` is the line of another function: the next one of the module that says something
    else, or else the next one of all."""
    tasks = _tasks(split)
    modules = defaultdict(list)
    for task in tasks:
        modules[task["module"]].append(task["completion"])
    everything = [task["completion"] for task in tasks]
    found = []
    for task in tasks:
        true = task["completion"]
        wrong = _next_other(modules[task["module"]], true) or _next_other(everything, true)
        if wrong is not None:
            found.append({"prompt": task["prompt"], "chosen": true, "rejected": wrong})
    return found


def labelled(rows: list[Row]) -> list[Row]:
    """Pairs as single completions, `prompt`, `completion` and `label`: each pair gives two rows."""
    return [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in rows
        for side in ("chosen", "rejected")
    ]


def _tasks(split: Split) -> list[dict[str, str]]:
    """The tasks of a split; of the held-out ones, those of functions that a module of the other side has a copy of are
    left out."""
    tasks = docstring_tasks(split)
    known = {task["prompt"] for task in docstring_tasks("train")} if split == "validation" else set()
    return [task for task in tasks if task["prompt"] not in known]


def _shuffled(line: str, key: str) -> str | None:
    """The words of a line in an order of chance that depends on `key`; None where no other order is possible."""
    words = line.split()
    if len(set(words)) < 2:
        return None
    chance = random.Random(hashlib.blake2b(f"{key}{line}".encode(), digest_size=8).digest())
    mixed = list(words)
    while mixed == words:
        chance.shuffle(mixed)
    return " ".join(mixed)


def _next_other(lines: list[str], true: str) -> str | None:
    start = lines.index(true)
    return next((line for line in [*lines[start:], *lines[:start]] if line != true), None)
