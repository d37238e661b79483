"""Log-probabilities of whole completions, and the batches of pairs that preference objectives read.

A batch of pairs has the usual columns with one more axis, [B, 2, L]: chosen first, then rejected. The labels of a row
are the tokens of its completion; what the row is padded with, on either side, is in no segment and counts for nothing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.objectives.cross_entropy import token_log_probs
from jaxlm.objectives.forward import forward, input_weights, reference
from jaxlm.types import Apply, Array, Batch, Variables

ROW_COLUMNS = ("tokens", "targets", "mask", "segments", "positions")

ROUNDING = 1e-6
"""Of a sum of log-probabilities in float32, relative to it and to its number of terms."""


class Completions(NamedTuple):
    """Of each row: the sum of its labels' log-probabilities, and how many labels it has; float32 [...]."""

    log_probs: Array
    lengths: Array

    @property
    def means(self) -> Array:
        """Log-probability per label; 0 for a row without labels."""
        return self.log_probs / jnp.maximum(self.lengths, 1.0)


def flat_rows(batch: Batch) -> Batch:
    """The columns of rows with all axes in front of the last made one: [B, 2, L] -> [2B, L], pairs side by side."""
    return {name: batch[name].reshape(-1, batch[name].shape[-1]) for name in ROW_COLUMNS}


def completions_of(log_probs: Array, mask: Array) -> Completions:
    """Of each row: log-probabilities of its targets and its mask, both [..., L]."""
    labels = mask > 0
    sums = jnp.sum(jnp.where(labels, log_probs, 0.0), axis=-1)
    return Completions(sums, jnp.sum(labels, axis=-1, dtype=jnp.float32))


def policy_log_probs(
    apply: Apply, params: Variables, frozen: Variables, batch: Batch, weights: dict[str, Array], key: Array | None
) -> tuple[Array, Array, dict[str, Array]]:
    """The trained model on a batch, differentiable.

    Returns:
      Log-probabilities of the targets, float32, in the shape of the tokens; the auxiliary losses of the layers, to be
      added to the loss; and the metrics of their routing.
    """
    rows = flat_rows(batch)
    output, auxiliary, metrics = forward(apply, params, frozen, rows, weights, key)
    log_probs = token_log_probs(output.hidden, output.head, rows["targets"])
    return log_probs.reshape(batch["tokens"].shape), auxiliary, metrics


def frozen_log_probs(apply: Apply, variables: Variables, batch: Batch) -> Array:
    """Sums of log-probabilities, [B] or [B, 2], under one model, without dropout and without gradient."""
    rows = flat_rows(batch)
    output = apply(variables, rows["tokens"], positions=rows["positions"], segments=rows["segments"])
    log_probs = token_log_probs(output.hidden, output.head, rows["targets"])
    sums = completions_of(log_probs.reshape(batch["tokens"].shape), batch["mask"]).log_probs
    return jax.lax.stop_gradient(sums)


def with_reference(apply: Apply, params: Variables, frozen: Variables, batch: Batch, key: Array | None) -> Batch:
    """The `prepare` that adds `reference_log_probs`, [B] or [B, 2]; values that the batch came with are kept."""
    if "reference_log_probs" in batch:
        return batch
    return batch | {"reference_log_probs": frozen_log_probs(apply, reference(params, frozen), batch)}


def log_ratios(completions: Completions, reference_log_probs: Array) -> Array:
    """Log-probabilities less those of the reference, [...], 0 where they differ by rounding alone.

    A policy that equals its reference runs through another program, whose sums are rounded differently. Its ratios are
    0 all the same, so that the first step has a margin of 0; the gradient is that of the difference.
    """
    difference = completions.log_probs - reference_log_probs
    limit = ROUNDING * (jnp.abs(reference_log_probs) + completions.lengths)
    return difference - jax.lax.stop_gradient(jnp.where(jnp.abs(difference) <= limit, difference, 0.0))


def real_rows(batch: Batch) -> Array:
    """bool [B]: whether there is anything in a row of data; rows that fill up a batch have no tokens."""
    segments = batch["segments"]
    return jnp.any(segments != 0, axis=tuple(range(1, segments.ndim)))


def row_weights(batch: Batch) -> dict[str, Array]:
    """`rows`, the number of rows of data (pairs, or single completions) of the step, and `inputs`."""
    count = jnp.sum(real_rows(batch), dtype=jnp.float32)
    return {"rows": jnp.maximum(count, 1.0)} | input_weights(batch)


def without_prompt(batch: Batch) -> Batch:
    """The same rows with completions that see nothing of their prompts, and start at position 0.

    A completion becomes a segment of its own. Its first token is then no label: nothing is left to predict it from.
    """
    labels, inside = batch["mask"] > 0, batch["segments"] != 0
    # An input belongs to the completion if it comes after the one whose target is the first label.
    completion = inside & (jnp.cumsum(labels, axis=-1) - labels > 0)
    start = jnp.argmax(completion, axis=-1, keepdims=True)
    steps = jnp.broadcast_to(jnp.arange(labels.shape[-1]), labels.shape)
    return batch | {
        "segments": jnp.where(completion, 2, inside.astype(jnp.int32)),
        "positions": jnp.where(completion, steps - start, batch["positions"]).astype(jnp.int32),
        "mask": jnp.where(completion, batch["mask"], 0.0),
    }
