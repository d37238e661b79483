"""What every objective owes the step: microbatches and devices add up to the one batch, and there is a gradient.

A new objective adds a row to `CASES`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm import objectives
from jaxlm.dist import mesh as meshes
from jaxlm.dist import place
from jaxlm.nn import transformer
from jaxlm.nn.compute import Compute
from jaxlm.nn.config import ModelConfig
from jaxlm.objectives import config as kinds
from jaxlm.objectives.reward import fresh_score
from jaxlm.training.step import Recipe, init_state, train_step

CFG = ModelConfig(d_model=16, n_layers=1, n_heads=2, vocab_size=31)
ROWS, LENGTH = 8, 10


def rows(sides=()):
    """Rows [ROWS, *sides, LENGTH] of very different lengths, completions of very different sizes, for a batch."""
    rng = np.random.default_rng(len(sides))
    shape = (ROWS, *sides, LENGTH)
    ids = rng.integers(1, CFG.V, (*shape[:-1], LENGTH + 1)).astype("int32")
    size = rng.integers(2, LENGTH + 1, (*shape[:-1], 1))
    prompt = rng.integers(0, size - 1)
    index = np.broadcast_to(np.arange(LENGTH, dtype="int32"), shape)
    inside = index < size
    batch = {"tokens": ids[..., :-1] * inside, "targets": ids[..., 1:] * inside}
    batch |= {"mask": (inside & (index >= prompt)).astype("float32"), "segments": inside.astype("int32")}
    return batch | {"positions": index * inside}


def labelled():
    return rows() | {"label": np.arange(ROWS, dtype="int32") % 3 // 2, "row": np.arange(ROWS, dtype="int32")[::-1]}


def margins():
    return rows((2,)) | {"margin": np.linspace(-1.0, 2.0, ROWS).astype("float32")}


def pairs():
    return rows((2,))


def drawn():
    rewards = np.random.default_rng(3).normal(size=ROWS).astype("float32")
    rewards[5] = np.nan
    return rows() | {"reward_0": rewards, "ended": np.ones(ROWS, "float32")}


@functools.cache
def model(seed, scored=False):
    params = transformer.init(CFG, jax.random.key(seed))["params"]
    return {"params": params | ({"score": fresh_score(CFG.D, jax.random.key(9))} if scored else {})}


class Case(NamedTuple):
    """An objective by its settings, a batch, what is trained, and what is frozen."""

    config: Any
    batch: Callable[[], dict[str, np.ndarray]]
    params: Callable[[], Any] = lambda: model(0)
    frozen: Callable[[], Any] = dict


def reference():
    return {"reference": model(1)}


def valued():
    kernel = np.random.default_rng(4).normal(size=(CFG.D, 1))
    return model(0) | {"value": {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.ones(1)}}


def teacher():
    return {"teacher": model(1)}


def projected():
    kernel = np.random.default_rng(5).normal(size=(CFG.N, CFG.D, CFG.D)) / 4
    return model(0) | {"projection": {"hidden": {"kernel": jnp.asarray(kernel, jnp.float32)}}}


def taught():
    """Rows with the top of a teacher's distributions."""
    logits = np.random.default_rng(6).normal(size=(ROWS, LENGTH, CFG.V)).astype("float32")
    found = jax.lax.top_k(jax.nn.log_softmax(logits), 5)
    tail = np.log1p(-np.exp(found[0]).sum(-1, keepdims=True))
    return rows() | {"teacher_ids": np.uint16(found[1]), "teacher_log_probs": np.concatenate([found[0], tail], -1)}


DRAWN: Any = {"rewards": ("judge.py:good",), "max_new_tokens": LENGTH, "temperature": 0.8}


CASES = {
    "next_token": Case(kinds.NextTokenConfig(z_loss=0.1), rows),
    "sft": Case(kinds.SftConfig(label_smoothing=0.1), rows),
    "distill": Case(kinds.DistillConfig(loss="jsd"), rows, frozen=teacher),
    "distill layers": Case(
        kinds.DistillConfig(hidden_weight=1.0, attention_weight=1.0), rows, params=projected, frozen=teacher
    ),
    "distill cached": Case(kinds.DistillConfig(loss="hinton", kd_weight=0.8), taught),
    "dpo": Case(kinds.DpoConfig(beta=0.5), pairs, frozen=reference),
    "dpo ipo": Case(kinds.DpoConfig(loss="ipo", beta=0.5), pairs, frozen=reference),
    "simpo": Case(kinds.SimpoConfig(), pairs),
    "orpo": Case(kinds.OrpoConfig(beta=1.0), pairs),
    "kto": Case(kinds.KtoConfig(beta=0.5, undesirable_weight=0.7), labelled, frozen=reference),
    "reward": Case(kinds.RewardConfig(center=0.1), margins, params=lambda: model(0, scored=True)),
    "grpo": Case(kinds.GrpoConfig(group_size=4, beta=0.1, **DRAWN), drawn, frozen=reference),
    "grpo rloo": Case(kinds.GrpoConfig(variant="rloo", group_size=4, beta=0.1, **DRAWN), drawn, frozen=reference),
    "ppo": Case(kinds.PpoConfig(kl_coef=0.2, **DRAWN), drawn, params=valued, frozen=reference),
}


def apply(variables, tokens, model="policy", **inputs):
    return transformer.apply(CFG, variables, tokens, compute=Compute(scan=False, attention="reference"), **inputs)


def step(case, accumulation=1, mesh=None):
    """New parameters and metrics after one step of plain gradient descent at rate 1."""
    optimizer = optax.with_extra_args_support(optax.sgd(1.0))
    recipe = Recipe(objectives.make(case.config), apply, optimizer, optax.constant_schedule(1.0), accumulation)
    batch = case.batch()
    batch = jax.tree.map(jnp.asarray, batch) if mesh is None else place.place_batch(batch, mesh)
    run = jax.jit(functools.partial(train_step, recipe))
    if mesh is None:
        state, metrics = run(init_state(recipe, case.params()), case.frozen(), batch)
    else:
        with jax.set_mesh(mesh):
            state = place.replicate(init_state(recipe, case.params()), mesh)
            state, metrics = run(state, place.replicate(case.frozen(), mesh), batch)
    return jax.device_get(state.params), {name: float(value) for name, value in metrics.items()}


@functools.cache
def whole(name):
    return step(CASES[name])


def equal(one, other):
    (params, metrics), (parts, found) = one, other
    assert metrics.keys() == found.keys()
    for name, value in metrics.items():
        assert found[name] == pytest.approx(value, rel=1e-5, abs=2e-6), name
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-6), params, parts)


@pytest.mark.parametrize("name", CASES)
def test_microbatches_equal_one_batch(name):
    equal(whole(name), step(CASES[name], accumulation=4))


@pytest.mark.parametrize("name", CASES)
def test_eight_devices_equal_one(name):
    equal(whole(name), step(CASES[name], mesh=meshes.make(meshes.MeshConfig(data=4, fsdp=2))))


@pytest.mark.parametrize("name", CASES)
def test_every_objective_moves_the_parameters(name):
    _, metrics = whole(name)
    assert np.isfinite(metrics["loss"]) and metrics["grad_norm"] > 1e-3 and metrics["skipped"] == 0.0
    assert all(np.isfinite(value) for value in metrics.values())
