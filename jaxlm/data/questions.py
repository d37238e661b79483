"""Questions with exact answers, made of the standard library: close the brackets that a line of code has left open.

The prompt is a line of a module up to its last run of closing brackets; the answer is that run, and a colon where the
line opens a block. Both follow from the prompt alone (`answer_of`), so an answer is right or wrong whoever gives it.
Questions are held out by module, as in the embedded corpus, and none is asked twice. The two most common answers are
thinned out until no answer is that of more than about a third of the questions.
"""

import collections
import json
import re
from pathlib import Path

from jaxlm.data.cache import cached
from jaxlm.data.corpus import TOPICS, Split, corpus_hash, standard_library
from jaxlm.data.sources import Document
from jaxlm.data.splits import fraction, is_held_out

VERSION = 1
"""To be raised with every change of the code that changes the questions."""

PAIRS = {"(": ")", "[": "]", "{": "}"}
BLOCK = re.compile(r"\s*(async |class |def |elif |except |for |if |while |with )")
TAIL = re.compile(r"[)\]}]+:?$")
SHORTEST, LONGEST = 12, 70
"""Characters of a line, leading spaces left out, and in all."""


def closing_questions(split: Split) -> list[dict[str, str]]:
    """Lines of the standard library without the brackets at their end.

    Args:
      split: `train` or `validation`, by module.

    Returns:
      Rows with `prompt`, `answer` and `module`; no prompt stands in both splits, or twice in one.
    """
    documents = [document for document in standard_library() if TOPICS not in (document.group or "")]
    key = f"closing-{VERSION}-{corpus_hash(documents)[:32]}"

    def write(folder: Path) -> None:
        (folder / "rows.json").write_text(json.dumps(_questions(documents)), encoding="utf-8")

    def read(folder: Path) -> dict[str, list[dict[str, str]]]:
        return json.loads((folder / "rows.json").read_text(encoding="utf-8"))

    return cached(key, write, read)[split]


def _questions(documents: list[Document]) -> dict[str, list[dict[str, str]]]:
    """The rows of both splits."""
    rows: dict[str, list[dict[str, str]]] = {"validation": [], "train": []}
    seen = set()
    # Held-out modules come first, so that a line which stands on both sides is theirs and never trained on.
    for split, held_out in (("validation", True), ("train", False)):
        for document in documents:
            group = document.group or ""
            if is_held_out(group) != held_out:
                continue
            for prompt in filter(None, map(prompt_of, document.text.splitlines())):
                if prompt not in seen:
                    seen.add(prompt)
                    module = group.partition(":")[2]
                    rows[split].append({"prompt": prompt, "answer": answer_of(prompt), "module": module})
    return {split: _thinned(part) for split, part in rows.items()}


def _thinned(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Of each answer at most as many rows as the third most common answer and all rarer ones have together."""
    counts = collections.Counter(row["answer"] for row in rows)
    room = max(sum(count for _, count in counts.most_common()[2:]), 1)
    groups = {answer: sorted(r["prompt"] for r in rows if r["answer"] == answer) for answer in counts}
    kept = {prompt for prompts in groups.values() for prompt in sorted(prompts, key=fraction)[:room]}
    return [row for row in rows if row["prompt"] in kept]


def prompt_of(line: str) -> str | None:
    """The line without its end, if the end is what `answer_of` says of the rest, and the line is plain enough."""
    line = line.rstrip()
    tail = TAIL.search(line)
    if tail is None or len(line) > LONGEST or len(line.strip()) < SHORTEST or set("#\"'\\") & set(line):
        return None
    prompt = line[: tail.start()]
    if not prompt or prompt[-1] in "([{ ," or answer_of(prompt) != tail.group():
        return None
    return prompt


def answer_of(prompt: str) -> str:
    """The brackets that are open in a line, closed from the inside; a colon behind them where the line opens a block.

    Empty where the line has a closing bracket too many, or of the wrong kind.
    """
    waiting: list[str] = []
    for character in prompt:
        if character in PAIRS:
            waiting.append(PAIRS[character])
        elif character in PAIRS.values() and (not waiting or waiting.pop() != character):
            return ""
    if not waiting:
        return ""
    return "".join(reversed(waiting)) + (":" if BLOCK.match(prompt) else "")


def exact_match(prompts: list[str], completions: list[str], answer: list[str], **columns: object) -> list[float | None]:
    """A reward: 1 where the completion is the answer, spaces around either left out, else 0; None without an answer."""
    pairs = zip(completions, answer, strict=True)
    return [None if right is None else float(given.strip() == right.strip()) for given, right in pairs]
