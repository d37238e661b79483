"""Proximal policy optimisation of a language model against a reward, with a KL penalty per token, as in TRL.

Once a step: `r_t = -kl_coef * (logp_t - ref_t)`, plus the score at the last token; advantages and returns by GAE over
the completion's tokens, advantages whitened over the step. Then, `epochs` times,

    mean over tokens of max(-A rho, -A clip(rho)) + value_coef / 2 * mean over tokens of max((V - R)^2, (clip(V) - R)^2)

The value of a token is read off the policy's own hidden state before that token by a linear head (the tree `value`), so
policy, value and, with adapters, reference share one base. TRL puts the score one slot behind the end of text.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.objectives import completions, policy_gradient
from jaxlm.objectives.config import PpoConfig
from jaxlm.objectives.forward import forward, policy, reference
from jaxlm.objectives.grpo import token_weights
from jaxlm.types import Apply, Array, Batch, Objective, Variables

COEFFICIENT = "kl_coef"
"""Among the frozen trees: the weight of the penalty in this step, where it is not the configuration's."""

REPORTED = (
    *("objective/kl", "objective/entropy", "objective/non_score_reward", "objective/scores", "objective/rlhf_reward"),
    *("completions/mean_length", "completions/clipped_ratio"),
)


def ppo(config: PpoConfig) -> Objective:
    """See the module. The batch is a rollout's (`completions`), one completion a prompt.

    A completion that no reward function could score is left out of the losses. Dropout is off in every pass.

    Metrics as TRL's, means over tokens without padding: `objective/*` of the rollout (sums over a completion, means
    over completions), `policy/approxkl_avg`, `policy/clipfrac_avg`, `loss/policy_avg`, `loss/value_avg`,
    `val/clipfrac_avg`, `val/ratio`, `policy/entropy_avg`.
    """
    names = (*(f"rewards/{name}/mean" for name in completions.reward_names(config.rewards)), *REPORTED)

    def prepare(apply: Apply, params: Variables, frozen: Variables, batch: Batch, key: Array | None) -> Batch:
        return _prepare(config, apply, params, frozen, batch)

    def loss(
        apply: Apply, params: Variables, frozen: Variables, batch: Batch, weights: dict[str, Array], key: Array | None
    ) -> tuple[Array, dict[str, Array]]:
        output, extra, routing = forward(apply, params, frozen, batch, weights, None)
        log_probs, entropy = completions.statistics(output, batch["targets"], config.temperature)
        total, metrics = _loss(config, log_probs, values_of(params["value"], output.hidden), batch, weights)
        metrics["policy/entropy_avg"] = jnp.sum(entropy * batch["mask"]) / weights["tokens"]
        return total + extra, metrics | routing | completions.reported(batch, names)

    return Objective(prepare, token_weights, loss, init)


def init(models: Mapping[str, Any], key: Array) -> Variables:
    """The value head: {"value": {"kernel": [D, 1], "bias": [1]}}, zero, so that the first values are 0."""
    width = models["policy"].d_model
    return {"value": {"kernel": jnp.zeros((width, 1), jnp.float32), "bias": jnp.zeros((1,), jnp.float32)}}


def values_of(head: Mapping[str, Array], hidden_BxLxD: Array) -> Array:
    """The value of each state: float32 [B, L]."""
    values = hidden_BxLxD.astype(jnp.float32) @ head["kernel"].astype(jnp.float32)
    return values[:, :, 0] + head["bias"][0]


def _prepare(config: PpoConfig, apply: Apply, params: Variables, frozen: Variables, batch: Batch) -> Batch:
    """Adds, [R, L] each: old log-probabilities and values, whitened advantages, returns; and numbers to report."""
    if "reference" not in frozen and "lora" not in params:
        raise ValueError("objective.reference: there is none; set it to copy, or train adapters")
    output = completions.run(apply, policy(params, frozen), batch)
    old = completions.statistics(output, batch["targets"], config.temperature)[0]
    values = values_of(params["value"], output.hidden)
    output = completions.run(apply, reference(params, frozen), batch)
    other = completions.statistics(output, batch["targets"], config.temperature)[0]
    each, scores = completions.rewards_of(config.rewards, apply, frozen, batch)
    drawn = batch["mask"]
    mask = jnp.where(jnp.isnan(scores)[:, None], 0.0, drawn)
    kl = jnp.where(drawn > 0, policy_gradient.divergence(old, other), 0.0)
    kl_coef = frozen.get(COEFFICIENT, config.kl_coef)
    rewards = policy_gradient.shaped_rewards(kl, jnp.nan_to_num(scores), mask, kl_coef)
    advantages, returns = policy_gradient.gae(rewards, values, mask, config.gamma, config.lam)
    columns = {
        "mask": mask,
        "old_log_probs": old,
        "old_values": values,
        "advantages": policy_gradient.whiten(advantages, mask),
        "returns": returns,
    }
    penalty, score = -kl_coef * jnp.mean(jnp.sum(kl, axis=1)), completions.moments(scores)[0]
    numbers = [*(completions.moments(column)[0] for column in each.T), jnp.mean(jnp.sum(kl, axis=1))]
    numbers += [jnp.mean(jnp.sum(-old * drawn, axis=1)), penalty, score, penalty + score]
    numbers += [jnp.mean(jnp.sum(drawn, axis=1)), 1.0 - jnp.mean(batch["ended"])]
    return completions.report(batch | columns, numbers)


def _loss(
    config: PpoConfig, log_probs: Array, values: Array, batch: Batch, weights: dict[str, Array]
) -> tuple[Array, dict[str, Array]]:
    """What these rows add to the loss, and to the metrics of ratio and value; log_probs and values [B, L]."""
    share, advantages = batch["mask"] / weights["tokens"], batch["advantages"]
    # A single pass has its old log-probabilities at hand, to the last bit.
    old = batch["old_log_probs"] if config.epochs > 1 else jax.lax.stop_gradient(log_probs)
    gap = jnp.where(batch["mask"] > 0, log_probs - old, 0.0)
    ratio = jnp.exp(gap)
    policy_part = jnp.sum(share * policy_gradient.policy_loss(ratio, advantages, config.epsilon))
    squares = policy_gradient.value_loss(values, batch["old_values"], batch["returns"], config.epsilon)
    value_part = 0.5 * jnp.sum(share * squares)
    clipped = policy_gradient.is_clipped(ratio, advantages, config.epsilon)
    metrics = {
        "policy/approxkl_avg": jnp.sum(share * policy_gradient.divergence(gap, jnp.zeros_like(gap), "k2")),
        "policy/clipfrac_avg": jnp.sum(share * clipped),
        "loss/policy_avg": policy_part,
        "loss/value_avg": value_part,
        "val/clipfrac_avg": jnp.sum(share * (squares > jnp.square(values - batch["returns"]))),
        "val/ratio": jnp.sum(share * ratio),
    }
    return policy_part + config.value_coef * value_part, metrics
