"""Loss of a text model on held-out rows, in nats per token and bits per byte."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.objectives.cross_entropy import cross_entropy
from jaxlm.types import Apply, Array, Batch, Variables


class Sums(NamedTuple):
    """Of a batch: nats over its labels, number of labels, UTF-8 bytes of the labels; float32 scalars."""

    nats: Array
    tokens: Array
    bytes: Array


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
