"""Moments in 8 bits: the stated errors, nearness to Adam, and what they cost in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.optim.adam8bit import (
    BLOCK,
    decode_positive,
    decode_signed,
    encode_positive,
    encode_signed,
    scale_by_adam8bit,
)


def blocks_of(x):
    """The largest magnitude in the block of each entry."""
    width = x.shape[-1]
    parts = [x[..., i : i + BLOCK] for i in range(0, width, BLOCK)]
    return np.concatenate([np.broadcast_to(np.abs(p).max(-1, keepdims=True), p.shape) for p in parts], -1)


@settings(max_examples=15, deadline=None)
@given(
    width=st.sampled_from([7, 256, 600]),
    seed=st.integers(0, 2**16),
    spread=st.floats(0.1, 8.0),
    size=st.floats(1e-12, 1e12),
)
def test_errors_stay_within_what_is_stated(width, seed, spread, size):
    rng = np.random.default_rng(seed)
    x = (size * rng.standard_normal((3, width)) * np.exp(-spread * rng.random((3, width)))).astype(np.float32)
    largest = blocks_of(x)
    codes, scale = encode_signed(jnp.asarray(x))
    assert (codes.shape, codes.dtype, scale.shape) == (x.shape, jnp.int8, (3, -(-width // BLOCK)))
    assert np.all(np.abs(decode_signed(codes, scale) - x) <= largest / 60)
    square = np.square(x.astype(np.float64)).astype(np.float32)
    codes, scale = encode_positive(jnp.asarray(square))
    root = np.sqrt(np.asarray(decode_positive(codes, scale), np.float64))
    assert np.all(np.abs(root - np.abs(x)) <= largest / 120)
    assert np.all((np.asarray(codes) > 0) == (square > 0))


def test_zero_blocks_stay_zero():
    zero = jnp.zeros((2, 300))
    assert not np.any(decode_signed(*encode_signed(zero))) and not np.any(decode_positive(*encode_positive(zero)))


def test_stays_near_adam_and_needs_a_quarter_of_its_memory():
    """On a noisy quadratic with gradients over four orders of magnitude: paths within 5 % of the way travelled."""
    rng = np.random.default_rng(0)
    scales = jnp.asarray(10.0 ** rng.uniform(-4, 0, (2, 512)), jnp.float32)
    start = {"w": jnp.asarray(rng.standard_normal((2, 512)), jnp.float32)}

    def run(rule):
        @jax.jit
        def step(carry, key):
            params, state = carry
            noise = jax.random.normal(key, scales.shape)
            updates, state = rule.update({"w": scales * (params["w"] + 0.5 * noise)}, state, params)
            return (optax.apply_updates(params, jax.tree.map(lambda u: -0.01 * u, updates)), state), None

        (params, state), _ = jax.lax.scan(step, (start, rule.init(start)), jax.random.split(jax.random.key(0), 100))
        return np.asarray(params["w"]), sum(x.nbytes for x in jax.tree.leaves(state))

    exact, full = run(optax.scale_by_adam(0.9, 0.95, 1e-8))
    ours, small = run(scale_by_adam8bit(0.9, 0.95, 1e-8))
    travelled = np.abs(exact - np.asarray(start["w"])).mean()
    assert travelled > 0.3
    assert np.abs(ours - exact).mean() < 0.05 * travelled
    assert small < 0.27 * full


def test_first_step_is_a_step_of_one():
    w = {"w": jnp.ones((4, 300))}
    rule = scale_by_adam8bit(0.9, 0.95, 1e-8)
    updates, state = rule.update({"w": -3.0 * w["w"]}, rule.init(w))
    np.testing.assert_allclose(updates["w"], -1.0, rtol=1e-5)
    assert int(state.steps) == 1
