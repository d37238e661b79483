"""The transformer by its properties: causality, independence of documents, one result however it is computed."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import tree
from jaxlm.nn import cache as kv
from jaxlm.nn import transformer, walk
from jaxlm.nn.compute import Compute
from jaxlm.nn.config import ModelConfig, RopeConfig

SMALL = ModelConfig(d_model=16, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=31, max_length=32)
CONFIGS = {
    "llama": SMALL,
    "gpt2": dataclasses.replace(
        SMALL, n_kv_heads=4, norm="layernorm", positions="learned", gated=False, activation="gelu_tanh",
        qkv_bias=True, o_bias=True, mlp_bias=True, norm_eps=1e-5,
    ),
    "untied": dataclasses.replace(SMALL, tie_embeddings=False, logit_softcap=5.0, qk_norm="head"),
    "gemma2": dataclasses.replace(
        SMALL, norm_placement="both", norm_offset=True, window=3, layer_types=("sliding", "full"), embed_scale=4.0,
        attention_softcap=2.0, head_dim=6, local_rope=RopeConfig(theta=100.0), n_layers=5,
    ),
    "olmo2": dataclasses.replace(SMALL, norm_placement="post", qk_norm="projection"),
    "parallel": dataclasses.replace(SMALL, parallel_residual=True, clip_qkv=0.5, positions="none"),
}  # fmt: skip


def model(cfg, seed=0):
    """Parameters with every leaf random, so that no norm or bias hides behind its initial value."""
    rng = np.random.default_rng(seed)
    variables = transformer.init(cfg, jax.random.key(seed))
    return jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape, "float32"), variables)


FAST = Compute(attention="reference", scan=False)
"""Compiles quickly; the kernels have tests of their own."""

logits = functools.partial(transformer.logits, compute=FAST)
apply = jax.jit(transformer.apply, static_argnames=("cfg", "compute"))


def tokens_of(cfg, rows=2, length=9, seed=2):
    return jnp.asarray(np.random.default_rng(seed).integers(0, cfg.V, (rows, length)), jnp.int32)


def _leaves(cfg):
    return tree.leaves(jax.eval_shape(lambda k: transformer.init(cfg, k), jax.random.key(0))["params"])


@pytest.mark.parametrize("name", CONFIGS)
def test_causal_by_gradient(name):
    """The hidden state at a position depends on its own embedding and on no later one."""
    cfg = CONFIGS[name]
    variables, tokens = model(cfg), jnp.arange(9)[None, :]

    @jax.jit
    def reach(at):
        def out(kernel):
            params = {**variables["params"], "embed": {"kernel": kernel}}
            hidden = transformer.apply(cfg, {"params": params}, tokens, compute=FAST).hidden
            return jnp.sum(jnp.sin(hidden[0, at]))

        return jnp.max(jnp.abs(jax.grad(out)(variables["params"]["embed"]["kernel"])), axis=1)[:9]

    for at in (0, 4, 8):
        assert np.all(np.asarray(reach(at))[at + 1 :] == 0.0)
        assert reach(at)[at] > 0.0


@pytest.mark.parametrize("name", CONFIGS)
def test_every_way_to_compute_agrees(name):
    """Scanned, unrolled, unstacked, with and without rematerialisation: one value, one gradient."""
    cfg = CONFIGS[name]
    variables, tokens = model(cfg), tokens_of(cfg)

    @functools.partial(jax.jit, static_argnums=1)
    def loss(variables, compute):
        hidden = transformer.apply(cfg, variables, tokens, compute=compute).hidden
        return jnp.mean(jnp.sin(3.0 * hidden))

    gradient = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    value, plain = gradient(variables, FAST)
    policy = {"llama": "dots", "gpt2": "block", "gemma2": "full"}.get(name, "none")
    other = gradient(variables, Compute(remat=policy))
    chex.assert_trees_all_close((value, plain), other, atol=2e-5, rtol=2e-4)
    unstacked = {"params": walk.unstack(cfg, variables["params"])}
    chex.assert_trees_all_close(value, loss(unstacked, FAST), atol=1e-6)


@pytest.mark.parametrize("policy", ["dots", "block", "full"])
def test_rematerialisation_changes_no_number(policy):
    variables, tokens = model(SMALL), tokens_of(SMALL)

    def loss(variables, remat):
        compute = Compute(attention="reference", remat=remat)
        return jnp.mean(jnp.square(transformer.apply(SMALL, variables, tokens, compute=compute).hidden))

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    chex.assert_trees_all_close(gradient(variables, "none"), gradient(variables, policy), atol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_cached_decoding_equals_the_full_pass(name):
    """Prefill of a left-padded batch, then token by token."""
    cfg = CONFIGS[name]
    variables, tokens = model(cfg), tokens_of(cfg)
    pad = jnp.array([0, 3])
    segments = (jnp.arange(9)[None, :] >= pad[:, None]).astype(jnp.int32)
    positions = jnp.maximum(jnp.arange(9)[None, :] - pad[:, None], 0)
    full = logits(cfg, variables, tokens, positions=positions, segments=segments)
    cache, got = kv.empty(cfg, 2, 12), []
    for first, last in ((0, 5), (5, 6), (6, 9)):
        part = slice(first, last)
        inputs = {"positions": positions[:, part], "segments": segments[:, part], "cache": cache}
        output = apply(cfg, variables, tokens[:, part], compute=FAST, **inputs)
        cache = output.cache
        got.append(transformer.head_logits(output.hidden, output.head))
    real = np.asarray(segments, bool)
    np.testing.assert_allclose(np.concatenate(got, 1)[real], np.asarray(full)[real], atol=2e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "untied", "olmo2"])
def test_packed_documents_are_as_alone(name):
    cfg = CONFIGS[name]
    variables, tokens = model(cfg), tokens_of(cfg, rows=1)
    segments = jnp.array([[1, 1, 1, 1, 2, 2, 2, 0, 0]])
    positions = jnp.array([[0, 1, 2, 3, 0, 1, 2, 0, 0]])
    packed = logits(cfg, variables, tokens, positions=positions, segments=segments)
    np.testing.assert_allclose(packed[:, :4], logits(cfg, variables, tokens[:, :4]), atol=2e-5)
    np.testing.assert_allclose(packed[:, 4:7], logits(cfg, variables, tokens[:, 4:7]), atol=2e-5)


def test_leaf_paths_and_shapes():
    shapes = {path: x.shape for path, x in _leaves(SMALL).items()}
    assert shapes["embed/kernel"] == (31, 16)
    assert shapes["layers/attn/k/kernel"] == (3, 16, 8)
    assert shapes["layers/mlp/down/kernel"] == (3, SMALL.F, 16)
    assert shapes["layers/attn/norm/scale"] == (3, 16)
    assert "unembed/kernel" not in shapes
    assert "unembed/kernel" in _leaves(CONFIGS["untied"])


def test_initial_scales():
    """Matrices have variance 1/fan_in, output projections 1/(2N) of that, on every layer of the stack."""
    cfg = ModelConfig(d_model=128, n_layers=2, n_heads=4, vocab_size=500, tie_embeddings=False)
    params = tree.leaves(transformer.init(cfg, jax.random.key(0))["params"])
    want = {
        "embed/kernel": 1.0, "unembed/kernel": 128**-0.5, "layers/attn/q/kernel": 128**-0.5,
        "layers/attn/o/kernel": 0.5 * 128**-0.5, "layers/mlp/down/kernel": 0.5 * cfg.F**-0.5,
    }  # fmt: skip
    for path, std in want.items():
        parts = params[path] if path.startswith("layers") else params[path][None]
        for part in parts:
            assert abs(float(jnp.std(part)) / std - 1.0) < 0.02, path


@pytest.mark.parametrize("n_layers, types", [(1, None), (7, ("sliding", "sliding", "full")), (4, ("full", "sliding"))])
def test_patterned_layers_scan_like_a_loop(n_layers, types):
    cfg = dataclasses.replace(SMALL, n_layers=n_layers, layer_types=types, window=None if types is None else 2)
    variables, tokens = model(cfg), tokens_of(cfg)
    scanned = logits(cfg, variables, tokens, compute=dataclasses.replace(FAST, scan=True))
    looped = logits(cfg, variables, tokens)
    np.testing.assert_allclose(scanned, looped, atol=1e-5)


def test_plans_cover_every_layer_once():
    for sequence in ("aaaa", "abab", "aabaabaab", "xxxaaaa", "abcabcab", "a", "abc", "xabababy"):
        plan = walk.find_plan(list(sequence))
        pattern = sequence[plan.start : plan.start + plan.period]
        end = plan.start + plan.period * plan.repeats
        assert sequence[: plan.start] + pattern * plan.repeats + sequence[end:] == sequence
    assert walk.find_plan(list("aaaa")) == walk.Plan(0, 1, 4)
    assert walk.find_plan(list("abababy")).period == 2


def test_dropout_needs_a_key_and_differs_by_layer_and_key():
    cfg = dataclasses.replace(SMALL, dropout=0.5)
    variables, tokens = model(cfg), tokens_of(cfg)

    def run(key):
        return apply(cfg, variables, tokens, key=key, compute=FAST).hidden

    np.testing.assert_array_equal(run(None), apply(SMALL, variables, tokens, compute=FAST).hidden)
    np.testing.assert_array_equal(run(jax.random.key(1)), run(jax.random.key(1)))
    assert float(jnp.max(jnp.abs(run(jax.random.key(1)) - run(jax.random.key(2))))) > 0.1


def test_bfloat16_is_close_and_keeps_parameters_float32():
    variables, tokens = model(SMALL), tokens_of(SMALL)
    bf16 = dataclasses.replace(FAST, dtype="bfloat16")
    wide = apply(SMALL, variables, tokens, compute=FAST).hidden
    narrow = apply(SMALL, variables, tokens, compute=bf16).hidden
    assert narrow.dtype == jnp.bfloat16
    assert float(jnp.linalg.norm(narrow.astype(jnp.float32) - wide) / jnp.linalg.norm(wide)) < 0.03
    gradient = jax.grad(lambda v: apply(SMALL, v, tokens, compute=bf16).hidden.astype(jnp.float32).sum())(variables)
    assert {x.dtype for x in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}


def test_an_id_outside_the_vocabulary_is_named():
    with pytest.raises(ValueError, match="id 31 in row 1, column 2"):
        transformer.logits(SMALL, model(SMALL), [[1, 2, 3], [1, 2, 31]])
    with pytest.raises(ValueError, match=r"tokens: not integers .* rows of one length"):
        transformer.logits(SMALL, model(SMALL), [[1, 2, 3], [1]])


@pytest.mark.parametrize(
    "change, word",
    [
        ({"n_heads": 3}, "model.n_heads"), ({"n_kv_heads": 3}, "model.n_kv_heads"), ({"head_dim": 5}, "model.head_dim"),
        ({"layer_types": ("sliding",)}, "model.window"), ({"vocab_size": None}, "model.vocab_size"),
        ({"n_layers": 0}, "model.n_layers"),
    ],
)  # fmt: skip
def test_impossible_shapes_name_the_field(change, word):
    with pytest.raises(ValueError, match=word):
        transformer.init(dataclasses.replace(SMALL, **change), jax.random.key(0))
