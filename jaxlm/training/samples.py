"""The samples file of a run: what the model continues a few fixed prompts with, as training goes on.

    === step 200
    --- "The colour of the"
      The colour of the sky is ...

A prompt is a JSON string; the text below it (prompt and completion) is indented, so no text can be taken for a heading.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

SAMPLES_FILE = "samples.txt"
_STEP, _PROMPT, _INDENT = "=== step ", "--- ", "  "


class Sample(NamedTuple):
    """A prompt and what the model wrote after it."""

    prompt: str
    completion: str


def append(path: str | os.PathLike[str], step: int, samples: Iterable[Sample]) -> None:
    """Add the samples taken after `step` updates to the end of the file."""
    with open(path, "a", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        file.write(_block(step, samples))


def read(path: str | os.PathLike[str]) -> dict[int, list[Sample]]:
    """Samples by step, ascending; of a repeated step (after a resume) the last ones. No file: no samples."""
    path = Path(path)
    found: dict[int, list[Sample]] = {}
    if not path.is_file():
        return found
    current: list[Sample] = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        if line.startswith(_STEP) and line[len(_STEP) :].strip().isdigit():
            current = found[int(line[len(_STEP) :])] = []
        elif line.startswith(_PROMPT):
            current.append(Sample(_prompt(line[len(_PROMPT) :]), ""))
        elif line.startswith(_INDENT) and current:
            prompt, text = current[-1]
            current[-1] = Sample(prompt, f"{text}\n{line[len(_INDENT) :]}")
    return {step: [_whole(sample) for sample in samples] for step, samples in sorted(found.items())}


def _block(step: int, samples: Iterable[Sample]) -> str:
    lines = [f"{_STEP}{step}"]
    for prompt, completion in samples:
        text = _lines(prompt + completion)
        lines += [f"{_PROMPT}{json.dumps(prompt, ensure_ascii=False)}", *(_INDENT + line for line in text.split("\n"))]
    return "\n".join(lines) + "\n\n"


def _lines(text: str) -> str:
    """One kind of line end: a lone carriage return would otherwise escape the indentation when read as text."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _prompt(text: str) -> str:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, str) else text


def _whole(sample: Sample) -> Sample:
    """Take the line end that joins heading and text, and the prompt, off the front."""
    text = sample.completion.removeprefix("\n")
    return Sample(sample.prompt, text.removeprefix(_lines(sample.prompt)))
