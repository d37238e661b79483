"""A student as a part of its teacher: chosen whole it is the teacher; smaller choices fit their architecture."""

import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.nn import transformer
from jaxlm.nn.compute import Compute
from jaxlm.nn.config import ModelConfig, MoEConfig
from jaxlm.params.select import layer_choice, select

TEACHER = ModelConfig(
    d_model=24, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=40, vocab_size=30, qk_norm="head", max_length=16
)
OTHER = dataclasses.replace(
    TEACHER, norm="layernorm", gated=False, qkv_bias=True, o_bias=True, mlp_bias=True, tie_embeddings=False,
    positions="learned", qk_norm="projection",
)  # fmt: skip


@functools.cache
def variables(cfg):
    """Fresh parameters, moved off their zeros and ones."""
    keys = iter(jax.random.split(jax.random.key(1), 99))
    params = transformer.init(cfg, jax.random.key(0))["params"]
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), params)


def logits(cfg, params):
    tokens = jnp.arange(24).reshape(2, 12) % 20
    return transformer.logits(cfg, {"params": params}, tokens, compute=Compute(scan=False))


@pytest.mark.parametrize("cfg", [TEACHER, OTHER], ids=["llama", "other"])
def test_the_whole_choice_is_the_teacher(cfg):
    params = variables(cfg)
    chosen = select(cfg, cfg, params)
    jax.tree.map(np.testing.assert_array_equal, chosen, params)


def test_padding_rows_of_the_vocabulary_leave_the_other_logits():
    params = variables(TEACHER)
    wide = dataclasses.replace(TEACHER, vocab_size=33)
    found = logits(wide, select(TEACHER, wide, params))
    np.testing.assert_allclose(found[..., :30], logits(TEACHER, params), rtol=1e-5, atol=1e-5)
    narrow = dataclasses.replace(TEACHER, vocab_size=25)
    np.testing.assert_allclose(logits(narrow, select(TEACHER, narrow, params)), found[..., :25], rtol=1e-5, atol=1e-5)


SIZES = st.tuples(st.integers(1, 24), st.integers(1, 4), st.sampled_from([1, 2]), st.integers(1, 4), st.integers(1, 40))


@hypothesis.settings(max_examples=8, deadline=None, derandomize=True)
@hypothesis.given(SIZES, st.sampled_from([1, 2]), st.sampled_from([TEACHER, OTHER]))
def test_every_choice_has_the_shapes_of_the_student(sizes, ratio, teacher):
    width, layers, groups, pairs, units = sizes
    student = dataclasses.replace(
        teacher,
        d_model=width,
        n_layers=layers,
        n_heads=groups * ratio,
        n_kv_heads=groups,
        head_dim=2 * pairs,
        d_ff=units,
    )
    found = jax.eval_shape(lambda p: select(teacher, student, p), variables(teacher))
    expected = jax.eval_shape(lambda: transformer.init(student, jax.random.key(0))["params"])
    assert jax.tree.map(lambda x: x.shape, found) == jax.tree.map(lambda x: x.shape, expected)


def test_channels_without_weight_are_left_out():
    """A teacher with dead channels, heads and units: without them it says the same."""
    params = jax.tree.map(jnp.copy, variables(dataclasses.replace(TEACHER, qk_norm=None)))
    cfg = dataclasses.replace(TEACHER, qk_norm=None, norm_eps=1e-12)
    dead_heads, dead_units = slice(16, 32), slice(10, 18)  # the second key head with its two query heads
    params["layers"]["attn"]["o"]["kernel"] = params["layers"]["attn"]["o"]["kernel"].at[:, dead_heads].set(0.0)
    params["layers"]["mlp"]["down"]["kernel"] = params["layers"]["mlp"]["down"]["kernel"].at[:, dead_units].set(0.0)
    student = dataclasses.replace(cfg, n_heads=2, n_kv_heads=1, d_ff=32)
    chosen = select(cfg, student, params)
    gains = {"o": 2**0.5, "down": (40 / 32) ** 0.5}
    for branch, name in (("attn", "o"), ("mlp", "down")):
        chosen["layers"][branch][name]["kernel"] /= gains[name]
    np.testing.assert_allclose(logits(student, chosen), logits(cfg, params), rtol=1e-4, atol=1e-4)


def test_layers_are_spread_from_the_first_to_the_last():
    assert layer_choice(6, 3) == [0, 3, 5]
    assert layer_choice(4, 4) == [0, 1, 2, 3]
    assert layer_choice(12, 2) == [0, 11]


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"d_model": 32}, "model.d_model: 32"),
        ({"n_layers": 5}, "model.n_layers: 5"),
        ({"norm": "layernorm"}, "model.norm: layernorm"),
        ({"tie_embeddings": False}, "model.tie_embeddings"),
        ({"n_heads": 4, "n_kv_heads": 1}, "model.n_kv_heads"),
        ({"moe": MoEConfig(experts=2)}, "objective.init"),
    ],
)
def test_what_is_no_part_of_the_teacher_is_refused(change, where):
    with pytest.raises(ValueError, match=where):
        select(TEACHER, dataclasses.replace(TEACHER, **change), {})
