"""Rows with a prompt and whatever columns its rewards need; the model writes the completions itself."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np

from jaxlm.data.packing import Row
from jaxlm.data.questions import closing_questions
from jaxlm.data.sources import Record, content_hash, digest, read_records, text_of
from jaxlm.data.splits import hold_out_rows
from jaxlm.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class PromptRows:
    """Prompts, as rows of a dataset: an array row is its number, `row` int32 [], by which the host finds the text.

    Attributes:
      prompts: the texts.
      columns: all other columns of each row, as they were read.
      ids: the tokens of each prompt, with the special tokens that tokenizer.json adds, without an end of text.
    """

    prompts: list[str] = dataclasses.field(repr=False)
    columns: list[dict[str, Any]] = dataclasses.field(repr=False)
    ids: list[list[int]] = dataclasses.field(repr=False)

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> Row:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return {"row": np.array(index % len(self), np.int32)}

    @property
    def input_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(map(len, self.ids))

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(map(len, self.ids), default=0)

    def spread(self, count: int) -> "PromptRows":
        """At most `count` rows, evenly spaced over the set."""
        if len(self) <= count:
            return self
        chosen = [int(index) for index in np.arange(count) * len(self) // count]
        return PromptRows(
            [self.prompts[i] for i in chosen], [self.columns[i] for i in chosen], [self.ids[i] for i in chosen]
        )

    def columns_of(self, rows: Iterable[int]) -> dict[str, list[Any]]:
        """Column name -> values of these rows; None where a row does not have the column."""
        taken = [self.columns[row] for row in rows]
        names = dict.fromkeys(name for row in taken for name in row)
        return {name: [row.get(name) for row in taken] for name in names}


def prompt_records(path: str | None, validation: str | None) -> tuple[list[Record], list[Record], dict[str, str]]:
    """Rows of training, held-out rows, and the hashes of both by field; null for `path` is the embedded questions.

    Without `validation` the embedded questions are held out by module, other rows by their prompts; of too few rows
    none is.
    """
    if path is None:
        parts = [closing_questions("train"), closing_questions("validation")]
        rows = [[Record(f"{row['module']}: {row['prompt']}", dict(row)) for row in part] for part in parts]
        train, held_out = rows
        content = {"data.path": digest(*(row["prompt"] for part in parts for row in part))}
    else:
        train, held_out, content = list(read_records(path)), [], {"data.path": content_hash(path)}
    if validation is not None:
        held_out = list(read_records(validation, field="data.validation"))
        content["data.validation"] = content_hash(validation, "data.validation")
        if not held_out:
            raise ValueError(f"data.validation: {validation}: no rows; give a file with something in it")
    elif path is not None:
        sides = hold_out_rows([str(record.fields.get("prompt")) for record in train])
        held_out = [record for record, side in zip(train, sides, strict=True) if side]
        train = [record for record, side in zip(train, sides, strict=True) if not side]
    return train, held_out, content


def read_prompts(records: Iterable[Record], tokenizer: Tokenizer, longest: int) -> tuple[PromptRows, int]:
    """Rows as prompts with their columns, and how many prompts were cut.

    Args:
      records: with a column `prompt`.
      tokenizer: of the model.
      longest: tokens of a prompt; a longer one loses its beginning, because what is asked stands at the end.

    Raises:
      ValueError: `file:line: ...` for a row without a prompt, or an empty one.
    """
    rows = [(text_of(record, "prompt", "give the prompt as text"), record) for record in records]
    encodings = tokenizer.backend.encode_batch([prompt for prompt, _ in rows])
    prompts, columns, ids, cut = [], [], [], 0
    for (prompt, record), encoding in zip(rows, encodings, strict=True):
        tokens = list(encoding.ids)
        if tokens and tokens[-1] == tokenizer.eos_id and len(tokens) > 1:
            tokens.pop()  # some tokenizers end every text
        if not tokens:
            raise ValueError(f"{record.where}: the prompt is empty; write one, or remove the row")
        cut += len(tokens) > longest
        prompts.append(prompt)
        columns.append({name: value for name, value in record.fields.items() if name != "prompt"})
        ids.append(tokens[-longest:])
    return PromptRows(prompts, columns, ids), cut
