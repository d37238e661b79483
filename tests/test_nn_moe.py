"""The mixture of experts: equal to a loop over tokens, in every implementation, and its statistics to transformers'."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from jaxlm.nn import routing
from jaxlm.nn.compute import Compute
from jaxlm.nn.config import LoraConfig, ModelConfig, MoEConfig
from jaxlm.nn.kernels.grouped_matmul import BACKENDS
from jaxlm.nn.moe import MoE
from jaxlm.nn.qtensor import dequantise, is_qtensor
from jaxlm.params.quantize import quantize

CFG = ModelConfig(d_model=8, n_layers=2, n_heads=2, vocab_size=7, moe=MoEConfig(experts=5, top_k=2, d_ff=6))
X = np.random.default_rng(0).standard_normal((2, 7, 8)).astype("float32")
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2], [0, 0, 1, 1, 1, 1, 0]], np.int32)


def with_moe(**fields):
    return dataclasses.replace(CFG, moe=dataclasses.replace(CFG.moe, **fields))


def fresh(cfg):
    params = MoE(cfg, Compute()).init(jax.random.key(0), X)["params"]
    return jax.tree.map(lambda w: 2.0 * w, params)


def run(cfg, moe_state=None, segments=SEGMENTS, backend=None):
    params = fresh(cfg)
    variables = {"params": params} | ({} if moe_state is None else {"moe_state": moe_state})
    y, aux = jax.jit(MoE(cfg, Compute(grouped=backend)).apply)(variables, X, segments)
    return params, np.asarray(y), aux


def normed(cfg, params, b, t):
    x = X[b, t].astype(np.float64)
    return x / np.sqrt(np.mean(x**2) + cfg.norm_eps) * np.asarray(params["norm"]["scale"], np.float64)


def feed(w, x, e):
    h = x @ w["gate"]["kernel"][e]
    return (h / (1 + np.exp(-h)) * (x @ w["up"]["kernel"][e])) @ w["down"]["kernel"][e]


def by_hand(cfg, params, bias=0.0, segments=SEGMENTS, kept=None):
    """One token at a time, in float64; `kept` [B, L, k] says which choices find room."""
    moe = cfg.moe
    w = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    out = np.zeros(X.shape)
    for b, t in np.ndindex(X.shape[:2]):
        if segments[b, t] == 0:
            continue
        x = normed(cfg, params, b, t)
        scores = np.exp(x @ w["router"]["kernel"])
        scores /= scores.sum()
        chosen = np.argsort(-(scores + bias))[: moe.top_k]
        gates = scores[chosen] / (scores[chosen].sum() if moe.renormalize else 1.0)
        for j, (gate, e) in enumerate(zip(gates, chosen)):
            out[b, t] += gate * feed(w, x, e) * (1 if kept is None else kept[b, t, j])
    return out


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_equals_a_loop_over_tokens(top_k, renormalize):
    cfg = with_moe(top_k=top_k, renormalize=renormalize)
    params, y, _ = run(cfg)
    np.testing.assert_allclose(y, by_hand(cfg, params), atol=2e-5)


def test_selection_bias_chooses_but_does_not_weigh():
    bias = np.array([0.0, 0.0, 5.0, 0.0, 0.0], "float32")
    params, y, aux = run(CFG, {"router": {"bias": jnp.asarray(bias)}})
    np.testing.assert_allclose(y, by_hand(CFG, params, bias), atol=2e-5)
    assert aux["moe/counts"][2] == np.count_nonzero(SEGMENTS)


def test_padding_neither_routes_nor_counts():
    """The first row alone, and beside a row of nothing but padding."""
    padded = np.stack([SEGMENTS[0], np.zeros(7, np.int32)])
    _, y, aux = run(with_moe(capacity_factor=1.0), segments=padded)
    params, cfg = fresh(CFG), with_moe(capacity_factor=1.0)
    alone, wanted = jax.jit(MoE(cfg, Compute()).apply)({"params": params}, X[:1], padded[:1])
    np.testing.assert_allclose(y[:1], alone, atol=1e-6)
    np.testing.assert_array_equal(y[1], 0.0)
    for name in wanted:
        np.testing.assert_allclose(aux[name], wanted[name], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("factor", [0.5, 1.0])
def test_capacity_keeps_first_choices_and_early_tokens(factor):
    cfg = with_moe(capacity_factor=factor)
    params, y, aux = run(cfg)
    chosen = np.full((*X.shape[:2], 2), -1)
    w = np.asarray(params["router"]["kernel"], np.float64)
    for b, t in np.ndindex(X.shape[:2]):
        if SEGMENTS[b, t]:
            chosen[b, t] = np.argsort(-(normed(cfg, params, b, t) @ w))[:2]
    room = int(np.ceil(factor * 2 * np.count_nonzero(SEGMENTS) / 5))
    used, kept = np.zeros(5, int), np.zeros(chosen.shape)
    for j in range(2):
        for b, t in np.ndindex(X.shape[:2]):
            e = chosen[b, t, j]
            if e >= 0 and used[e] < room:
                used[e] += 1
                kept[b, t, j] = 1
    assert aux["moe/dropped"] == np.sum(chosen >= 0) - kept.sum() > 0
    np.testing.assert_allclose(y, by_hand(cfg, params, kept=kept), atol=2e-5)


OPTIONS = {
    "plain": {},
    "every expert": {"top_k": 5},
    "capacity": {"capacity_factor": 0.7},
    "sigmoid": {"scoring": "sigmoid", "routed_scaling_factor": 2.5},
    "groups, shared": {"experts": 6, "n_group": 3, "topk_group": 2, "n_shared_experts": 2},
    "losses": {"aux_weight": 0.3, "z_weight": 0.1, "renormalize": False},
}


@pytest.mark.parametrize(("name", "dtype"), [*((name, "float32") for name in OPTIONS), ("plain", "bfloat16")])
def test_implementations_agree(name, dtype):
    """Values, auxiliary losses and gradients of all leaves and of the input; in bfloat16 up to its rounding."""
    cfg = with_moe(**OPTIONS[name])
    params = fresh(cfg)

    def loss(params, x, backend):
        y, aux = MoE(cfg, Compute(grouped=backend)).apply({"params": params}, x.astype(dtype), SEGMENTS)
        return jnp.sum(y.astype(jnp.float32) * jnp.cos(jnp.arange(X.size, dtype=jnp.float32)).reshape(X.shape)) + aux[
            "moe/loss"
        ], y

    found = {
        backend: jax.jit(jax.value_and_grad(lambda p, x, b=backend: loss(p, x, b), (0, 1), has_aux=True))(params, X)
        for backend in BACKENDS
    }
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    for backend in BACKENDS[1:]:
        for got, wanted in zip(jax.tree.leaves(found[backend]), jax.tree.leaves(found["reference"])):
            scale = max(1.0, float(jnp.max(jnp.abs(wanted.astype(jnp.float32)))))
            np.testing.assert_allclose(
                got.astype(jnp.float32) / scale, wanted.astype(jnp.float32) / scale, atol=tolerance, err_msg=backend
            )


def test_statistics_equal_those_of_transformers():
    """transformers' balance loss is top_k at perfect balance, ours 1; padding counts in neither."""
    moe = MoEConfig(experts=5, top_k=2, aux_weight=0.5, z_weight=0.25)
    logits = np.random.default_rng(1).standard_normal((14, 5)).astype("float32") * 2
    mask = (SEGMENTS != 0).reshape(-1)
    wanted = load_balancing_loss_func((torch.tensor(logits),), 5, 2, torch.tensor(mask.reshape(2, 7).astype(np.int64)))
    chosen, _ = routing.choose(moe, jnp.asarray(logits))
    chosen = jnp.where(mask[:, None], chosen, 5)
    got = routing.statistics(moe, jnp.asarray(logits), chosen, chosen, jnp.asarray(mask, jnp.float32))
    assert float(got["moe/balance"]) * 2 == pytest.approx(float(wanted), rel=1e-5)
    assert float(got["moe/loss"]) == pytest.approx(0.5 * got["moe/balance"] + 0.25 * got["moe/z"])
    assert float(jnp.sum(got["moe/counts"])) == 2 * mask.sum()
    even = routing.statistics(moe, jnp.zeros((5, 5)), jnp.arange(5)[:, None], jnp.arange(5)[:, None], None)
    assert float(even["moe/balance"]) == pytest.approx(1.0)
    assert float(even["moe/router_entropy"]) == pytest.approx(np.log(5), rel=1e-5)
    assert float(even["moe/z"]) == pytest.approx(np.log(5) ** 2, rel=1e-5)


