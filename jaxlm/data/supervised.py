"""Instruction data: rows with prompts and answers -> token sequences that know which of their tokens are labels.

Four kinds of row, told apart by their columns: `messages`; `prompt` and `completion`; `instruction`, `input`, `output`
(Alpaca); and plain text, all of whose tokens are labels.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from jaxlm.data.packing import Examples
from jaxlm.data.sources import Record, text_of
from jaxlm.data.tokenizer import Tokenizer

Messages = list[dict[str, Any]]
Render = Callable[[Messages], tuple[str, list[tuple[int, int]]]]
"""`render(messages) -> (text, spans)`: the chat template's text, its special tokens written out, and the character
ranges [start, stop) of what is to be learnt: each assistant turn with its end-of-turn token."""

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
BATCH = 1024


class Sample(NamedTuple):
    """A row as text. `spans` is None for prompt and completion; then labels start where the prompt's tokens end."""

    where: str
    prompt: str
    text: str
    spans: list[tuple[int, int]] | None = None


def read_samples(records: Iterable[Record], render: Render | None = None, text_field: str = "text") -> Iterator[Sample]:
    """Rows as text, one by one.

    Args:
      records: the rows.
      render: the chat template; needed for rows with `messages` only.
      text_field: the column of plain text.

    Raises:
      ValueError: `file:line: ...` for a row without the columns of any kind, or with something else than text in them.
    """
    for record in records:
        fields, where = record.fields, record.where
        if fields.get("messages") is not None:
            yield _chat(record, render)
        elif "completion" in fields or "prompt" in fields:
            prompt = text_of(record, "prompt", "give prompt and completion as text")
            completion = text_of(record, "completion", "give prompt and completion as text")
            yield Sample(where, prompt, prompt + completion)
        elif "instruction" in fields:
            prompt = _alpaca(record)
            yield Sample(where, prompt, prompt + text_of(record, "output", "give instruction and output as text"))
        else:
            remedy = "a row has messages, or prompt and completion, or instruction and output, or text"
            yield Sample(where, "", text_of(record, text_field, remedy))


def sample_key(sample: Sample) -> str:
    """What must stay on one side of a split: the prompt, or the whole text where there is none."""
    return sample.prompt or sample.text


def encode_samples(samples: Iterable[Sample], tokenizer: Tokenizer, length: int) -> Examples:
    """Tokenise, mark the labels, append the end, cut to what a row of `length` can hold.

    Prompt and completion are tokenised together, with the special tokens that tokenizer.json itself adds and no others;
    labels begin where these tokens differ from those of the prompt alone, so that a token that spans the seam belongs
    to the completion. The EOS is appended as a label, unless the text already ends with it. Of a chat, the tokens that
    touch the spans are labels, and nothing is added.

    Args:
      samples: rows as text.
      tokenizer: with an `eos_id`, which everything but chats needs.
      length: L; a longer example keeps its first L + 1 tokens. If no label is among them the example is dropped.

    Raises:
      ValueError: an example has no label (`file:line` is named), the tokenizer has no end, or nothing is left.
    """
    tokens: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    truncated = dropped = 0
    where = ""
    for batch in _batches(samples):
        for sample, (ids, learnt) in zip(batch, encode(batch, tokenizer), strict=True):
            if not learnt[1:].any():
                raise ValueError(f"{sample.where}: no label in this example; give it an answer or remove it")
            truncated += len(ids) > length + 1
            ids, learnt = ids[: length + 1], learnt[: length + 1]
            if not learnt[1:].any():
                dropped, where = dropped + 1, where or sample.where
                continue
            tokens.append(ids)
            labels.append(learnt)
    if dropped and not tokens:
        raise ValueError(
            f"data.sequence_length: {length} is too short: the prompts fill it in all {dropped} examples; raise it"
        )
    offsets = np.cumsum([0, *map(len, tokens)], dtype=np.int64)
    empty = np.zeros(0, np.int32)
    joined = np.concatenate([empty, *tokens]), np.concatenate([empty.astype(bool), *labels])
    return Examples(*joined, offsets, truncated, dropped, where)


def encode(batch: list[Sample], tokenizer: Tokenizer) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """int32 ids and bool labels of each sample."""
    plain = [sample for sample in batch if sample.spans is None]
    chats = [sample for sample in batch if sample.spans is not None]
    backend, eos_id = tokenizer.backend, tokenizer.eos_id
    if plain and eos_id is None:
        raise ValueError(
            f"{plain[0].where}: the tokenizer has no end-of-sequence token to append; name one as eos_token in the "
            "tokenizer_config.json beside tokenizer.json"
        )
    prompts = iter(backend.encode_batch_fast([sample.prompt for sample in plain]))
    texts = iter(backend.encode_batch_fast([sample.text for sample in plain]))
    rendered = iter(backend.encode_batch([sample.text for sample in chats], add_special_tokens=False))
    for sample in batch:
        if sample.spans is None:
            prompt, ids = next(prompts).ids, next(texts).ids
            start = _common_prefix(prompt, ids) if sample.prompt else 0
            end = [] if ids and ids[-1] == eos_id else [eos_id]
            yield np.array([*ids, *end], np.int32), np.arange(len(ids) + len(end)) >= start
        else:
            encoding = next(rendered)
            begins, ends = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
            learnt = np.zeros(len(begins), bool)
            for first, last in sample.spans:
                learnt |= (begins < last) & (ends > first)
            yield np.array(encoding.ids, np.int32), learnt


def _common_prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _chat(record: Record, render: Render | None) -> Sample:
    messages = record.fields["messages"]
    valid = isinstance(messages, list) and messages and all(isinstance(m, dict) and "role" in m for m in messages)
    if not valid:
        raise ValueError(f'{record.where}: field "messages" is no list of {{"role", "content"}}; write it as one')
    if render is None:
        raise ValueError(
            f"{record.where}: rows with messages need a chat template, and the tokenizer comes without one; name one "
            "in data.template, or give prompt and completion"
        )
    try:
        text, spans = render(messages)
    except ValueError as error:
        raise ValueError(f"{record.where}: {error}") from None
    question = next((str(m.get("content")) for m in messages if m["role"] == "user"), "")
    return Sample(record.where, question, text, spans)


def _alpaca(record: Record) -> str:
    instruction = text_of(record, "instruction", "give instruction and output as text")
    if record.fields.get("input"):
        return ALPACA_INPUT.format(instruction=instruction, input=text_of(record, "input", "give the input as text"))
    return ALPACA.format(instruction=instruction)


def _batches(samples: Iterable[Sample]) -> Iterator[list[Sample]]:
    stream = iter(samples)
    while batch := list(itertools.islice(stream, BATCH)):
        yield batch
