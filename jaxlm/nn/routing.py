"""Who goes to which expert: the router, its choice of experts, and what is known of their load."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.nn.config import MoEConfig
from jaxlm.types import Array

TINY = 1e-20
"""Keeps a sum of gates from being 0, as DeepSeek-V3 does."""


class Router(nn.Module):
    """`x [..., D] -> (logits [..., E], selection bias [E] or None)`, float32 throughout.

    The input is jittered in training; an adapter counts where the collection `lora` has one; the bias is that of the
    collection `moe_state`.
    """

    moe: MoEConfig

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array | None]:
        width, moe = x.shape[-1], self.moe
        kernel = self.param("kernel", nn.initializers.normal(1.0 / math.sqrt(width)), (width, moe.experts))
        x = x.astype(jnp.float32)
        if moe.jitter and self.has_rng("dropout"):
            x = x * jax.random.uniform(self.make_rng("dropout"), x.shape, x.dtype, 1 - moe.jitter, 1 + moe.jitter)
        logits = _product(x, kernel)
        if self.has_variable("lora", "a"):
            adapter: dict[str, Array] = {name: self.get_variable("lora", name) for name in "ab"}
            logits = logits + _product(_product(x, adapter["a"]), adapter["b"])
        bias = self.get_variable("moe_state", "bias") if self.has_variable("moe_state", "bias") else None
        return logits, bias


def _product(x: Array, w: Array) -> Array:
    # The choice between near experts must not hang on an accelerator's shortened float32.
    return jnp.matmul(x, w.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


def choose(moe: MoEConfig, logits_TxE: Array, bias_E: Array | None = None) -> tuple[Array, Array]:
    """The experts of each token and their gates.

    Args:
      moe: scoring, groups, renormalisation, scale.
      logits_TxE: of the router, float32.
      bias_E: added to the scores for the choice, never to the gates (2412.19437, section 2.1.2); without gradient.

    Returns:
      chosen int32 [T, k], best first (of equal ones the lower index), and gates float32 [T, k]. Their gradients are
      products with one-hot rows, not scatters.
    """
    scores_TxE = scores(moe, logits_TxE)
    wanted_TxE = jax.lax.stop_gradient(scores_TxE)
    if bias_E is not None:
        wanted_TxE = wanted_TxE + jax.lax.stop_gradient(bias_E).astype(jnp.float32)[None, :]
    if moe.n_group > 1:
        wanted_TxE = _best_groups(moe, wanted_TxE)
    _, chosen_Txk = jax.lax.top_k(wanted_TxE, moe.top_k)
    hit_TxkxE = jax.nn.one_hot(chosen_Txk, moe.experts, dtype=jnp.float32)
    gates_Txk = jnp.sum(hit_TxkxE * scores_TxE[:, None, :], axis=-1)
    if moe.renormalize:
        gates_Txk = gates_Txk / (jnp.sum(gates_Txk, axis=-1, keepdims=True) + TINY)
    return chosen_Txk.astype(jnp.int32), gates_Txk * moe.routed_scaling_factor


def scores(moe: MoEConfig, logits_TxE: Array) -> Array:
    """Softmax over all experts, or sigmoids."""
    return jax.nn.sigmoid(logits_TxE) if moe.scoring == "sigmoid" else jax.nn.softmax(logits_TxE, axis=-1)


def _best_groups(moe: MoEConfig, wanted_TxE: Array) -> Array:
    """Scores with those of all but the best groups at minus infinity."""
    groups = wanted_TxE.reshape(wanted_TxE.shape[0], moe.n_group, -1)
    best, _ = jax.lax.top_k(groups, min(2, groups.shape[-1]))
    _, chosen = jax.lax.top_k(jnp.sum(best, axis=-1), moe.topk_group)
    open_TxG = jnp.sum(jax.nn.one_hot(chosen, moe.n_group), axis=1) > 0
    return jnp.where(open_TxG[:, :, None], groups, -jnp.inf).reshape(wanted_TxE.shape)


def drop(moe: MoEConfig, chosen_Txk: Array) -> Array:
    """Choices with `experts` in place of those that find no room: first choices come first, then the order of tokens.

    Room is `capacity_factor` times the mean load, rounded up: `ceil(factor * pairs / E)`, pairs without padding.
    """
    if moe.capacity_factor is None:
        return chosen_Txk
    tokens, k = chosen_Txk.shape
    by_choice = chosen_Txk.T.reshape(-1)
    pairs = jnp.sum(by_choice < moe.experts)
    room = jnp.ceil(moe.capacity_factor * pairs / moe.experts).astype(jnp.int32)
    order = jnp.argsort(by_choice, stable=True)
    rank = jnp.zeros(tokens * k, jnp.int32).at[order].set(jnp.arange(tokens * k, dtype=jnp.int32))
    counts_E = counts(chosen_Txk, moe.experts)
    first_E = (jnp.cumsum(counts_E) - counts_E).astype(jnp.int32)
    place = rank - first_E[jnp.minimum(by_choice, moe.experts - 1)]
    return jnp.where(place < room, by_choice, moe.experts).reshape(k, tokens).T


def counts(chosen_Txk: Array, experts: int) -> Array:
    """How many pairs each expert has: float32 [E]; the choice `experts` is nobody's."""
    hit = jax.nn.one_hot(chosen_Txk, experts, dtype=jnp.float32)
    return jax.lax.stop_gradient(jnp.sum(hit, axis=tuple(range(chosen_Txk.ndim))))


