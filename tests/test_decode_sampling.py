"""Sampling against transformers' own processors, and the draws against the distributions they come from."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation import logits_process as theirs

from jaxlm.decode import sampling
from jaxlm.decode.sampling import Choice

ROWS, V = 6, 211
process = jax.jit(sampling.process)
sample = jax.jit(sampling.sample)


def scores(ties: bool) -> np.ndarray:
    values = 4.0 * np.random.default_rng(0).standard_normal((ROWS, V)).astype(np.float32)
    return np.round(values).astype(np.float32) if ties else values


def seen_tokens() -> np.ndarray:
    return np.random.default_rng(1).integers(0, V, (ROWS, 30))


def seen_mask() -> np.ndarray:
    mask = np.zeros((ROWS, V), bool)
    np.put_along_axis(mask, seen_tokens(), True, axis=1)
    return mask


def reference(values: np.ndarray, choice: Choice) -> np.ndarray:
    """transformers' processors in its order, on rows of one setting."""
    chain = []
    if choice.repetition_penalty != 1.0:
        chain.append(theirs.RepetitionPenaltyLogitsProcessor(choice.repetition_penalty))
    if choice.temperature not in (0.0, 1.0):
        chain.append(theirs.TemperatureLogitsWarper(choice.temperature))
    if choice.temperature and choice.top_k:
        chain.append(theirs.TopKLogitsWarper(choice.top_k))
    if choice.temperature and choice.top_p < 1.0:
        chain.append(theirs.TopPLogitsWarper(choice.top_p))
    if choice.temperature and choice.min_p:
        chain.append(theirs.MinPLogitsWarper(choice.min_p))
    out = torch.tensor(values)
    for processor in chain:
        out = processor(torch.tensor(seen_tokens()), out)
    return out.numpy()


CHOICES = {
    "off": Choice(1.0),
    "greedy keeps the penalty alone": Choice(0.0, top_k=3, top_p=0.5, repetition_penalty=1.3),
    "penalty": Choice(1.0, repetition_penalty=1.7),
    "penalty below 1": Choice(1.0, repetition_penalty=0.6),
    "temperature": Choice(0.6),
    "top-k": Choice(1.0, top_k=7),
    "top-k of one": Choice(1.0, top_k=1),
    "top-k above V": Choice(1.0, top_k=1000),
    "top-p": Choice(1.0, top_p=0.83),
    "top-p small": Choice(1.0, top_p=0.001),
    "min-p": Choice(1.0, min_p=0.07),
    "all": Choice(1.4, top_k=40, top_p=0.9, min_p=0.03, repetition_penalty=1.2),
}


# Which of equal scores a sort puts first is left open by torch: top-p with ties has a test of its own.
CASES = [(name, ties) for name, c in CHOICES.items() for ties in (False, True) if not (ties and 0 < c.top_p < 1)]


@pytest.mark.parametrize(("name", "ties"), CASES)
def test_processors_equal_those_of_transformers(name, ties):
    choice, values = CHOICES[name], scores(ties)
    got = process(values, seen_mask(), sampling.settings([choice] * ROWS, range(ROWS), [[]] * ROWS))
    want = reference(values, choice)
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want))
    np.testing.assert_allclose(np.asarray(got)[np.isfinite(want)], want[np.isfinite(want)], rtol=1e-6)


def test_top_p_with_ties_is_a_stable_sort():
    values = np.round(scores(True) / 3.0)
    for p in (0.01, 0.4, 0.77, 0.96):
        kept = np.isfinite(jax.jit(sampling.keep_top_p)(values, np.full(ROWS, p, np.float32)))
        for row in range(ROWS):
            order = np.argsort(values[row], kind="stable")
            probs = np.exp(values[row][order] - values[row].max())
            gone = np.cumsum(probs / probs.sum()) <= 1.0 - p
            gone[-1] = False
            assert sorted(order[~gone]) == sorted(np.flatnonzero(kept[row])), (p, row)


def test_mixed_rows_equal_each_row_alone_and_share_a_program():
    choices = [*CHOICES.values()][:ROWS]
    values, mask, traces = scores(False), seen_mask(), []

    @jax.jit
    def run(*inputs):
        traces.append(1)
        return sampling.process(*inputs)

    mixed = run(values, mask, sampling.settings(choices, range(ROWS), [[]] * ROWS))
    for row, choice in enumerate(choices):
        alone = run(values, mask, sampling.settings([choice] * ROWS, range(ROWS), [[]] * ROWS))
        np.testing.assert_array_equal(mixed[row], alone[row])
    assert len(traces) == 1


