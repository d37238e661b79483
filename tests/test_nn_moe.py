"""The mixture of experts: equal to a loop over tokens, and its statistics to those that transformers computes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from jaxlm.nn.compute import Compute
from jaxlm.nn.config import ModelConfig, MoEConfig
from jaxlm.nn.moe import MoE, routing_statistics

CFG = ModelConfig(d_model=8, n_layers=2, n_heads=2, vocab_size=7, moe=MoEConfig(experts=5, top_k=2, d_ff=6))
X = np.random.default_rng(0).standard_normal((2, 7, 8)).astype("float32")
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2], [0, 0, 1, 1, 1, 1, 0]], np.int32)


def run(cfg, moe_state=None):
    module = MoE(cfg, Compute())
    params = module.init(jax.random.key(0), X)["params"]
    params = jax.tree.map(lambda w: 2.0 * w, params)
    variables = {"params": params} | ({} if moe_state is None else {"moe_state": moe_state})
    y, aux = jax.jit(module.apply)(variables, X, SEGMENTS)
    return params, np.asarray(y), aux


def by_hand(cfg, params, bias=0.0):
    """One token at a time, in float64."""
    moe = cfg.moe
    w = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    out = np.zeros(X.shape)
    for b, t in np.ndindex(X.shape[:2]):
        x = X[b, t].astype(np.float64)
        x = x / np.sqrt(np.mean(x**2) + cfg.norm_eps) * w["norm"]["scale"]
        scores = np.exp(x @ w["router"]["kernel"])
        scores /= scores.sum()
        chosen = np.argsort(-(scores + bias))[: moe.top_k]
        gates = scores[chosen] / (scores[chosen].sum() if moe.renormalize else 1.0)
        for gate, e in zip(gates, chosen):
            h = x @ w["gate"]["kernel"][e]
            out[b, t] += gate * ((h / (1 + np.exp(-h)) * (x @ w["up"]["kernel"][e])) @ w["down"]["kernel"][e])
    return out


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_equals_a_loop_over_tokens(top_k, renormalize):
    cfg = dataclasses.replace(CFG, moe=dataclasses.replace(CFG.moe, top_k=top_k, renormalize=renormalize))
    params, y, _ = run(cfg)
    np.testing.assert_allclose(y, by_hand(cfg, params), atol=2e-5)


def test_selection_bias_chooses_but_does_not_weigh():
    bias = np.array([0.0, 0.0, 5.0, 0.0, 0.0], "float32")
    params, y, aux = run(CFG, {"router": {"bias": jnp.asarray(bias)}})
    np.testing.assert_allclose(y, by_hand(CFG, params, bias), atol=2e-5)
    assert aux["moe/load"][2] == pytest.approx(0.5)


def test_statistics_equal_those_of_transformers():
    """transformers' balance loss is top_k at perfect balance, ours 1; padding counts in neither."""
    logits = np.random.default_rng(1).standard_normal((14, 5)).astype("float32") * 2
    mask = torch.tensor((SEGMENTS != 0).astype(np.int64))
    wanted = load_balancing_loss_func((torch.tensor(logits),), 5, 2, mask)
    chosen = np.zeros_like(logits)
    np.put_along_axis(chosen, np.argsort(-logits, axis=1)[:, :2], 1.0, axis=1)
    got = routing_statistics(
        jnp.asarray(logits), jnp.asarray(chosen), jnp.asarray(SEGMENTS.reshape(-1) != 0, jnp.float32)
    )
    assert float(got["moe/balance"]) * 2 == pytest.approx(float(wanted), rel=1e-5)
    np.testing.assert_allclose(np.sum(got["moe/load"]), 1.0, rtol=1e-6)
    even = routing_statistics(jnp.zeros((5, 5)), jnp.eye(5), None)
    assert float(even["moe/balance"]) == pytest.approx(1.0)
    assert float(even["moe/entropy"]) == pytest.approx(np.log(5), rel=1e-5)
    assert float(even["moe/z"]) == pytest.approx(np.log(5) ** 2, rel=1e-5)