def statistics(
    moe: MoEConfig, logits_TxE: Array, wanted_Txk: Array, kept_Txk: Array, weights_T: Array | None
) -> dict[str, Array]:
    """Auxiliary losses and load of a layer, over the tokens with weight 1 (null: all).

    Args:
      moe: the mixture.
      logits_TxE: float32.
      wanted_Txk: choices; padding chooses nobody (`experts`).
      kept_Txk: those that found room.
      weights_T: 1, or 0 for padding.

    Returns:
      `moe/balance`: `E * sum_e f_e P_e` of 2101.03961, f_e the share of choices and P_e the mean of the probabilities
      (sigmoids over their sum), so 1 at perfect balance; the gradient goes through P_e. `moe/z`: mean squared logsumexp
      of the logits (2202.08906). `moe/loss`: both with their weights. `moe/router_entropy`: of the probabilities, in
      nats. `moe/counts` [E]: choices by expert. `moe/dropped`: choices without room.
    """
    weights_T = jnp.ones(logits_TxE.shape[:1], jnp.float32) if weights_T is None else weights_T
    count = jnp.maximum(jnp.sum(weights_T), 1.0)
    probs_TxE = scores(moe, logits_TxE)
    if moe.scoring == "sigmoid":
        probs_TxE = probs_TxE / (jnp.sum(probs_TxE, axis=-1, keepdims=True) + TINY)
    wanted_E = counts(wanted_Txk, moe.experts)
    share_E = wanted_E / jnp.maximum(jnp.sum(wanted_E), 1.0)
    mean_E = jnp.sum(probs_TxE * weights_T[:, None], axis=0) / count
    balance = moe.experts * jnp.sum(share_E * mean_E)
    lse_T = jax.nn.logsumexp(logits_TxE, axis=-1)
    z = jnp.sum(weights_T * jnp.square(lse_T)) / count
    entropy_T = -jnp.sum(jax.scipy.special.xlogy(probs_TxE, probs_TxE), axis=-1)
    aux_weight = moe.aux_weight if moe.balance == "aux" else 0.0
    return {
        "moe/balance": balance,
        "moe/z": z,
        "moe/loss": aux_weight * balance + moe.z_weight * z,
        "moe/router_entropy": jax.lax.stop_gradient(jnp.sum(weights_T * entropy_T) / count),
        "moe/counts": wanted_E,
        "moe/dropped": jnp.sum(wanted_E) - jnp.sum(counts(kept_Txk, moe.experts)),
    }
