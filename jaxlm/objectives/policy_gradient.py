"""The arithmetic of policy gradients: advantages, clipped losses, divergence estimates. Pure functions of arrays.

Letters: B rows (completions), L positions. A mask is 1 (or True) at the tokens of completions and 0 elsewhere; what
stands where it is 0, NaN included, changes no result.
"""

import jax
import jax.numpy as jnp

from jaxlm.types import Array

EPSILON = 1e-8
"""Added to the variance in `whiten`, as in TRL."""

DEVIATION = 1e-4
"""Added to the deviation of a group, as in TRL."""

SCALES = ("group", "none")
DIVERGENCES = ("k1", "k2", "k3")


def gae(rewards: Array, values: Array, mask: Array, gamma: float = 1.0, lam: float = 0.95) -> tuple[Array, Array]:
    """Generalised advantage estimation (Schulman et al., 1506.02438).

    `delta_t = r_t + gamma * V_{t+1} - V_t` and `A_t = delta_t + gamma * lam * A_{t+1}`, where t + 1 is the next
    position inside the mask (turns of other speakers are stepped over) and both are 0 after the last.

    Args:
      rewards, values: [B, L]; the value of a position is the estimate before its token is chosen.
      mask: [B, L].
      gamma: discount.
      lam: 0 trusts the values, 1 the rewards.

    Returns:
      Advantages and returns (advantages + values), float32 [B, L], 0 outside the mask.
    """
    inside = jnp.asarray(mask) > 0
    rewards, values = (jnp.where(inside, jnp.asarray(x, jnp.float32), 0.0) for x in (rewards, values))

    def back(after: tuple[Array, Array], here: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], Array]:
        (advantage, value), (r, v, m) = after, here
        now = r + gamma * value - v + gamma * lam * advantage
        return (jnp.where(m, now, advantage), jnp.where(m, v, value)), jnp.where(m, now, 0.0)

    nothing = jnp.zeros(rewards.shape[0], jnp.float32)
    _, advantages = jax.lax.scan(back, (nothing, nothing), (rewards.T, values.T, inside.T), reverse=True)
    return advantages.T, jnp.where(inside, advantages.T + values, 0.0)


def whiten(x: Array, mask: Array) -> Array:
    """Shifted and scaled to mean 0 and unbiased variance 1 over the mask: float32, 0 outside. Shapes are equal."""
    inside = jnp.asarray(mask) > 0
    x = jnp.where(inside, jnp.asarray(x, jnp.float32), 0.0)
    count = jnp.sum(inside, dtype=jnp.float32)
    centred = jnp.where(inside, x - jnp.sum(x) / jnp.maximum(count, 1.0), 0.0)
    variance = jnp.sum(jnp.square(centred)) / jnp.maximum(count - 1.0, 1.0)
    return centred * jax.lax.rsqrt(variance + EPSILON)


def group_advantages(rewards: Array, group_size: int, scale: str = "group") -> Array:
    """Rewards relative to the mean of the completions of the same prompt (GRPO, 2402.03300).

    Args:
      rewards: [groups * group_size], members of a group side by side; NaN is not scorable: left out of its group.
      group_size: completions per prompt.
      scale: `group` divides by the unbiased deviation of the group (+ 1e-4); `none` does not (Dr. GRPO, 2503.20783).

    Returns:
      float32 [groups * group_size]; 0 for what is not scorable, and in groups that are all alike.

    Raises:
      ValueError: the rewards are no whole groups, or an unknown scale.
    """
    if scale not in SCALES:
        raise ValueError(f"scale: unknown value {scale!r}; the known ones are {', '.join(SCALES)}")
    groups, known = _groups(rewards, group_size)
    centred = _centred(groups, known)
    if scale == "group":
        count = jnp.sum(known, axis=1, keepdims=True)
        variance = jnp.sum(jnp.square(centred), axis=1, keepdims=True) / jnp.maximum(count - 1, 1)
        centred = centred / (jnp.sqrt(variance) + DEVIATION)
    return centred.reshape(-1)


def leave_one_out(rewards: Array, group_size: int) -> Array:
    """Rewards minus the mean of the *other* completions of the same prompt (RLOO, 2402.14740).

    Arguments, result and errors as in `group_advantages`; a group with one scorable completion gets 0.
    """
    groups, known = _groups(rewards, group_size)
    count = jnp.sum(known, axis=1, keepdims=True)
    # r - (sum - r) / (n - 1) is the distance from the mean of all, n / (n - 1) times.
    return (_centred(groups, known) * (count / jnp.maximum(count - 1, 1))).reshape(-1)


