"""The experts of a mixture: their feed-forward layers over rows sorted by expert, on one device or spread over many."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from jaxlm.nn.copies import POSITIONS, ROWS, TENSOR, parts
from jaxlm.nn.dispatch import Boxes, dispatch, from_experts, to_experts
from jaxlm.nn.dropout import dropout
from jaxlm.nn.kernels import grouped_matmul as grouped
from jaxlm.nn.kernels.grouped_matmul import Backend, grouped_matmul
from jaxlm.nn.mlp import ACTIVATIONS
from jaxlm.nn.qtensor import dequantise, is_qtensor
from jaxlm.types import Array

EXPERT, GATHERED = "expert", "gathered"
"""The mesh axis of experts, and the name of weights that a backward pass gathers again instead of keeping."""

Projection = dict[str, Any]
"""One projection of all experts: `kernel` [E, in, out]; of an adapter `a` [E, in, R], `b` [E, R, out] and `factor`
[E, out], which is multiplied in at the end (DoRA)."""


class Form(NamedTuple):
    """What is static about experts.

    Attributes:
      experts: E.
      activation: by its name in `ACTIVATIONS`.
      dropout: of the input of adapters.
      backend: of the grouped products.
      room: most pairs that an expert can have, or None.
    """

    experts: int
    activation: str
    dropout: float = 0.0
    backend: Backend = "reference"
    room: int | None = None


def mixture(
    form: Form, x: Array, gates: Array, chosen: Array, weights: dict[str, Projection], key: Array | None = None
) -> Array:
    """`y = sum_j gates_j * expert_{chosen_j}(x)` for each token, each device on its own rows.

    Under a mesh (`jax.set_mesh`) with several parts of `expert`, each part has some of the experts, and rows travel to
    them and back: two all-to-all, and two more backward. Their buffers have room for the worst case, so nothing is ever
    dropped here.

    Args:
      form: static settings.
      x: [B, L, D].
      gates: float32 [B, L, k].
      chosen: int32 [B, L, k]; `form.experts` for nobody.
      weights: `gate` (or not), `up`, `down`.
      key: of dropout, or None.

    Returns:
      [B, L, D] in the dtype of `x`.
    """
    if not _fits(x.shape):
        return _flat(functools.partial(_local, form), x, gates, chosen, weights, key)
    weights = {name: {part: _dense(leaf, x.dtype) for part, leaf in node.items()} for name, node in weights.items()}
    data = PartitionSpec(ROWS, POSITIONS, None)
    specs = {name: {part: PartitionSpec(*_spec(name, part)) for part in node} for name, node in weights.items()}

    def share(x: Array, gates: Array, chosen: Array, weights: dict[str, Projection], key: Array | None) -> Array:
        if key is not None:
            for axis in (*ROWS, POSITIONS):
                key = jax.random.fold_in(key, jax.lax.axis_index(axis))
        body = functools.partial(_spread, form)
        return jax.lax.psum(_flat(body, x, gates, chosen, weights, key), TENSOR)

    # Loops inside begin with constants, which the check of varying types would refuse.
    call = jax.shard_map(share, in_specs=(data, data, data, specs, PartitionSpec()), out_specs=data, check_vma=False)
    kept = jax.checkpoint_policies.save_anything_except_these_names(GATHERED)
    return jax.checkpoint(call, policy=kept)(x, gates, chosen, weights, key)


def _flat(body: Callable[..., Array], x: Array, gates: Array, chosen: Array, *rest: Any) -> Array:
    k = chosen.shape[-1]
    y = body(x.reshape(-1, x.shape[-1]), gates.reshape(-1, k), chosen.reshape(-1, k), *rest)
    return y.reshape(x.shape)


def _local(
    form: Form, x_TxD: Array, gates: Array, chosen: Array, weights: dict[str, Projection], key: Array | None
) -> Array:
    """All experts here."""
    experts = weights["up"]["kernel"].shape[0]
    plan = dispatch(chosen, experts, grouped.unit(form.backend))
    return from_experts(_feed(form, to_experts(x_TxD, plan), plan.sizes_E, weights, key), gates, plan)


def _spread(
    form: Form, x_TxD: Array, gates: Array, chosen: Array, weights: dict[str, Projection], key: Array | None
) -> Array:
    """Some of the experts here, the others on the other parts of the axis."""
    count = jax.lax.axis_size(EXPERT)
    weights = {name: {part: _whole(name, part, leaf) for part, leaf in node.items()} for name, node in weights.items()}
    if count == 1:
        return _local(form, x_TxD, gates, chosen, weights, key)
    own = form.experts // count
    boxes = Boxes(count, box_rows(form, count, x_TxD.shape[0], chosen.shape[1]))
    plan = dispatch(chosen, form.experts, boxes=boxes)
    received = _exchange(to_experts(x_TxD, plan))
    counts_SxE = _exchange(plan.counts_E.reshape(count, own))
    mine = _experts_of_rows(counts_SxE, boxes.rows)
    ones = jnp.ones((mine.size, 1), jnp.float32)
    y = _local(form, received, ones, mine.reshape(-1, 1), weights, key)
    return from_experts(_exchange(y), gates, plan)


def box_rows(form: Form, count: int, tokens: int, k: int) -> int:
    """Rows from one device to another: all that its tokens can choose there."""
    own = form.experts // count
    most = tokens * min(k, own)
    return most if form.room is None else min(most, own * form.room)


def _exchange(x: Array) -> Array:
    """Part i of the leading axis to device i of the axis; what it sent comes to stand in its place."""
    return jax.lax.all_to_all(x, EXPERT, 0, 0, tiled=True)


def _experts_of_rows(counts_SxE: Array, rows: int) -> Array:
    """The own expert of each row of each box, E where there is none: int32 [S, rows]."""
    ends = jnp.cumsum(counts_SxE, axis=1)
    at = jnp.arange(rows, dtype=ends.dtype)[None, None, :]
    return jnp.sum(at >= ends[:, :, None], axis=1, dtype=jnp.int32)


def _feed(form: Form, x_PxD: Array, sizes_E: Array, weights: dict[str, Projection], key: Array | None) -> Array:
    act = ACTIVATIONS[form.activation]
    keys = dict(zip(("gate", "up", "down"), (None,) * 3 if key is None else jax.random.split(key, 3), strict=True))

    def project(x: Array, name: str) -> Array:
        return _project(form, x, sizes_E, weights[name], keys[name])

    up = project(x_PxD, "up")
    return project(act(project(x_PxD, "gate")) * up if "gate" in weights else act(up), "down")


def _project(form: Form, x: Array, sizes_E: Array, node: Projection, key: Array | None) -> Array:
    product = functools.partial(grouped_matmul, backend=form.backend)
    kernel = node["kernel"]
    if is_qtensor(kernel):
        # Dequantised again in the backward pass, so that nothing but the codes is kept in between.
        again = jax.checkpoint(lambda x, q: product(x, jax.lax.stop_gradient(dequantise(q, x.dtype)), sizes_E))
        y = again(x, kernel)
    else:
        y = product(x, kernel, sizes_E)
    if "a" in node:
        y = y + product(product(dropout(x, form.dropout, key), node["a"], sizes_E), node["b"], sizes_E)
    if "factor" in node:
        own_P = jnp.minimum(grouped.group_of(x.shape[0], sizes_E), sizes_E.shape[0] - 1)
        y = y * node["factor"][own_P].astype(y.dtype)
    return y


def _dense(leaf: Any, dtype: Any) -> Array:
    return dequantise(leaf, dtype) if is_qtensor(leaf) else leaf


def _spec(projection: str, part: str) -> tuple[str | None, ...]:
    """How a leaf of `weights` is cut: as `dist.rules` cuts parameters."""
    inner, outer = (TENSOR, "fsdp") if projection == "down" else ("fsdp", TENSOR)
    ends = {"kernel": (inner, outer), "a": (inner, None), "b": (None, outer), "factor": (outer,)}[part]
    return (EXPERT, *ends)


def _whole(projection: str, part: str, leaf: Array) -> Array:
    """A leaf gathered over `fsdp`; backward the gradients are scattered."""
    spec = _spec(projection, part)
    if "fsdp" not in spec or jax.lax.axis_size("fsdp") == 1:
        return leaf
    return checkpoint_name(jax.lax.all_gather(leaf, "fsdp", axis=spec.index("fsdp"), tiled=True), GATHERED)


def _fits(shape: tuple[int, ...]) -> bool:
    """Whether there is a mesh to spread over, and rows and positions for all its parts."""
    rows, positions = parts(ROWS[0]) * parts(ROWS[1]) * parts(ROWS[2]), parts(POSITIONS)
    return rows * positions * parts(TENSOR) > 1 and not (shape[0] % rows or shape[1] % positions)