@pytest.mark.parametrize("renormalize", [True, False])
def test_the_router_of_deepseek_v3(renormalize):
    config = DeepseekV3Config(hidden_size=8, moe_intermediate_size=6, n_routed_experts=12, num_experts_per_tok=3,
                              n_group=4, topk_group=2, routed_scaling_factor=2.5, norm_topk_prob=renormalize,
                              n_shared_experts=1)  # fmt: skip
    theirs = DeepseekV3TopkRouter(config)
    x, weight = (np.random.default_rng(seed).standard_normal(shape).astype("float32") for seed, shape in
                 ((2, (50, 8)), (4, (12, 8))))  # fmt: skip
    bias = 0.3 * np.random.default_rng(3).standard_normal(12).astype("float32")
    with torch.no_grad():
        theirs.weight.copy_(torch.tensor(weight))
        theirs.e_score_correction_bias.copy_(torch.tensor(bias))
        logits, gates, chosen = theirs(torch.tensor(x))
    moe = MoEConfig(experts=12, top_k=3, scoring="sigmoid", n_group=4, topk_group=2, routed_scaling_factor=2.5,
                    renormalize=renormalize)  # fmt: skip
    ours, our_gates = routing.choose(moe, jnp.asarray(logits.numpy()), jnp.asarray(bias))
    dense = np.zeros((2, 50, 12), "float32")
    np.put_along_axis(dense[0], chosen.numpy(), gates.numpy(), axis=1)
    np.put_along_axis(dense[1], np.asarray(ours), np.asarray(our_gates), axis=1)
    np.testing.assert_allclose(dense[1], dense[0], atol=1e-5)


