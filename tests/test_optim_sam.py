"""SAM, ASAM and LookSAM against loops written from their definitions, and what must hold around them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from optax import contrib

from jaxlm.nn.config import ModelConfig
from jaxlm.optim import chain
from jaxlm.optim.config import OptimizerConfig, SamConfig
from jaxlm.optim.sam import metrics, per_microbatch, perturbation, sam

X, Y = np.random.default_rng(0).standard_normal((2, 12, 3))
MODEL = ModelConfig(d_model=3, n_layers=1, n_heads=1, head_dim=2, vocab_size=5)
CONFIG = OptimizerConfig(schedule="linear", warmup=0.25, learning_rate=0.1, weight_decay=0.2, clip=0.3, end=0.5)


def start():
    rng = np.random.default_rng(1)
    return {"layers": {"attn": {"q": {"kernel": rng.standard_normal((1, 3, 3)), "bias": rng.standard_normal((1, 3))}}}}


def loss(params, rows=slice(None)):
    """A small regression that is not quadratic; a mean over all rows, whatever part of it is asked for."""
    q = params["layers"]["attn"]["q"]
    h = jnp.tanh(X[rows] @ q["kernel"][0] + jnp.broadcast_to(q["bias"], X[rows].shape))
    return jnp.sum((h - Y[rows]) ** 2) / X.size


grad_fn = jax.value_and_grad(loss)


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def unflat(vector):
    return jax.tree.unflatten(jax.tree.structure(start()), [vector[:3].reshape(1, 3), vector[3:].reshape(1, 3, 3)])


class NumpyAdamW:
    """CONFIG's chain in plain numpy: bias first in the vector, and only the kernel decays."""

    def __init__(self):
        self.t, self.m, self.v = 0, 0.0, 0.0

    def step(self, w, g):
        g = g * min(1.0, 0.3 / np.linalg.norm(g))
        rate = 0.1 * (self.t / 2 if self.t < 2 else 0.5 + 0.5 * (8 - self.t) / 6)
        self.t += 1
        self.m = 0.9 * self.m + 0.1 * g
        self.v = 0.95 * self.v + 0.05 * g**2
        direction = (self.m / (1 - 0.9**self.t)) / (np.sqrt(self.v / (1 - 0.95**self.t)) + 1e-8)
        return w - rate * (direction + 0.2 * w * np.array([0] * 3 + [1] * 9))


def numpy_grad(w):
    value, grads = grad_fn(unflat(w))
    return float(value), flat(grads)


def numpy_run(config, steps=7):
    w, base, sharpness, orthogonal = flat(start()), NumpyAdamW(), 0.0, np.zeros(12)
    for step in range(steps):
        value, g = numpy_grad(w)
        if step % config.interval:
            second = g + config.look_weight * np.linalg.norm(g) / np.linalg.norm(orthogonal) * orthogonal
        else:
            size = np.ones(12) if config.variant == "sam" else np.abs(w) + config.eta
            if config.bias == "unit" and config.variant == "asam":
                size[:3] = 1.0
            higher, second = numpy_grad(w + config.rho * size**2 * g / np.linalg.norm(size * g))
            orthogonal = second - (second @ g) / (g @ g) * g
            sharpness = higher - value
        w = base.step(w, second)
    return w, sharpness


def our_run(config, steps=7, with_value=True):
    params = jax.tree.map(jnp.asarray, start())
    tx = chain.make(dataclasses.replace(CONFIG, sam=config), MODEL, params, 8)
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        value, grads = grad_fn(params)
        extra = {"value": value} if with_value else {}
        updates, state = tx.update(grads, state, params, grad_fn=grad_fn, **extra)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return params, state


