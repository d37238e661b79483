"""Every optimizer through one table of properties, and each against its reference on the same gradients."""

import dataclasses
import itertools
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from optax import contrib

from jaxlm import tree as trees
from jaxlm.nn import transformer
from jaxlm.nn.config import ModelConfig, MoEConfig
from jaxlm.optim import chain
from jaxlm.optim.config import LayerLrConfig, OptimizerConfig, SamConfig
from jaxlm.optim.effective import effective
from jaxlm.optim.rules import RULES
from jaxlm.params import mup
from jaxlm.params.config import MupConfig

TINY = ModelConfig(
    d_model=16, n_layers=3, n_heads=2, n_kv_heads=1, d_ff=24, vocab_size=20, tie_embeddings=False, qkv_bias=True
)
BASE = dataclasses.replace(TINY, d_model=8, d_ff=16, n_layers=2)
FLAT = OptimizerConfig(schedule="constant", warmup=0.0, clip=None, learning_rate=0.01)


KEPT = r"embed/.*|unembed/.*|norm/.*|layers/(attn/(q|norm)|mlp/(router|down))/.*"
"""One leaf of each kind: the rest would only add to compilation."""


@cache
def shapes(cfg, kept=KEPT):
    """Abstract parameters, float32."""
    tree = jax.eval_shape(partial(transformer.init, cfg), jax.random.key(0))
    return prune(tree, "", kept)


def prune(tree, path, kept):
    if not isinstance(tree, dict):
        return tree if trees.matches(kept, path) else None
    below = {name: prune(child, f"{path}/{name}", kept) for name, child in tree.items()}
    return {name: child for name, child in below.items() if child is not None and child != {}}