def test_jitter_only_in_training_and_the_same_when_computed_again():
    cfg = with_moe(jitter=0.3)
    params = fresh(cfg)
    plain = MoE(cfg, Compute()).apply({"params": params}, X)[0]
    np.testing.assert_array_equal(plain, MoE(CFG, Compute()).apply({"params": params}, X)[0])

    def loss(x, wrap):
        apply = lambda x: MoE(cfg, Compute()).apply({"params": params}, x, rngs={"dropout": jax.random.key(1)})[0]  # noqa: E731
        return jnp.sum(jnp.sin(wrap(apply)(x)))

    kept, again = (jax.grad(loss)(X, wrap) for wrap in (lambda f: f, jax.checkpoint))
    np.testing.assert_allclose(kept, again, atol=1e-6)
    assert (
        float(
            jnp.abs(
                kept - jax.grad(lambda x: jnp.sum(jnp.sin(MoE(CFG, Compute()).apply({"params": params}, x)[0])))(X)
            ).max()
        )
        > 1e-3
    )


def test_adapters_of_experts_are_as_if_merged():
    cfg = dataclasses.replace(CFG, lora=LoraConfig(r=3))
    params = fresh(CFG)
    keys = iter(jax.random.split(jax.random.key(5), 8))
    adapter = {
        name: {
            "a": jax.random.normal(next(keys), (5, w.shape[1], 3)),
            "b": jax.random.normal(next(keys), (5, 3, w.shape[2])),
        }
        for name, w in ((n, params[n]["kernel"]) for n in ("gate", "up", "down"))
    }
    merged = params | {n: {"kernel": params[n]["kernel"] + node["a"] @ node["b"]} for n, node in adapter.items()}
    y, _ = MoE(cfg, Compute()).apply({"params": params, "lora": adapter}, X, SEGMENTS)
    wanted, _ = MoE(CFG, Compute()).apply({"params": merged}, X, SEGMENTS)
    np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-3)


def test_quantised_experts_are_their_dequantised_selves():
    cfg = dataclasses.replace(CFG, d_model=64, moe=dataclasses.replace(CFG.moe, d_ff=64))
    x = np.random.default_rng(4).standard_normal((2, 7, 64)).astype("float32")
    params = MoE(cfg, Compute()).init(jax.random.key(0), x)["params"]
    packed = quantize({"layers": {"mlp": jax.tree.map(lambda w: w[None], params)}}, "nf4")["layers"]["mlp"]
    packed = jax.tree.map(lambda w: w[0], packed)
    assert is_qtensor(packed["up"]["kernel"]) and not is_qtensor(packed["router"]["kernel"])
    plain = jax.tree.map(lambda w: dequantise(w) if is_qtensor(w) else w, packed, is_leaf=is_qtensor)

    def loss(x, params):
        y, aux = MoE(cfg, Compute(grouped="ragged")).apply({"params": params}, x, SEGMENTS)
        return jnp.sum(jnp.sin(y)) + aux["moe/balance"]

    for got, wanted in zip(*(jax.jit(jax.value_and_grad(loss))(x, tree) for tree in (packed, plain))):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
