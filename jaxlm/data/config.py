"""Where the text comes from and how it is cut into rows: the `data` section of a configuration."""

import dataclasses
from typing import Annotated

import msgspec


@dataclasses.dataclass(frozen=True)
class MixtureConfig:
    """General text beside the data of a task. Its held-out part is evaluated too: `eval/general/...`.

    Attributes:
      path: running text, of the kinds of `data.path`. Null: the embedded corpus.
      ratio: share of the rows of training that are general; 0 only evaluates.
    """

    path: str | None = None
    ratio: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.1


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The `data` section.

    Attributes:
      path: a .txt, .jsonl or .parquet file, a folder, a glob, a folder of prepared token bins, or the name of a Hugging
        Face dataset (`owner/name`, `owner/name:split`; needs the datasets package). Null: the embedded corpus.
      validation: the same kinds, used whole. Null: a held-out part of path.
      validation_rows: at most so many rows of a held-out part are evaluated, evenly spaced over it.
      sequence_length: L, tokens a row.
      tokenizer: a tokenizer.json or a folder with one. Null: the model's, else one trained on the data.
      packing: row data only: several examples share a row, kept apart by segments.
      text_field: the column that holds running text.
      template: the chat template of rows with messages, by name. Null: the one beside the tokenizer.
      mixture: general text mixed in, to limit forgetting and to measure it; null is none.
    """

    path: str | None = None
    validation: str | None = None
    validation_rows: int = 256
    sequence_length: int = 256
    tokenizer: str | None = None
    packing: bool = False
    text_field: str = "text"
    template: str | None = None
    mixture: MixtureConfig | None = None

    def validate(self) -> None:
        """Raise ValueError, naming the field, for a value that cannot be."""
        for field in ("sequence_length", "validation_rows"):
            value = getattr(self, field)
            if value < 1:
                raise ValueError(f"data.{field}: {value} is not positive; use a whole number from 1 up")
        for field in ("path", "validation", "tokenizer", "text_field", "template"):
            if getattr(self, field) == "":
                raise ValueError(f"data.{field}: empty; leave it out or give a name")
        if self.mixture is not None and self.mixture.path == "":
            raise ValueError("data.mixture.path: empty; leave it out or give a name")