def draw(tree, seed, scale=1.0):
    """Normal numbers in the structure and default precision of the moment."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(scale * rng.standard_normal(x.shape), dtype=float), tree)


def run(tx, params, gradients):
    state = tx.init(params)
    update = jax.jit(tx.update)
    for grads in gradients:
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def assert_close(a, b, **tolerance):
    a, b = trees.leaves(a), trees.leaves(b)
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_allclose(a[path], b[path], err_msg=path, **tolerance)


def layer(tree, index):
    """The same tree with one layer: stacked leaves [N, ...] cut to [1, ...]."""
    inner = dict(tree["params"])
    inner["layers"] = jax.tree.map(lambda x: x[index : index + 1], inner["layers"])
    return {"params": inner}


@pytest.fixture(params=RULES)
def config(request):
    return dataclasses.replace(FLAT, name=request.param)


def test_common_descends_a_quadratic_in_one_trace_with_a_finite_float32_state(config):
    params = draw(shapes(TINY), 0)
    tx = chain.make(config, TINY, params, 10)
    traces = []

    @jax.jit
    def step(params, state):
        traces.append(1)
        loss, grads = jax.value_and_grad(lambda p: sum(jnp.sum(x**2) for x in jax.tree.leaves(p)))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    state, losses = jax.jit(tx.init)(params), []
    for _ in range(5):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert len(traces) == 1
    assert all(b < a for a, b in itertools.pairwise(losses)), losses
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    allowed = {"float32", "int32"} | ({"int8", "uint8"} if config.name == "adamw8bit" else set())
    assert {str(x.dtype) for x in jax.tree.leaves(state)} <= allowed
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves((params, state)))


def test_common_stacked_layers_equal_single_layers(config):
    """Nothing reduces across layers: three layers at once are three models of one layer."""
    cfg = dataclasses.replace(TINY, d_model=128, head_dim=64, n_kv_heads=2, d_ff=128)  # large enough to be factored
    tree = shapes(cfg)
    with jax.enable_x64(True):
        params, grads = draw(tree, 0), [draw(tree, seed) for seed in (1, 2)]
        whole, _ = run(chain.make(config, cfg, params, 10), params, grads)
        one = dataclasses.replace(cfg, n_layers=1)
        tx = chain.make(config, one, layer(params, 0), 10)
        alone, _ = run(tx, layer(params, 1), [layer(g, 1) for g in grads])
        # Moments of 8 bits are kept with float32 scales.
        assert_close(layer(whole, 1), alone, rtol=0, atol=1e-7 if config.name == "adamw8bit" else 1e-12)


def test_common_zero_gradients_stay_finite_and_only_decay(config):
    params = draw(shapes(TINY), 0)
    zeros = jax.tree.map(jnp.zeros_like, params)
    decayed, _ = run(chain.make(config, TINY, params, 10), params, [zeros])
    for path, before in trees.leaves(params).items():
        factor = 1 - 0.01 * 0.1 if path.endswith("kernel") else 1.0
        np.testing.assert_allclose(trees.leaves(decayed)[path], factor * before, rtol=1e-5, err_msg=path)


def test_common_sam_goes_around_any_rule(config):
    params = draw(shapes(TINY, "embed/kernel|layers/mlp/down/kernel"), 0)
    grads = jax.tree.map(jnp.cos, params)
    plain, _ = run(chain.make(config, TINY, params, 10), params, [grads])
    for granularity in ("batch", "micro"):
        with_sam = dataclasses.replace(config, sam=SamConfig(rho=0.1, granularity=granularity))
        tx = chain.make(with_sam, TINY, params, 10)
        # The gradient is the same everywhere, so looking for it elsewhere changes nothing.
        arguments = {"grad_fn": lambda p: (jnp.float32(0), grads), "value": jnp.float32(0)}
        updates, _ = jax.jit(partial(tx.update, **arguments))(grads, tx.init(params), params)
        assert_close(optax.apply_updates(params, updates), plain, rtol=1e-5)


def everything(name):
    """muP, depth, layer-wise rates and decay at once."""
    config = dataclasses.replace(FLAT, name=name, layer_lr=LayerLrConfig(rate=0.8), eps=1e-3, weight_decay=0.3)
    tree = shapes(TINY)
    plan = mup.plan_tree(tree, TINY, BASE, MupConfig(depth_alpha=0.5, decay_exponent=0.5), name)
    return config, tree, plan


def test_adamw_equals_torch_with_a_parameter_group_per_row_of_the_effective_table():
    config, tree, plan = everything("adamw")
    rows = {row.leaf: row for row in effective(config, TINY, tree, plan)}
    with jax.enable_x64(True):
        start, grads = draw(tree, 0), [draw(tree, seed) for seed in range(1, 6)]
        ours, _ = run(chain.make(config, TINY, tree, 10, plan), start, grads)
    for path, value in trees.leaves(start).items():
        for index in range(TINY.N if "layers" in path else 1):
            cut = (lambda x, i=index: np.array(x[i])) if "layers" in path else np.array
            name = path.removeprefix("params/").removesuffix("/kernel").removesuffix("/scale").replace("/", ".")
            row = rows[name.replace("layers", f"layers.{index}")]
            weight = torch.nn.Parameter(torch.tensor(cut(value)))
            group = {"params": [weight], "lr": row.learning_rate, "weight_decay": row.weight_decay, "eps": row.eps}
            reference = torch.optim.AdamW([group], betas=(0.9, 0.95))
            for g in grads:
                weight.grad = torch.tensor(cut(trees.leaves(g)[path]))
                reference.step()
            result = cut(trees.leaves(ours)[path])
            np.testing.assert_allclose(result, weight.detach().numpy(), rtol=0, atol=1e-12, err_msg=path)


def test_clipping_and_warmup_equal_torch():
    config = dataclasses.replace(FLAT, clip=0.5, schedule="linear", warmup=0.2, weight_decay=0.0)
    tree = shapes(TINY)
    with jax.enable_x64(True):
        start, grads = draw(tree, 0), [draw(tree, seed) for seed in range(1, 6)]
        ours, _ = run(chain.make(config, TINY, tree, 10), start, grads)
    weights = {path: torch.nn.Parameter(torch.tensor(np.array(x))) for path, x in trees.leaves(start).items()}
    reference = torch.optim.AdamW(weights.values(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
    rate = torch.optim.lr_scheduler.LambdaLR(reference, lambda i: i / 2 if i < 2 else (10 - i) / 8)
    for g in grads:
        for path, weight in weights.items():
            weight.grad = torch.tensor(np.array(trees.leaves(g)[path]))
        # torch adds 1e-6 to the norm; undo it, the norm is far from 0.
        norm = float(torch.nn.utils.get_total_norm([w.grad for w in weights.values()]))
        torch.nn.utils.clip_grads_with_norm_(weights.values(), 0.5, torch.tensor(norm - 1e-6, dtype=torch.float64))
        reference.step()
        rate.step()
    assert_close(ours, mirror(start, weights), rtol=0, atol=1e-12)


def mirror(tree, weights):
    return trees.map_with_path(lambda path, _: weights[path].detach().numpy(), tree)


def reference(name, path):
    """Optax's own optimizer for a leaf of one layer."""
    kernel = path.endswith("kernel")
    decay = {"weight_decay": 0.1 if kernel else 0.0}
    if name == "lion":
        return optax.lion(0.01, 0.9, 0.95, **decay)
    if name == "schedule_free":
        return contrib.schedule_free_adamw(0.01, b1=0.9, b2=0.95, **decay)
    if name == "sgd":
        return optax.chain(optax.trace(0.9), optax.add_decayed_weights(0.1 if kernel else 0.0), optax.scale(-0.01))
    if name == "muon" and "layers" in path and kernel:
        return contrib.muon(0.01, consistent_rms=0.2, **decay)
    return optax.adamw(0.01, 0.9, 0.95, **decay)