VARIANTS = {
    "sam": SamConfig(rho=0.3),
    "asam": SamConfig(rho=0.5, variant="asam"),
    "asam unit": SamConfig(rho=0.5, variant="asam", bias="unit", eta=0.1),
    "looksam": SamConfig(rho=0.3, interval=3, look_weight=0.5),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_its_definition(name):
    with jax.enable_x64(True):
        expected, sharpness = numpy_run(VARIANTS[name])
        params, state = our_run(VARIANTS[name])
        np.testing.assert_allclose(flat(params), expected, rtol=0, atol=1e-12)
    assert float(metrics(state)["sam/sharpness"]) == pytest.approx(sharpness, rel=1e-5)


def test_loss_is_computed_when_it_is_not_passed():
    with jax.enable_x64(True):
        passed, first = our_run(VARIANTS["sam"], steps=2)
        computed, second = our_run(VARIANTS["sam"], steps=2, with_value=False)
    np.testing.assert_array_equal(flat(passed), flat(computed))
    assert float(first.sharpness) == pytest.approx(float(second.sharpness), rel=1e-6)


def test_equals_optax_in_opaque_mode():
    base = optax.chain(optax.clip_by_global_norm(0.3), optax.adamw(0.05, weight_decay=0.1))
    with jax.enable_x64(True):
        reference = contrib.sam(base, optax.chain(contrib.normalize(), optax.sgd(0.3)), opaque_mode=True)
        ours = sam(base, SamConfig(rho=0.3))
        a = b = jax.tree.map(jnp.asarray, start())
        s, t = reference.init(a), ours.init(b)
        for _ in range(4):
            u, s = reference.update(grad_fn(a)[1], s, a, grad_fn=lambda p, _: grad_fn(p)[1])
            a = optax.apply_updates(a, u)
            value, grads = grad_fn(b)
            u, t = ours.update(grads, t, b, grad_fn=grad_fn, value=value)
            b = optax.apply_updates(b, u)
        np.testing.assert_allclose(flat(a), flat(b), rtol=0, atol=1e-12)


def test_perturbation_has_length_rho_and_vanishes_with_the_gradient():
    params = jax.tree.map(jnp.float32, start())
    grads = jax.tree.map(lambda x: 1e-3 * x, params)
    assert np.linalg.norm(flat(perturbation(grads, params, SamConfig(rho=0.3)))) == pytest.approx(0.3, rel=1e-6)
    for config in VARIANTS.values():
        zero = perturbation(jax.tree.map(jnp.zeros_like, params), params, config)
        assert not flat(zero).any()


def test_zero_gradients_and_gradients_that_are_not_finite_do_no_harm():
    params = jax.tree.map(jnp.float32, start())
    zeros = jax.tree.map(jnp.zeros_like, params)
    for config in VARIANTS.values():
        tx = sam(optax.adam(0.1), config)
        updates, state = tx.update(zeros, tx.init(params), params, grad_fn=lambda p: (0.0, zeros), value=0.0)
        updates, _ = tx.update(zeros, state, params, grad_fn=lambda p: (0.0, zeros), value=0.0)
        assert not flat(updates).any()
    tx = sam(optax.sgd(1.0), SamConfig())
    broken = jax.tree.map(lambda x: x * jnp.nan, params)
    grads = grad_fn(params)[1]
    updates, _ = tx.update(grads, tx.init(params), params, grad_fn=lambda p: (jnp.nan, broken), value=0.0)
    np.testing.assert_array_equal(flat(updates), -flat(grads))


def test_state_and_updates_never_hold_perturbed_weights():
    """With a rate of 0 nothing moves, however far the perturbation reaches."""
    params = jax.tree.map(jnp.float32, start())
    tx = sam(optax.sgd(0.0), SamConfig(rho=100.0))
    value, grads = grad_fn(params)
    updates, state = tx.update(grads, tx.init(params), params, grad_fn=grad_fn, value=value)
    np.testing.assert_array_equal(flat(optax.apply_updates(params, updates)), flat(params))
    assert max(np.abs(np.ravel(x)).max() for x in jax.tree.leaves(state)) < 50.0


def test_microbatches_add_up_to_the_batch_or_are_perturbed_one_by_one():
    halves = [slice(0, 6), slice(6, 12)]

    def accumulated(params):
        parts = [jax.value_and_grad(loss)(params, rows) for rows in halves]
        return jax.tree.map(lambda *x: sum(x), *parts)

    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, start())
        tx = sam(optax.sgd(1.0), SamConfig(rho=0.3))
        whole, split = (tx.update(f(params)[1], tx.init(params), params, grad_fn=f)[0] for f in (grad_fn, accumulated))
        np.testing.assert_allclose(flat(whole), flat(split), rtol=0, atol=1e-12)

        def with_metrics(params, rows):
            return loss(params, rows), {"n": jnp.ones(())}

        one_by_one = per_microbatch(jax.value_and_grad(with_metrics, has_aux=True), SamConfig(rho=0.3))
        found, expected = 0.0, 0.0
        for rows in halves:
            (value, extra), second = one_by_one(params, rows)
            _, g = jax.value_and_grad(loss)(params, rows)
            at = unflat(flat(params) + 0.3 * flat(g) / np.linalg.norm(flat(g)))
            higher, reference = jax.value_and_grad(loss)(at, rows)
            found, expected = found + flat(second), expected + flat(reference)
            assert float(value) == pytest.approx(float(loss(params, rows)))
            assert float(extra["sam/sharpness"]) == pytest.approx(float(higher - value), rel=1e-5)
            assert set(extra) == {"n", "sam/sharpness"}
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
        assert np.abs(found + flat(whole)).max() > 1e-4


