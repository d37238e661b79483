"""A set of rows that can be read in any order, and what identifies it."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from jaxlm.data.packing import Row
from jaxlm.data.sources import digest

NumpyBatch = dict[str, np.ndarray]


class Rows(Protocol):
    """Rows by number; each a dict of arrays [L], the same columns in every row."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...

    @property
    def input_tokens(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Rows and their identity.

    Attributes:
      rows: see `Rows`.
      identity: what the rows depend on, by the name of the field that a user would look at: hashes of the text and of
        the tokenizer, the sequence length, whether rows are packed. Two datasets with equal identity have equal rows.
      name: what to call the data in messages.
    """

    rows: Rows = dataclasses.field(repr=False)
    identity: dict[str, Any]
    name: str

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def tokens(self) -> int:
        """Input tokens over all rows, padding left out."""
        return self.rows.input_tokens

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the identity."""
        return fingerprint(self.identity)

    def batch(self, indices: Sequence[int] | np.ndarray) -> NumpyBatch:
        """The rows of these numbers, stacked: arrays [len(indices), ...]; -1 stands for a row of padding."""
        rows = [self.rows[int(index)] for index in np.maximum(indices, 0)]
        present = np.asarray(indices) >= 0
        stacked = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        if present.all():
            return stacked
        shape = lambda values: (-1, *(1,) * (values.ndim - 1))  # noqa: E731
        return {name: values * present.reshape(shape(values)).astype(values.dtype) for name, values in stacked.items()}

    def spread(self, count: int) -> "Dataset":
        """At most `count` rows, evenly spaced over the set."""
        if len(self) <= count:
            return self
        chosen = np.arange(count) * len(self) // count
        return dataclasses.replace(self, rows=_Chosen(self.rows, chosen))


@dataclasses.dataclass(frozen=True)
class _Chosen:
    rows: Rows
    chosen: np.ndarray

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> Row:
        return self.rows[int(self.chosen[index])]

    @property
    def input_tokens(self) -> int:
        return sum(count_tokens(self[index]) for index in range(len(self)))


def fingerprint(identity: dict[str, Any]) -> str:
    """SHA-256 of an identity."""
    return digest(json.dumps(identity, sort_keys=True))


def count_tokens(batch: NumpyBatch) -> int:
    """Input tokens of a batch (or a row), padding left out."""
    return int(np.count_nonzero(batch["segments"]))
