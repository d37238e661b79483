"""Objectives on pairs of completions, one preferred: DPO and its relatives, SimPO, ORPO.

Batches are pairs, see `jaxlm.objectives.sequences`. Means are over the pairs of the whole step. With c and r the
log-probabilities of chosen and rejected under the policy, summed over their labels (the end of the sequence counts),
c0 and r0 those under the reference, and n_c, n_r the numbers of labels:

    d = (c - c0) - (r - r0)                     m = (c - c0) / n_c - (r - r0) / n_r

Metrics, by TRL's names and definitions: `rewards/chosen`, `rewards/rejected`, `rewards/margins`, `rewards/accuracies`
(strict, so that equal rewards count as wrong), `logps/chosen`, `logps/rejected`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxlm.objectives.config import DpoConfig, OrpoConfig, SimpoConfig
from jaxlm.objectives.next_token import unprepared
from jaxlm.objectives.sequences import (
    completions_of,
    frozen_log_probs,
    log_ratios,
    policy_log_probs,
    real_rows,
    row_weights,
    with_reference,
    without_prompt,
)
from jaxlm.types import Apply, Array, Batch, Objective, Variables

log_sigmoid = jax.nn.log_sigmoid


def _sigmoid(config: DpoConfig, d: Array, m: Array) -> Array:
    """2305.18290."""
    return -log_sigmoid(config.beta * d)


def _hinge(config: DpoConfig, d: Array, m: Array) -> Array:
    """SLiC, 2305.10425."""
    return jax.nn.relu(1.0 - config.beta * d)


def _ipo(config: DpoConfig, d: Array, m: Array) -> Array:
    """2310.12036, with means over labels, as its authors had it; the paper's formula has d."""
    return jnp.square(m - 1.0 / (2.0 * config.beta))


def _sigmoid_norm(config: DpoConfig, d: Array, m: Array) -> Array:
    """`sigmoid` of means over labels, as in 2411.15124."""
    return -log_sigmoid(config.beta * m)


def _cdpo(config: DpoConfig, d: Array, m: Array) -> Array:
    """Conservative DPO: cross-entropy to a share `label_smoothing` of flipped preferences."""
    share = config.label_smoothing
    return -(1.0 - share) * log_sigmoid(config.beta * d) - share * log_sigmoid(-config.beta * d)


def _robust(config: DpoConfig, d: Array, m: Array) -> Array:
    """2403.00409: its mean is that of `sigmoid` on clean preferences, if a share `label_smoothing` is flipped."""
    share = config.label_smoothing
    flipped = share * log_sigmoid(-config.beta * d)
    return (flipped - (1.0 - share) * log_sigmoid(config.beta * d)) / (1.0 - 2.0 * share)


LOSSES: dict[str, Callable[[DpoConfig, Array, Array], Array]] = {
    "sigmoid": _sigmoid,
    "hinge": _hinge,
    "ipo": _ipo,
    "robust": _robust,
    "sigmoid_norm": _sigmoid_norm,
    "cdpo": _cdpo,
}
"""What is averaged over pairs, by name: (config, d [B], m [B]) -> [B]."""


def dpo(config: DpoConfig) -> Objective:
    """Direct preference optimisation: the mean over pairs of `LOSSES[config.loss]`.

    The reference runs once a step, without dropout and without gradient: the frozen copy where there is one, else the
    base without its adapters; or its log-probabilities are in the batch already, as `reference_log_probs` [B, 2].
    """

    def loss(
        apply: Apply, params: Variables, frozen: Variables, batch: Batch, weights: dict[str, Array], key: Array | None
    ) -> tuple[Array, dict[str, Array]]:
        log_probs, auxiliary, metrics = policy_log_probs(apply, params, frozen, batch, weights, key)
        completions = completions_of(log_probs, batch["mask"])
        ratios = log_ratios(completions, batch["reference_log_probs"])
        means = ratios / jnp.maximum(completions.lengths, 1.0)
        losses = LOSSES[config.loss](config, ratios[:, 0] - ratios[:, 1], means[:, 0] - means[:, 1])
        mean = _over_pairs(batch, weights)
        metrics |= pair_metrics(mean, config.beta * ratios, completions.log_probs)
        return mean(losses) + auxiliary, metrics

    return Objective(with_reference, row_weights, loss)


