"""Next-token prediction: cross-entropy averaged over the label tokens of the whole step."""

import jax.numpy as jnp

from jaxlm.objectives.config import NextTokenConfig
from jaxlm.objectives.cross_entropy import cross_entropy
from jaxlm.types import Apply, Array, Batch, Objective, Variables


def next_token(config: NextTokenConfig) -> Objective:
    """`sum_t mask_t * -log p(target_t) / sum_t mask_t`, with optional z-loss and label smoothing.

    The batch has the columns of `jaxlm.types.Batch`. The one term of the weights is `tokens`, the number of labels.
    """

    def loss(
        apply: Apply, params: Variables, frozen: Variables, batch: Batch, weights: dict[str, Array], key: Array | None
    ) -> tuple[Array, dict[str, Array]]:
        output = apply(
            {**frozen, **params}, batch["tokens"], positions=batch["positions"], segments=batch["segments"], key=key
        )
        total, _ = cross_entropy(
            output.hidden,
            output.head,
            batch["targets"],
            batch["mask"],
            z_weight=config.z_loss,
            label_smoothing=config.label_smoothing,
        )
        return total / weights["tokens"], {}

    return Objective(unprepared, token_weights, loss)


def unprepared(apply: Apply, params: Variables, frozen: Variables, batch: Batch, key: Array | None) -> Batch:
    """The `prepare` of objectives that need nothing from the whole batch."""
    return batch


def token_weights(batch: Batch) -> dict[str, Array]:
    """Labels in the step. An all-masked batch weighs 1, so that its loss is 0 and not NaN."""
    return {"tokens": jnp.maximum(jnp.sum(batch["mask"], dtype=jnp.float32), 1.0)}
