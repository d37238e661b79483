"""Rotary positions: tables equal transformers' for every kind, and the rotation's own properties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, Phi3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from jaxlm.interop.hf import read_config
from jaxlm.nn import rope
from jaxlm.nn.config import RopeConfig
from jaxlm.nn.rope import inverse_frequencies, rotate, tables

MAX_LENGTH, WIDTH = 64, 16
KINDS = {
    "default": {},
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 2.5},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "yarn, rounded limits off": {"factor": 4.0, "original_max_position_embeddings": 16, "truncate": False},
    "yarn, mscale": {"factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.3, "beta_fast": 8, "beta_slow": 2},
    "yarn, attention factor": {"factor": 4.0, "attention_factor": 0.6},
    "longrope": {
        "short_factor": list(np.linspace(1, 2, 8)), "long_factor": list(np.linspace(1, 9, 8)),
        "original_max_position_embeddings": 20,
    },
    "longrope, attention factor": {
        "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "factor": 9.0, "attention_factor": 1.7,
        "original_max_position_embeddings": 20,
    },
}  # fmt: skip


@pytest.mark.parametrize("length", [7, 40, 100])
@pytest.mark.parametrize("name", KINDS)
def test_tables_equal_those_of_transformers(name, length):
    """Below the original context, between it and the limit, and beyond the limit; positions need not start at 0."""
    parameters = {"rope_type": name.split(",")[0], "rope_theta": 500.0} | KINDS[name]
    config = LlamaConfig(
        hidden_size=2 * WIDTH, num_attention_heads=2, max_position_embeddings=MAX_LENGTH, rope_parameters=parameters
    )
    cfg = read_config(config.to_dict() | {"architectures": None})
    positions = np.arange(length - 5, length)[None]
    module = LlamaRotaryEmbedding(config)
    cos, sin = module(torch.zeros(1), torch.tensor(positions))
    for given in (None, length):
        ours = tables(cfg.rope, WIDTH, MAX_LENGTH, jnp.asarray(positions), given)
        for mine, theirs in zip(ours, (cos, sin)):
            np.testing.assert_allclose(mine, theirs[..., : WIDTH // 2].numpy(), atol=2e-5)
    inv, factor = inverse_frequencies(cfg.rope, WIDTH, MAX_LENGTH, length)
    np.testing.assert_allclose(inv, module.inv_freq.numpy(), rtol=1e-6)
    assert factor == pytest.approx(module.attention_scaling, rel=1e-7)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.3])
def test_partial_rotation_equals_that_of_transformers(share):
    """Also where the share does not give a whole even width: transformers rounds the pairs up."""
    config = Phi3Config(hidden_size=2 * WIDTH, num_attention_heads=2, partial_rotary_factor=share, pad_token_id=0)
    cos, sin = Phi3RotaryEmbedding(config)(torch.zeros(1), torch.arange(9)[None])
    ours = tables(RopeConfig(partial=share), WIDTH, MAX_LENGTH, jnp.arange(9)[None])
    half = ours[0].shape[-1]
    for mine, theirs in zip(ours, (cos, sin)):
        np.testing.assert_allclose(mine, theirs[..., :half].numpy(), atol=1e-6)
    x = jax.random.normal(jax.random.key(0), (1, 9, 2, WIDTH))
    turned = rotate(x, *ours)
    np.testing.assert_array_equal(turned[..., 2 * half :], x[..., 2 * half :])
    assert np.abs(turned - x)[:, 1:, :, : 2 * half].min() > 0


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_length_under_jit_is_that_of_the_positions(name):
    rope = RopeConfig(kind=name, factor=3.0, short_factor=(1.0,) * 8, long_factor=(4.0,) * 8, original_length=20)
    for length in (10, 90):
        positions = jnp.arange(length)[None]
        traced = jax.jit(lambda p: tables(rope, WIDTH, MAX_LENGTH, p))(positions)
        for mine, eager in zip(traced, tables(rope, WIDTH, MAX_LENGTH, positions, length)):
            np.testing.assert_allclose(mine, eager, atol=1e-5)


def test_rotation_keeps_lengths_and_sees_distances_only():
    q, k = jax.random.normal(jax.random.key(1), (2, 1, 1, 3, WIDTH))

    def score(i, j):
        turned = [
            rotate(x, *tables(RopeConfig(theta=100.0), WIDTH, MAX_LENGTH, jnp.array([[p]])))
            for x, p in ((q, i), (k, j))
        ]
        np.testing.assert_allclose(np.linalg.norm(turned[0]), np.linalg.norm(q), rtol=1e-6)
        return jnp.sum(turned[0] * turned[1], axis=-1)

    np.testing.assert_allclose(score(11, 4), score(50, 43), atol=1e-4)
    assert np.abs(score(11, 4) - score(11, 5)).max() > 1e-2


def test_rotation_keeps_the_dtype_and_computes_in_float32():
    x = jax.random.normal(jax.random.key(2), (1, 200, 1, WIDTH)).astype(jnp.bfloat16)
    cos, sin = tables(RopeConfig(), WIDTH, 1 << 17, jnp.arange(100_000, 100_200)[None])
    assert cos.dtype == sin.dtype == jnp.float32
    low = rotate(x, cos, sin)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_array_equal(low, rotate(x.astype(jnp.float32), cos, sin).astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("rope", "field"),
    [
        (RopeConfig(kind="linear"), "factor"),
        (RopeConfig(kind="llama3"), "factor"),
        (RopeConfig(kind="longrope", long_factor=(1.0,) * 8), "short_factor"),
        (RopeConfig(kind="longrope", long_factor=(1.0,) * 8, short_factor=(1.0,) * 3), "short_factor: 3 numbers for 8"),
        (RopeConfig(kind="alibi"), "kind: 'alibi'"),
    ],
)
def test_incomplete_settings_name_the_field(rope, field):
    with pytest.raises(ValueError, match=rf"model\.rope\.{field}"):
        inverse_frequencies(rope, WIDTH, MAX_LENGTH)


@pytest.mark.parametrize("positions", [[[0, 1, 2], [5, 6, 70]], [[-3, 0, 2]], np.zeros((0, 3))])
@pytest.mark.parametrize("kind", ["default", "dynamic"])
def test_tables_of_one_cpu_device_are_the_same(positions, kind, monkeypatch):
    """There they come out of a loop, whatever the positions are."""
    settings = RopeConfig(kind=kind, factor=2.0)
    found = []
    for one in (False, True):
        monkeypatch.setattr(rope, "one_cpu_device", lambda one=one: one)
        made = jax.jit(lambda p: tables(settings, 8, 16, p, 40))(jnp.asarray(positions, jnp.int32))
        found.append(jax.device_get(made))
    for got, wanted in zip(*found, strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-6)
        assert got.shape == (*np.shape(positions), 4) and (not got.size or np.any(got))
