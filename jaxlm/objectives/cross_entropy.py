"""Cross-entropy and log-probabilities from hidden states, in chunks: the logits of all positions never exist at once.

For the loss, the gradient is made in the forward pass, while the logits of a chunk are there: the backward pass only
scales it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.objectives.chunks import (
    Gradients,
    Layout,
    chunk_rows,
    chunked,
    group,
    head_copies,
    logits_of,
    no_gradients,
    over_groups,
    row_split,
    take,
    uncap,
    ungroup,
)
from jaxlm.types import Array, Head


class Form(NamedTuple):
    """Static settings: see `cross_entropy`; `rows` is its `chunk`."""

    z_weight: float
    label_smoothing: float
    layout: Layout
    rows: int


def cross_entropy(
    hidden_BxLxD: Array,
    head: Head,
    targets_BxL: Array,
    weights_BxL: Array,
    *,
    z_weight: float = 0.0,
    label_smoothing: float = 0.0,
    chunk: int | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Weighted sum over positions of `nll + z_weight * lse^2`, with `lse = log sum exp logits`.

    `nll = lse - (1 - e) * logits[target] - e * mean(logits)`, with `e = label_smoothing`. Softmax in float32, products
    from operands in the dtype of `hidden` with float32 sums. Under a mesh (`jax.set_mesh`) the rows may be sharded over
    its data, fsdp, expert and context axes.

    Args:
      hidden_BxLxD: [B, L, D].
      head: kernel [D, V], or [V, D] if tied. With `copies`, or one more leading axis, the kernel has a copy for each
        group of rows (`row_groups` many, sharded as they are), and so has its gradient: whoever made them sums them.
      targets_BxL: int32 [B, L]; any value where the weight is 0.
      weights_BxL: float32 [B, L].
      z_weight: weight of the squared log denominator (PaLM, 2204.02311).
      label_smoothing: share of the target's probability that is spread evenly over the vocabulary.
      chunk: rows of logits at a time and device; null: `chunk_rows`.

    Returns:
      The sum, float32, and sums over positions without gradient: `nll` (without smoothing), `lse_squared`, `correct`
      (the target has the largest logit) and `weight`.
    """
    form = Form(z_weight, label_smoothing, Layout(head.softcap, head.tied), chunk or chunk_rows())
    split = row_split(hidden_BxLxD.shape)
    rows = tuple(group(x, split) for x in (hidden_BxLxD, targets_BxL, weights_BxL.astype(jnp.float32)))
    kernel, bias = head_copies(head, split)
    loss, sums = over_groups(functools.partial(_loss, form), split)(rows[0], kernel, bias, *rows[1:])
    if split.count > 1:
        loss, sums = jnp.sum(loss), jnp.sum(sums, axis=0)
    return loss, dict(zip(("nll", "lse_squared", "correct", "weight"), jax.lax.stop_gradient(sums), strict=True))


def token_log_probs(hidden_BxLxD: Array, head: Head, targets_BxL: Array, *, chunk: int | None = None) -> Array:
    """`log softmax(logits)[target]` at each position: float32 [B, L].

    The backward pass makes each chunk's logits again. Arguments as in `cross_entropy`; targets out of range are
    clipped.
    """
    return token_statistics(hidden_BxLxD, head, targets_BxL, chunk=chunk)[0]


def token_statistics(
    hidden_BxLxD: Array, head: Head, targets_BxL: Array, *, chunk: int | None = None
) -> tuple[Array, Array]:
    """Log-probability of the target, and entropy of the distribution in nats: float32 [B, L] each, differentiable."""
    form = Form(0.0, 0.0, Layout(head.softcap, head.tied), chunk or chunk_rows())
    split = row_split(hidden_BxLxD.shape)
    hidden, targets = group(hidden_BxLxD, split), group(targets_BxL, split)
    kernel, bias = head_copies(head, split)
    values = over_groups(functools.partial(_statistics, form), split)(hidden, kernel, bias, targets)
    log_probs, entropy = (ungroup(x, split) for x in values)
    return log_probs, entropy


def _is_target(logits: Array, targets: Array) -> Array:
    vocabulary = logits.shape[-1]
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2)
    return ids == jnp.clip(targets, 0, vocabulary - 1)[..., None]


class _Row(NamedTuple):
    """Of each position: largest logit, log denominator, the target's logit; [B, L]."""

    top: Array
    lse: Array
    target: Array


def _reduce(logits: Array, is_target: Array) -> _Row:
    top = jnp.max(logits, axis=-1)
    lse = top + jnp.log(jnp.sum(jnp.exp(logits - top[..., None]), axis=-1))
    return _Row(top, lse, jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1))


