"""Reward models: one number for a sequence, so that of two completions the preferred one has the larger."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.objectives.config import RewardConfig
from jaxlm.objectives.forward import forward, policy
from jaxlm.objectives.next_token import unprepared
from jaxlm.objectives.sequences import flat_rows, real_rows, row_weights
from jaxlm.types import Apply, Array, Batch, Objective, Output, Tree, Variables

SCORE_STD = 0.02
"""Of fresh heads, as transformers draws them."""


def reward(config: RewardConfig) -> Objective:
    """`-log sigmoid(r_chosen - r_rejected - margin)`, averaged over pairs (Bradley-Terry).

    `center` adds that weight times the mean of `(r_chosen + r_rejected)^2` (2312.09244), since the first term does not
    say where 0 is. Batches are pairs [B, 2, L] whose inputs include the last token, perhaps with a `margin` [B].
    Metrics: `accuracy` (strict), `margin` (the mean difference), `min_reward`, `mean_reward`, `max_reward`.
    """

    def loss(
        apply: Apply, params: Variables, frozen: Variables, batch: Batch, weights: dict[str, Array], key: Array | None
    ) -> tuple[Array, dict[str, Array]]:
        rows = flat_rows(batch)
        output, auxiliary, metrics = forward(apply, params, frozen, rows, weights, key)
        kernel = score_head(policy(params, frozen))["kernel"]
        rewards = scores(output, kernel, rows["segments"]).reshape(-1, 2)
        difference = rewards[:, 0] - rewards[:, 1]
        losses = -jax.nn.log_sigmoid(difference - batch["margin"] if "margin" in batch else difference)
        if config.center is not None:
            losses += config.center * jnp.square(rewards[:, 0] + rewards[:, 1])
        real = real_rows(batch)

        def mean(values: Array) -> Array:
            return jnp.sum(jnp.where(real, values, 0.0)) / weights["rows"]

        pairs = jnp.broadcast_to(real[:, None], rewards.shape)
        metrics |= {
            "accuracy": mean((difference > 0).astype(jnp.float32)),
            "margin": mean(difference),
            "min_reward": jnp.min(jnp.where(pairs, rewards, jnp.inf)),
            "mean_reward": mean(jnp.mean(rewards, axis=1)),
            "max_reward": jnp.max(jnp.where(pairs, rewards, -jnp.inf)),
        }
        return mean(losses) + auxiliary, jax.lax.stop_gradient(metrics)

    def init(models: Mapping[str, Any], key: Array) -> Variables:
        return {"params": {"score": fresh_score(models["policy"].D, key)}}

    return Objective(unprepared, row_weights, loss, init)


def scores(output: Output, kernel_Dx1: Array, segments_BxL: Array) -> Array:
    """The score head on the last token of each row, float32 [B]; 0 for a row without tokens.

    The last token is found by segments, so neither the side and amount of padding nor its id make a difference.
    """
    length = segments_BxL.shape[-1]
    inside = segments_BxL != 0
    last = length - 1 - jnp.argmax(inside[:, ::-1], axis=-1)
    hidden_BxD = jnp.take_along_axis(output.hidden, last[:, None, None], axis=1)[:, 0]
    values = jnp.dot(hidden_BxD, kernel_Dx1.astype(hidden_BxD.dtype), preferred_element_type=jnp.float32)[:, 0]
    return jnp.where(jnp.any(inside, axis=-1), values, 0.0)


def score_head(variables: Variables) -> Tree:
    """The trees of the head, {"kernel": [D, 1]}: those trained beside adapters where there are any.

    Raises:
      ValueError: the model has no such head.
    """
    for collection in ("lora", "params"):
        if "score" in variables.get(collection, {}):
            return variables[collection]["score"]
    raise ValueError("params: no score/kernel; load a sequence-classification directory, or train a reward model")


def fresh_score(width: int, key: Array) -> Tree:
    """A fresh head for hidden states of `width`: {"kernel": [D, 1]}, float32."""
    return {"kernel": SCORE_STD * jax.random.normal(key, (width, 1))}
