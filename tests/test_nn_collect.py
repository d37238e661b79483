"""What a model keeps of its layers when it is asked: their outputs, and who attends to whom."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.nn import transformer
from jaxlm.nn.compute import Compute
from jaxlm.nn.config import ModelConfig
from jaxlm.nn.kernels import reference
from jaxlm.nn.kernels.attention import AttentionMask
from jaxlm.nn.kernels.reference import mean_attention, reference_attention

CFG = ModelConfig(
    d_model=16, n_layers=3, n_heads=4, n_kv_heads=2, d_ff=16, vocab_size=20, window=4, layer_types=("sliding", "full")
)
SEGMENTS = jnp.asarray([[0, 0, 1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 2, 2, 2, 2, 2, 0]], jnp.int32)


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (3, 5.0)])
def test_mean_attention_is_what_attention_does_to_unit_values(window, softcap, monkeypatch):
    monkeypatch.setattr(reference, "QUERIES", 4)  # parts of 2
    q, k = (jax.random.normal(jax.random.key(i), (2, 10, heads, 8)) for i, heads in enumerate((4, 2)))
    values = jnp.broadcast_to(jnp.eye(10)[None, :, None], (2, 10, 2, 10))
    mask = AttentionMask(window=window, segments_BxL=SEGMENTS)
    share = jax.random.normal(jax.random.key(3), (2, 10, 10))

    def plain(q, k):
        # The last axis of queries and keys is as wide as the values, which the kernel takes to be of one width.
        wide = [jnp.pad(x, [(0, 0)] * 3 + [(0, 2)]) for x in (q, k)]
        found = jnp.mean(reference_attention(*wide, values, mask=mask, scale=0.3, softcap=softcap), axis=2)
        return jnp.sum(share * found), found

    def own(q, k):
        found = mean_attention(q, k, mask=mask, scale=0.3, softcap=softcap)
        return jnp.sum(share * found), found

    for a, b in zip(
        *(jax.tree.leaves(jax.value_and_grad(f, (0, 1), has_aux=True)(q, k)) for f in (own, plain)), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_collecting_changes_nothing_and_does_not_depend_on_the_walk():
    variables = transformer.init(CFG, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), SEGMENTS.shape, 0, CFG.V)

    def run(compute, collect):
        return jax.jit(
            lambda v: transformer.apply(CFG, v, tokens, segments=SEGMENTS, compute=compute, collect=collect)
        )(variables)

    plain = run(Compute(scan=False), ())
    found = run(Compute(scan=True), ("hidden", "attention"))
    assert plain.states == {} and not found.aux
    np.testing.assert_allclose(found.hidden, plain.hidden, atol=1e-5)
    assert found.states["hidden"].shape == (3, 2, 10, 16)
    last = found.states["hidden"][-1]
    scaled = last * jax.lax.rsqrt(jnp.mean(last**2, axis=-1, keepdims=True) + CFG.norm_eps)
    np.testing.assert_allclose(scaled, plain.hidden, atol=1e-5)
    maps = np.asarray(found.states["attention"])
    np.testing.assert_allclose(maps.sum(-1), np.broadcast_to(SEGMENTS > 0, (3, 2, 10)), atol=1e-6)
    assert not np.any(np.triu(maps, 1))
    assert np.any(maps[1, 0, 9, :5]) and not np.any(maps[0, 0, 9, :6])
