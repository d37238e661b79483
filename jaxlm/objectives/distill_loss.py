"""Divergence from a teacher and cross-entropy of the labels, in chunks of positions.

The logits of student and teacher are made for one chunk at a time, and the gradient with them in the forward pass: the
backward pass only scales it.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.objectives import chunks
from jaxlm.objectives.chunks import Layout
from jaxlm.objectives.divergence import Divergence, with_tail
from jaxlm.types import Array, Head


class Online(NamedTuple):
    """A teacher that runs beside the student: its hidden states [B, L, Dt] and its head."""

    hidden: Array
    head: Head


class TopK(NamedTuple):
    """What is kept of a teacher: at each position the K most likely tokens, and all others as one.

    Attributes:
      ids: integer [B, L, K].
      log_probs: [B, L, K + 1], at the temperature of the divergence; the last entry is that of all other tokens.
    """

    ids: Array
    log_probs: Array


def top_k(hidden_BxLxD: Array, head: Head, k: int, vocabulary: int, temperature: float) -> TopK:
    """What a cache keeps of a teacher, from its hidden states; the logits exist chunk by chunk.

    Args:
      hidden_BxLxD, head: of the teacher.
      k: how many tokens to keep, at most `vocabulary`.
      vocabulary: ids below this count; those above are padding.
      temperature: divides the logits.

    Returns:
      int32 ids, float32 log-probabilities.
    """
    layout, split = Layout(head.softcap, head.tied), chunks.row_split(hidden_BxLxD.shape)

    def run(hidden: Array, kernel: Array, bias: Array | None) -> tuple[Array, Array]:
        count, step, parts = chunks.chunked(chunks.chunk_rows(), (hidden,))
        cast = kernel.astype(hidden.dtype)

        def one(index: Array) -> tuple[Array, Array]:
            logits = chunks.logits_of(layout, chunks.take(parts[0], index, step), cast, bias)
            log_p = jax.nn.log_softmax(logits[..., :vocabulary] / temperature)
            ids = jax.lax.top_k(log_p, k)[1]
            return ids, with_tail(log_p, ids)

        found = jax.lax.map(one, jnp.arange(count, dtype=jnp.int32))
        whole = [jnp.moveaxis(x, 0, 1).reshape(len(hidden), -1, x.shape[-1]) for x in found]
        return whole[0][:, : hidden.shape[1]], whole[1][:, : hidden.shape[1]]

    hidden = chunks.group(hidden_BxLxD, split)
    ids, log_probs = chunks.over_groups(run, split)(hidden, *chunks.head_copies(head, split))
    return TopK(chunks.ungroup(ids, split), chunks.ungroup(log_probs, split))


class Labels(NamedTuple):
    """What the student is to say, and how much each position counts.

    Attributes:
      targets: int32 [B, L]; any value where both weights are 0.
      weights: float32 [B, L], of the divergence.
      data: float32 [B, L], of the cross-entropy; it may leave out what the student wrote itself.
    """

    targets: Array
    weights: Array
    data: Array


class Form(NamedTuple):
    """Static settings: weight of the divergence, the divergence, the student's and the teacher's head."""

    kd_weight: float
    divergence: Divergence
    layout: Layout
    teacher: Layout | None
    rows: int


def distillation(
    hidden_BxLxD: Array,
    head: Head,
    teacher: Online | TopK,
    labels: Labels,
    settings: tuple[float, Divergence],
) -> tuple[Array, dict[str, Array]]:
    """Weighted sum over positions of `a * divergence + (1 - a) * nll`, for settings (a, divergence).

    The vocabularies of student and teacher may differ by padding at their ends: the divergence is between the
    distributions over the ids that both have; `nll` is over all of the student's. Softmax in float32. No gradient goes
    to the teacher. Meshes as in `cross_entropy`.

    Args:
      hidden_BxLxD, head: of the student.
      teacher: hidden states and head, or the top of its distributions.
      labels: targets and weights.
      settings: the divergence's weight and the divergence.

    Returns:
      The sum, float32, and sums over positions without gradient: `kd` and `nll`.
    """
    online = isinstance(teacher, Online)
    layout = Layout(teacher.head.softcap, teacher.head.tied) if isinstance(teacher, Online) else None
    form = Form(*settings, Layout(head.softcap, head.tied), layout, chunks.chunk_rows())
    split = chunks.row_split(hidden_BxLxD.shape)
    kernel, bias = chunks.head_copies(head, split)
    theirs = chunks.head_copies(teacher.head, split) if isinstance(teacher, Online) else None
    rows = (teacher.hidden,) if isinstance(teacher, Online) else tuple(teacher)
    counted = (x.astype(jnp.float32) for x in (labels.weights, labels.data))
    rows = (hidden_BxLxD, labels.targets, *counted, *jax.lax.stop_gradient(rows))
    rows = tuple(chunks.group(x, split) for x in rows)
    run = chunks.over_groups(functools.partial(_loss, form), split)
    loss, sums = run(rows[0], kernel, bias, rows[1:], jax.lax.stop_gradient(theirs) if online else None)
    if split.count > 1:
        loss, sums = jnp.sum(loss), jnp.sum(sums, axis=0)
    return loss, dict(zip(("kd", "nll"), jax.lax.stop_gradient(sums), strict=True))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(form: Form, hidden: Array, kernel: Array, bias: Array | None, rows: tuple[Array, ...], theirs: Any):
    """(loss, sums [2]) of one group of rows; `rows` are the labels' and the teacher's."""
    count, step, parts = chunks.chunked(form.rows, (hidden, *rows))
    cast = kernel.astype(hidden.dtype)

    def body(total: tuple[Array, Array], index: Array):
        h, *rest = (chunks.take(x, index, step) for x in parts)
        logits = chunks.logits_of(form.layout, h, cast, bias)
        return jax.tree.map(jnp.add, total, _chunk_loss(form, logits, rest, theirs)), None

    return jax.lax.scan(body, _zeros(), jnp.arange(count, dtype=jnp.int32))[0]


def _loss_forward(form: Form, hidden: Array, kernel: Array, bias: Array | None, rows: tuple[Array, ...], theirs: Any):
    count, step, parts = chunks.chunked(form.rows, (hidden, *rows))
    cast = kernel.astype(hidden.dtype)

    def body(carry, index: Array):
        total, gradients = carry
        h, *rest = (chunks.take(x, index, step) for x in parts)
        logits = chunks.logits_of(form.layout, h, cast, bias)
        found, dlogits = jax.value_and_grad(lambda x: _chunk_loss(form, x, rest, theirs), has_aux=True)(logits)
        gradients = gradients.add(form.layout, chunks.uncap(form.layout, dlogits, logits), h, cast, index)
        return (jax.tree.map(jnp.add, total, found), gradients), None

    first = (_zeros(), chunks.no_gradients(parts[0], kernel, bias))
    (total, gradients), _ = jax.lax.scan(body, first, jnp.arange(count, dtype=jnp.int32))
    gradients = gradients._replace(hidden=gradients.hidden[:, : hidden.shape[1]])
    empty = tuple(None if x is None else jnp.zeros((0,), x.dtype) for x in (kernel, bias))
    return total, (gradients, empty)


def _loss_backward(form: Form, saved, cotangent):
    gradients, (kernel, bias) = saved
    return *gradients.scaled(form.layout, cotangent[0], kernel, bias), None, None


_loss.defvjp(_loss_forward, _loss_backward)


def _zeros() -> tuple[Array, Array]:
    return jnp.zeros((), jnp.float32), jnp.zeros(2, jnp.float32)


def _chunk_loss(form: Form, logits: Array, rest: list[Array], theirs: Any) -> tuple[Array, Array]:
    """The chunk's loss and its sums [kd, nll], from the student's logits [B, step, V]."""
    targets, weights, data, *teacher = rest
    ids = jnp.clip(targets, 0, logits.shape[-1] - 1)[..., None]
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), ids, axis=-1)[..., 0]
    log_p, log_q = _both(form, logits, teacher, theirs)
    kd = form.divergence.between(log_p, log_q)
    sums = jnp.stack([jnp.sum(weights * kd), jnp.sum(data * nll)])
    return form.kd_weight * sums[0] + (1.0 - form.kd_weight) * sums[1], sums


def _both(form: Form, logits: Array, teacher: list[Array], theirs: Any) -> tuple[Array, Array]:
    """The teacher's and the student's log-probabilities over the same entries."""
    temperature = form.divergence.temperature
    if form.teacher is None:
        ids, log_p = teacher
        return log_p.astype(jnp.float32), with_tail(jax.nn.log_softmax(logits / temperature), ids.astype(jnp.int32))
    hidden, (kernel, bias) = teacher[0], theirs
    other = chunks.logits_of(form.teacher, hidden, kernel.astype(hidden.dtype), bias)
    shared = min(logits.shape[-1], other.shape[-1])
    log_p, log_q = (jax.nn.log_softmax(x[..., :shared] / temperature) for x in (other, logits))
    return log_p, log_q
