"""What a sweep says about transfer: the best learning rate at each size, how far it moves, and what that costs."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

RATE = "optimizer.learning_rate"


class Result(NamedTuple):
    """A cell of a sweep and its loss."""

    parametrisation: str
    values: Mapping[str, Any]
    loss: float


class Curve(NamedTuple):
    """Loss by one field, the others fixed.

    Attributes:
      parametrisation: `mup` or `sp`.
      values: of the other swept fields.
      x: values of the field, ascending if they are numbers.
      losses: nats; infinity where a run diverged.
    """

    parametrisation: str
    values: dict[str, Any]
    x: tuple[Any, ...]
    losses: tuple[float, ...]


class Optimum(NamedTuple):
    """The best learning rate at a size.

    Attributes:
      size: value of the field that grows.
      rate: of the grid. octave: log2 of the learning rate at the lowest point of a parabola through the best rate and
        its neighbours on the grid, or of the best rate itself at an edge.
      loss: at `rate`.
      regret: nats that the smallest size's best rate costs here.
    """

    size: float
    rate: float
    octave: float
    loss: float
    regret: float


class Transfer(NamedTuple):
    """How the best learning rate moves as one field grows.

    Attributes:
      parametrisation, field: what is trained, and what grows.
      optima: by size, ascending.
      grid_steps: of the rate's grid that the best one moves, from the smallest size to the largest; negative is down.
      octaves: the same by parabolas.
      regret: at the largest size.
      wider_is_better: rates at which no size is worse than the one before it by more than `NOISE`.
      rates: how many there are.
    """

    parametrisation: str
    field: str
    optima: list[Optimum]
    grid_steps: int
    octaves: float
    regret: float
    wider_is_better: int
    rates: int


NOISE = 0.01


def swept_fields(results: Sequence[Result]) -> list[str]:
    """The fields of the grid."""
    return list(results[0].values)


def is_number(value: Any) -> bool:
    """Whether a value can stand on an axis."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def main_field(results: Sequence[Result]) -> str:
    """The field for the horizontal axis: the learning rate, else the first with numbers, else the first."""
    fields = swept_fields(results)
    numeric = [field for field in fields if all(is_number(result.values[field]) for result in results)]
    return RATE if RATE in fields else (numeric or fields)[0]


def curves(results: Sequence[Result], field: str) -> list[Curve]:
    """Loss by `field` for each parametrisation and combination of the other fields, muP first."""
    groups: dict[tuple, list[Result]] = {}
    for result in results:
        rest = tuple((name, value) for name, value in result.values.items() if name != field)
        groups.setdefault((result.parametrisation, rest), []).append(result)
    found = []
    for (parametrisation, rest), members in groups.items():
        if all(is_number(member.values[field]) for member in members):
            members = sorted(members, key=lambda member: member.values[field])
        x = tuple(member.values[field] for member in members)
        found.append(Curve(parametrisation, dict(rest), x, tuple(member.loss for member in members)))
    return sorted(found, key=lambda curve: curve.parametrisation)


def transfers(results: Sequence[Result]) -> list[Transfer]:
    """Transfer of the learning rate over the first other field with numbers; over further fields losses are averaged.

    Empty unless learning rates were swept together with such a field.
    """
    fields = swept_fields(results)
    growing = [f for f in fields if f not in (RATE, "run.seed") and all(is_number(r.values[f]) for r in results)]
    if RATE not in fields or not growing:
        return []
    names = list(dict.fromkeys(result.parametrisation for result in results))
    return [_transfer(name, growing[0], [r for r in results if r.parametrisation == name]) for name in names]


def _transfer(parametrisation: str, field: str, results: Sequence[Result]) -> Transfer:
    sizes = sorted({result.values[field] for result in results})
    rates = sorted({result.values[RATE] for result in results})
    cells: dict[tuple, list[float]] = {}
    for result in results:
        cells.setdefault((result.values[field], result.values[RATE]), []).append(result.loss)
    losses = np.array([[np.mean(cells[size, rate]) for rate in rates] for size in sizes])
    best = losses.argmin(axis=1)
    optima = [
        Optimum(size, rates[i], _octave(rates, row, int(i)), float(row[i]), _minus(row[best[0]], row[i]))
        for size, row, i in zip(sizes, losses, best, strict=True)
    ]
    better = [all(b <= a + NOISE for a, b in itertools.pairwise(column)) for column in losses.T]
    return Transfer(
        parametrisation,
        field,
        optima,
        grid_steps=int(best[-1] - best[0]),
        octaves=optima[-1].octave - optima[0].octave,
        regret=optima[-1].regret,
        wider_is_better=sum(better),
        rates=len(rates),
    )


def _minus(a: float, b: float) -> float:
    """a - b; nan where even the best run diverged."""
    return float(a - b) if math.isfinite(b) else math.nan


def _octave(rates: Sequence[float], losses: np.ndarray, best: int) -> float:
    x = np.log2(rates)
    if not 0 < best < len(rates) - 1 or not np.isfinite(losses[best - 1 : best + 2]).all():
        return float(x[best])
    a, b, _ = np.polyfit(x[best - 1 : best + 2], losses[best - 1 : best + 2], 2)
    return float(-b / (2 * a)) if a > 0 else float(x[best])
