"""The step: microbatches add up, a bad step changes nothing, one trace, averages and schedule advance rightly."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm import objectives
from jaxlm.nn import transformer
from jaxlm.nn.compute import Compute
from jaxlm.nn.config import ModelConfig
from jaxlm.objectives.config import NextTokenConfig
from jaxlm.training.step import Recipe, init_state, train_step
from jaxlm.types import Objective

CFG = ModelConfig(d_model=16, n_layers=2, n_heads=2, vocab_size=29)
FAST = Compute(attention="reference", scan=False)


def apply(variables, tokens, cfg=CFG, **inputs):
    return transformer.apply(cfg, variables, tokens, compute=FAST, **inputs)


def recipe(**changes):
    optimizer = optax.with_extra_args_support(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)))
    objective = objectives.make(NextTokenConfig(z_loss=1e-3))
    return Recipe(objective, apply, optimizer, optax.constant_schedule(1e-2))._replace(**changes)


def batch(rows=8, length=6, seed=0):
    """Rows with very different numbers of labels, one with none."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, CFG.V, (rows, length + 1)).astype("int32")
    mask = np.arange(length)[None, :] < rng.integers(0, length + 1, (rows, 1))
    mask[0] = False
    ones = np.ones((rows, length), "int32")
    positions = np.broadcast_to(np.arange(length, dtype="int32"), (rows, length))
    columns = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "mask": mask.astype("float32")}
    return jax.tree.map(jnp.asarray, columns | {"segments": ones, "positions": positions})


@functools.cache
def start():
    return transformer.init(CFG, jax.random.key(0))


def run(recipe_, batches, params=None):
    state = init_state(recipe_, start() if params is None else params)
    step = jax.jit(functools.partial(train_step, recipe_))
    history = []
    for rows in batches:
        state, metrics = step(state, {}, rows)
        history.append({name: float(value) for name, value in metrics.items()})
    return state, history


@pytest.mark.parametrize("accumulation", [2, 4, 8])
def test_microbatches_equal_one_batch_with_unequal_weights(accumulation):
    one, whole = run(recipe(), [batch(), batch(seed=1)])
    parts, cut = run(recipe(accumulation=accumulation), [batch(), batch(seed=1)])
    chex.assert_trees_all_close(one.params, parts.params, atol=2e-6)
    for a, b in zip(whole, cut, strict=True):
        assert abs(a["loss"] - b["loss"]) < 2e-6
        assert abs(a["grad_norm"] - b["grad_norm"]) < 1e-5


def test_the_loss_is_the_mean_over_labels():
    rows = batch()
    logits = transformer.logits(CFG, start(), rows["tokens"])
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), rows["targets"][..., None], -1)[..., 0]
    z = jnp.square(jax.nn.logsumexp(logits, axis=-1))
    want = jnp.sum((nll + 1e-3 * z) * rows["mask"]) / jnp.sum(rows["mask"])
    _, history = run(recipe(), [rows])
    assert abs(history[0]["loss"] - float(want)) < 2e-6


def poisoned():
    """The objective whose loss has a term that the batch can make NaN or infinite."""
    base = objectives.make(NextTokenConfig())

    def loss(apply, params, frozen, rows, weights, key):
        total, metrics = base.loss(apply, params, frozen, rows, weights, key)
        return total + params["params"]["norm"]["scale"][0] * jnp.sum(rows["poison"]), metrics

    return Objective(base.prepare, base.weights, loss)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_a_step_that_is_not_finite_changes_nothing_but_the_count(value):
    clean = batch() | {"poison": jnp.zeros((8,))}
    bad = batch() | {"poison": jnp.full((8,), value)}
    chosen = recipe(objective=poisoned(), ema=0.5)
    before, _ = run(chosen, [clean])
    after, history = run(chosen, [clean, bad])
    assert history[1]["skipped"] == 1.0
    assert (int(after.step), int(after.applied)) == (2, 1)
    chex.assert_trees_all_equal(before._replace(step=after.step), after)
    again, history = run(chosen, [clean, bad, clean])
    assert np.isfinite(history[2]["loss"])
    assert history[2]["skipped"] == 0.0
    assert int(again.applied) == 2


def test_a_batch_without_labels_is_harmless():
    rows = batch() | {"mask": jnp.zeros((8, 6))}
    state, history = run(recipe(), [rows])
    assert history[0]["loss"] == 0.0
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state.params))


def test_one_trace_for_all_steps():
    chosen = recipe(accumulation=2, ema=0.9)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(state, frozen, rows):
        return train_step(chosen, state, frozen, rows)

    state = init_state(chosen, start())
    for seed in range(4):
        state, _ = step(state, {}, batch(seed=seed))
    assert int(state.step) == 4


def test_the_average_follows_its_closed_form():
    states = [run(recipe(ema=0.75), [batch(seed=s) for s in range(n)])[0] for n in (1, 2, 3)]
    average = start()
    for state in states:
        average = jax.tree.map(lambda a, p: 0.75 * a + 0.25 * p, average, state.params)
    chex.assert_trees_all_close(average, states[-1].ema, atol=1e-6)


def test_dropout_depends_on_seed_and_step_alone():
    cfg = dataclasses.replace(CFG, dropout=0.3)
    chosen = recipe(apply=functools.partial(apply, cfg=cfg), optimizer=optax.with_extra_args_support(optax.sgd(0.0)))
    losses = [h["loss"] for h in run(chosen, [batch()] * 3)[1]]
    assert len(set(losses)) == 3
    assert losses == [h["loss"] for h in run(chosen, [batch()] * 3)[1]]
    other = [h["loss"] for h in run(chosen._replace(seed=1), [batch()] * 3)[1]]
    assert set(losses).isdisjoint(other)


def test_padding_does_not_count_as_tokens():
    rows = batch() | {"segments": jnp.ones((8, 6), jnp.int32).at[:, 4:].set(0)}
    assert run(recipe(), [rows])[1][0]["step_tokens"] == 32.0
