"""Distillation: divergences and their gradients against TRL and the plain formulas, and the objective's promises."""

import functools
import os

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxlm.nn import transformer
from jaxlm.nn.config import ModelConfig
from jaxlm.objectives import make
from jaxlm.objectives.config import DistillConfig, SftConfig
from jaxlm.objectives.distill_loss import Labels, Online, TopK, distillation
from jaxlm.objectives.divergence import Divergence, with_tail
from jaxlm.objectives.layer_matching import pairs
from jaxlm.types import Head

LOSSES = {
    "forward_kl": Divergence("forward_kl"),
    "hinton": Divergence("hinton", 2.5),
    "warm forward_kl": Divergence("forward_kl", 2.5),
    "reverse_kl": Divergence("reverse_kl", 0.8),
    "skew_kl": Divergence("skew_kl", skew=0.3),
    "skew_kl without skew": Divergence("skew_kl", skew=0.0),
    "jsd": Divergence("jsd", 1.3, beta=0.2),
    "jsd towards the teacher": Divergence("jsd", beta=0.0),
    "jsd towards the student": Divergence("jsd", beta=1.0),
}


class Case:
    """Random hidden states and heads of student and teacher, random labels and weights."""

    def __init__(self, seed=0, vocabularies=(11, 13), batch=3, length=7, softcap=None):
        rng = np.random.default_rng(seed)
        normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
        self.hidden, self.kernel = normal(batch, length, 8), normal(vocabularies[0], 8)
        self.their_hidden, self.their_kernel = normal(batch, length, 5), normal(5, vocabularies[1])
        self.targets = rng.integers(0, min(vocabularies), (batch, length)).astype(np.int32)
        self.weights = (rng.random((batch, length)) * (rng.random((batch, length)) < 0.7)).astype(np.float32)
        self.softcap = softcap

    @property
    def teacher(self):
        return Online(self.their_hidden, Head(self.their_kernel))

    def run(self, divergence, kd_weight=1.0, teacher=None, weights=None):
        """Value and sums, and the gradients of hidden states and head."""
        weights = self.weights if weights is None else weights

        def loss(hidden, kernel):
            head, settings = Head(kernel, softcap=self.softcap, tied=True), (kd_weight, divergence)
            return distillation(hidden, head, teacher or self.teacher, Labels(self.targets, weights, weights), settings)

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(self.hidden, self.kernel)

    def plain(self, loss, kd_weight=1.0):
        """The same in torch, float64: `loss(teacher's logits, student's logits)` gives a value per position."""
        leaves = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (self.hidden, self.kernel)]
        logits = leaves[0] @ leaves[1].T
        logits = logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)
        theirs = torch.tensor(self.their_hidden, dtype=torch.float64) @ torch.tensor(self.their_kernel).double()
        shared = min(logits.shape[-1], theirs.shape[-1])
        targets, weights = torch.tensor(self.targets).long(), torch.tensor(self.weights)
        nll = torch.nn.functional.cross_entropy(logits.movedim(-1, 1), targets, reduction="none")
        kd = loss(theirs[..., :shared], logits[..., :shared])
        total = (weights * (kd_weight * kd + (1 - kd_weight) * nll)).sum()
        total.backward()
        return total.item(), [x.grad.numpy() for x in leaves]


def close(found, expected, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.max(np.abs(b)))


def formula(divergence):
    """The divergence per position from logits, as its paper writes it."""

    def loss(theirs, ours):
        log_p, log_q = ((x / divergence.temperature).log_softmax(-1) for x in (theirs, ours))
        kl = lambda a, b: (a.exp() * (a - b)).sum(-1)  # noqa: E731
        mixture = lambda s: (s * log_p.exp() + (1 - s) * log_q.exp()).log()  # noqa: E731
        b = divergence.beta
        return {
            "forward_kl": lambda: kl(log_p, log_q),
            "hinton": lambda: divergence.temperature**2 * kl(log_p, log_q),
            "reverse_kl": lambda: kl(log_q, log_p),
            "skew_kl": lambda: kl(log_p, mixture(divergence.skew)),
            "jsd": lambda: (
                {0.0: kl(log_p, log_q), 1.0: kl(log_q, log_p)}[b]
                if b in (0.0, 1.0)
                else b * kl(log_p, mixture(b)) + (1 - b) * kl(log_q, mixture(b))
            ),
        }[divergence.loss]()

    return loss