def simpo(config: SimpoConfig) -> Objective:
    """`-log sigmoid(beta * (c / n_c - r / n_r) - gamma)`, averaged over pairs (2405.14734); no reference.

    Rewards and `logps` of the metrics are those of the mean log-probability.
    """

    def loss(
        apply: Apply, params: Variables, frozen: Variables, batch: Batch, weights: dict[str, Array], key: Array | None
    ) -> tuple[Array, dict[str, Array]]:
        log_probs, auxiliary, metrics = policy_log_probs(apply, params, frozen, batch, weights, key)
        means = completions_of(log_probs, batch["mask"]).means
        losses = -log_sigmoid(config.beta * (means[:, 0] - means[:, 1]) - config.gamma)
        mean = _over_pairs(batch, weights)
        metrics |= pair_metrics(mean, config.beta * means, means)
        return mean(losses) + auxiliary, metrics

    return Objective(unprepared, row_weights, loss)


def orpo(config: OrpoConfig) -> Objective:
    """Likelihood of the chosen minus a log odds ratio (2403.07691); no reference.

    `nll_loss - beta * mean(log sigmoid(log odds(chosen) - log odds(rejected)))`, where `log odds = a - log(1 - exp a)`
    with a the mean log-probability of the completion, and `nll_loss` is the mean over all tokens of the chosen rows of
    the step, prompts included. Rewards and `logps` are those of a.
    """

    def loss(
        apply: Apply, params: Variables, frozen: Variables, batch: Batch, weights: dict[str, Array], key: Array | None
    ) -> tuple[Array, dict[str, Array]]:
        log_probs, auxiliary, metrics = policy_log_probs(apply, params, frozen, batch, weights, key)
        nll = -jnp.sum(jnp.where(_chosen_inputs(batch), log_probs[:, 0], 0.0)) / weights["chosen_tokens"]
        means = completions_of(log_probs, batch["mask"]).means
        odds = (means[:, 0] - means[:, 1]) - (log1mexp(means[:, 0]) - log1mexp(means[:, 1]))
        ratio = log_sigmoid(odds)
        mean = _over_pairs(batch, weights)
        metrics |= pair_metrics(mean, config.beta * means, means)
        metrics |= {"nll_loss": nll, "log_odds_chosen": mean(odds), "log_odds_ratio": mean(ratio)}
        return nll - config.beta * mean(ratio) + auxiliary, jax.lax.stop_gradient(metrics)

    def weights(batch: Batch) -> dict[str, Array]:
        tokens = jnp.sum(_chosen_inputs(batch), dtype=jnp.float32)
        return row_weights(batch) | {"chosen_tokens": jnp.maximum(tokens, 1.0)}

    return Objective(unprepared, weights, loss)


def log1mexp(x: Array) -> Array:
    """`log(1 - exp x)` for x < 0, accurate at both ends (Maechler 2012); finite at 0, where it is clipped."""
    x = jnp.minimum(x, -jnp.finfo(x.dtype).tiny)
    near = x > -jnp.log(jnp.asarray(2.0, x.dtype))
    # Each branch gets an argument at which it is finite, or the gradient of the one not taken would be NaN.
    close = jnp.log(-jnp.expm1(jnp.where(near, x, -0.5)))
    far = jnp.log1p(-jnp.exp(jnp.where(near, -1.0, x)))
    return jnp.where(near, close, far)


def pair_metrics(mean: Callable[[Array], Array], rewards: Array, log_probs: Array) -> dict[str, Array]:
    """TRL's metrics of pairs; `rewards` and `log_probs` [B, 2], `mean` from [B] to this microbatch's share."""
    rewards, log_probs = jax.lax.stop_gradient((rewards, log_probs))
    return {
        "rewards/chosen": mean(rewards[:, 0]),
        "rewards/rejected": mean(rewards[:, 1]),
        "rewards/margins": mean(rewards[:, 0] - rewards[:, 1]),
        "rewards/accuracies": mean((rewards[:, 0] > rewards[:, 1]).astype(jnp.float32)),
        "logps/chosen": mean(log_probs[:, 0]),
        "logps/rejected": mean(log_probs[:, 1]),
    }


def unconditional_accuracy(apply: Apply, variables: Variables, batch: Batch, weights: dict[str, Array]) -> Array:
    """How often a model gives the chosen completion more probability than the rejected, seeing neither prompt: this
    batch's share of the mean over pairs."""
    log_probs = frozen_log_probs(apply, variables, without_prompt(batch))
    return _over_pairs(batch, weights)((log_probs[:, 0] > log_probs[:, 1]).astype(jnp.float32))


def _over_pairs(batch: Batch, weights: dict[str, Array]) -> Callable[[Array], Array]:
    """[B] -> its sum over real pairs, over the pairs of the step."""
    real = real_rows(batch)
    return lambda values: jnp.sum(jnp.where(real, values, 0.0)) / weights["rows"]


def _chosen_inputs(batch: Batch) -> Array:
    """bool [B, L]: the tokens of chosen rows, each of which predicts the next."""
    return batch["segments"][:, 0] != 0
