"""Tokens to experts and back: rows sorted by expert, made and undone by gathers alone, forward and backward.

The gradient of a gather is a scatter-add, which is slow on CPU and adds in any order on GPU. But this gather is a
permutation with repeats, whose inverse is known: its gradient is a gather too.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.types import Array


class Dispatch(NamedTuple):
    """Where each (token, choice) pair stands among the rows that experts see. All int32.

    Attributes:
      sizes_E: rows of each expert, multiples of the unit.
      row_Txk: the row of a pair, P where it has none.
      pair_P: the pair in a row, `token * k + choice`; T * k in rows without one.
      counts_E: pairs of each expert.
    """

    sizes_E: Array
    row_Txk: Array
    pair_P: Array
    counts_E: Array


class Boxes(NamedTuple):
    """Rows in equal boxes, each with a few experts: `number` boxes of `rows` rows. A box's experts fit into it."""

    number: int
    rows: int


def dispatch(chosen_Txk: Array, experts: int, unit: int = 1, boxes: Boxes | None = None) -> Dispatch:
    """Sort pairs by expert, those of an expert in the order of tokens.

    Args:
      chosen_Txk: int32, the experts of each token; `experts` itself for no expert (padding, no room).
      experts: E.
      unit: what each expert's rows are filled up to a multiple of.
      boxes: where the rows of experts begin anew; null: the experts follow each other.

    Returns:
      The places of T * k pairs among the rows of the boxes, or among T * k + E * (unit - 1) rows, rounded up to a
      multiple of the unit.
    """
    pairs = chosen_Txk.size
    chosen = chosen_Txk.reshape(-1)
    order = jnp.argsort(chosen, stable=True).astype(jnp.int32)
    rank = jnp.zeros(pairs, jnp.int32).at[order].set(jnp.arange(pairs, dtype=jnp.int32), unique_indices=True)
    counts_E = jnp.sum(jax.nn.one_hot(chosen, experts, dtype=jnp.int32), axis=0)
    sizes_E = -(-counts_E // unit) * unit
    first_E = jnp.cumsum(counts_E) - counts_E
    if boxes is None:
        rows = -(-(pairs + min(experts, pairs) * (unit - 1)) // unit) * unit
        start_E = jnp.cumsum(sizes_E) - sizes_E
    else:
        rows = boxes.number * boxes.rows
        inside = sizes_E.reshape(boxes.number, -1)
        start = jnp.cumsum(inside, axis=1) - inside + boxes.rows * jnp.arange(boxes.number)[:, None]
        start_E = start.reshape(-1)
    own = jnp.minimum(chosen, experts - 1)
    row = jnp.where(chosen < experts, start_E[own] + rank - first_E[own], rows)
    # Of experts that begin at the same row, all but the last are empty.
    own_P = jnp.maximum(jnp.searchsorted(start_E, jnp.arange(rows), side="right") - 1, 0)
    place_P = jnp.arange(rows, dtype=jnp.int32) - start_E[own_P]
    source_P = jnp.minimum(first_E[own_P] + place_P, pairs - 1)
    pair_P = jnp.where(place_P < counts_E[own_P], order[source_P], pairs)
    return Dispatch(sizes_E, row.reshape(chosen_Txk.shape).astype(jnp.int32), pair_P.astype(jnp.int32), counts_E)


@jax.custom_vjp
def to_experts(x_TxD: Array, plan: Dispatch) -> Array:
    """Each row's token: [P, D]; some token's values in rows without a pair."""
    k = plan.row_Txk.shape[1]
    return _rows(x_TxD, jnp.minimum(plan.pair_P // k, x_TxD.shape[0] - 1))


def _to_experts(x_TxD: Array, plan: Dispatch) -> tuple[Array, Dispatch]:
    return to_experts(x_TxD, plan), plan


def _to_experts_back(plan: Dispatch, dx_PxD: Array) -> tuple[Array, None]:
    return _gathered_sum(dx_PxD, plan, None), None


to_experts.defvjp(_to_experts, _to_experts_back)


@jax.custom_vjp
def from_experts(y_PxD: Array, gates_Txk: Array, plan: Dispatch) -> Array:
    """`out[t] = sum_j gates[t, j] * y[row of (t, j)]`, sums in float32: [T, D] in the dtype of `y`."""
    return _gathered_sum(y_PxD, plan, gates_Txk)


def _from_experts(y: Array, gates: Array, plan: Dispatch) -> tuple[Array, tuple[Array, Array, Dispatch]]:
    return from_experts(y, gates, plan), (y, gates, plan)


def _from_experts_back(saved: tuple[Array, Array, Dispatch], do_TxD: Array) -> tuple[Array, Array, None]:
    y_PxD, gates_Txk, plan = saved
    tokens, k = gates_Txk.shape
    filled_P = plan.pair_P < tokens * k
    pair_P = jnp.minimum(plan.pair_P, tokens * k - 1)
    gate_P = jnp.where(filled_P, gates_Txk.reshape(-1)[pair_P], 0.0)
    do_PxD = _rows(do_TxD, pair_P // k)
    dy_PxD = (gate_P[:, None] * do_PxD.astype(jnp.float32)).astype(y_PxD.dtype)
    # The gate's gradient is a product of rows; it is made where both lie side by side, and only the number travels.
    dot_P = jnp.sum(y_PxD.astype(jnp.float32) * do_PxD.astype(jnp.float32), axis=1)
    row_Txk, placed_Txk = _placed(plan)
    return dy_PxD, jnp.where(placed_Txk, dot_P[row_Txk], 0.0).astype(gates_Txk.dtype), None


from_experts.defvjp(_from_experts, _from_experts_back)


def _placed(plan: Dispatch) -> tuple[Array, Array]:
    rows = plan.pair_P.shape[0]
    return jnp.minimum(plan.row_Txk, rows - 1), plan.row_Txk < rows


def _gathered_sum(y_PxD: Array, plan: Dispatch, gates_Txk: Array | None) -> Array:
    """Sum over a token's rows, one choice after the other, so that no [T, k, D] array is made."""
    row_Txk, placed_Txk = _placed(plan)
    factor_Txk = placed_Txk.astype(jnp.float32) if gates_Txk is None else jnp.where(placed_Txk, gates_Txk, 0.0)
    total = jnp.zeros((row_Txk.shape[0], y_PxD.shape[1]), jnp.float32)
    for j in range(row_Txk.shape[1]):
        total = total + factor_Txk[:, j, None] * _rows(y_PxD, row_Txk[:, j]).astype(jnp.float32)
    return total.astype(y_PxD.dtype)


def _rows(x: Array, index: Array) -> Array:
    return x.at[index].get(mode="promise_in_bounds")