def group_deviations(rewards: Array, group_size: int) -> Array:
    """Unbiased deviation of each group: float32 [groups]; NaN where fewer than two are scorable."""
    groups, known = _groups(rewards, group_size)
    count = jnp.sum(known, axis=1)
    variance = jnp.sum(jnp.square(_centred(groups, known)), axis=1) / jnp.maximum(count - 1, 1)
    return jnp.where(count > 1, jnp.sqrt(variance), jnp.nan)


def shaped_rewards(divergence: Array, scores: Array, mask: Array, kl_coef: float | Array) -> Array:
    """The reward of each token: `-kl_coef * divergence`, plus the completion's score at its last token.

    Args:
      divergence: [B, L], an estimate per token, usually `k1`.
      scores: [B].
      mask: [B, L].
      kl_coef: weight of the penalty.

    Returns:
      float32 [B, L], 0 outside the mask; a row without tokens gets no score.
    """
    inside = jnp.asarray(mask) > 0
    after = jnp.cumsum(inside[:, ::-1], axis=1)[:, ::-1]
    last = inside & (after == 1)
    penalty = jnp.where(inside, -kl_coef * divergence, 0.0)
    return penalty + jnp.where(last, jnp.asarray(scores, jnp.float32)[:, None], 0.0)


def divergence(log_probs: Array, reference: Array, kind: str = "k1") -> Array:
    """Estimates of KL(policy || reference) from tokens that the policy drew (Schulman, 2020), of the same shape.

    With `d = log_probs - reference`: `k1` is d, unbiased; `k2` is d^2 / 2; `k3` is exp(-d) + d - 1, unbiased and never
    negative.

    Raises:
      ValueError: an unknown kind.
    """
    gap = log_probs - reference
    if kind == "k1":
        return gap
    if kind == "k2":
        return 0.5 * jnp.square(gap)
    if kind == "k3":
        return jnp.expm1(-gap) + gap
    raise ValueError(f"kind: unknown value {kind!r}; the known ones are {', '.join(DIVERGENCES)}")


def policy_loss(ratio: Array, advantages: Array, epsilon: float) -> Array:
    """Clipped surrogate `max(-A * ratio, -A * clip(ratio, 1 - e, 1 + e))` of PPO (1707.06347); shapes are equal."""
    clipped = jnp.clip(ratio, 1.0 - epsilon, 1.0 + epsilon)
    return jnp.maximum(-advantages * ratio, -advantages * clipped)


def is_clipped(ratio: Array, advantages: Array, epsilon: float) -> Array:
    """Where the clip takes the gradient away: a ratio too low for a bad token, or too high for a good one; bool."""
    low = (ratio < 1.0 - epsilon) & (advantages < 0.0)
    return low | ((ratio > 1.0 + epsilon) & (advantages > 0.0))


def value_loss(values: Array, old_values: Array, returns: Array, epsilon: float) -> Array:
    """Clipped squared error, without the factor 1/2; all of one shape.

    `max((V - R)^2, (clip(V, V_old - e, V_old + e) - R)^2)`.
    """
    near = jnp.clip(values, old_values - epsilon, old_values + epsilon)
    return jnp.maximum(jnp.square(values - returns), jnp.square(near - returns))


def adapted_kl(coefficient: Array, observed: Array, target: float, rows: float, horizon: float = 1e4) -> Array:
    """The KL coefficient for the next step, proportional control towards a target (Ziegler et al., 1909.08593).

    Args:
      coefficient: the present one.
      observed: KL from the reference per completion, in nats.
      target: what it should be.
      rows: completions of the step.
      horizon: completions over which the coefficient may change by a fifth of itself.
    """
    error = jnp.clip(observed / target - 1.0, -0.2, 0.2)
    return coefficient * (1.0 + error * rows / horizon)


def _groups(rewards: Array, group_size: int) -> tuple[Array, Array]:
    """Rewards [groups, group_size] with 0 for what is not scorable, and which are scorable."""
    rewards = jnp.asarray(rewards, jnp.float32)
    if group_size < 1 or rewards.ndim != 1 or rewards.shape[0] % group_size:
        raise ValueError(
            f"rewards: shape {rewards.shape} is no list of whole groups of {group_size}; give one reward a completion, "
            "those of a prompt side by side"
        )
    groups = rewards.reshape(-1, group_size)
    known = ~jnp.isnan(groups)
    return jnp.where(known, groups, 0.0), known


def _centred(groups: Array, known: Array) -> Array:
    """Distance from the mean of the scorable, exactly 0 where all of them are alike."""
    count = jnp.maximum(jnp.sum(known, axis=1, keepdims=True), 1)
    centred = jnp.where(known, groups - jnp.sum(groups, axis=1, keepdims=True) / count, 0.0)
    high = jnp.max(jnp.where(known, groups, -jnp.inf), axis=1, keepdims=True)
    low = jnp.min(jnp.where(known, groups, jnp.inf), axis=1, keepdims=True)
    return jnp.where(high > low, centred, 0.0)
