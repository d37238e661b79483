"""Overrides that list several values, and the grid that they span."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from jaxlm.config.text import parse

_PAIRS = {"[": "]", "{": "}", "(": ")"}


class Axis(NamedTuple):
    """A field and the values that it takes in turn.

    Attributes:
      field: dotted name.
      values: YAML scalars, as read.
      overrides: the same as `field=VALUE`.
    """

    field: str
    values: tuple[Any, ...]
    overrides: tuple[str, ...]


class Point(NamedTuple):
    """One cell of a grid: the axes' values by field, and the overrides that set them."""

    values: dict[str, Any]
    overrides: tuple[str, ...]


def axes(overrides: Sequence[str]) -> tuple[list[str], list[Axis]]:
    """Overrides with one value, and an axis for each with a comma list.

        ["train.steps=60", "optimizer.learning_rate=1e-3,2e-3"]
        ->  ["train.steps=60"], [Axis("optimizer.learning_rate", (0.001, 0.002), ...)]

    Commas inside quotes, brackets and braces do not count.

    Raises:
      ValueError: naming a field with an empty value, a value twice, or two lists.
    """
    plain: list[str] = []
    found: list[Axis] = []
    for override in overrides:
        field, _, text = override.partition("=")
        field, parts = field.strip(), [part.strip() for part in split(text)]
        if len(parts) == 1:
            plain.append(override)
            continue
        if "" in parts:
            raise ValueError(f"{field}: {text} has an empty value between commas; remove the comma or write null")
        values = tuple(parse(part, field) for part in parts)
        twice = [part for part, value in zip(parts, values, strict=True) if values.count(value) > 1]
        if twice:
            raise ValueError(f"{field}: {twice[0]} stands twice in {text}; give each value once")
        if field in [axis.field for axis in found]:
            raise ValueError(f"{field}: two lists of values; put all of them into one")
        found.append(Axis(field, values, tuple(f"{field}={part}" for part in parts)))
    return plain, found


def points(grid: Iterable[Axis]) -> Iterator[Point]:
    """All cells of the grid, the last axis fastest."""
    grid = list(grid)
    for indices in itertools.product(*(range(len(axis.values)) for axis in grid)):
        chosen = list(zip(grid, indices, strict=True))
        yield Point({axis.field: axis.values[i] for axis, i in chosen}, tuple(axis.overrides[i] for axis, i in chosen))


def split(text: str) -> list[str]:
    """A comma list at the top level of YAML: `1, "a,b", [2, 3]` -> `1`, ` "a,b"`, ` [2, 3]`."""
    parts, closing, quote = [""], [], ""
    for sign in text:
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "\"'":
            quote = sign
        elif sign in _PAIRS:
            closing.append(_PAIRS[sign])
        elif closing and sign == closing[-1]:
            closing.pop()
        elif sign == "," and not closing:
            parts.append("")
            continue
        parts[-1] += sign
    return parts
