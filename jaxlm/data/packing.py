"""Rows of length L out of documents and examples: running text cut into rows, or several examples packed into one.

Every row is a dict of arrays [L]: tokens, targets, positions, segments (int32) and mask (float32), as `types.Batch`.
Segments are numbered 1, 2, ... in a row and 0 is padding; positions restart at 0 in each segment; a token never attends
to another document, and the first token of a document is never a target.
"""

import bisect
import dataclasses
from typing import NamedTuple

import numpy as np

from jaxlm.data.bins import Bins, refuse_ids

Row = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class RunningRows:
    """Rows cut from the tokens [start, stop) of the bins, as if all documents were one text.

    Row i reads tokens i*L .. i*L + L (one more than L), so each token is a target at most once. What is left after the
    last whole row is dropped, or padded if `pad_tail`.

    Attributes:
      bins: tokens and document offsets.
      length: L.
      vocab_size: V; an id outside of it is refused where it is read.
      start, stop: the part of the tokens that is used.
      pad_tail: whether the last, incomplete row is kept.
    """

    bins: Bins
    length: int
    vocab_size: int
    start: int
    stop: int
    pad_tail: bool = False

    def __len__(self) -> int:
        targets = max(self.stop - self.start - 1, 0)
        return -(-targets // self.length) if self.pad_tail else targets // self.length

    def __getitem__(self, index: int) -> Row:
        first = self.start + index * self.length
        last = min(first + self.length + 1, self.stop)
        refuse_ids(self.bins, self.vocab_size, first, last)
        tokens = self.bins.tokens[first:last].astype(np.int32)
        offsets = self.bins.documents
        low, high = np.searchsorted(offsets, (first, last - 1), "right")
        starts = np.concatenate([[0], offsets[low:high] - first])
        sizes = np.diff(starts, append=last - first)
        segments = np.repeat(np.arange(1, len(starts) + 1, dtype=np.int32), sizes)
        positions = (np.arange(last - first) - np.repeat(starts, sizes)).astype(np.int32)
        return _padded(
            {
                "tokens": tokens[:-1],
                "targets": tokens[1:],
                "mask": (segments[:-1] == segments[1:]).astype(np.float32),
                "segments": segments[:-1],
                "positions": positions[:-1],
            },
            self.length,
        )

    @property
    def input_tokens(self) -> int:
        """Input tokens over all rows, padding left out."""
        return max(self.stop - self.start - 1, 0) if self.pad_tail else len(self) * self.length


class Examples(NamedTuple):
    """Tokenised examples, one after the other.

    Attributes:
      tokens: int32 [tokens].
      labels: bool [tokens]; whether the token is to be learnt (the first of an example never is: nothing predicts it).
      offsets: int64 [examples + 1]; example e is tokens[offsets[e]:offsets[e + 1]].
      truncated: how many examples were cut to the sequence length.
      dropped: how many had no label left after that, and are not here. where: the first of them, `file:line`.
    """

    tokens: np.ndarray
    labels: np.ndarray
    offsets: np.ndarray
    truncated: int = 0
    dropped: int = 0
    where: str = ""

    @property
    def inputs(self) -> np.ndarray:
        """int64 [examples]: places that each example takes in a row, one less than its tokens."""
        return np.maximum(np.diff(self.offsets) - 1, 0)


@dataclasses.dataclass(frozen=True)
class ExampleRows:
    """Rows of whole examples: one a row, or the groups of `pack`.

    Attributes:
      examples: the tokenised examples; none has more than L + 1 tokens.
      length: L.
      groups: int64 [examples], example numbers in the order of the rows.
      ends: int64 [rows]; row r holds groups[ends[r - 1]:ends[r]].
    """

    examples: Examples
    length: int
    groups: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> Row:
        members = self.groups[self.ends[index - 1] if index else 0 : self.ends[index]]
        tokens, labels, offsets = self.examples[:3]
        columns: dict[str, list[np.ndarray]] = {name: [] for name in ("tokens", "targets", "mask", "positions")}
        for example in members:
            span = slice(offsets[example], offsets[example + 1])
            columns["tokens"].append(tokens[span][:-1])
            columns["targets"].append(tokens[span][1:])
            columns["mask"].append(labels[span][1:].astype(np.float32))
            columns["positions"].append(np.arange(len(columns["tokens"][-1]), dtype=np.int32))
        segments = [np.full(len(part), number, np.int32) for number, part in enumerate(columns["tokens"], 1)]
        row = {name: np.concatenate(parts) for name, parts in columns.items()}
        return _padded(row | {"segments": np.concatenate(segments)}, self.length)

    @property
    def input_tokens(self) -> int:
        """Input tokens over all rows, padding left out."""
        return int(self.examples.inputs.sum())


def rows_of(examples: Examples, length: int, packing: bool) -> ExampleRows:
    """One example a row, or as few rows as best-fit decreasing finds."""
    groups = pack(examples.inputs, length) if packing else [[example] for example in range(len(examples.inputs))]
    ends = np.cumsum([len(group) for group in groups], dtype=np.int64)
    flat = np.array([example for group in groups for example in group], np.int64)
    return ExampleRows(examples, length, flat, ends)


def pack(sizes: np.ndarray, capacity: int) -> list[list[int]]:
    """Best-fit decreasing: the largest first, each into the fullest row that still has room for it.

    Args:
      sizes: int [examples], each at most `capacity`.
      capacity: places in a row, L.

    Returns:
      The examples of each row; every example once, in an order that depends on the sizes alone.
    """
    sizes = np.asarray(sizes)
    if sizes.size and sizes.max() > capacity:
        raise ValueError(
            f"packing: example {int(sizes.argmax())} of size {sizes.max()} exceeds {capacity}; truncate it"
        )
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}  # room left -> rows, the most recent last
    rooms: list[int] = []  # the keys of open_rows, sorted
    for example in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[example])
        found = bisect.bisect_left(rooms, size)
        if found == len(rooms):
            row, room = len(rows), capacity
            rows.append([])
        else:
            room = rooms[found]
            row = open_rows[room].pop()
            if not open_rows[room]:
                del open_rows[room], rooms[found]
        rows[row].append(example)
        left = room - size
        if left not in open_rows:
            bisect.insort(rooms, left)
            open_rows[left] = []
        open_rows[left].append(row)
    return rows


def _padded(row: Row, length: int) -> Row:
    """Arrays of at most L elements, filled up with zeros."""
    missing = length - len(row["tokens"])
    return {name: np.pad(values, (0, missing)) if missing else values for name, values in row.items()}
