"""Group-relative policy optimisation: completions of one prompt are compared with each other, by named variants.

With `A` the advantage of a completion, `rho = exp(logp - old)`, and `l = max(-A rho, -A clip(rho)) + beta * KL`:

    grpo      mean over completions of the mean of l over their tokens (2402.03300)
    bnpo      sum of l / tokens of the batch
    dapo      sum of l / tokens of the step (2503.14476); the batch here is the step, so it is the same as bnpo
    dr_grpo   sum of l / (completions * max_new_tokens), A without division by the deviation (2503.20783)
    rloo      mean over completions of the clipped loss of the ratio of the whole completion, A = reward minus the mean
              of the others, KL (k1, summed over tokens) taken off the reward (2402.14740)

KL is k3, times rho (the correction of 2512.02556, which TRL has on) unless `kl_correction` is false.
"""

import jax
import jax.numpy as jnp

from jaxlm.objectives import completions, policy_gradient
from jaxlm.objectives.config import GrpoConfig
from jaxlm.objectives.forward import forward, input_weights, policy, reference
from jaxlm.types import Apply, Array, Batch, Objective, Variables

REPORTED = ("reward", "reward_std", "frac_reward_zero_std", "completions/mean_length", "completions/clipped_ratio")


def grpo(config: GrpoConfig) -> Objective:
    """See the module. The batch is a rollout's (`completions`), completions of a prompt side by side.

    Metrics as TRL's: `reward`, `reward_std`, `frac_reward_zero_std`, `rewards/<function>/mean`, lengths, `entropy`,
    `clip_ratio/region_mean`, and `kl` from the reference, or without `beta` from the policy that made the rollout.
    Dropout is off in every pass, so that the ratio of the first is 1.
    """
    names = (*(f"rewards/{name}/mean" for name in completions.reward_names(config.rewards)), *REPORTED)

    def prepare(apply: Apply, params: Variables, frozen: Variables, batch: Batch, key: Array | None) -> Batch:
        return _prepare(config, apply, params, frozen, batch)

    def loss(
        apply: Apply, params: Variables, frozen: Variables, batch: Batch, weights: dict[str, Array], key: Array | None
    ) -> tuple[Array, dict[str, Array]]:
        output, extra, routing = forward(apply, params, frozen, batch, weights, None)
        log_probs, entropy = completions.statistics(output, batch["targets"], config.temperature)
        total, metrics = _loss(config, log_probs, batch, weights)
        metrics["entropy"] = jnp.sum(entropy * batch["mask"]) / weights["tokens"]
        return total + extra, metrics | routing | completions.reported(batch, names)

    return Objective(prepare, token_weights, loss)


def token_weights(batch: Batch) -> dict[str, Array]:
    """`tokens` and `rows` of the completions of the step, and what auxiliary losses are weighed by."""
    tokens = jnp.maximum(jnp.sum(batch["mask"], dtype=jnp.float32), 1.0)
    return {"tokens": tokens, "rows": jnp.float32(batch["mask"].shape[0])} | input_weights(batch)


def _prepare(config: GrpoConfig, apply: Apply, params: Variables, frozen: Variables, batch: Batch) -> Batch:
    """Adds advantages [R], numbers to report, and [R, L] the log-probabilities that the loss compares with."""
    batch, mask = dict(batch), batch["mask"]
    if config.epochs > 1 or (config.beta and config.variant == "rloo"):
        output = completions.run(apply, policy(params, frozen), batch)
        batch["old_log_probs"] = completions.statistics(output, batch["targets"], config.temperature)[0]
    if config.beta:
        if "reference" not in frozen and "lora" not in params:
            raise ValueError("objective.beta: there is no reference; set objective.reference to copy, or beta to 0")
        output = completions.run(apply, reference(params, frozen), batch)
        batch["reference_log_probs"] = completions.statistics(output, batch["targets"], config.temperature)[0]
    each, rewards = completions.rewards_of(config.rewards, apply, frozen, batch)
    mean, deviation = completions.moments(rewards)
    alike = jnp.mean((policy_gradient.group_deviations(rewards, config.group_size) == 0).astype(jnp.float32))
    if config.variant == "rloo":
        if config.beta:
            gap = policy_gradient.divergence(batch["old_log_probs"], batch["reference_log_probs"])
            rewards = rewards - config.beta * jnp.sum(gap * mask, axis=1)
        batch["advantages"] = policy_gradient.leave_one_out(rewards, config.group_size)
    else:
        scale = "none" if config.variant == "dr_grpo" else "group"
        batch["advantages"] = policy_gradient.group_advantages(rewards, config.group_size, scale)
    values = [*(completions.moments(column)[0] for column in each.T), mean, deviation, alike]
    values += [jnp.mean(jnp.sum(mask, axis=1)), 1.0 - jnp.mean(batch["ended"])]
    return completions.report(batch, values)


def _loss(
    config: GrpoConfig, log_probs: Array, batch: Batch, weights: dict[str, Array]
) -> tuple[Array, dict[str, Array]]:
    """What these rows add to the loss, and to the metrics of ratio and divergence; log_probs [B, L]."""
    mask, whole = batch["mask"], config.variant == "rloo"
    old = batch.get("old_log_probs", jax.lax.stop_gradient(log_probs))
    gap = jnp.where(mask > 0, log_probs - old, 0.0)
    kl = policy_gradient.divergence(log_probs, batch.get("reference_log_probs", old), "k1" if whole else "k3")
    kl = jnp.where(mask > 0, kl, 0.0)
    if whole:
        ratio, advantages = jnp.exp(jnp.sum(gap, axis=1)), batch["advantages"]
        share = mean = jnp.full(ratio.shape, 1.0) / weights["rows"]
    else:
        ratio, advantages = jnp.exp(gap), jnp.broadcast_to(batch["advantages"][:, None], mask.shape)
        share, mean = _shares(config, mask, weights), mask / weights["tokens"]
        kl = kl * ratio if config.kl_correction else kl
    each = policy_gradient.policy_loss(ratio, advantages, config.epsilon)
    if config.beta and not whole:
        each += config.beta * kl
    clipped = policy_gradient.is_clipped(ratio, advantages, config.epsilon)
    metrics = {"kl": jnp.sum(kl) / weights["tokens"], "clip_ratio/region_mean": jnp.sum(clipped * mean)}
    return jnp.sum(each * share), metrics


def _shares(config: GrpoConfig, mask: Array, weights: dict[str, Array]) -> Array:
    """The weight of each token's loss, [B, L], 0 outside the mask."""
    if config.variant == "grpo":
        return mask / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1.0) / weights["rows"]
    if config.variant == "dr_grpo":
        return mask / (weights["rows"] * config.max_new_tokens)
    return mask / weights["tokens"]
