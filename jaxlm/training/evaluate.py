"""Held-out rows under the trained model: loss of texts in nats and bits, or the objective's own measures."""

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.data.dataset import Dataset
from jaxlm.data.supply import LABELLED, PAIRS, PROMPTS
from jaxlm.objectives.cross_entropy import cross_entropy
from jaxlm.objectives.forward import policy
from jaxlm.training import answers, preferences
from jaxlm.training.setup import Setup, global_batch
from jaxlm.types import Apply, Array, Batch, Variables

Evaluator = Callable[[Variables, Variables], dict[str, float]]
"""`(params, frozen) -> values by name`, with `loss`, which decides what is best."""


class Sums(NamedTuple):
    """Of a batch: nats over its labels, number of labels, UTF-8 bytes of the labels; float32 scalars."""

    nats: Array
    tokens: Array
    bytes: Array


def make(setup: Setup) -> Evaluator:
    """What evaluates a run of this objective: `loss` and others on the held-out rows, and on each further set of them
    under `<its name>/`.
    """
    if setup.config.objective.kind in PROMPTS:
        return answers.make(setup)
    if setup.config.objective.kind in PAIRS + LABELLED:
        return preferences.make(setup, batches_of)
    bytes_V = jnp.asarray(setup.data.token_bytes, jnp.float32)
    score: Scorer = jax.jit(functools.partial(text_sums, setup.program.recipe.apply, bytes_V))

    def measure(params: Variables, frozen: Variables, data: Dataset) -> dict[str, float]:
        return text_metrics(score, policy(params, frozen), batches_of(setup, data))

    def evaluate(params: Variables, frozen: Variables) -> dict[str, float]:
        values = measure(params, frozen, setup.data.validation)
        for name, data in setup.data.others.items():
            values |= {f"{name}/{key}": value for key, value in measure(params, frozen, data).items()}
        return values

    return evaluate


def batches_of(setup: Setup, data: Dataset) -> Iterator[Batch]:
    """The rows that an evaluation looks at, on the mesh; the last batch is filled up with padding."""
    train = setup.config.train
    count = len(data) if train.eval_batches is None else min(len(data), train.eval_batches * train.batch_size)
    rows = np.pad(np.arange(count), (0, -count % train.batch_size), constant_values=-1).reshape(-1, train.batch_size)
    return (global_batch(data, part, setup.program.mesh) for part in rows)


Scorer = Callable[[Variables, Batch], Sums]


def text_sums(apply: Apply, bytes_V: Array, variables: Variables, batch: Batch) -> Sums:
    """Score one batch; without dropout, smoothing or penalties."""
    output = apply(variables, batch["tokens"], positions=batch["positions"], segments=batch["segments"])
    nats, _ = cross_entropy(output.hidden, output.head, batch["targets"], batch["mask"])
    sizes = jnp.take(bytes_V, batch["targets"], axis=0, mode="clip") * batch["mask"]
    return Sums(nats, jnp.sum(batch["mask"]), jnp.sum(sizes))


def text_metrics(score: Scorer, variables: Variables, batches: Iterable[Batch]) -> dict[str, float]:
    """`loss` (nats per token) and `bits_per_byte` over all batches.

    Sums of batches are added in Python floats, so the result does not depend on how rows are cut into batches beyond
    float32 rounding within one. Without labels both are NaN; without bytes (ids that stand for none) so are the bits.
    """
    nats = tokens = size = 0.0
    for batch in batches:
        sums = jax.device_get(score(variables, batch))
        nats, tokens, size = nats + float(sums.nats), tokens + float(sums.tokens), size + float(sums.bytes)
    return {
        "loss": nats / tokens if tokens else math.nan,
        "bits_per_byte": nats / math.log(2) / size if size else math.nan,
    }