@pytest.mark.parametrize("name", ["lion", "schedule_free", "sgd", "muon"])
def test_equals_optax_leaf_by_leaf(name):
    config = dataclasses.replace(FLAT, name=name, momentum=0.9 if name == "sgd" else None)
    tree = shapes(TINY)
    with jax.enable_x64(True):
        start, grads = draw(tree, 0), [draw(tree, seed) for seed in (1, 2, 3)]
        ours, _ = run(chain.make(config, TINY, tree, 10), start, grads)
        for path, value in trees.leaves(start).items():
            cut = (lambda x: x[1]) if "layers" in path else (lambda x: x)
            steps = [cut(trees.leaves(g)[path]) for g in grads]
            expected, _ = run(reference(name, path), cut(value), steps)
            np.testing.assert_allclose(cut(trees.leaves(ours)[path]), expected, rtol=0, atol=1e-12, err_msg=path)


def test_adafactor_equals_optax_on_one_layer():
    cfg = dataclasses.replace(TINY, d_model=128, head_dim=64, n_kv_heads=2, d_ff=160)
    tree = shapes(cfg)
    config = dataclasses.replace(FLAT, name="adafactor", weight_decay=0.0)
    with jax.enable_x64(True):
        start, grads = draw(tree, 0), [draw(tree, seed) for seed in (1, 2)]
        ours, state = run(chain.make(config, cfg, tree, 10), start, grads)
        path = "params/layers/mlp/down/kernel"
        steps = [trees.leaves(g)[path][2] for g in grads]
        expected, _ = run(optax.adafactor(0.01), trees.leaves(start)[path][2], steps)
        np.testing.assert_allclose(trees.leaves(ours)[path][2], expected, rtol=0, atol=1e-12)
    factors = [x.shape for p, x in trees.leaves(state).items() if p.endswith("v_row/" + path)]
    assert factors == [(cfg.N, 128)]


def test_muon_steers_matrices_of_layers_and_experts_only():
    cfg = dataclasses.replace(TINY, moe=MoEConfig(experts=2, top_k=1), qk_norm="head")
    rows = effective(dataclasses.replace(FLAT, name="muon"), cfg, shapes(cfg, ".*"))
    muon = {row.leaf.removeprefix("layers.0.") for row in rows if row.optimizer == "muon"}
    assert muon == {"attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down"}
    params = draw(shapes(cfg), 0)
    path = "params/layers/mlp/down/kernel"
    config = dataclasses.replace(FLAT, name="muon", weight_decay=0.0)
    after, _ = run(chain.make(config, cfg, params, 10), params, [draw(params, 1)])
    moved = np.asarray(trees.leaves(after)[path] - trees.leaves(params)[path]) / 0.01
    singular = np.linalg.svd(moved, compute_uv=False) / (0.2 * 24**0.5)
    assert singular.shape == (3, 2, 16)
    assert singular.min() > 0.3 and singular.max() < 1.4


def test_numbers_reach_the_chain():
    """Options that could be accepted and then ignored."""
    tree = shapes(TINY, "embed/kernel|layers/attn/norm/scale")
    start, grads = draw(tree, 0), [draw(tree, seed) for seed in (1, 2)]
    results = []
    for changes in ({}, {"b1": 0.5}, {"b2": 0.5}, {"eps": 1.0}, {"weight_decay": 0.0}, {"clip": 0.01, "eps": 1.0}):
        results.append(run(chain.make(dataclasses.replace(FLAT, **changes), TINY, tree, 10), start, grads)[0])
    flat = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(r)]) for r in results]
    assert all(np.abs(a - b).max() > 1e-5 for i, a in enumerate(flat) for b in flat[:i])


def test_errors_name_the_fields():
    tree = shapes(TINY)
    with pytest.raises(ValueError, match=r"optimizer\.schedule: warmup_cosine.*schedule_free"):
        chain.make(OptimizerConfig(name="schedule_free"), TINY, tree, 10)
    with pytest.raises(ValueError, match=r"optimizer\.momentum: 0\.9.*adamw"):
        chain.make(OptimizerConfig(momentum=0.9), TINY, tree, 10)
    with pytest.raises(ValueError, match=r"optimizer\.warmup: 0\.9 and optimizer\.decay 0\.2"):
        chain.make(OptimizerConfig(schedule="wsd", warmup=0.9), TINY, tree, 10)
    with pytest.raises(ValueError, match=r"optimizer\.name: sgd.*adamw"):
        chain.make(OptimizerConfig(name="sgd"), TINY, tree, 10, mup.plan_tree(tree, TINY, BASE, MupConfig()))
    with pytest.raises(ValueError, match="other leaves"):
        chain.make(OptimizerConfig(), TINY, tree, 10, mup.plan_tree(tree["params"], TINY, BASE, MupConfig()))
    with pytest.raises(ValueError, match="axis roles: no rule covers params/mystery"):
        chain.make(OptimizerConfig(), TINY, {"params": {"mystery": jnp.zeros(3)}}, 10)