def _chunk_sums(form: Form, logits: Array, is_target: Array, weights: Array) -> tuple[_Row, Array, Array]:
    """The rows' reductions, the chunk's loss, and its sums for the metrics [4]."""
    row = _reduce(logits, is_target)
    nll = row.lse - row.target
    loss = nll + form.z_weight * jnp.square(row.lse)
    if form.label_smoothing:
        loss += form.label_smoothing * (row.target - jnp.mean(logits, axis=-1))
    kinds = (nll, jnp.square(row.lse), (row.target >= row.top).astype(jnp.float32), jnp.ones_like(nll))
    return row, jnp.sum(weights * loss), jnp.stack([jnp.sum(weights * kind) for kind in kinds])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(form: Form, hidden: Array, kernel: Array, bias: Array | None, targets: Array, weights: Array):
    """(loss, sums [4]) of one group of rows."""
    count, step, rows = chunked(form.rows, (hidden, targets, weights))
    cast = kernel.astype(hidden.dtype)

    def body(carry: tuple[Array, Array], index: Array):
        h, t, w = (take(x, index, step) for x in rows)
        logits = logits_of(form.layout, h, cast, bias)
        _, loss, sums = _chunk_sums(form, logits, _is_target(logits, t), w)
        return (carry[0] + loss, carry[1] + sums), None

    return jax.lax.scan(
        body, (jnp.zeros((), jnp.float32), jnp.zeros(4, jnp.float32)), jnp.arange(count, dtype=jnp.int32)
    )[0]


def _loss_forward(form: Form, hidden: Array, kernel: Array, bias: Array | None, targets: Array, weights: Array):
    count, step, rows = chunked(form.rows, (hidden, targets, weights))
    cast = kernel.astype(hidden.dtype)

    def body(carry, index: Array):
        total, all_sums, gradients = carry
        h, t, w = (take(x, index, step) for x in rows)
        logits = logits_of(form.layout, h, cast, bias)
        is_target = _is_target(logits, t)
        row, loss, sums = _chunk_sums(form, logits, is_target, w)
        peak = w * (1.0 + 2.0 * form.z_weight * row.lse)
        # The same exponential as in the sum, so that it is made once.
        dlogits = jnp.exp(logits - row.top[..., None]) * (peak * jnp.exp(row.top - row.lse))[..., None]
        dlogits -= jnp.where(is_target, (w * (1.0 - form.label_smoothing))[..., None], 0.0)
        if form.label_smoothing:
            dlogits -= (w * (form.label_smoothing / logits.shape[-1]))[..., None]
        dlogits = uncap(form.layout, dlogits, logits)
        return (total + loss, all_sums + sums, gradients.add(form.layout, dlogits, h, cast, index)), None

    first = (jnp.zeros((), jnp.float32), jnp.zeros(4, jnp.float32), no_gradients(rows[0], kernel, bias))
    (loss, sums, gradients), _ = jax.lax.scan(body, first, jnp.arange(count, dtype=jnp.int32))
    gradients = gradients._replace(hidden=gradients.hidden[:, : hidden.shape[1]])
    empty = tuple(None if x is None else jnp.zeros((0,), x.dtype) for x in (kernel, bias))
    return (loss, sums), (gradients, empty)


def _loss_backward(form: Form, saved, cotangent):
    gradients, (kernel, bias) = saved
    return *gradients.scaled(form.layout, cotangent[0], kernel, bias), None, None


_loss.defvjp(_loss_forward, _loss_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _statistics(form: Form, hidden: Array, kernel: Array, bias: Array | None, targets: Array):
    """(log-probability, entropy), [B, L] each, of one group of rows."""
    return _statistics_forward(form, hidden, kernel, bias, targets)[0]


def _statistics_forward(form: Form, hidden: Array, kernel: Array, bias: Array | None, targets: Array):
    count, step, rows = chunked(form.rows, (hidden, targets))
    cast = kernel.astype(hidden.dtype)

    def body(index: Array) -> tuple[Array, Array, Array]:
        h, t = (take(x, index, step) for x in rows)
        logits = logits_of(form.layout, h, cast, bias)
        row = _reduce(logits, _is_target(logits, t))
        mean = jnp.sum(jnp.exp(logits - row.lse[..., None]) * logits, axis=-1)
        return row.target - row.lse, row.lse - mean, row.lse

    values = jax.lax.map(body, jnp.arange(count, dtype=jnp.int32))
    flat = (jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1)[:, : hidden.shape[1]] for x in values)
    log_probs, entropy, lse = flat
    return (log_probs, entropy), (hidden, kernel, bias, targets, entropy, lse)


def _statistics_backward(form: Form, saved, cotangents: tuple[Array, Array]):
    hidden, kernel, bias, targets, entropy, lse = saved
    count, step, rows = chunked(form.rows, (hidden, targets, entropy, lse, *cotangents))
    cast = kernel.astype(hidden.dtype)

    def body(gradients: Gradients, index: Array):
        h, t, e, z, dlog_prob, dentropy = (take(x, index, step) for x in rows)
        logits = logits_of(form.layout, h, cast, bias)
        log_p = logits - z[..., None]
        slope = dlog_prob[..., None] + dentropy[..., None] * (log_p + e[..., None])
        dlogits = jnp.where(_is_target(logits, t), dlog_prob[..., None], 0.0) - jnp.exp(log_p) * slope
        return gradients.add(form.layout, uncap(form.layout, dlogits, logits), h, cast, index), None

    first = no_gradients(rows[0], kernel, bias)
    gradients, _ = jax.lax.scan(body, first, jnp.arange(count, dtype=jnp.int32))
    dhidden = gradients.hidden[:, : hidden.shape[1]]
    dbias = None if bias is None or gradients.bias is None else gradients.bias.astype(bias.dtype)
    dkernel = gradients.kernel.T if form.layout.tied else gradients.kernel
    return dhidden, dkernel.astype(kernel.dtype), dbias, None


_statistics.defvjp(_statistics_forward, _statistics_backward)
