"""Choice questions from the embedded corpus: functions of held-out modules, and which line begins their docstring."""

import hashlib
from collections.abc import Sequence

from jaxlm.data.corpus import docstring_tasks
from jaxlm.evals.choice import Question

CHOICES = 4
LABELS = "ABCD"

Row = dict[str, str]


def docstrings() -> list[Question]:
    """The line of the function itself, or of one of three other functions of held-out modules: needs understanding."""
    rows = _rows()
    return [_question(row, _others(row, rows)) for row in rows]


def docstrings_shuffled() -> list[Question]:
    """The line as it is, or with its words in another order: needs the language of docstrings alone."""
    rows = _rows()
    return [_question(row, list(found)) for row in rows if len(found := _shuffles(row)) == CHOICES - 1]


def _rows() -> list[Row]:
    """Held-out tasks whose lines are all different."""
    return list({row["completion"]: row for row in docstring_tasks("validation")}.values())


def _question(row: Row, wrong: Sequence[str]) -> Question:
    """The right line stands at a place that depends on the row alone."""
    gold = _draw(row, "place") % CHOICES
    lines = [*wrong[:gold], row["completion"], *wrong[gold:]]
    doc = {
        "id": f"{row['module']}:{row['function']}",
        "question": row["prompt"],
        "choices": {"text": lines, "label": list(LABELS)},
        "answerKey": LABELS[gold],
    }
    return Question(doc, row["prompt"], lines, gold, separator="")


def _others(row: Row, rows: Sequence[Row]) -> list[str]:
    """Lines of three other functions: those whose hash together with this row's is the smallest."""
    ranked = sorted((other for other in rows if other is not row), key=lambda other: _draw(row, other["completion"]))
    return [other["completion"] for other in ranked[: CHOICES - 1]]


def _shuffles(row: Row) -> dict[str, None]:
    """Three other orders of the line's words, if it has as many."""
    words, found = row["completion"].split(), dict[str, None]()
    for attempt in range(4 * CHOICES):
        order = sorted(range(len(words)), key=lambda i: _draw(row, f"{attempt} {i}"))
        line = " ".join(words[i] for i in order)
        if line != " ".join(words) and len(found) < CHOICES - 1:
            found[line] = None
    return found


def _draw(row: Row, salt: str) -> int:
    """A number that looks random and is the same everywhere."""
    text = "\0".join((row["prompt"], row["completion"], salt))
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest())


TASKS = {"docstrings": docstrings, "docstrings_shuffled": docstrings_shuffled}
"""Built-in tasks by name."""
