"""Chunked cross-entropy and log-probabilities equal the plain formulas, on one device and on many."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxlm.dist.collectives import collectives
from jaxlm.nn.kernels import matmul as products
from jaxlm.objectives.chunks import chunk_rows, row_groups
from jaxlm.objectives.cross_entropy import cross_entropy, token_log_probs, token_statistics
from jaxlm.types import Head


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


class Case:
    """Random rows and a random head."""

    def __init__(self, batch, length, vocabulary, *, tied=True, bias=False, softcap=None, width=8):
        self.hidden = normal(0, batch, length, width)
        self.kernel = normal(1, *((vocabulary, width) if tied else (width, vocabulary)))
        self.bias = normal(2, vocabulary) if bias else None
        rng = np.random.default_rng(3)
        self.targets = jnp.asarray(rng.integers(0, vocabulary, (batch, length)), jnp.int32)
        self.weights = jnp.asarray(rng.random((batch, length)) * (rng.random((batch, length)) < 0.7), jnp.float32)
        self.softcap, self.tied = softcap, tied

    def head(self, kernel, bias):
        return Head(kernel, bias, self.softcap, self.tied)

    def logits(self, hidden, kernel, bias):
        logits = jnp.einsum("bld,vd->blv" if self.tied else "bld,dv->blv", hidden, kernel)
        logits = logits if bias is None else logits + bias[None, None, :]
        return logits if self.softcap is None else self.softcap * jnp.tanh(logits / self.softcap)

    def with_gradients(self, loss):
        """Value and gradients of hidden states, kernel and bias."""
        operands = (self.hidden, self.kernel) if self.bias is None else (self.hidden, self.kernel, self.bias)

        def run(hidden, kernel, bias=None):
            return loss(hidden, kernel, bias)

        return jax.jit(jax.value_and_grad(run, tuple(range(len(operands))), has_aux=True))(*operands)


def close(found, expected, tolerance=1e-6):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        scale = max(1.0, float(jnp.max(jnp.abs(b))))
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * scale)


def check_loss(case, z_weight, smoothing, chunk):
    settings = {"z_weight": z_weight, "label_smoothing": smoothing, "chunk": chunk}

    def chunked(hidden, kernel, bias):
        return cross_entropy(hidden, case.head(kernel, bias), case.targets, case.weights, **settings)

    def plain(hidden, kernel, bias):
        logits = case.logits(hidden, kernel, bias)
        labels = jax.nn.one_hot(case.targets, logits.shape[-1])
        lse = jax.nn.logsumexp(logits, axis=-1)
        loss = optax.softmax_cross_entropy(logits, optax.smooth_labels(labels, smoothing)) + z_weight * lse**2
        sums = {
            "nll": optax.softmax_cross_entropy(logits, labels),
            "lse_squared": lse**2,
            "correct": (jnp.argmax(logits, axis=-1) == case.targets).astype(jnp.float32),
            "weight": jnp.ones_like(lse),
        }
        return jnp.sum(case.weights * loss), {name: jnp.sum(case.weights * value) for name, value in sums.items()}

    close(case.with_gradients(chunked), case.with_gradients(plain), 2e-6)


TABLE = {
    "plain": (Case(3, 7, 11), 0.0, 0.0),
    "untied with bias": (Case(3, 7, 11, tied=False, bias=True), 0.0, 0.0),
    "z-loss": (Case(2, 16, 13), 1e-2, 0.0),
    "smoothing": (Case(2, 16, 13, bias=True), 0.0, 0.1),
    "soft cap": (Case(2, 9, 13, tied=False, softcap=3.0), 0.0, 0.0),
    "all of it": (Case(3, 7, 11, bias=True, softcap=5.0), 1e-2, 0.1),
}


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("chunk", [6, None])
def test_loss_metrics_and_gradients_equal_the_formula(name, chunk):
    case, z_weight, smoothing = TABLE[name]
    check_loss(case, z_weight, smoothing, chunk)


@hypothesis.settings(max_examples=8, deadline=None, derandomize=True)
@hypothesis.given(st.integers(1, 5), st.integers(1, 20), st.integers(1, 40), st.booleans(), st.integers(1, 30))
def test_loss_for_any_shape_and_chunk(batch, length, vocabulary, tied, chunk):
    check_loss(Case(batch, length, vocabulary, tied=tied), 1e-3, 0.0, chunk)


def check_statistics(case, chunk):
    share = normal(5, *case.targets.shape)

    def chunked(hidden, kernel, bias):
        log_probs, entropy = token_statistics(hidden, case.head(kernel, bias), case.targets, chunk=chunk)
        return jnp.sum(case.weights * log_probs + share * entropy), (log_probs, entropy)

    def plain(hidden, kernel, bias):
        log_p = jax.nn.log_softmax(case.logits(hidden, kernel, bias))
        log_probs = jnp.take_along_axis(log_p, case.targets[..., None], axis=-1)[..., 0]
        entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
        return jnp.sum(case.weights * log_probs + share * entropy), (log_probs, entropy)

    close(case.with_gradients(chunked), case.with_gradients(plain), 3e-6)


@pytest.mark.parametrize("name", ["plain", "untied with bias", "soft cap"])
def test_log_probabilities_and_entropy_equal_the_formulas(name):
    check_statistics(TABLE[name][0], 6)


def test_log_probabilities_are_the_negative_loss():
    case = Case(3, 7, 11)
    log_probs = token_log_probs(case.hidden, case.head(case.kernel, None), case.targets)
    loss, _ = cross_entropy(case.hidden, case.head(case.kernel, None), case.targets, case.weights)
    np.testing.assert_allclose(-jnp.sum(case.weights * log_probs), loss, rtol=1e-6)


def test_targets_do_not_matter_where_the_weight_is_zero():
    case = Case(2, 9, 13)

    def run(targets, weights):
        def loss(hidden, kernel):
            return cross_entropy(hidden, case.head(kernel, None), targets, weights)[0]

        return jax.jit(jax.value_and_grad(loss, (0, 1)))(case.hidden, case.kernel)

    hidden = case.weights == 0
    close(run(jnp.where(hidden, -100, case.targets), case.weights), run(case.targets, case.weights))
    close(run(jnp.where(hidden, 10**6, case.targets), case.weights), run(case.targets, case.weights))
    nothing = run(case.targets, jnp.zeros_like(case.weights))
    assert not any(np.any(x) for x in jax.tree.leaves(nothing))


def test_softmax_of_huge_logits_is_finite():
    case = Case(2, 9, 13)
    case.hidden = case.hidden * 1e4
    loss = lambda hidden, kernel, bias: cross_entropy(  # noqa: E731
        hidden, case.head(kernel, bias), case.targets, case.weights
    )
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(case.with_gradients(loss)))


@pytest.mark.parametrize("one_device", [True, False])
def test_bfloat16_hidden_states_and_float32_weights(one_device, monkeypatch):
    monkeypatch.setattr(products, "one_cpu_device", lambda: one_device)
    case = Case(4, 16, 32)
    exact = case.with_gradients(lambda h, k, b: cross_entropy(h, case.head(k, b), case.targets, case.weights, chunk=16))
    case.hidden = case.hidden.astype(jnp.bfloat16)
    found = case.with_gradients(lambda h, k, b: cross_entropy(h, case.head(k, b), case.targets, case.weights, chunk=16))
    assert found[1][0].dtype == jnp.bfloat16
    assert found[1][1].dtype == jnp.float32
    close(jax.tree.map(lambda x: x.astype(jnp.float32), found), exact, 2e-2)


def memory(rows, form):
    vocabulary, width = 4096, 16
    hidden = jax.ShapeDtypeStruct((4, rows // 4, width), jnp.float32)
    kernel = jax.ShapeDtypeStruct((vocabulary, width), jnp.float32)
    targets = jax.ShapeDtypeStruct((4, rows // 4), jnp.int32)

    def loss(hidden, kernel, targets):
        if form is cross_entropy:
            return cross_entropy(hidden, Head(kernel, tied=True), targets, jnp.ones(targets.shape))[0]
        return jnp.sum(token_log_probs(hidden, Head(kernel, tied=True), targets))

    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(hidden, kernel, targets).compile()
    return compiled.memory_analysis().temp_size_in_bytes, rows * vocabulary * 4


@pytest.mark.parametrize("form", [cross_entropy, token_log_probs])
def test_logits_of_all_rows_never_exist(form):
    few, _ = memory(2048, form)
    many, whole = memory(16384, form)
    assert many < 0.1 * whole
    assert many - few < 0.03 * whole


def test_a_frozen_head_costs_no_product():
    case = Case(2, 32, 16)

    def loss(hidden, kernel):
        return cross_entropy(hidden, case.head(kernel, None), case.targets, case.weights, chunk=16)[0]

    def products(over):
        text = jax.jit(jax.grad(loss, over)).lower(case.hidden, case.kernel).compile().as_text()
        return text.count(" dot(")

    assert products((0, 1)) == 3
    assert products(0) == 2


AXES = ("data", "fsdp", "tensor", "expert", "context")


def mesh_of(**sizes):
    return jax.make_mesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES, axis_types=(AxisType.Auto,) * 5)


MESHES = {
    "data": ({"data": 8}, PartitionSpec()),
    "fsdp": ({"data": 2, "fsdp": 4}, PartitionSpec(None, "fsdp")),
    "tensor": ({"data": 2, "tensor": 4}, PartitionSpec("tensor")),
    "context": ({"fsdp": 2, "context": 4}, PartitionSpec("fsdp")),
    "all": ({"fsdp": 2, "tensor": 2, "context": 2}, PartitionSpec("tensor", "fsdp")),
}


def both(case, kernel, hidden, chunk):
    loss, sums = cross_entropy(hidden, case.head(kernel, None), case.targets, case.weights, z_weight=1e-3, chunk=chunk)
    log_probs, entropy = token_statistics(hidden, case.head(kernel, None), case.targets, chunk=chunk)
    return loss + jnp.sum(case.weights * (log_probs**2 + entropy)), sums


@pytest.mark.parametrize("name", MESHES)
def test_many_devices_equal_one_and_send_no_hidden_states(name):
    sizes, kernel_spec = MESHES[name]
    case = Case(8, 16, 96, width=32)
    run = functools.partial(jax.value_and_grad(functools.partial(both, case), (0, 1), has_aux=True), chunk=16)
    expected = jax.jit(run)(case.kernel, case.hidden)
    mesh = mesh_of(**sizes)
    places = [NamedSharding(mesh, kernel_spec), NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "context"))]
    operands = [jax.device_put(x, place) for x, place in zip((case.kernel, case.hidden), places, strict=True)]
    with jax.set_mesh(mesh):
        groups = row_groups(case.hidden.shape)
        compiled = jax.jit(run, out_shardings=(None, tuple(places))).lower(*operands).compile()
    close(compiled(*operands), expected, 1e-5)
    parts = {axis: sizes.get(axis, 1) for axis in AXES}
    assert groups == parts["data"] * parts["fsdp"] * parts["context"]
    gathered = [c for c in collectives(compiled.as_text()) if c.kind in ("all-gather", "all-to-all")]
    assert all(c.bytes <= case.kernel.size * 4 // parts["tensor"] for c in gathered)
    assert bool(gathered) == (parts["fsdp"] > 1)


def test_the_heads_gradient_is_summed_over_devices_once():
    case = Case(8, 16, 96, width=32)
    mesh = mesh_of(data=8)
    hidden = jax.device_put(case.hidden, NamedSharding(mesh, PartitionSpec("data")))
    weights, targets = (
        jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))) for x in (case.weights, case.targets)
    )

    def loss(kernel, hidden, targets, weights):
        return cross_entropy(hidden, case.head(kernel, None), targets, weights, chunk=4)[0]

    with jax.set_mesh(mesh):
        program = jax.jit(jax.grad(loss), out_shardings=NamedSharding(mesh, PartitionSpec()))
        text = program.lower(case.kernel, hidden, targets, weights).compile().as_text()
    sums = [c for c in collectives(text) if c.bytes >= case.kernel.size]
    assert [(c.kind, c.calls, c.bytes) for c in sums] == [("all-reduce", 1, case.kernel.size * 4)]


def test_copies_of_the_head_give_gradients_by_group():
    case = Case(8, 16, 24)
    with jax.set_mesh(mesh_of(data=8)):

        def loss(copies):
            return cross_entropy(case.hidden, case.head(copies, None), case.targets, case.weights)[0]

        copies = jnp.broadcast_to(case.kernel[None], (row_groups(case.hidden.shape), *case.kernel.shape))
        found = jax.jit(jax.grad(loss))(copies)
    whole = jax.grad(lambda k: cross_entropy(case.hidden, case.head(k, None), case.targets, case.weights)[0])
    np.testing.assert_allclose(jnp.sum(found, axis=0), whole(case.kernel), rtol=1e-5, atol=1e-5)
    row = jax.grad(lambda k: cross_entropy(case.hidden[:1], case.head(k, None), case.targets[:1], case.weights[:1])[0])
    np.testing.assert_allclose(found[0], row(case.kernel), rtol=1e-5, atol=1e-5)


def test_the_chunk_is_a_matter_of_the_platform():
    assert chunk_rows() == 256