@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients_equal_the_formulas(name):
    case = Case(softcap=4.0 if name == "hinton" else None)
    (value, _), gradients = case.run(LOSSES[name], 0.7)
    expected, their_gradients = case.plain(formula(LOSSES[name]), 0.7)
    assert value == pytest.approx(expected, rel=1e-5)
    close(gradients, their_gradients)


@pytest.mark.parametrize(("beta", "temperature"), [(0.0, 1.0), (0.1, 0.9), (0.5, 2.0), (1.0, 3.0)])
def test_jsd_equals_trl(beta, temperature, monkeypatch):
    monkeypatch.setitem(os.environ, "TRL_EXPERIMENTAL_SILENCE", "1")
    trainer = pytest.importorskip("trl.experimental.gkd").GKDTrainer
    case = Case(1, (17, 17))
    case.weights = (case.weights > 0).astype(np.float32)

    def trl(theirs, ours):
        labels = None
        return trainer.generalized_jsd_loss(ours, theirs, labels, beta, temperature, "none").sum(-1)

    (value, sums), gradients = case.run(Divergence("jsd", temperature, beta))
    expected, their_gradients = case.plain(trl)
    assert value == pytest.approx(expected, rel=1e-5)
    assert value == sums["kd"]
    close(gradients, their_gradients)


@hypothesis.settings(max_examples=12, deadline=None, derandomize=True)
@hypothesis.given(st.floats(-30, 30), st.sampled_from(sorted(LOSSES)), st.integers(0, 99))
def test_a_divergence_is_never_negative_and_zero_for_equals(scale, name, seed):
    logits = scale * np.random.default_rng(seed).normal(size=(2, 4, 9)).astype(np.float32)
    log_p, log_q = jax.nn.log_softmax(logits[0]), jax.nn.log_softmax(logits[1])
    found = LOSSES[name].between(log_p, log_q)
    assert np.all(np.isfinite(found)) and np.all(found >= -1e-5)
    np.testing.assert_allclose(LOSSES[name].between(log_p, log_p), 0.0, atol=1e-5)


def test_padding_rows_of_either_vocabulary_change_nothing():
    divergence = Divergence("jsd")
    narrow, wide = Case(2, (12, 12)), Case(2, (12, 12))
    wide.their_kernel = np.concatenate([wide.their_kernel, np.full((5, 4), 9.0, np.float32)], axis=1)
    close(wide.run(divergence), narrow.run(divergence))
    wide.their_kernel = narrow.their_kernel
    wide.kernel = np.concatenate([narrow.kernel, np.full((3, 8), 9.0, np.float32)])
    found, expected = wide.run(divergence), narrow.run(divergence)
    assert found[0][0] == pytest.approx(float(expected[0][0]), rel=1e-6)
    close(found[1][1][:12], expected[1][1])
    assert not np.any(found[1][1][12:])


def test_without_labels_there_is_no_loss_and_no_gradient():
    found = Case().run(Divergence("hinton", 2.0), 0.5, weights=np.zeros((3, 7), np.float32))
    assert not any(np.any(x) for x in jax.tree.leaves(found))


def test_half_precision_gives_nearly_the_same():
    case, divergence = Case(3, (32, 32), 4, 16), Divergence("skew_kl")
    (expected, _), gradients = case.run(divergence)
    case.hidden, case.their_hidden = jnp.bfloat16(case.hidden), jnp.bfloat16(case.their_hidden)
    (value, _), rounded = case.run(divergence)
    assert rounded[0].dtype == jnp.bfloat16 and rounded[1].dtype == jnp.float32
    assert value == pytest.approx(float(expected), rel=0.02)
    close(jnp.float32(rounded[1]), gradients[1], 0.05)


def top_k(case, divergence, k):
    """What a cache would hold of the teacher."""
    logits = (case.their_hidden @ case.their_kernel)[..., : len(case.kernel)] / divergence.temperature
    log_p = jax.nn.log_softmax(logits)
    ids = jax.lax.top_k(log_p, k)[1]
    return TopK(ids.astype(jnp.uint16), with_tail(log_p, ids))


@pytest.mark.parametrize("name", ["hinton", "reverse_kl", "jsd", "skew_kl"])
def test_a_whole_vocabulary_in_the_cache_equals_the_teacher_and_part_of_it_is_a_lower_bound(name):
    case, divergence = Case(4, (11, 13)), LOSSES[name]
    whole = case.run(divergence)
    close(case.run(divergence, teacher=top_k(case, divergence, 11)), whole, 2e-5)
    values = [case.run(divergence, teacher=top_k(case, divergence, k))[0][0] for k in (1, 3, 6, 11)]
    assert 0 < values[0] < values[1] < values[2] < values[3] * (1 + 1e-5)


