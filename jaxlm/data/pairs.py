"""Preference data: rows with two completions of a prompt, or with one and a label -> token sequences and batches.

A pair has `prompt`, `chosen` and `rejected`, as text or as lists of messages; where `prompt` is missing, it is what
chosen and rejected begin with alike. A labelled row has `prompt`, `completion` and `label` (bool). Rows of pairs are
arrays [2, L], chosen first; those of labelled completions [L] with `label` and their number `row`.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from jaxlm.data.config import DataConfig
from jaxlm.data.packing import ExampleRows, Examples, Row, rows_of
from jaxlm.data.preferences import labelled, other_functions, shuffled_words
from jaxlm.data.sources import Record, content_hash, digest, read_records, text_of
from jaxlm.data.splits import hold_out_rows
from jaxlm.data.supervised import Messages, Render, Sample, encode
from jaxlm.data.tokenizer import Tokenizer

BATCH = 512
REMEDY = "give prompt, chosen and rejected, as text or as lists of messages"


class Pair(NamedTuple):
    """A row as texts: chosen and rejected, or the one completion; `value` is the margin or the label, if any."""

    sides: tuple[Sample, ...]
    value: float | None = None

    @property
    def key(self) -> str:
        """What must stay on one side of a split."""
        return self.sides[0].prompt or self.sides[0].text


def read_pairs(records: Iterable[Record], render: Render | None = None) -> Iterator[Pair]:
    """Rows with two completions; a `margin` is read where there is one.

    Raises:
      ValueError: `file:line: ...` for a row without the columns, or with something else in them.
    """
    for record in records:
        margin = record.fields.get("margin")
        if margin is not None and (isinstance(margin, bool | str) or not math.isfinite(float(margin))):
            raise ValueError(f'{record.where}: field "margin" is {margin!r}, no number; give a number or leave it out')
        yield Pair(_sides(record, ("chosen", "rejected"), render), None if margin is None else float(margin))


def read_labelled(records: Iterable[Record], render: Render | None = None) -> Iterator[Pair]:
    """Rows with one completion and a label; errors as in `read_pairs`."""
    for record in records:
        if "label" not in record.fields:
            there = ", ".join(record.fields)
            raise ValueError(f'{record.where}: no field "label" (there are: {there}); give true (desirable) or false')
        label = record.fields["label"]
        if not isinstance(label, bool | np.bool_):
            raise ValueError(f'{record.where}: field "label" is {label!r}; give true (desirable) or false')
        yield Pair(_sides(record, ("completion",), render), float(label))


def _sides(record: Record, names: tuple[str, ...], render: Render | None) -> tuple[Sample, ...]:
    fields, where = record.fields, record.where
    if any(isinstance(fields.get(name), list) for name in ("prompt", *names)):
        return _chats(record, names, render)
    texts = [text_of(record, name, REMEDY) for name in names]
    if "prompt" in fields:
        prompt = text_of(record, "prompt", REMEDY)
        return tuple(Sample(where, prompt, prompt + text) for text in texts)
    prompt = _common_text(*texts) if len(texts) == 2 else ""
    return tuple(Sample(where, prompt, text) for text in texts)


def _common_text(chosen: str, rejected: str) -> str:
    """What both begin with, up to a space that belongs to what follows."""
    size = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    size = min(len(chosen), len(rejected)) if size is None else size
    return chosen[: size - 1] if size and chosen[size - 1] == " " else chosen[:size]


def _chats(record: Record, names: tuple[str, ...], render: Render | None) -> tuple[Sample, ...]:
    """Conversations: what is learnt are the assistant's turns after the prompt."""
    where = record.where
    answers = [_messages(record, name) for name in names]
    if "prompt" in record.fields:
        prompt = _messages(record, "prompt")
    elif len(answers) == 2:
        same = sum(1 for _ in itertools.takewhile(lambda both: both[0] == both[1], zip(*answers, strict=False)))
        prompt, answers = answers[0][:same], [answer[same:] for answer in answers]
    else:
        prompt, answers = answers[0][:-1], [answers[0][-1:]]
    if render is None:
        raise ValueError(
            f"{where}: rows with messages need a chat template; start from a model whose tokenizer_config.json has "
            "one, or give prompt and completions as text"
        )
    question = next((str(m.get("content")) for m in prompt if m["role"] == "user"), "")
    samples = []
    for name, answer in zip(names, answers, strict=True):
        turns = sum(message["role"] == "assistant" for message in answer)
        if not turns:
            raise ValueError(f'{where}: field "{name}" has no turn of the assistant after the prompt; give it one')
        try:
            text, spans = render([*prompt, *answer])
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        samples.append(Sample(where, question, text, spans[-turns:]))
    return tuple(samples)


def _messages(record: Record, name: str) -> Messages:
    messages = record.fields.get(name)
    if not isinstance(messages, list) or not all(isinstance(m, dict) and "role" in m for m in messages):
        raise ValueError(f'{record.where}: field "{name}" is no list of {{"role", "content"}}; {REMEDY}')
    return messages


class Sets(NamedTuple):
    """The rows of a run by set (`train`, `validation` unless it must be held out of train, further ones by name), and
    the hashes of where they come from."""

    pairs: dict[str, list[Pair]]
    content: dict[str, str]


