"""Instruction tuning: which tokens count, that cutting the batch changes nothing, noise in training alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import objectives
from jaxlm.data.packing import Examples, rows_of
from jaxlm.nn import transformer
from jaxlm.nn.config import ModelConfig
from jaxlm.nn.dropout import embedding_noise
from jaxlm.objectives.config import SftConfig
from jaxlm.optim import chain, schedules
from jaxlm.optim.config import OptimizerConfig
from jaxlm.training.step import Recipe, init_state, train_step

CFG = ModelConfig(d_model=16, n_layers=1, n_heads=2, vocab_size=32, max_length=32)
LENGTH = 16
ROWS = 12


def examples(sizes, seed=0):
    """Examples of these numbers of tokens; the last third of each, at least one token, are labels."""
    rng = np.random.default_rng(seed)
    labels = [np.arange(size) >= size - max(size // 3, 1) for size in sizes]
    tokens = rng.integers(1, CFG.V, sum(sizes)).astype(np.int32)
    return Examples(tokens, np.concatenate(labels), np.cumsum([0, *sizes]))


def batch_of(sizes, packing):
    """The rows of the examples, filled up with rows of padding: one shape, one compilation."""
    rows = rows_of(examples(sizes), LENGTH, packing)
    batch = {name: np.stack([rows[i][name] for i in range(len(rows))]) for name in rows[0]}
    return {name: jnp.asarray(np.pad(values, ((0, ROWS - len(rows)), (0, 0)))) for name, values in batch.items()}


@functools.cache
def recipe(neftune=0.0, accumulation=1):
    optimizer = OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup=0.0)
    abstract = jax.eval_shape(functools.partial(transformer.init, CFG), jax.random.key(0))
    return Recipe(
        objective=objectives.make(SftConfig(neftune=neftune)),
        apply=functools.partial(transformer.apply, CFG),
        optimizer=chain.make(optimizer, CFG, abstract, 10),
        schedule=schedules.make(optimizer, 10),
        accumulation=accumulation,
    )


@functools.cache
def compiled(neftune=0.0, accumulation=1):
    return jax.jit(functools.partial(train_step, recipe(neftune, accumulation)))


@functools.cache
def params():
    return transformer.init(CFG, jax.random.key(0))


def stepped(batch, step=0, **settings):
    state = init_state(recipe(**settings), params())
    return compiled(**settings)(state._replace(step=state.step + step), {}, batch)


SIZES = [17, 4, 9, 5, 12, 3, 7, 2]


def test_packed_is_alone():
    """Loss, gradient and count of labels of a batch are those of the same examples one a row."""
    alone, packed = batch_of(SIZES, False), batch_of(SIZES, True)
    assert int(alone["segments"].max()) == 1 < int(packed["segments"].max())
    (_, a), (_, b) = stepped(alone), stepped(packed)
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(a[name], b[name], rtol=1e-5)
    assert a["supervised_tokens"] == b["supervised_tokens"] == sum(max(size // 3, 1) for size in SIZES)
    assert a["step_tokens"] == b["step_tokens"] == sum(SIZES) - len(SIZES)


def test_each_document_has_the_logits_it_has_alone():
    batch = batch_of(SIZES, True)
    whole = transformer.logits(CFG, params(), batch["tokens"], batch["positions"], batch["segments"])
    segments = np.asarray(batch["segments"])
    documents = [(row, segment) for row in range(ROWS) for segment in range(1, segments[row].max() + 1)]
    assert len(documents) == len(SIZES)
    alone = np.zeros((ROWS, LENGTH), np.int32)
    places = [np.nonzero(segments[row] == segment)[0] for row, segment in documents]
    for number, ((row, _), at) in enumerate(zip(documents, places, strict=True)):
        alone[number, : len(at)] = batch["tokens"][row, at]
        assert batch["positions"][row, at].tolist() == list(range(len(at)))
    logits = transformer.logits(CFG, params(), jnp.asarray(alone))  # causal: what stands behind does not matter
    for number, ((row, _), at) in enumerate(zip(documents, places, strict=True)):
        np.testing.assert_allclose(whole[row, at], logits[number, : len(at)], atol=1e-5)


@pytest.mark.parametrize("packing", [False, True])
def test_microbatches_of_unequal_label_counts_add_up_to_the_batch(packing):
    batch = batch_of([17, 2, 3, 2, 16, 14, 2, 2, 9, 8, 5, 4], packing)
    counts = batch["mask"].reshape(4, -1).sum(1)
    assert len(set(counts.tolist())) > 1
    (one, a), (four, b) = stepped(batch), stepped(batch, accumulation=4)
    for name in ("loss", "grad_norm", "supervised_tokens"):
        np.testing.assert_allclose(a[name], b[name], rtol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), one.params, four.params)


def test_what_is_no_label_teaches_nothing():
    """Other targets in prompts and padding, the same loss and gradient."""
    batch = batch_of(SIZES, False)
    changed = batch | {"targets": jnp.where(batch["mask"] > 0, batch["targets"], 3)}
    (_, found), (_, wanted) = stepped(changed), stepped(batch)
    assert found["loss"] == wanted["loss"] and found["grad_norm"] == wanted["grad_norm"]


def test_noise_is_of_the_size_that_the_paper_says():
    """Uniform in +- alpha / sqrt(L D) of the document, whatever shares its row; none without a key."""
    key, alpha = jax.random.key(3), 5.0
    x = jnp.zeros((64, LENGTH, 16))
    segments = jnp.broadcast_to(jnp.array([1] * 4 + [2] * 9 + [0] * 3, jnp.int32), (64, LENGTH))
    noise = np.asarray(embedding_noise(x, segments, alpha, key))
    for part, size in ((slice(0, 4), 4), (slice(4, 13), 9)):
        limit = alpha / np.sqrt(size * 16)
        assert 0.98 * limit < np.abs(noise[:, part]).max() <= limit
        np.testing.assert_allclose(noise[:, part].std(), limit / np.sqrt(3), rtol=0.02)
        assert abs(noise[:, part].mean()) < 0.02 * limit
    whole = np.asarray(embedding_noise(x, None, alpha, key))
    assert 0.98 < np.abs(whole).max() / (alpha / np.sqrt(LENGTH * 16)) <= 1


def test_noise_is_for_training_alone():
    batch = batch_of(SIZES, True)
    weights = objectives.make(SftConfig()).weights(batch)
    noisy = jax.jit(lambda key: recipe(5.0).objective.loss(recipe().apply, params(), {}, batch, weights, key)[0])
    quiet = jax.jit(lambda: recipe(5.0).objective.loss(recipe().apply, params(), {}, batch, weights, None)[0])
    plain = stepped(batch)[1]["loss"]
    np.testing.assert_allclose(quiet(), plain, rtol=1e-6)
    first, second = noisy(jax.random.key(1)), noisy(jax.random.key(2))
    assert len({float(first), float(second), float(plain)}) == 3
    assert first == noisy(jax.random.key(1))


def test_every_step_has_its_own_noise():
    batch = batch_of(SIZES, True)
    losses = [float(stepped(batch, step, neftune=5.0)[1]["loss"]) for step in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
