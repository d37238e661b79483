"""Preference objectives: where they start, what must not matter to them, and their parts one by one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm import objectives
from jaxlm.nn import transformer
from jaxlm.nn.compute import Compute
from jaxlm.nn.config import LoraConfig, ModelConfig
from jaxlm.objectives import preference
from jaxlm.objectives.config import DpoConfig, KtoConfig
from jaxlm.objectives.kto import mismatched
from jaxlm.objectives.sequences import Completions, frozen_log_probs, log_ratios, without_prompt
from jaxlm.params import lora
from jaxlm.training.step import Recipe, init_state, train_step

CFG = ModelConfig(d_model=16, n_layers=2, n_heads=2, vocab_size=31)
ADAPTED = dataclasses.replace(CFG, lora=LoraConfig(r=4))
COMPUTE = Compute(scan=False, attention="reference")


@functools.cache
def model(seed=0):
    return transformer.init(CFG, jax.random.key(seed))


def apply(variables, tokens, model="policy", **inputs):
    return transformer.apply(ADAPTED, variables, tokens, compute=COMPUTE, **inputs)


def row(ids, prompt, length, left=0):
    """Columns [length] of one sequence, its labels after `prompt` tokens, with `left` places of padding before it."""
    count = len(ids) - 1
    place = slice(left, left + count)
    columns = {name: np.zeros(length, np.int32) for name in ("tokens", "targets", "mask", "segments", "positions")}
    columns["tokens"][:] = columns["targets"][:] = 5  # padding has ids that could be words
    columns["tokens"][place], columns["targets"][place] = ids[:-1], ids[1:]
    columns["mask"][place] = np.arange(1, count + 1) >= prompt
    columns["segments"][place], columns["positions"][place] = 1, np.arange(count)
    return columns


def batch_of(rows):
    batch = {name: jnp.asarray(np.stack([r[name] for r in rows])) for name in rows[0]}
    return batch | {"mask": batch["mask"].astype(jnp.float32)}


SIZES = [(3, 8), (5, 6), (1, 11), (2, 4)]
"""Tokens of the prompt, and of the whole sequence."""
SEQUENCES = [np.random.default_rng(i).integers(1, 31, size) for i, (_, size) in enumerate(SIZES)]
ROWS = [row(ids, prompt, 12) for ids, (prompt, _) in zip(SEQUENCES, SIZES, strict=True)]


def pairs():
    others = [row(np.random.default_rng(9 + i).integers(1, 31, 9), size, 12) for i, (size, _) in enumerate(SIZES)]
    chosen, rejected = batch_of(ROWS), batch_of(others)
    return {name: jnp.stack([x, rejected[name]], axis=1) for name, x in chosen.items()}


def steps(config, batch, count, trained, frozen, accumulation=1):
    optimizer = optax.with_extra_args_support(optax.adam(1e-2))
    recipe = Recipe(objectives.make(config), apply, optimizer, optax.constant_schedule(1e-2), accumulation)
    state = jax.jit(functools.partial(init_state, recipe))(trained)
    run = jax.jit(functools.partial(train_step, recipe), donate_argnums=0)
    history = []
    for _ in range(count):
        state, metrics = run(state, frozen, batch)
        history.append({name: float(value) for name, value in metrics.items()})
    return history


@pytest.mark.parametrize("reference", ["adapter-off", "copy"])
def test_dpo_starts_at_ln_2_with_margins_of_exactly_0_and_then_moves(reference):
    if reference == "adapter-off":
        params = model()["params"]
        trained, frozen = {"lora": lora.init(ADAPTED, jax.random.key(1), params)}, {"params": params}
    else:
        trained, frozen = jax.tree.map(jnp.copy, model()), {"reference": model()}
    first, *_, last = steps(DpoConfig(reference=reference), pairs(), 4, trained, frozen, accumulation=2)
    assert first["loss"] == np.float32(np.log(2.0))
    for name in ("chosen", "rejected", "margins", "accuracies"):
        assert first[f"rewards/{name}"] == 0.0, name
    assert first["grad_norm"] > 1e-3
    assert last["rewards/margins"] > 1e-3 and last["loss"] < 0.69


def test_a_ratio_is_0_within_rounding_alone_and_keeps_its_gradient():
    reference = jnp.array([-100.0, -100.0, -0.5])
    lengths = jnp.array([50.0, 50.0, 3.0])
    difference = jnp.array([3e-5, 3e-3, -1e-6])
    ratios = lambda x: log_ratios(Completions(reference + x, lengths), reference)  # noqa: E731
    values = ratios(difference)
    assert values[0] == 0.0 and values[2] == 0.0
    assert values[1] == pytest.approx(3e-3, rel=1e-2)
    np.testing.assert_array_equal(jax.grad(lambda x: jnp.sum(ratios(x)))(difference), jnp.ones(3))


def log_probs(rows):
    return np.asarray(frozen_log_probs(apply, model(), batch_of(rows)))


@functools.cache
def alone():
    return [float(log_probs([r])[0]) for r in ROWS]


@pytest.mark.parametrize("left, length", [(0, 20), (9, 20)])
def test_log_probabilities_of_a_completion_do_not_depend_on_padding_or_neighbours(left, length):
    rows = [row(ids, prompt, length, min(left, length + 1 - len(ids)))
            for ids, (prompt, _) in zip(SEQUENCES, SIZES, strict=True)]  # fmt: skip
    np.testing.assert_allclose(log_probs(rows), alone(), atol=1e-5)


def test_log_probabilities_of_a_completion_do_not_depend_on_packing():
    packed = {name: np.concatenate([r[name][: len(ids) - 1] for r, ids in zip(ROWS, SEQUENCES, strict=True)])
              for name in ROWS[0]}  # fmt: skip
    numbers = np.repeat(np.arange(len(ROWS)), [len(ids) - 1 for ids in SEQUENCES])
    packed["segments"] = numbers + 1
    # One row for each completion, in which the others are no labels.
    rows = [packed | {"mask": packed["mask"] * (numbers == number)} for number in range(len(ROWS))]
    np.testing.assert_allclose(log_probs(rows), alone(), atol=1e-5)


@pytest.mark.parametrize("left", [0, 3])
def test_without_its_prompt_a_completion_is_as_if_it_stood_alone(left):
    rows = [row(ids, prompt, 15, left) for ids, (prompt, _) in zip(SEQUENCES, SIZES, strict=True)]
    found = frozen_log_probs(apply, model(), without_prompt(batch_of(rows)))
    bare = [row(ids[prompt:], 1, 12) for ids, (prompt, _) in zip(SEQUENCES, SIZES, strict=True)]
    np.testing.assert_allclose(found, log_probs(bare), atol=1e-5)
    twice = {name: jnp.stack([x, x], axis=1) for name, x in batch_of(rows).items()}
    np.testing.assert_allclose(frozen_log_probs(apply, model(), without_prompt(twice))[:, 1], found, atol=1e-5)


def test_the_preference_without_prompts_is_counted_strictly():
    ones = {"rows": jnp.float32(4.0)}
    batch = pairs()
    accuracy = preference.unconditional_accuracy(apply, model(), batch, ones)
    values = frozen_log_probs(apply, model(), without_prompt(batch))
    assert accuracy == pytest.approx(np.mean(values[:, 0] > values[:, 1]))
    same = {name: jnp.stack([x[:, 0], x[:, 0]], axis=1) for name, x in batch.items()}
    assert preference.unconditional_accuracy(apply, model(), same, ones) == 0.0


@pytest.mark.parametrize("loss", preference.LOSSES)
def test_losses_and_gradients_are_finite_far_out(loss):
    config = DpoConfig(loss=loss, label_smoothing=0.1 if loss in ("robust", "cdpo") else 0.0)
    d = jnp.array([-5000.0, -100.0, 0.0, 100.0, 5000.0])
    function = lambda d: jnp.sum(preference.LOSSES[loss](config, d, d / 10))  # noqa: E731
    assert jnp.isfinite(function(d)) and jnp.isfinite(jax.grad(function)(d)).all()


def test_log1mexp_is_accurate_and_finite_at_both_ends():
    x = np.array([-1e-7, -1e-3, -0.5, -0.6931, -0.7, -5.0, -60.0], np.float32)
    exact = x.astype(np.float64)
    wanted = np.where(exact > -1.0, np.log(-np.expm1(exact)), np.log1p(-np.exp(exact)))
    np.testing.assert_allclose(preference.log1mexp(jnp.asarray(x)), wanted, rtol=2e-6)
    ends = jnp.array([0.0, -1e-30, -1000.0])
    assert jnp.isfinite(preference.log1mexp(ends)).all()
    assert jnp.isfinite(jax.vmap(jax.grad(preference.log1mexp))(ends)).all()


def sequence(batch, index):
    """Ids and number of prompt tokens of a row as they came."""
    inside = np.asarray(batch["segments"][index]) != 0
    tokens, targets = np.asarray(batch["tokens"][index])[inside], np.asarray(batch["targets"][index])[inside]
    labels = np.asarray(batch["mask"][index])[inside] > 0
    np.testing.assert_array_equal(tokens[1:], targets[:-1])
    np.testing.assert_array_equal(np.asarray(batch["positions"][index])[inside], np.arange(inside.sum()))
    first = int(np.argmax(labels))
    assert labels[first:].all()
    return [*tokens[:1], *targets], first + 1


@pytest.mark.parametrize("left", [0, 2])
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 0, 3, 1]])
def test_completions_are_matched_with_the_prompt_of_the_next_row_whatever_the_order(order, left):
    rows = [row(SEQUENCES[i], SIZES[i][0], 14, left) for i in order]
    padding = {name: np.zeros_like(column) for name, column in rows[0].items()}
    batch = batch_of([*rows, padding]) | {"row": jnp.array([*order, 0])}
    found = mismatched(batch)
    for place, i in enumerate(order):
        before = (i - 1) % len(order)
        prompt, completion = SEQUENCES[i][: SIZES[i][0]], SEQUENCES[before][SIZES[before][0] :]
        ids, size = sequence(found, place)
        assert ids == [*prompt, *completion] and size == len(prompt)


def test_a_matched_completion_that_is_too_long_is_cut():
    batch = batch_of([row(ids, prompt, 10) for ids, (prompt, _) in zip(SEQUENCES, SIZES, strict=True)])
    ids, size = sequence(mismatched(batch), 3)  # a prompt of 2 and the completion of 10
    assert size == 2 and len(ids) == 11
    assert ids == [*SEQUENCES[3][:2], *SEQUENCES[2][1:10]]


def test_kto_starts_at_half_of_the_weights_without_divergence():
    batch = batch_of(ROWS) | {"label": jnp.array([1, 0, 1, 1])}
    config = KtoConfig(desirable_weight=1.0, undesirable_weight=2.0)
    first, *_, last = steps(config, batch, 4, jax.tree.map(jnp.copy, model()), {"reference": model()})
    assert first["kl"] == 0.0 and first["loss"] == pytest.approx((3 * 0.5 + 1.0) / 4, rel=1e-6)
    assert first["rewards/chosen"] == first["rewards/rejected"] == 0.0
    assert last["rewards/chosen"] > last["rewards/rejected"] and last["loss"] < first["loss"]
