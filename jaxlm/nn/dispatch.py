"""Tokens to experts and back: rows sorted by expert, made and undone by gathers alone, forward and backward.

The gradient of a gather is a scatter-add, which is slow on CPU and adds in any order on GPU. But this gather is a
permutation with repeats, whose inverse is known: its gradient is a gather too.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.nn.kernels.grouped_matmul import group_of
from jaxlm.types import Array


class Dispatch(NamedTuple):
    """Where each (token, choice) pair stands among the rows that experts see. All int32.

    Attributes:
      sizes_E: rows of each expert, multiples of the unit; experts in order, rows behind the last are free.
      row_Txk: the row of a pair, P where it has none: of padding, and dropped.
      pair_P: the pair in a row, `token * k + choice`; T * k in rows without one.
      kept_E: pairs that each expert has.
    """

    sizes_E: Array
    row_Txk: Array
    pair_P: Array
    kept_E: Array


def dispatch(chosen_Txk: Array, experts: int, unit: int = 1, room: Array | None = None) -> Dispatch:
    """Sort pairs by expert: first choices before second ones, and tokens in order.

    Args:
      chosen_Txk: int32, the experts of each token; `experts` itself for no expert (padding).
      experts: E.
      unit: what each expert's rows are filled up to a multiple of.
      room: most pairs of one expert; the later ones are dropped. Null: all are kept.

    Returns:
      The places of T * k pairs among P = T * k + E * (unit - 1) rows, rounded up to a multiple of the unit.
    """
    tokens, k = chosen_Txk.shape
    pairs = tokens * k
    by_choice = chosen_Txk.T.reshape(-1)
    order = jnp.argsort(by_choice, stable=True).astype(jnp.int32)
    rank = jnp.zeros(pairs, jnp.int32).at[order].set(jnp.arange(pairs, dtype=jnp.int32), unique_indices=True)
    counts_E = jnp.sum(jax.nn.one_hot(by_choice, experts, dtype=jnp.int32), axis=0)
    kept_E = counts_E if room is None else jnp.minimum(counts_E, room)
    sizes_E = -(-kept_E // unit) * unit
    first_E, start_E = jnp.cumsum(counts_E) - counts_E, jnp.cumsum(sizes_E) - sizes_E
    rows = -(-(pairs + min(experts, pairs) * (unit - 1)) // unit) * unit

    own = jnp.minimum(by_choice, experts - 1)
    place = rank - first_E[own]
    kept = (by_choice < experts) & (place < kept_E[own])
    row_Txk = jnp.where(kept, start_E[own] + place, rows).reshape(k, tokens).T

    group_P = group_of(rows, sizes_E)
    own_P = jnp.minimum(group_P, experts - 1)
    place_P = jnp.arange(rows, dtype=jnp.int32) - start_E[own_P]
    filled = (group_P < experts) & (place_P < kept_E[own_P])
    source = order[jnp.where(filled, first_E[own_P] + place_P, 0)]
    pair_P = jnp.where(filled, source % tokens * k + source // tokens, pairs)
    return Dispatch(sizes_E.astype(jnp.int32), row_Txk.astype(jnp.int32), pair_P.astype(jnp.int32), kept_E)


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
