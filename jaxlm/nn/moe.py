"""The mixture-of-experts branch of a layer: router, experts, and the statistics of their load."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.nn.compute import Compute
from jaxlm.nn.config import ModelConfig, MoEConfig
from jaxlm.nn.kernels.matmul import matmul
from jaxlm.nn.mlp import ACTIVATIONS, residual_init
from jaxlm.nn.norms import make_norm
from jaxlm.types import Array


class Router(nn.Module):
    """`x [T, D] -> (gates [T, E], chosen [T, E], logits [T, E])`, all float32; gates are 0 where not chosen.

    Probabilities are the softmax over all experts; the top k of them, plus the selection bias `bias` [E] where the
    collection `moe_state` holds one (2412.19437), are chosen. The bias decides who is chosen, never the gate.
    """

    moe: MoEConfig

    @nn.compact
    def __call__(self, x_TxD: Array) -> tuple[Array, Array, Array]:
        moe, width = self.moe, x_TxD.shape[-1]
        kernel = self.param("kernel", nn.initializers.normal(1.0 / math.sqrt(width)), (width, moe.experts))
        logits_TxE = x_TxD.astype(jnp.float32) @ kernel.astype(jnp.float32)
        probs_TxE = jax.nn.softmax(logits_TxE, axis=-1)
        scores_TxE = probs_TxE
        if self.has_variable("moe_state", "bias"):
            scores_TxE = probs_TxE + self.get_variable("moe_state", "bias").astype(jnp.float32)[None, :]
        _, top_Txk = jax.lax.top_k(scores_TxE, moe.top_k)
        chosen_TxE = jnp.sum(jax.nn.one_hot(top_Txk, moe.experts, dtype=jnp.float32), axis=1)
        gates_TxE = probs_TxE * chosen_TxE
        if moe.renormalize:
            gates_TxE = gates_TxE / jnp.sum(gates_TxE, axis=-1, keepdims=True)
        return gates_TxE, chosen_TxE, logits_TxE


class Experts(nn.Module):
    """The kernel [E, in, out] of one projection of all experts."""

    shape: tuple[int, int, int]
    init_scale: float = 1.0

    @nn.compact
    def __call__(self) -> Array:
        return self.param("kernel", nn.initializers.normal(self.init_scale / math.sqrt(self.shape[1])), self.shape)


class MoE(nn.Module):
    """`x [B, L, D] -> sum over chosen experts of gate_e(x) * expert_e(x)`, and statistics of the routing.

    Every expert sees every token and unchosen ones have gate 0: exact, dropless, and E / top_k times the arithmetic
    that is needed. Padding (segment 0) is left out of the statistics, which are, each a float32:
    `moe/balance` (`E * sum_e f_e P_e` of 2101.03961, f_e the share of choices, so 1 at perfect balance), `moe/z`
    (mean squared logsumexp of the router's logits, 2202.08906), `moe/entropy` (of the probabilities, in nats), and
    `moe/load` [E], the f_e.
    """

    cfg: ModelConfig
    compute: Compute

    @nn.compact
    def __call__(self, x: Array, segments: Array | None = None) -> tuple[Array, dict[str, Array]]:
        cfg = self.cfg
        moe = cfg.moe
        assert moe is not None
        if moe.capacity_factor is not None:
            raise ValueError("model.moe.capacity_factor: only null (nothing is dropped) is supported; leave it out")
        if cfg.norm_placement != "post":
            x = make_norm(cfg, "norm")(x)
        x_TxD = x.reshape(-1, cfg.D)
        gates_TxE, chosen_TxE, logits_TxE = Router(moe, name="router")(x_TxD)
        width = moe.d_ff if moe.d_ff is not None else cfg.F
        kernels = {"up": Experts((moe.experts, cfg.D, width), name="up")()}
        if cfg.gated:
            kernels["gate"] = Experts((moe.experts, cfg.D, width), name="gate")()
        kernels["down"] = Experts((moe.experts, width, cfg.D), residual_init(cfg), name="down")()
        y_TxD = _mix(x_TxD, gates_TxE, kernels, cfg.activation)
        y = y_TxD.reshape(x.shape).astype(x.dtype)
        weights_T = None if segments is None else (segments.reshape(-1) != 0).astype(jnp.float32)
        aux = routing_statistics(logits_TxE, chosen_TxE, weights_T)
        return (y if cfg.norm_placement == "pre" else make_norm(cfg, "post_norm")(y)), aux


def _mix(x_TxD: Array, gates_TxE: Array, kernels: dict[str, Array], activation: str) -> Array:
    """Gate-weighted sum over experts, float32 [T, D], one expert after the other so that memory stays small."""
    act = ACTIVATIONS[activation]

    def add(total_TxD: Array, expert: tuple[dict[str, Array], Array]) -> tuple[Array, None]:
        kernel, gate_T = expert
        up = matmul(x_TxD, kernel["up"])
        hidden = act(matmul(x_TxD, kernel["gate"])) * up if "gate" in kernel else act(up)
        y_TxD = matmul(hidden, kernel["down"]).astype(jnp.float32)
        return total_TxD + gate_T[:, None] * y_TxD, None

    total, _ = jax.lax.scan(add, jnp.zeros(x_TxD.shape, jnp.float32), (kernels, gates_TxE.T))
    return total


def routing_statistics(logits_TxE: Array, chosen_TxE: Array, weights_T: Array | None) -> dict[str, Array]:
    """The auxiliary values that `MoE` names, over the tokens with weight 1 (None: all)."""
    weights_T = jnp.ones(logits_TxE.shape[:1], jnp.float32) if weights_T is None else weights_T
    count = jnp.maximum(jnp.sum(weights_T), 1.0)
    logp_TxE = jax.nn.log_softmax(logits_TxE, axis=-1)
    probs_TxE = jnp.exp(logp_TxE)
    chosen_E = jnp.sum(chosen_TxE * weights_T[:, None], axis=0)
    load_E = chosen_E / jnp.maximum(jnp.sum(chosen_E), 1.0)
    mean_E = jnp.sum(probs_TxE * weights_T[:, None], axis=0) / count
    lse_T = jax.nn.logsumexp(logits_TxE, axis=-1)
    entropy_T = -jnp.sum(probs_TxE * logp_TxE, axis=-1)
    return {
        "moe/balance": logits_TxE.shape[-1] * jnp.sum(load_E * mean_E),
        "moe/z": jnp.sum(weights_T * jnp.square(lse_T)) / count,
        "moe/entropy": jnp.sum(weights_T * entropy_T) / count,
        "moe/load": load_E,
    }
