"""Cross-entropy and log-probabilities from hidden states, in chunks: the logits of all positions never exist at once.

For the loss, the gradient is made in the forward pass, while the logits of a chunk are there: the backward pass only
scales it. Rows are grouped as the mesh shards them, and each group sums its own gradient of the head, so that nothing
but the final sum crosses devices.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxlm.nn.kernels.matmul import outer
from jaxlm.types import Array, Head

CHUNK = {"cpu": 256}
"""Rows of logits at a time and device, by platform. CPU's is measured: 512 to 128 differ by 6 % either way with the
vocabulary. Elsewhere it is `LONG_CHUNK`, because each chunk also reads and writes the whole gradient of the head."""

LONG_CHUNK = 2048

BATCH_AXES = ("data", "fsdp", "expert")
SEQUENCE_AXES = ("context",)
"""Mesh axes over which the two leading axes of a batch are sharded."""


class Form(NamedTuple):
    """Static settings: see `cross_entropy`; `rows` is its `chunk`."""

    z_weight: float
    label_smoothing: float
    softcap: float | None
    tied: bool
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
    form = Form(z_weight, label_smoothing, head.softcap, head.tied, chunk or chunk_rows())
    split = _row_split(hidden_BxLxD.shape)
    rows = tuple(_group(x, split) for x in (hidden_BxLxD, targets_BxL, weights_BxL.astype(jnp.float32)))
    kernel, bias = _head_copies(head, split)
    loss, sums = _over_groups(functools.partial(_loss, form), split)(rows[0], kernel, bias, *rows[1:])
    if split.count > 1:
        loss, sums = jnp.sum(loss), jnp.sum(sums, axis=0)
    return loss, dict(zip(("nll", "lse_squared", "correct", "weight"), jax.lax.stop_gradient(sums), strict=True))


def chunk_rows() -> int:
    """Rows of logits that each device makes at a time on this platform."""
    return CHUNK.get(jax.default_backend(), LONG_CHUNK)


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
    form = Form(0.0, 0.0, head.softcap, head.tied, chunk or chunk_rows())
    split = _row_split(hidden_BxLxD.shape)
    hidden, targets = _group(hidden_BxLxD, split), _group(targets_BxL, split)
    kernel, bias = _head_copies(head, split)
    values = _over_groups(functools.partial(_statistics, form), split)(hidden, kernel, bias, targets)
    log_probs, entropy = (_ungroup(x, split) for x in values)
    return log_probs, entropy


class _Split(NamedTuple):
    """How [B, L] is cut into groups of rows, one for each device that has rows of its own."""

    batch: int = 1
    sequence: int = 1
    axes: tuple[str, ...] = ()

    @property
    def count(self) -> int:  # type: ignore[override]
        return self.batch * self.sequence


def row_groups(shape: tuple[int, ...]) -> int:
    """How many groups of rows a batch [B, L, ...] has under the mesh in force: 1 without a mesh."""
    return _row_split(shape).count


def _row_split(shape: tuple[int, ...]) -> _Split:
    mesh = jax.sharding.get_abstract_mesh()
    auto = [n for n, t in zip(mesh.axis_names, mesh.axis_types, strict=True) if t == jax.sharding.AxisType.Auto]
    batch_axes = tuple(a for a in BATCH_AXES if a in auto)
    sequence_axes = tuple(a for a in SEQUENCE_AXES if a in auto)
    batch = sequence = 1
    for a in batch_axes:
        batch *= mesh.shape[a]
    for a in sequence_axes:
        sequence *= mesh.shape[a]
    if shape[0] % batch or shape[1] % sequence:
        return _Split()
    return _Split(batch, sequence, (*batch_axes, *sequence_axes))


def _place(x: Array, split: _Split) -> Array:
    """Shards the leading axis of groups, leaving the others to the partitioner."""
    rest = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(split.axes, *rest))


def _group(x: Array, split: _Split) -> Array:
    """[B, L, ...] -> [groups, B / batch, L / sequence, ...]; unchanged if there is one group."""
    if split.count == 1:
        return x
    b, s = split.batch, split.sequence
    x = x.reshape(b, x.shape[0] // b, s, x.shape[1] // s, *x.shape[2:])
    x = jnp.moveaxis(x, 2, 1)
    return _place(x.reshape(b * s, *x.shape[2:]), split)


def _ungroup(x: Array, split: _Split) -> Array:
    if split.count == 1:
        return x
    b, s = split.batch, split.sequence
    x = jnp.moveaxis(x.reshape(b, s, *x.shape[1:]), 1, 2)
    return x.reshape(b * x.shape[1], s * x.shape[3], *x.shape[4:])


def _head_copies(head: Head, split: _Split) -> tuple[Array, Array | None]:
    """Kernel and bias with one copy for each group: the sum of their gradients is then the transpose of this."""
    kernel = head.kernel if head.copies is None else head.copies
    copies = kernel.ndim == 3
    if split.count == 1:
        return (kernel[0] if copies else kernel), head.bias

    def copy(x: Array) -> Array:
        return _place(jnp.broadcast_to(x[None], (split.count, *x.shape)), split)

    return (kernel if copies else copy(kernel)), (None if head.bias is None else copy(head.bias))


def _over_groups(function, split: _Split):
    return function if split.count == 1 else jax.vmap(function)


def _chunked(rows: int, arrays: tuple[Array, ...]) -> tuple[int, int, tuple[Array, ...]]:
    """How many chunks, of how many positions, and the arrays [B, L, ...] padded by zeros along L to that."""
    batch, length = arrays[0].shape[:2]
    step = max(1, min(length, rows // batch))
    count = -(-length // step)
    step = -(-length // count)
    rest = count * step - length
    if rest:
        arrays = tuple(jnp.pad(x, [(0, 0), (0, rest)] + [(0, 0)] * (x.ndim - 2)) for x in arrays)
    return count, step, arrays


def _slice(x: Array, index: Array, step: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, index * step, step, 1)


def _logits(form: Form, hidden: Array, kernel: Array, bias: Array | None) -> Array:
    axis = 1 if form.tied else 0
    logits = jax.lax.dot_general(hidden, kernel, (((2,), (axis,)), ((), ())), preferred_element_type=jnp.float32)
    if bias is not None:
        logits += bias.astype(jnp.float32)[None, None, :]
    return logits if form.softcap is None else form.softcap * jnp.tanh(logits / form.softcap)


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


def _uncap(form: Form, dlogits: Array, logits: Array) -> Array:
    return dlogits if form.softcap is None else dlogits * (1.0 - jnp.square(logits / form.softcap))


class _Gradients(NamedTuple):
    """Of hidden states (dtype of theirs), kernel [D, V] (tied or not) and bias (float32); grown chunk by chunk."""

    hidden: Array
    kernel: Array
    bias: Array | None

    def add(self, form: Form, dlogits: Array, hidden: Array, kernel: Array, index: Array) -> "_Gradients":
        bias = None if self.bias is None else self.bias + jnp.sum(dlogits, axis=(0, 1))
        dlogits = dlogits.astype(hidden.dtype)
        dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
        dhidden = dot(dlogits, kernel, (((2,), (0 if form.tied else 1,)), ((), ())))
        dkernel = outer(hidden, dlogits)
        start = (0, index * dhidden.shape[1], 0)
        whole = jax.lax.dynamic_update_slice(self.hidden, dhidden.astype(self.hidden.dtype), start)
        return _Gradients(whole, self.kernel + dkernel, bias)


def _no_gradients(hidden: Array, kernel: Array, bias: Array | None) -> _Gradients:
    zeros = None if bias is None else jnp.zeros(bias.shape, jnp.float32)
    width = (hidden.shape[-1], kernel.size // hidden.shape[-1])
    return _Gradients(jnp.zeros(hidden.shape, hidden.dtype), jnp.zeros(width, jnp.float32), zeros)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(form: Form, hidden: Array, kernel: Array, bias: Array | None, targets: Array, weights: Array):
    """(loss, sums [4]) of one group of rows."""
    count, step, rows = _chunked(form.rows, (hidden, targets, weights))
    cast = kernel.astype(hidden.dtype)

    def body(carry: tuple[Array, Array], index: Array):
        h, t, w = (_slice(x, index, step) for x in rows)
        logits = _logits(form, h, cast, bias)
        _, loss, sums = _chunk_sums(form, logits, _is_target(logits, t), w)
        return (carry[0] + loss, carry[1] + sums), None

    return jax.lax.scan(
        body, (jnp.zeros((), jnp.float32), jnp.zeros(4, jnp.float32)), jnp.arange(count, dtype=jnp.int32)
    )[0]


def _loss_forward(form: Form, hidden: Array, kernel: Array, bias: Array | None, targets: Array, weights: Array):
    count, step, rows = _chunked(form.rows, (hidden, targets, weights))
    cast = kernel.astype(hidden.dtype)

    def body(carry, index: Array):
        total, all_sums, gradients = carry
        h, t, w = (_slice(x, index, step) for x in rows)
        logits = _logits(form, h, cast, bias)
        is_target = _is_target(logits, t)
        row, loss, sums = _chunk_sums(form, logits, is_target, w)
        peak = w * (1.0 + 2.0 * form.z_weight * row.lse)
        # The same exponential as in the sum, so that it is made once.
        dlogits = jnp.exp(logits - row.top[..., None]) * (peak * jnp.exp(row.top - row.lse))[..., None]
        dlogits -= jnp.where(is_target, (w * (1.0 - form.label_smoothing))[..., None], 0.0)
        if form.label_smoothing:
            dlogits -= (w * (form.label_smoothing / logits.shape[-1]))[..., None]
        dlogits = _uncap(form, dlogits, logits)
        return (total + loss, all_sums + sums, gradients.add(form, dlogits, h, cast, index)), None

    first = (jnp.zeros((), jnp.float32), jnp.zeros(4, jnp.float32), _no_gradients(rows[0], kernel, bias))
    (loss, sums, gradients), _ = jax.lax.scan(body, first, jnp.arange(count, dtype=jnp.int32))
    gradients = gradients._replace(hidden=gradients.hidden[:, : hidden.shape[1]])
    empty = tuple(None if x is None else jnp.zeros((0,), x.dtype) for x in (kernel, bias))
    return (loss, sums), (gradients, empty)


def _loss_backward(form: Form, saved, cotangent):
    scale = cotangent[0]
    gradients, (kernel, bias) = saved
    dhidden = (gradients.hidden.astype(jnp.float32) * scale).astype(gradients.hidden.dtype)
    dkernel = gradients.kernel * scale
    dkernel = (dkernel.T if form.tied else dkernel).astype(kernel.dtype)
    dbias = None if bias is None else (gradients.bias * scale).astype(bias.dtype)
    return dhidden, dkernel, dbias, None, None


_loss.defvjp(_loss_forward, _loss_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _statistics(form: Form, hidden: Array, kernel: Array, bias: Array | None, targets: Array):
    """(log-probability, entropy), [B, L] each, of one group of rows."""
    return _statistics_forward(form, hidden, kernel, bias, targets)[0]


def _statistics_forward(form: Form, hidden: Array, kernel: Array, bias: Array | None, targets: Array):
    count, step, rows = _chunked(form.rows, (hidden, targets))
    cast = kernel.astype(hidden.dtype)

    def body(index: Array) -> tuple[Array, Array, Array]:
        h, t = (_slice(x, index, step) for x in rows)
        logits = _logits(form, h, cast, bias)
        row = _reduce(logits, _is_target(logits, t))
        mean = jnp.sum(jnp.exp(logits - row.lse[..., None]) * logits, axis=-1)
        return row.target - row.lse, row.lse - mean, row.lse

    values = jax.lax.map(body, jnp.arange(count, dtype=jnp.int32))
    flat = (jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1)[:, : hidden.shape[1]] for x in values)
    log_probs, entropy, lse = flat
    return (log_probs, entropy), (hidden, kernel, bias, targets, entropy, lse)


def _statistics_backward(form: Form, saved, cotangents: tuple[Array, Array]):
    hidden, kernel, bias, targets, entropy, lse = saved
    count, step, rows = _chunked(form.rows, (hidden, targets, entropy, lse, *cotangents))
    cast = kernel.astype(hidden.dtype)

    def body(gradients: _Gradients, index: Array):
        h, t, e, z, dlog_prob, dentropy = (_slice(x, index, step) for x in rows)
        logits = _logits(form, h, cast, bias)
        log_p = logits - z[..., None]
        slope = dlog_prob[..., None] + dentropy[..., None] * (log_p + e[..., None])
        dlogits = jnp.where(_is_target(logits, t), dlog_prob[..., None], 0.0) - jnp.exp(log_p) * slope
        return gradients.add(form, _uncap(form, dlogits, logits), h, cast, index), None

    first = _no_gradients(rows[0], kernel, bias)
    gradients, _ = jax.lax.scan(body, first, jnp.arange(count, dtype=jnp.int32))
    dhidden = gradients.hidden[:, : hidden.shape[1]]
    dbias = None if bias is None or gradients.bias is None else gradients.bias.astype(bias.dtype)
    dkernel = gradients.kernel.T if form.tied else gradients.kernel
    return dhidden, dkernel.astype(kernel.dtype), dbias, None


_statistics.defvjp(_statistics_forward, _statistics_backward)