def test_argmax_is_the_first_of_the_largest():
    values = scores(True)
    np.testing.assert_array_equal(jax.jit(sampling.argmax)(values), np.argmax(values, axis=1))


@functools.partial(jax.jit, static_argnums=1)
def many(settings: sampling.Settings, draws: int, values: jax.Array) -> jax.Array:
    seen = jnp.zeros(values.shape, bool)

    def one(position: jax.Array) -> jax.Array:
        return sampling.sample(values, seen, settings, jnp.full(values.shape[0], position))[0]

    return jax.lax.map(one, jnp.arange(draws), batch_size=500)


def chi_square_p(counts: np.ndarray, probs: np.ndarray) -> float:
    """The chance of counts at least so far from the expected ones (Wilson and Hilferty's normal approximation)."""
    assert counts[probs == 0].sum() == 0
    expected, counts = counts.sum() * probs[probs > 0], counts[probs > 0]
    x, df = float(((counts - expected) ** 2 / expected).sum()), len(counts) - 1
    z = ((x / df) ** (1 / 3) - (1 - 2 / (9 * df))) / (2 / (9 * df)) ** 0.5
    return 0.5 * float(torch.special.erfc(torch.tensor(z / 2**0.5)))


@pytest.mark.parametrize("choice", [Choice(1.0, seed=5), Choice(1.5, top_k=9, seed=6), Choice(1.8, top_p=0.8, seed=7)])
def test_draws_follow_the_processed_distribution(choice):
    values = 1.2 * np.random.default_rng(3).standard_normal((2, 23)).astype(np.float32)
    s = sampling.settings([choice] * 2, range(2), [[]] * 2)
    probs = np.asarray(jax.nn.softmax(process(values, np.zeros(values.shape, bool), s), axis=1), np.float64)
    drawn = np.asarray(many(s, 6000, values))
    for row in range(2):
        counts = np.bincount(drawn[:, row], minlength=23)
        assert chi_square_p(counts, probs[row] / probs[row].sum()) > 1e-4
    # Rows have streams of their own: equal draws are no more frequent than chance has it.
    chance = float((probs[0] * probs[1]).sum())
    assert abs(np.mean(drawn[:, 0] == drawn[:, 1]) - chance) < 5 * (chance / 6000) ** 0.5


def test_a_draw_depends_on_key_position_and_scores_alone():
    values = scores(False)
    s = sampling.settings([Choice(1.0, seed=9)] * ROWS, range(ROWS), [[]] * ROWS)
    position = np.arange(3, 3 + ROWS, dtype=np.int32)
    token, log_prob = sample(values, seen_mask(), s, position)
    backward = sample(values[::-1], seen_mask()[::-1], jax.tree.map(lambda x: x[::-1], s), position[::-1])
    np.testing.assert_array_equal(token, backward[0][::-1])
    want = jax.nn.log_softmax(values, axis=1)[np.arange(ROWS), token]
    np.testing.assert_allclose(log_prob, want, rtol=1e-5)
    other = sample(values, seen_mask(), s, position + 1)[0]
    assert np.any(other != token)


def test_drawing_never_takes_what_has_no_weight():
    probs = np.zeros((4, 100), np.float32)
    probs[:, [3, 40, 99]] = [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0.3, 0.3, 0.4]]
    for u in (0.0, 0.2999999, 0.3, 0.6, 0.99999994):
        token = jax.jit(sampling.draw)(probs, np.full(4, u, np.float32))
        assert np.all(probs[np.arange(4), token] > 0), u


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -1.0), ("temperature", float("nan")), ("top_k", -1), ("top_k", 1.5), ("top_p", 1.1),
     ("min_p", -0.1), ("repetition_penalty", 0.0), ("seed", 0.5), ("top_p", "a")],
)  # fmt: skip
def test_settings_that_cannot_be_are_named(field, value):
    with pytest.raises(ValueError, match=f"^{field}: "):
        sampling.settings([Choice(**{field: value})], [0], [[]])
