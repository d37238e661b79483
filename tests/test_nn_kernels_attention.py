"""Every form of attention equals the reference, values and gradients; and what a call gets is what was promised."""

import functools
import logging

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.nn.kernels import attention as attentions
from jaxlm.nn.kernels import cudnn, tiles
from jaxlm.nn.kernels.attention import AttentionMask, attention, blockwise_attention, choose, reference_attention
from jaxlm.nn.kernels.splash import splash_attention


def normal(seed, shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def operands(batch, lengths, heads, width, dtype="float32"):
    (n_queries, n_keys), (count, groups) = lengths, heads
    keys = (batch, n_keys, groups, width)
    return normal(0, (batch, n_queries, count, width), dtype), normal(1, keys, dtype), normal(2, keys, dtype)


def output_and_gradients(form, q, k, v, **settings):
    def compute(q, k, v):
        o, pull = jax.vjp(functools.partial(form, **settings), q, k, v)
        return o, *pull(normal(3, q.shape, q.dtype))

    return jax.jit(compute)(q, k, v)


def close(found, expected, tolerance=1e-5):
    for name, a, b in zip(("output", "dq", "dk", "dv"), found, expected, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.all(np.isfinite(a)), name
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(1.0, np.abs(b).max()), err_msg=name)


def ids(*rows):
    return jnp.asarray(rows, jnp.int32)


PACKED = ids([1] * 7 + [2] * 20 + [3] * 6 + [0] * 7, [5] * 38 + [9] * 2)
EMPTY = ids([0] * 40, [1] * 20 + [0] * 20)

MASKS = {
    "causal": AttentionMask(),
    "both ways": AttentionMask(causal=False),
    "window": AttentionMask(window=9),
    "window of one": AttentionMask(window=1),
    "window both ways": AttentionMask(causal=False, window=6),
    "packed": AttentionMask(segments_BxL=PACKED),
    "packed both ways": AttentionMask(causal=False, segments_BxL=PACKED, segments_BxS=PACKED),
    "empty segments": AttentionMask(segments_BxL=EMPTY),
    "padding among the keys": AttentionMask(causal=False, segments_BxS=EMPTY),
    "nothing to see": AttentionMask(q_offset=-50),
}


@pytest.fixture
def narrow(monkeypatch):
    """Tiles of 16 x 16, so that short sequences have many."""
    monkeypatch.setattr(tiles, "BLOCKS", {"cpu": (16, 16), "gpu": (16, 16)})
    monkeypatch.setattr(tiles, "DECODE", (4, 16))


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("mask", MASKS)
def test_blockwise_equals_the_reference_under_every_mask(mask):
    q, k, v = operands(2, (40, 40), (4, 2), 8)
    settings = {"mask": MASKS[mask], "scale": 0.4, "softcap": 3.0 if "packed" in mask else None}
    expected = output_and_gradients(reference_attention, q, k, v, **settings)
    close(output_and_gradients(blockwise_attention, q, k, v, **settings), expected)


@hypothesis.settings(max_examples=14, deadline=None, derandomize=True)
@hypothesis.given(st.data())
def test_blockwise_equals_the_reference_for_any_shape(data):
    draw = data.draw
    batch, groups, repeats = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    n_queries, n_keys, block = draw(st.integers(1, 40)), draw(st.integers(1, 50)), draw(st.integers(4, 24))
    offset = draw(st.integers(-3, 30))
    some_ids = st.one_of(st.none(), st.integers(1, 4))
    limit = draw(some_ids)

    def draw_ids(seed, length):
        chosen = np.sort(np.random.default_rng(seed).integers(0, limit + 1, (batch, length)), axis=1)
        return jnp.asarray(chosen, jnp.int32)

    mask = AttentionMask(
        causal=draw(st.booleans()),
        window=draw(st.one_of(st.none(), st.integers(1, 20))),
        segments_BxL=None if limit is None else draw_ids(4, n_queries),
        segments_BxS=None if limit is None else draw_ids(5, n_keys),
        q_offset=draw(st.sampled_from([offset, offset + jnp.arange(batch, dtype=jnp.int32)])),
    )
    q, k, v = operands(batch, (n_queries, n_keys), (groups * repeats, groups), 8)
    settings = {"mask": mask, "scale": 0.3, "softcap": draw(st.sampled_from([None, 2.0]))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "BLOCKS", {"cpu": (block, block), "gpu": (block, block)})
        patch.setattr(tiles, "DECODE", (draw(st.sampled_from([0, 8])), block))
        patch.setattr(tiles, "TILE", draw(st.sampled_from([1, 3 * block * block, 1 << 20])))
        patch.setattr(tiles, "one_cpu_device", lambda: True)
        found = output_and_gradients(blockwise_attention, q, k, v, **settings)
    close(found, output_and_gradients(reference_attention, q, k, v, **settings))


@pytest.mark.parametrize("one_device", [True, False])
@pytest.mark.usefixtures("narrow")
def test_bfloat16_rounds_no_more_than_its_operands(one_device, monkeypatch):
    monkeypatch.setattr(tiles, "one_cpu_device", lambda: one_device)
    q, k, v = operands(2, (40, 40), (4, 2), 8, "bfloat16")
    settings = {"mask": AttentionMask(window=20), "scale": 0.3}
    found = output_and_gradients(blockwise_attention, q, k, v, **settings)
    assert all(x.dtype == jnp.bfloat16 for x in found)
    exact = output_and_gradients(reference_attention, *(x.astype("float32") for x in (q, k, v)), **settings)
    close(found, exact, 3e-2)


@pytest.mark.usefixtures("narrow")
def test_queries_without_keys_give_zero_and_leave_no_gradient():
    q, k, v = operands(2, (40, 40), (4, 2), 8)
    o, dq, dk, dv = output_and_gradients(blockwise_attention, q, k, v, mask=MASKS["empty segments"], scale=1.0)
    for x in (o, dq, dk, dv):
        assert not np.any(x[0])
        assert not np.any(x[1, 20:])
        assert np.any(x[1, :20])


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(("window", "first"), [(None, 0), (7, 16)])
def test_the_future_and_what_lies_before_the_window_have_no_influence(window, first):
    q, k, v = operands(1, (40, 40), (2, 2), 8)
    mask = AttentionMask(window=window)

    def one_output(k, v):
        return jnp.sum(blockwise_attention(q, k, v, mask=mask, scale=0.3)[:, 22])

    for gradient in jax.jit(jax.grad(one_output, (0, 1)))(k, v):
        seen = np.flatnonzero(np.any(np.asarray(gradient)[0] != 0, axis=(1, 2)))
        assert seen[0] == first
        assert seen[-1] == 22
        assert len(seen) == 23 - first


@pytest.mark.usefixtures("narrow")
def test_without_jit_as_with_it():
    q, k, v = operands(1, (24, 24), (2, 1), 8)
    settings = {"mask": AttentionMask(), "scale": 0.3}
    eager = blockwise_attention(q, k, v, **settings)
    np.testing.assert_allclose(eager, jax.jit(functools.partial(blockwise_attention, **settings))(q, k, v), atol=1e-6)


def test_memory_grows_with_the_length_not_with_its_square():
    def temporary(length):
        x = jax.ShapeDtypeStruct((1, length, 2, 32), jnp.float32)
        form = functools.partial(blockwise_attention, mask=AttentionMask(), scale=0.2)
        compiled = jax.jit(lambda q, k, v: jax.vjp(form, q, k, v)[1](q)).lower(x, x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporary(2048), temporary(8192)
    assert long < 4.5 * short
    assert long < 0.05 * 2 * 8192**2 * 4


def test_splash_equals_the_reference():
    packed = ids([1] * 50 + [2] * 60 + [0] * 18)
    q, k, v = operands(1, (128, 128), (2, 1), 64)
    for mask in (AttentionMask(segments_BxL=packed), AttentionMask(window=40)):
        settings = {"mask": mask, "scale": 0.1, "softcap": 4.0}
        expected = output_and_gradients(reference_attention, q, k, v, **settings)
        close(output_and_gradients(splash_attention, q, k, v, **settings), expected, 1e-4)


@pytest.mark.parametrize("window", [None, 5])
def test_what_is_asked_of_cudnn_means_the_same(window, monkeypatch):
    asked = []

    def plain(*operands, implementation, **settings):
        asked.append((implementation, settings["is_causal"]))
        return original(*operands, implementation="xla", **settings)

    original = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", plain)
    q, k, v = operands(2, (24, 24), (4, 2), 8)
    settings = {"mask": AttentionMask(window=window), "scale": 0.3}
    expected = output_and_gradients(reference_attention, q, k, v, **settings)
    close(output_and_gradients(cudnn.cudnn_attention, q, k, v, **settings), expected)
    assert asked == [("cudnn", True)]


def shapes(length=256, width=64, dtype="bfloat16", keys=None):
    return (
        jax.ShapeDtypeStruct((2, length, 4, width), dtype),
        jax.ShapeDtypeStruct((2, keys or length, 2, width), dtype),
    )


IDS = jax.ShapeDtypeStruct((2, 256), "int32")

CHOICES = [
    ("cpu", {}, {}, None, "blockwise"),
    ("gpu", {}, {}, None, "cudnn"),
    ("gpu", {"window": 100}, {}, None, "cudnn"),
    ("gpu", {"window": 100, "causal": False}, {}, None, "blockwise"),
    ("gpu", {"q_offset": 3}, {}, None, "blockwise"),
    ("gpu", {"segments_BxL": IDS}, {}, None, "blockwise"),
    ("gpu", {}, {"dtype": "float32"}, None, "blockwise"),
    ("gpu", {}, {"width": 20}, None, "blockwise"),
    ("gpu", {}, {"width": 264}, None, "blockwise"),
    ("gpu", {}, {}, 30.0, "blockwise"),
    ("tpu", {"segments_BxL": IDS, "window": 100}, {}, 30.0, "splash"),
    ("tpu", {}, {"length": 200}, None, "blockwise"),
    ("tpu", {"q_offset": 128}, {}, None, "blockwise"),
]


@pytest.mark.parametrize(("platform", "mask", "sizes", "softcap", "expected"), CHOICES)
def test_the_backend_follows_platform_and_features(platform, mask, sizes, softcap, expected):
    q, k = shapes(**sizes)
    chosen = AttentionMask(**mask)
    assert choose(q, k, mask=chosen, softcap=softcap, platform=platform) == expected
    best = {"gpu": "cudnn", "tpu": "splash"}.get(platform)
    if best is not None and best != expected:
        with pytest.raises(ValueError, match=rf"attention backend {best}: it (needs|has)"):
            choose(q, k, mask=chosen, softcap=softcap, backend=best, platform=platform)


@pytest.mark.parametrize(
    ("backend", "words"),
    [("flash", "'flash' is unknown; use one of reference, blockwise, cudnn"), ("cudnn", "it runs on gpu, not on cpu")],
)
def test_a_forced_backend_that_cannot_be_is_an_error(backend, words):
    q, k = shapes()
    with pytest.raises(ValueError, match=words):
        choose(q, k, mask=AttentionMask(), backend=backend, platform="cpu")


def test_what_was_passed_over_is_logged_once(caplog):
    attentions._log_once.cache_clear()
    q, k = shapes(dtype="float32")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            choose(q, k, mask=AttentionMask(), platform="gpu")
    (record,) = caplog.records
    words = "attention uses blockwise; passed over cudnn: it needs bfloat16 or float16, not float32 queries"
    assert record.getMessage().startswith(words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mask": AttentionMask(window=0)}, "window 0 is below 1"),
        ({"mask": AttentionMask(segments_BxL=IDS)}, r"segment ids of the queries are \(2, 256\); give \(1, 8\)"),
        ({"scale": 0.0}, "scale 0.0 is not positive"),
        ({"softcap": -1.0}, "softcap -1.0 is not positive"),
        ({"heads": (3, 2)}, "H a multiple of G"),
    ],
)
def test_operands_that_do_not_fit_are_named(change, words):
    q, k, v = operands(1, (8, 8), change.pop("heads", (2, 2)), 8)
    with pytest.raises(ValueError, match=words):
        attention(q, k, v, **({"mask": AttentionMask(), "scale": 0.3} | change))
