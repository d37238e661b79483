"""The walk over layers: one scan over the repeats of a pattern of layer kinds, a short loop for what is left over."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxlm.nn.block import BRANCH
from jaxlm.nn.compute import RematPolicy
from jaxlm.nn.config import ModelConfig
from jaxlm.types import Array, Tree

STACKS = ("layers", "dense_layers")
"""Stacked trees of a model: all layers, or, where only some are mixtures of experts, those and the dense rest."""


class Kind(NamedTuple):
    """What is static about a layer: its attention type, and whether it is a mixture of experts."""

    layer_type: str
    sparse: bool


class Plan(NamedTuple):
    """Layers 0..start-1 one by one, then `repeats` times a pattern of `period` layers, then the rest one by one."""

    start: int
    period: int
    repeats: int


def kinds(cfg: ModelConfig) -> list[Kind]:
    """The kind of each layer, in order."""
    moe = cfg.moe
    return [Kind(cfg.layer_type(i), moe is not None and i not in moe.dense_layers) for i in range(cfg.N)]


def stack_of(cfg: ModelConfig, kind: Kind) -> str:
    """Which stacked tree holds layers of this kind."""
    return "layers" if kind.sparse or cfg.moe is None or len(cfg.moe.dense_layers) >= cfg.N else "dense_layers"


def layer_slots(cfg: ModelConfig) -> list[tuple[str, int]]:
    """For each layer, the stacked tree that holds it and its index there."""
    used = dict.fromkeys(STACKS, 0)
    slots = []
    for kind in kinds(cfg):
        name = stack_of(cfg, kind)
        slots.append((name, used[name]))
        used[name] += 1
    return slots


def find_plan(sequence: list[Any]) -> Plan:
    """The plan with the fewest layers outside the scan plus layers inside its body."""
    n = len(sequence)
    best, cost = Plan(0, n, 1), n
    for start in range(n):
        for period in range(1, (n - start) // 2 + 1):
            repeats = 1
            while (
                sequence[start + repeats * period : start + (repeats + 1) * period] == sequence[start : start + period]
            ):
                repeats += 1
            total = n - (repeats - 1) * period
            if repeats > 1 and total < cost:
                best, cost = Plan(start, period, repeats), total
    return best


def unstack(cfg: ModelConfig, tree: Tree) -> Tree:
    """Stacked layers -> a tuple of per-layer trees, in layer order; for decoding, which must not copy weights. A tree
    without stacked layers stays as it is.

    {"embed": e, "layers": {"w": [N, D]}}  ->  {"embed": e, "layers": ({"w": [D]}, ... N times)}
    """
    if isinstance(tree.get("layers"), tuple) or not any(name in tree for name in STACKS):
        return tree
    layers = tuple(jax.tree.map(lambda x, i=i: x[i], tree.get(name, {})) for name, i in layer_slots(cfg))
    return {name: leaf for name, leaf in tree.items() if name not in STACKS} | {"layers": layers}


def checkpoint(body: Callable, policy: RematPolicy) -> Callable:
    """`body` under the named rematerialisation policy (see `Compute.remat`)."""
    policies = jax.checkpoint_policies
    if policy == "none":
        return body
    chosen = {
        "dots": policies.dots_with_no_batch_dims_saveable,
        "block": policies.save_only_these_names(BRANCH),
        "full": policies.nothing_saveable,
        "offload": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[BRANCH],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }[policy]
    return jax.checkpoint(body, policy=chosen, prevent_cse=False)


def walk(
    cfg: ModelConfig, layer: Callable[[Array, Tree, Kind, Array], tuple[Array, Tree]], x: Array, tree: Tree, scan: bool
) -> tuple[Array, list[Tree]]:
    """Carry x through all layers.

    Args:
      cfg: the model.
      layer: `(x, layer tree, kind, layer index) -> (x, auxiliary tree)`.
      x: [B, L, D].
      tree: collection -> {"layers": stacked tree, ...}; a collection may lack layers.
      scan: whether repeats are scanned or unrolled.

    Returns:
      x after the last layer, and one auxiliary tree a layer, in order.
    """
    order, slots = kinds(cfg), layer_slots(cfg)
    plan = find_plan(order) if scan else Plan(0, cfg.N, 1)

    def pick(index: int) -> Tree:
        name, i = slots[index]
        return {c: jax.tree.map(lambda w: w[i], stacks.get(name, {})) for c, stacks in tree.items()}

    def run(x: Array, indices: range) -> tuple[Array, list[Tree]]:
        out = []
        for index in indices:
            x, aux = layer(x, pick(index), order[index], jax.numpy.int32(index))
            out.append(aux)
        return x, out

    if plan.repeats == 1:
        return run(x, range(cfg.N))
    end = plan.start + plan.period * plan.repeats
    x, before = run(x, range(plan.start))
    x, scanned = _scan(layer, x, _repeats(tree, plan, slots), plan, order)
    inside = [jax.tree.map(lambda a, r=r: a[r], aux) for r in range(plan.repeats) for aux in scanned]
    x, after = run(x, range(end, cfg.N))
    return x, [*before, *inside, *after]


def _repeats(tree: Tree, plan: Plan, slots: list[tuple[str, int]]) -> list[Tree]:
    """For each position of the pattern, its layers of all repeats: leaves [repeats, ...]."""

    def position(j: int) -> Tree:
        name, first = slots[plan.start + j]
        stride = slots[plan.start + plan.period + j][1] - first
        stop = first + stride * (plan.repeats - 1) + 1

        def every(w: Array) -> Array:
            return w if (first, stride, stop) == (0, 1, w.shape[0]) else w[first:stop:stride]

        return {c: jax.tree.map(every, stacks.get(name, {})) for c, stacks in tree.items()}

    return [position(j) for j in range(plan.period)]


def _scan(layer: Callable, x: Array, trees: list[Tree], plan: Plan, order: list[Kind]) -> tuple[Array, list[Tree]]:
    def body(x: Array, slice_: tuple[list[Tree], Array]) -> tuple[Array, list[Tree]]:
        layers, repeat = slice_
        out = []
        for j in range(plan.period):
            index = plan.start + repeat * plan.period + j
            x, aux = layer(x, layers[j], order[plan.start + j], index)
            out.append(aux)
        return x, out

    return jax.lax.scan(body, x, (trees, jax.numpy.arange(plan.repeats, dtype="int32")))