def read_sets(config: DataConfig, single: bool, render: Render | None) -> Sets:
    """The rows that a configuration names; without a path, those of the embedded corpus, with a `hard` set.

    Args:
      config: the `data` section.
      single: whether rows have one completion and a label.
      render: the chat template.

    Raises:
      ValueError, FileNotFoundError: as `sources.read_records` and the readers above.
    """

    def read(records: Iterable[Record]) -> list[Pair]:
        return list((read_labelled if single else read_pairs)(records, render))

    if config.path is None:
        parts = {"train": shuffled_words("train"), "validation": shuffled_words("validation")}
        parts["hard"] = other_functions("validation")
        if single:
            parts = {name: labelled(rows) for name, rows in parts.items()}
        pairs = {
            name: read(Record(f"the embedded corpus:{number}", row) for number, row in enumerate(rows, 1))
            for name, rows in parts.items()
        }
        content = {"data.path": digest(*(s.text for part in pairs.values() for pair in part for s in pair.sides))}
    else:
        content = {"data.path": content_hash(config.path)}
        pairs = {"train": read(read_records(config.path, config.text_field))}
    if config.validation is not None:
        content["data.validation"] = content_hash(config.validation, "data.validation")
        pairs["validation"] = read(read_records(config.validation, config.text_field, "data.validation"))
        if not pairs["validation"]:
            raise ValueError(f"data.validation: {config.validation}: no rows; give a file with something in it")
    return Sets(pairs if "validation" in pairs else _held_out(pairs), content)


def _held_out(pairs: dict[str, list[Pair]]) -> dict[str, list[Pair]]:
    sides = hold_out_rows([pair.key for pair in pairs["train"]])
    if not any(sides):
        return pairs
    both = list(zip(pairs["train"], sides, strict=True))
    return {"train": [pair for pair, side in both if not side], "validation": [pair for pair, side in both if side]}


@dataclasses.dataclass(frozen=True)
class PairRows:
    """Rows of one or two sequences, and of one number each.

    Attributes:
      sides: the rows of each side, equally many.
      columns: further columns by name, [rows].
      truncated, dropped: how many rows were cut to the sequence length, and how many had nothing left to learn.
    """

    sides: tuple[ExampleRows, ...]
    columns: dict[str, np.ndarray]
    truncated: int = 0
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.sides[0])

    def __getitem__(self, index: int) -> Row:
        rows = [side[index] for side in self.sides]
        row = rows[0] if len(rows) == 1 else {name: np.stack([part[name] for part in rows]) for name in rows[0]}
        return row | {name: values[index] for name, values in self.columns.items()}

    @property
    def input_tokens(self) -> int:
        """Input tokens over all rows, padding left out."""
        return sum(side.input_tokens for side in self.sides)


def encode_pairs(pairs: list[Pair], tokenizer: Tokenizer, length: int, *, whole: bool = False) -> PairRows:
    """Tokenise, append the end to completions, mark them as labels, cut to what rows of `length` can hold.

    As `supervised.encode_samples`, but the labels of both sides begin at the same place, where the first of them
    differs from the prompt alone. A row of which one side has no label left is dropped.

    Args:
      pairs: rows as texts.
      tokenizer: with an `eos_id`, which everything but chats needs.
      length: L.
      whole: the last token of a sequence is an input too (a score is read there); longer sequences are dropped.

    Raises:
      ValueError: `file:line` of a side without a label; or nothing is left.
    """
    sides = len(pairs[0].sides) if pairs else 1
    kept: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in range(sides)]
    values: list[float | None] = []
    truncated = 0
    for pair, encoded in _encoded(pairs, tokenizer):
        limit = length if whole else length + 1
        longer = any(len(ids) > limit for ids, _ in encoded)
        truncated += longer
        if longer and (whole or not all(learnt[1:limit].any() for _, learnt in encoded)):
            continue
        for side, (ids, learnt) in zip(kept, encoded, strict=True):
            if whole:  # the target of the last token, which is no label
                ids, learnt = np.append(ids, np.int32(0)), np.append(learnt, False)
            side.append((ids[: length + 1], learnt[: length + 1]))
        values.append(pair.value)
    if pairs and not values:
        raise ValueError(f"data.sequence_length: {length} is too short for all {len(pairs)} rows; raise it")
    rows = tuple(rows_of(_examples(side), length, packing=False) for side in kept)
    return PairRows(rows, _columns(values, sides), truncated, len(pairs) - len(values))


def _columns(values: list[float | None], sides: int) -> dict[str, np.ndarray]:
    if sides == 1:
        return {"label": np.array(values, np.int32), "row": np.arange(len(values), dtype=np.int32)}
    if all(value is None for value in values):
        return {}
    return {"margin": np.array([value or 0.0 for value in values], np.float32)}


def _encoded(pairs: list[Pair], tokenizer: Tokenizer) -> Iterator[tuple[Pair, list[tuple[np.ndarray, np.ndarray]]]]:
    """Each row with the ids and labels of its sides."""
    for start in range(0, len(pairs), BATCH):
        batch = pairs[start : start + BATCH]
        stream = encode([sample for pair in batch for sample in pair.sides], tokenizer)
        for pair in batch:
            encoded = [next(stream) for _ in pair.sides]
            for sample, (_, learnt) in zip(pair.sides, encoded, strict=True):
                if not learnt[1:].any():
                    raise ValueError(f"{sample.where}: no label in this example; give it an answer or remove it")
            if pair.sides[0].spans is None:
                first = min(int(learnt.argmax()) for _, learnt in encoded)
                encoded = [(ids, np.arange(len(ids)) >= first) for ids, _ in encoded]
            yield pair, encoded


def _examples(encoded: list[tuple[np.ndarray, np.ndarray]]) -> Examples:
    empty = np.zeros(0, np.int32)
    tokens = np.concatenate([empty, *(ids for ids, _ in encoded)])
    labels = np.concatenate([empty.astype(bool), *(learnt for _, learnt in encoded)])
    return Examples(tokens, labels, np.cumsum([0, *(len(ids) for ids, _ in encoded)], dtype=np.int64))