STUDENT = ModelConfig(d_model=16, n_layers=1, n_heads=2, d_ff=32, vocab_size=24)
TEACHER = ModelConfig(d_model=24, n_layers=2, n_heads=3, n_kv_heads=1, d_ff=32, vocab_size=27, tie_embeddings=False)
MODELS = {"policy": STUDENT, "teacher": TEACHER}


def apply(variables, tokens, *, model="policy", **inputs):
    return transformer.apply(MODELS[model], variables, tokens, **inputs)


@functools.cache
def world():
    """Student, frozen teacher, and a batch with padding, two documents in a row and uneven labels."""
    student = transformer.init(STUDENT, jax.random.key(0))
    frozen = {"teacher": transformer.init(TEACHER, jax.random.key(1))}
    rng = np.random.default_rng(0)
    segments = np.ones((4, 10), np.int32)
    segments[1, 6:], segments[2, 7:] = 2, 0
    batch = {
        "tokens": rng.integers(0, 24, (4, 10)).astype(np.int32),
        "targets": rng.integers(0, 24, (4, 10)).astype(np.int32),
        "mask": ((rng.random((4, 10)) < 0.6) & (segments > 0)).astype(np.float32),
        "segments": segments,
        "positions": np.tile(np.arange(10, dtype=np.int32), (4, 1)),
    }
    return student, frozen, jax.tree.map(jnp.asarray, batch)


def gradient(config, parts=1):
    """Loss, metrics and gradient of the batch, cut into parts whose contributions are added."""
    student, frozen, batch = world()
    objective = make(config)
    params = student | objective.init(MODELS, jax.random.key(2))

    @jax.jit
    def run(params):
        whole = jax.lax.stop_gradient(objective.prepare(apply, params, frozen, batch, None))
        weights = objective.weights(whole)
        found = []
        for part in range(parts):
            rows = {name: x[part::parts] for name, x in whole.items()}
            loss = lambda p, rows=rows: objective.loss(apply, p, frozen, rows, weights, None)  # noqa: E731
            (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params)
            found.append((value, metrics, grads))
        return jax.tree.map(lambda *x: functools.reduce(jnp.add, x), *found)

    return run(params)


EVERYTHING = DistillConfig(loss="jsd", kd_weight=0.6, hidden_weight=0.3, attention_weight=0.2)


def test_weight_zero_is_the_student_alone():
    value, metrics, grads = gradient(DistillConfig(kd_weight=0.0))
    alone, _, their_grads = gradient(SftConfig())
    assert value == alone
    close(grads, their_grads, 1e-7)
    assert "distill/kd" not in metrics


def test_the_total_is_the_weighted_sum_of_its_terms():
    value, metrics, grads = gradient(EVERYTHING)
    weights = {"kd": 0.6, "cross_entropy": 0.4, "hidden": 0.3, "attention": 0.2}
    assert value == pytest.approx(sum(w * float(metrics[f"distill/{n}"]) for n, w in weights.items()), rel=1e-6)
    assert all(metrics[f"distill/{name}"] > 0 for name in weights)
    assert metrics["supervised_tokens"] == world()[2]["mask"].sum()
    assert np.any(grads["projection"]["hidden"]["kernel"])


def test_a_teacher_that_is_the_student_has_nothing_to_teach(monkeypatch):
    monkeypatch.setitem(MODELS, "teacher", STUDENT)
    student, _, batch = world()
    objective = make(DistillConfig(kd_weight=1.0, attention_weight=1.0))
    frozen = {"teacher": student}

    def loss(params):
        whole = jax.lax.stop_gradient(objective.prepare(apply, params, frozen, batch, None))
        return objective.loss(apply, params, frozen, whole, objective.weights(whole), None)

    (value, _), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(student)
    assert value == pytest.approx(0.0, abs=1e-5)
    assert max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(grads)) < 1e-5


def test_matched_layers_end_with_the_last():
    assert pairs(2, 6) == [2, 5]
    assert pairs(3, 3) == [0, 1, 2]
    assert pairs(4, 6) == [1, 2, 4, 5]
    assert pairs(3, 2)[-1] == 1
