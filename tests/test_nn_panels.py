"""Matrices in panels: the same product for few rows and many, and the same text from a model whose weights are so."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm.decode import loop
from jaxlm.nn.config import LoraConfig, ModelConfig, MoEConfig
from jaxlm.nn.kernels import tiles
from jaxlm.nn.kernels.matmul import matmul
from jaxlm.nn.panels import ROWS, WIDTH, Panels, panels, whole
from jaxlm.params import lora

CFG = ModelConfig(d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=40, vocab_size=70, max_length=64)
SHAPES = {
    "tied": CFG,
    "untied, biases": ModelConfig(d_model=16, n_layers=1, n_heads=2, vocab_size=33, d_ff=24, max_length=64,
                                  tie_embeddings=False, qkv_bias=True, mlp_bias=True),
    "experts": ModelConfig(d_model=16, n_layers=1, n_heads=2, vocab_size=33, max_length=64,
                           moe=MoEConfig(experts=4, top_k=2, d_ff=8, n_shared_experts=1)),
}  # fmt: skip


@pytest.fixture
def one_device(monkeypatch):
    """As on a machine with one CPU device."""
    monkeypatch.setattr(loop, "one_cpu_device", lambda: True)
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.parametrize("features", [1, WIDTH, WIDTH + 1, 3 * WIDTH])
@pytest.mark.parametrize("rows", [(1,), (2, 3), (ROWS,), (ROWS + 1,)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_product_with_panels_is_that_with_the_matrix(rows, features, dtype):
    rng = np.random.default_rng(0)
    x, w = jnp.asarray(rng.standard_normal((*rows, 24)), dtype), jnp.asarray(rng.standard_normal((24, features)))
    cut = jax.jit(panels)(w.astype(jnp.float32))
    assert cut.shape == w.shape and cut.values.shape == (-(-features // WIDTH), 24, WIDTH)
    np.testing.assert_array_equal(whole(cut), w.astype(jnp.float32))
    y, expected = matmul(x, cut), matmul(x, w.astype(jnp.float32))
    assert y.shape == (*rows, features) and y.dtype == x.dtype
    tolerance = 1e-5 if dtype == "float32" else 0.05
    np.testing.assert_allclose(y.astype(jnp.float32), expected.astype(jnp.float32), atol=tolerance)


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"x \(2, 3\) does not fit w \(4, 5\)"):
        matmul(jnp.zeros((2, 3)), panels(jnp.zeros((4, 5))))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("rows", [1, 3])
def test_text_is_the_same_from_panels(name, rows, one_device, monkeypatch):
    cfg = SHAPES[name]
    variables = jaxlm.init(cfg, jax.random.key(0))
    prompts = [[1, 2, 3, 4, 5, 6][: 6 - i] for i in range(rows)]
    prepared = loop.prepare(cfg, variables)
    kinds = [type(x) for x in jax.tree.leaves(prepared["params"], is_leaf=lambda x: isinstance(x, Panels))]
    assert Panels in kinds and isinstance(prepared["params"]["unembed"]["kernel"], Panels)
    found = jaxlm.generate(cfg, prepared, prompts, max_new_tokens=12)
    assert found == jaxlm.generate(cfg, variables, prompts, max_new_tokens=12)
    monkeypatch.setattr(loop, "one_cpu_device", lambda: False)
    jax.clear_caches()
    assert found == jaxlm.generate(cfg, variables, prompts, max_new_tokens=12)


def test_adapters_of_float32_weights_are_in_the_panels(one_device):
    cfg = dataclasses.replace(CFG, lora=LoraConfig(r=2))
    variables = jaxlm.init(cfg, jax.random.key(0))
    variables["lora"] = jax.tree.map(lambda x: x + 0.3, lora.init(cfg, jax.random.key(1), variables["params"]))
    text = jaxlm.generate(cfg, variables, [[1, 2, 3]], max_new_tokens=10)
    merged = lora.merge(cfg, variables["params"], variables["lora"])
    assert text == jaxlm.generate(CFG, {"params": merged}, [[1, 2, 3]], max_new_tokens=10)


def test_panels_are_for_one_cpu_device():
    assert not tiles.one_cpu_device(), "the tests run on eight"
    prepared = loop.prepare(CFG, jaxlm.init(CFG, jax.random.key(0)))
    assert "unembed" not in prepared["params"]