def test_sharded_equals_single():
    mesh = jax.make_mesh((8,), ("data",))
    rng = np.random.default_rng(2)
    params = {"w": jnp.asarray(rng.standard_normal((16, 4)), jnp.float32)}
    rows = jnp.asarray(rng.standard_normal((32, 16)), jnp.float32)
    tx = sam(optax.adam(0.1), SamConfig(rho=0.3))

    def step(params, state, rows):
        f = jax.value_and_grad(lambda p: jnp.mean(jnp.tanh(rows @ p["w"]) ** 2))
        value, grads = f(params)
        updates, state = tx.update(grads, state, params, grad_fn=f, value=value)
        return optax.apply_updates(params, updates), state

    single, _ = jax.jit(step)(params, tx.init(params), rows)
    cut = NamedSharding(mesh, PartitionSpec("data", None))
    placed = jax.device_put(params, cut)
    sharded, _ = jax.jit(step)(placed, tx.init(placed), jax.device_put(rows, cut))
    np.testing.assert_allclose(sharded["w"], single["w"], rtol=0, atol=1e-6)


def test_cost_is_two_gradients():
    def flops(config):
        params = {"embed": {"kernel": jnp.ones((64, 64))}, "norm": {"scale": jnp.ones(64)}}
        f = jax.value_and_grad(lambda p: jnp.sum(jnp.tanh(jnp.ones((512, 64)) @ p["embed"]["kernel"]) ** 2))
        tx = chain.make(dataclasses.replace(CONFIG, sam=config), MODEL, params, 8)

        def step(params, state):
            value, grads = f(params)
            updates, state = tx.update(grads, state, params, grad_fn=f, value=value)
            return optax.apply_updates(params, updates), state

        return jax.jit(step).lower(params, tx.init(params)).compile().cost_analysis()["flops"]

    assert 1.9 < flops(SamConfig()) / flops(None) < 2.1


def test_schedule_counts_a_perturbed_step_once():
    _, state = our_run(SamConfig(), steps=3)
    counts = [int(s.count) for s in jax.tree.leaves(state, is_leaf=is_count) if is_count(s)]
    assert counts == [3]


def is_count(node):
    return isinstance(node, optax.ScaleByScheduleState)


def test_missing_arguments_and_impossible_settings_are_named():
    params = jax.tree.map(jnp.float32, start())
    tx = sam(optax.sgd(1.0), SamConfig())
    with pytest.raises(ValueError, match="grad_fn"):
        tx.update(params, tx.init(params), params)
    micro = dataclasses.replace(CONFIG, sam=SamConfig(interval=2, granularity="micro"))
    with pytest.raises(ValueError, match=r"optimizer\.sam\.interval: 2.*granularity"):
        chain.make(micro, MODEL, params, 8)
    assert metrics(optax.adam(0.1).init(params)) == {}
