"""Evaluation of preference objectives on held-out rows: their own metrics, exactly as if the rows were one batch."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax

from jaxlm.data.dataset import Dataset
from jaxlm.objectives.forward import policy, reference
from jaxlm.objectives.preference import unconditional_accuracy
from jaxlm.training.setup import Setup
from jaxlm.training.step import Recipe, combine
from jaxlm.types import Array, Batch, Variables

if TYPE_CHECKING:
    from jaxlm.training.evaluate import Evaluator

BY_LIKELIHOOD = ("dpo", "simpo", "orpo")
"""Kinds of pairs whose rewards are log-probabilities, so that there is a preference without the prompt."""


def make(setup: Setup, batches_of: Callable[[Setup, Dataset], Iterator[Batch]]) -> "Evaluator":
    """What evaluates a run on pairs or labelled completions: on the held-out rows, and on each further set of them
    under `<its name>/`.

    Besides the objective's loss and metrics, without dropout, there is for pairs how often a model gives the chosen
    completion more probability than the rejected without seeing the prompt: `accuracy_unconditional` of the reference,
    which is what one starts from, and `accuracy_without_prompt` of the trained model. What the accuracy has above the
    first was learnt; what it has above the second comes from the prompt. Where the reference is not there (all of the
    model is trained, and its log-probabilities were made before), the trained model stands in for it.

    Args:
      setup: the run.
      batches_of: the rows that an evaluation looks at, in batches on the mesh.
    """
    recipe = setup.program.recipe
    weigh = jax.jit(recipe.objective.weights)
    score = jax.jit(functools.partial(shares, recipe, setup.config.objective.kind))

    def measure(params: Variables, frozen: Variables, data: Dataset) -> dict[str, float]:
        weights: dict[str, Any] = {}
        for batch in batches_of(setup, data):
            weights = {name: weights.get(name, 0.0) + value for name, value in weigh(batch).items()}
        values: dict[str, float] = {}
        for batch in batches_of(setup, data):
            for name, value in jax.device_get(score(params, frozen, weights, batch)).items():
                values[name] = float(combine(name, values[name], value) if name in values else value)
        return values or {"loss": math.nan}

    def evaluate(params: Variables, frozen: Variables) -> dict[str, float]:
        values = measure(params, frozen, setup.data.validation)
        for name, data in setup.data.others.items():
            values |= {f"{name}/{key}": value for key, value in measure(params, frozen, data).items()}
        return values

    return evaluate


def shares(
    recipe: Recipe, kind: str, params: Variables, frozen: Variables, weights: dict[str, Array], batch: Batch
) -> dict[str, Array]:
    """What a batch contributes to loss and metrics, if `weights` are those of all rows that are evaluated."""
    objective, apply = recipe.objective, recipe.apply
    prepared = objective.prepare(apply, params, frozen, batch, None)
    loss, metrics = objective.loss(apply, params, frozen, prepared, weights, None)
    models = {"without_prompt": policy} if kind in BY_LIKELIHOOD else {}
    models |= {"unconditional": reference} if kind == "dpo" else {}
    for name, model in models.items():
        metrics[f"accuracy_{name}"] = unconditional_accuracy(apply, model(params, frozen), batch, weights)
    return {"loss": loss, **{name: value for name, value in metrics.items() if not name.startswith("moe/")}}
