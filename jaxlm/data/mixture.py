"""General text among the rows of a task, so that what the model knew is not forgotten, and held-out text to see it."""

import dataclasses
from fractions import Fraction

import numpy as np

from jaxlm.data.dataset import Dataset, Rows
from jaxlm.data.packing import Row

LOOKED_AT = 64
"""Rows whose labels are counted for the share of the labels."""


@dataclasses.dataclass(frozen=True)
class Mixture:
    """The rows of a task, and behind them rows of general text.

    Attributes:
      task, general: rows of the same length and columns.
      ratio: share of general rows among those that are drawn, in [0, 1).
    """

    task: Rows
    general: Rows
    ratio: float

    def __len__(self) -> int:
        return len(self.task) + len(self.general)

    def __getitem__(self, index: int) -> Row:
        count = len(self.task)
        return self.task[index] if index < count else self.general[index - count]

    @property
    def input_tokens(self) -> int:
        """Input tokens over all rows, padding left out."""
        return self.task.input_tokens + self.general.input_tokens

    def draw(self, index: int) -> tuple[int, int]:
        """Which draw of which part the draw `index` of the mixture is: (part, index), part 0 being the task.

        General rows are spread evenly: among the first n draws there are floor(n * ratio) of them, however large n is.
        """
        share = Fraction(self.ratio).limit_denominator(1 << 20)
        before, through = int(index * share), int((index + 1) * share)
        return (1, before) if through > before else (0, index - before)


def mixed(task: Dataset, general: Dataset, ratio: float) -> Dataset:
    """The rows of a task with general rows among them; without any where `ratio` is 0."""
    if not ratio:
        return task
    identity = task.identity | {"data.mixture": {"ratio": ratio, **general.identity}}
    return Dataset(Mixture(task.rows, general.rows, ratio), identity, task.name)


def label_share(mixture: Mixture) -> float:
    """About what share of the labels general rows have; their rows are fuller than those of short examples."""
    task, general = (_labels(part) for part in (mixture.task, mixture.general))
    weighted = general * mixture.ratio
    return weighted / (task * (1 - mixture.ratio) + weighted)


def _labels(rows: Rows) -> float:
    """Mean number of labels in a row, of rows evenly spread."""
    count = min(len(rows), LOOKED_AT)
    return float(np.mean([rows[int(i)]["mask"].sum() for i in np.arange(count) * len(rows) // count]))
