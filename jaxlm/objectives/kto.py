"""KTO: single completions, each desirable or not, against a reference point (2402.01306)."""

import jax
import jax.numpy as jnp

from jaxlm.objectives.config import KtoConfig
from jaxlm.objectives.forward import policy, reference
from jaxlm.objectives.sequences import (
    completions_of,
    frozen_log_probs,
    log_ratios,
    policy_log_probs,
    real_rows,
    row_weights,
    with_reference,
)
from jaxlm.types import Apply, Array, Batch, Objective, Variables


def kto(config: KtoConfig) -> Objective:
    """The mean over rows of the desirable `w_d * (1 - sigmoid(beta * (r - z)))`, the others `w_u * (1 - sigmoid(beta *
    (z - r)))`, with r the log-probability of the completion less that under the reference.

    z is the mean of such differences over completions at prompts that are not theirs, not below 0: an estimate of the
    KL divergence between policy and reference, without gradient, over the whole batch of the step.

    Batches have rows [B, L], `label` [B] (whether the completion is desirable) and, if the rows of a step shall be
    matched independently of their order, their numbers `row` [B]. Metrics: `kl` (that is z), and `rewards/chosen`,
    `rewards/rejected`, `logps/chosen`, `logps/rejected`, means over the desirable and over the other rows, and
    `rewards/margins`, their difference.
    """

    def prepare(apply: Apply, params: Variables, frozen: Variables, batch: Batch, key: Array | None) -> Batch:
        batch = with_reference(apply, params, frozen, batch, key)
        pairs = mismatched(batch)
        ratios = frozen_log_probs(apply, policy(params, frozen), pairs)
        ratios -= frozen_log_probs(apply, reference(params, frozen), pairs)
        real = real_rows(batch)
        mean = jnp.sum(jnp.where(real, ratios, 0.0)) / row_weights(batch)["rows"]
        return batch | {"kl": jnp.broadcast_to(jnp.maximum(mean, 0.0), real.shape)}

    def weights(batch: Batch) -> dict[str, Array]:
        counts = {name: jnp.sum(rows, dtype=jnp.float32) for name, rows in _sides(batch).items()}
        return row_weights(batch) | {name: jnp.maximum(count, 1.0) for name, count in counts.items()}

    def loss(
        apply: Apply, params: Variables, frozen: Variables, batch: Batch, weights: dict[str, Array], key: Array | None
    ) -> tuple[Array, dict[str, Array]]:
        log_probs, auxiliary, metrics = policy_log_probs(apply, params, frozen, batch, weights, key)
        completions = completions_of(log_probs, batch["mask"])
        ratios = log_ratios(completions, batch["reference_log_probs"])
        sides = _sides(batch)
        shift = config.beta * (ratios - batch["kl"])
        losses = jnp.where(
            sides["chosen"],
            config.desirable_weight * (1.0 - jax.nn.sigmoid(shift)),
            config.undesirable_weight * (1.0 - jax.nn.sigmoid(-shift)),
        )
        real = real_rows(batch)
        for name, side in sides.items():
            metrics[f"rewards/{name}"] = jnp.sum(jnp.where(side, config.beta * ratios, 0.0)) / weights[name]
            metrics[f"logps/{name}"] = jnp.sum(jnp.where(side, completions.log_probs, 0.0)) / weights[name]
        metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
        metrics["kl"] = jnp.sum(jnp.where(real, batch["kl"], 0.0)) / weights["rows"]
        total = jnp.sum(jnp.where(real, losses, 0.0)) / weights["rows"]
        return total + auxiliary, jax.lax.stop_gradient(metrics)

    return Objective(prepare, weights, loss)


def mismatched(batch: Batch) -> Batch:
    """Rows of each prompt with the completion of the row before it, the first with that of the last; [B, L].

    "Before" is by `row` where the batch has that column, so that the order of rows in the batch does not matter, nor
    the number of processes that share it. What does not fit into L is cut off.
    """
    parts = _Parts(batch)
    before = _row_before(batch)
    length = batch["tokens"].shape[-1]
    index = jnp.broadcast_to(jnp.arange(length + 1)[None, :], (before.shape[0], length + 1))
    prompt = parts.prompt[:, None]
    own = jnp.take_along_axis(parts.ids, jnp.minimum(index, length), axis=-1)
    offset = index - prompt + parts.prompt[before][:, None]
    other = jnp.take_along_axis(parts.ids[before], jnp.clip(offset, 0, length), axis=-1)
    ids = jnp.where(index < prompt, own, other)
    size = jnp.minimum(prompt + (parts.size - parts.prompt)[before][:, None], length + 1)
    inputs = index[:, :-1] < size - 1
    zero = jnp.zeros((), jnp.int32)
    return {
        "tokens": jnp.where(inputs, ids[:, :-1], zero),
        "targets": jnp.where(inputs, ids[:, 1:], zero),
        "mask": (inputs & (index[:, 1:] >= prompt)).astype(jnp.float32),
        "segments": inputs.astype(jnp.int32),
        "positions": jnp.where(inputs, index[:, :-1], zero),
    }


class _Parts:
    """Rows as whole sequences from their first token on: `ids` [B, L + 1], and how many of them there are (`size`) and
    belong to the prompt (`prompt`), [B]."""

    def __init__(self, batch: Batch) -> None:
        inside, labels = batch["segments"] != 0, batch["mask"] > 0
        length = inside.shape[-1]
        first = jnp.argmax(inside, axis=-1)
        count = jnp.sum(inside, axis=-1)
        # The token after the last input is known as its target alone.
        columns = jnp.broadcast_to(jnp.arange(length + 1)[None, :], (inside.shape[0], length + 1))
        where = first[:, None] + columns
        tokens = jnp.take_along_axis(batch["tokens"], jnp.clip(where, 0, length - 1), axis=-1)
        targets = jnp.take_along_axis(batch["targets"], jnp.clip(where - 1, 0, length - 1), axis=-1)
        self.ids = jnp.where(columns < count[:, None], tokens, targets)
        self.size = jnp.where(count > 0, count + 1, 0)
        self.prompt = jnp.where(jnp.any(labels, axis=-1), jnp.argmax(labels, axis=-1) - first + 1, self.size)


def _row_before(batch: Batch) -> Array:
    """int [B]: for each row of data the one before it, for the first the last."""
    real = real_rows(batch)
    numbers = batch.get("row", jnp.arange(real.shape[0]))
    order = jnp.argsort(jnp.where(real, numbers, jnp.iinfo(jnp.int32).max))
    last = order[jnp.maximum(jnp.sum(real) - 1, 0)]
    previous = jnp.concatenate([last[None], order[:-1]])
    return jnp.zeros_like(order).at[order].set(previous)


def _sides(batch: Batch) -> dict[str, Array]:
    """bool [B] each: desirable rows, and the others."""
    desirable, real = batch["label"].astype(bool), real_rows(batch)
    return {"chosen": desirable & real, "rejected": ~desirable & real}
