"""Advantages, clipped losses and divergences against references in plain NumPy, float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.objectives import policy_gradient as pg

CLOSE = {"rtol": 1e-6, "atol": 1e-6}
RANDOM = np.random.default_rng(0)


def reference_gae(rewards, values, mask, gamma, lam):
    """Row by row over the positions inside the mask alone."""
    advantages, returns = np.zeros(rewards.shape), np.zeros(rewards.shape)
    for row in range(len(rewards)):
        inside = np.flatnonzero(mask[row])
        running = 0.0
        for i in reversed(range(len(inside))):
            t = inside[i]
            after = values[row, inside[i + 1]] if i + 1 < len(inside) else 0.0
            running = rewards[row, t] + gamma * after - values[row, t] + gamma * lam * running
            advantages[row, t], returns[row, t] = running, running + values[row, t]
    return advantages, returns


def reference_groups(rewards, size, scale):
    out = np.zeros(len(rewards))
    for start in range(0, len(rewards), size):
        group = np.asarray(rewards[start : start + size], np.float64)
        known = group[~np.isnan(group)]
        if len(known) > 1:
            spread = np.std(known, ddof=1) + 1e-4 if scale == "group" else 1.0
            out[start : start + size] = np.nan_to_num((group - known.mean()) / spread)
    return out


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 0.0), (0.99, 1.0)])
def test_gae_is_the_recursion_over_the_positions_inside_the_mask(gamma, lam):
    rewards, values = RANDOM.normal(size=(2, 5, 9))
    mask = RANDOM.integers(0, 2, size=(5, 9))
    mask[0], mask[1] = 0, 1
    wanted = reference_gae(rewards, values, mask, gamma, lam)
    dirty = [np.where(mask == 1, x, bad) for x, bad in ((rewards, np.nan), (values, np.inf))]
    for given_mask in (mask, mask.astype(bool), mask.astype(np.float32)):
        for got, want in zip(pg.gae(*dirty, given_mask, gamma, lam), wanted, strict=True):
            np.testing.assert_allclose(got, want, **CLOSE)


def test_gae_of_a_single_reward_at_the_end_is_that_reward_minus_the_value():
    values = jnp.asarray([[0.1, 0.2, 0.3]])
    advantages, returns = pg.gae(jnp.asarray([[0.0, 0.0, 1.0]]), values, jnp.ones((1, 3)), 1.0, 1.0)
    np.testing.assert_allclose(returns, [[1.0, 1.0, 1.0]], rtol=1e-6)
    np.testing.assert_allclose(advantages, 1.0 - values, rtol=1e-6)


@given(seed=st.integers(0, 2**31), shift=st.floats(-50, 50), spread=st.floats(0.1, 20))
@settings(max_examples=20, deadline=None)
def test_whitened_values_have_mean_0_and_unbiased_variance_1(seed, shift, spread):
    random = np.random.default_rng(seed)
    x, mask = random.normal(shift, spread, (4, 7)), random.integers(0, 2, (4, 7)).astype(bool)
    mask[0, :2] = True
    got = np.asarray(pg.whiten(np.where(mask, x, np.nan), mask), np.float64)
    inside = x[mask]
    np.testing.assert_allclose(got[mask], (inside - inside.mean()) / inside.std(ddof=1), rtol=1e-3, atol=1e-4)
    assert not got[~mask].any()


def test_whiten_equals_the_formula():
    x, mask = RANDOM.normal(size=(6, 5)), RANDOM.integers(0, 2, (6, 5))
    inside = x[mask == 1]
    want = np.where(mask, (x - inside.mean()) / np.sqrt(inside.var(ddof=1) + 1e-8), 0.0)
    np.testing.assert_allclose(pg.whiten(x, mask), want, **CLOSE)


@pytest.mark.parametrize("scale", pg.SCALES)
def test_group_advantages_leave_out_what_is_not_scorable(scale):
    rewards = RANDOM.normal(size=24)
    rewards[[1, 6, 7, 12, 13, 14, 15, 17, 18, 19]] = np.nan  # some of a group, all of one, all but one
    rewards[8:12] = 0.3
    got = np.asarray(pg.group_advantages(rewards, 4, scale))
    np.testing.assert_allclose(got, reference_groups(rewards, 4, scale), **CLOSE)
    assert not got[np.isnan(rewards)].any()
    assert not got[8:12].any(), "a group whose members are alike has nothing to learn"
    assert got[16] == 0.0, "one alone has nothing to be compared with"


def test_leave_one_out_subtracts_the_mean_of_the_others():
    rewards = RANDOM.normal(size=12)
    rewards[5] = np.nan
    want = np.zeros(12)
    for i in range(12):
        group = [j for j in range(i // 4 * 4, i // 4 * 4 + 4) if j != i and not np.isnan(rewards[j])]
        want[i] = 0.0 if np.isnan(rewards[i]) else rewards[i] - rewards[group].mean()
    np.testing.assert_allclose(pg.leave_one_out(rewards, 4), want, **CLOSE)


def test_group_deviations():
    rewards = np.array([0.0, 1.0, np.nan, 1.0, 2.0, 2.0, np.nan, np.nan, 5.0])
    got = pg.group_deviations(rewards, 3)
    np.testing.assert_allclose(got, [np.std([0, 1], ddof=1), np.std([1, 2, 2], ddof=1), np.nan], rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: pg.group_advantages(np.zeros(5), 2), "groups of 2"),
        (lambda: pg.group_advantages(np.zeros(4), 2, "batch"), "group, none"),
        (lambda: pg.leave_one_out(np.zeros((2, 2)), 2), "groups of 2"),
        (lambda: pg.divergence(jnp.zeros(2), jnp.zeros(2), "k4"), "k1, k2, k3"),
    ],
)
def test_what_cannot_be_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_the_score_stands_at_the_last_token_and_every_token_pays_for_its_divergence():
    mask = np.array([[0, 1, 1, 0], [1, 0, 1, 1], [0, 0, 0, 0]])
    kl = RANDOM.normal(size=(3, 4))
    got = pg.shaped_rewards(jnp.asarray(np.where(mask, kl, np.nan)), jnp.asarray([2.0, 3.0, 5.0]), mask, 0.1)
    want = np.where(mask, -0.1 * kl, 0.0)
    want[0, 2] += 2.0
    want[1, 3] += 3.0
    np.testing.assert_allclose(got, want, **CLOSE)


def test_divergence_estimates():
    a, b = RANDOM.normal(size=(2, 50))
    d = a - b
    for kind, want in (("k1", d), ("k2", d**2 / 2), ("k3", np.exp(-d) + d - 1)):
        np.testing.assert_allclose(pg.divergence(a, b, kind), want, **CLOSE)
    tiny = pg.divergence(jnp.float32(1e-4), jnp.float32(0.0), "k3")
    np.testing.assert_allclose(tiny, 5e-9, rtol=1e-2)


def test_unbiased_estimates_have_the_divergence_as_their_mean():
    logits, other = RANDOM.normal(size=(2, 8))
    p, q = (np.exp(x) / np.exp(x).sum() for x in (logits, other))
    exact = np.sum(p * np.log(p / q))
    for kind in ("k1", "k3"):
        estimates = pg.divergence(np.log(p), np.log(q), kind)
        np.testing.assert_allclose(np.sum(p * np.asarray(estimates)), exact, rtol=1e-5)


def test_clipped_losses():
    ratio, advantages = np.exp(RANDOM.normal(size=(2, 40)))
    advantages -= 1.0
    want = np.maximum(-advantages * ratio, -advantages * np.clip(ratio, 0.8, 1.2))
    np.testing.assert_allclose(pg.policy_loss(ratio, advantages, 0.2), want, **CLOSE)
    values, old, returns = RANDOM.normal(size=(3, 40))
    want = np.maximum((values - returns) ** 2, (np.clip(values, old - 0.2, old + 0.2) - returns) ** 2)
    np.testing.assert_allclose(pg.value_loss(values, old, returns, 0.2), want, **CLOSE)


def test_what_counts_as_clipped_is_what_has_no_gradient():
    ratio = jnp.asarray(np.exp(RANDOM.normal(size=200)), jnp.float32)
    advantages = jnp.asarray(RANDOM.normal(size=200), jnp.float32)
    slope = jax.grad(lambda r: jnp.sum(pg.policy_loss(r, advantages, 0.2)))(ratio)
    clipped = np.asarray(pg.is_clipped(ratio, advantages, 0.2))
    assert clipped.any()
    np.testing.assert_array_equal(np.asarray(slope) == 0.0, clipped)


def test_the_coefficient_follows_the_divergence_by_at_most_a_fifth_a_horizon():
    assert float(pg.adapted_kl(jnp.float32(0.1), jnp.float32(6.0), 6.0, 64)) == pytest.approx(0.1)
    assert float(pg.adapted_kl(jnp.float32(0.1), jnp.float32(60.0), 6.0, 100, 1000)) == pytest.approx(0.102)
    assert float(pg.adapted_kl(jnp.float32(0.1), jnp.float32(3.0), 6.0, 100, 1000)) == pytest.approx(0.098)
