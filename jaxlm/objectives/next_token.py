"""Next-token prediction: cross-entropy averaged over the label tokens of the whole step."""

import functools

import jax.numpy as jnp

from jaxlm.objectives.config import NextTokenConfig, SftConfig
from jaxlm.objectives.cross_entropy import cross_entropy
from jaxlm.objectives.forward import forward, input_weights
from jaxlm.types import Apply, Array, Batch, Objective, Variables


def next_token(config: NextTokenConfig) -> Objective:
    """`sum_t mask_t * -log p(target_t) / sum_t mask_t`, with optional z-loss and label smoothing.

    The batch has the columns of `jaxlm.types.Batch`. The weights are `tokens`, the number of labels, and `inputs`.
    """

    def loss(
        apply: Apply, params: Variables, frozen: Variables, batch: Batch, weights: dict[str, Array], key: Array | None
    ) -> tuple[Array, dict[str, Array]]:
        output, auxiliary, metrics = forward(apply, params, frozen, batch, weights, key)
        total, _ = cross_entropy(
            output.hidden,
            output.head,
            batch["targets"],
            batch["mask"],
            z_weight=config.z_loss,
            label_smoothing=config.label_smoothing,
        )
        return total / weights["tokens"] + auxiliary, metrics

    return Objective(unprepared, token_weights, loss)


def supervised(config: SftConfig) -> Objective:
    """`next_token` on the labels of examples, which counts them: the metric `supervised_tokens`.

    With `neftune`, noise is added to the embeddings wherever there is a key, so never in evaluation.
    """
    inner = next_token(NextTokenConfig(label_smoothing=config.label_smoothing))

    def loss(
        apply: Apply, params: Variables, frozen: Variables, batch: Batch, weights: dict[str, Array], key: Array | None
    ) -> tuple[Array, dict[str, Array]]:
        apply = functools.partial(apply, noise=config.neftune) if config.neftune else apply
        value, metrics = inner.loss(apply, params, frozen, batch, weights, key)
        return value, metrics | {"supervised_tokens": jnp.sum(batch["mask"])}

    return inner._replace(loss=loss)


def unprepared(apply: Apply, params: Variables, frozen: Variables, batch: Batch, key: Array | None) -> Batch:
    """The `prepare` of objectives that need nothing from the whole batch."""
    return batch


def token_weights(batch: Batch) -> dict[str, Array]:
    """Labels and inputs of the step. An all-masked batch weighs 1, so that its loss is 0 and not NaN."""
    return {"tokens": jnp.maximum(jnp.sum(batch["mask"], dtype=jnp.float32), 1.0)} | input_weights(batch)
