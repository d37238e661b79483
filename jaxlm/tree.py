"""Leaf paths, rule tables over them, and stacking of layers."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from jaxlm.types import Tree

V = TypeVar("V")
Rules = Sequence[tuple[str, V]]
IsLeaf = Callable[[Any], bool] | None


def path_name(path: Iterable[Any]) -> str:
    """A key path of `jax.tree_util` as text: `layers/attn/q/kernel`."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def leaves(tree: Tree, is_leaf: IsLeaf = None) -> dict[str, Any]:
    """All leaves by path, in tree order.

    {"embed": {"kernel": a}, "norm": {"scale": b}}  ->  {"embed/kernel": a, "norm/scale": b}
    """
    return {path_name(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)}


def map_with_path(function: Callable[..., Any], tree: Tree, *rest: Tree, is_leaf: IsLeaf = None) -> Tree:
    """`jax.tree.map`, with the leaf's path (text) as first argument of `function`."""
    return jax.tree_util.tree_map_with_path(lambda p, *x: function(path_name(p), *x), tree, *rest, is_leaf=is_leaf)


def matches(pattern: str, path: str) -> bool:
    """Whether `pattern` (a regular expression) covers the whole of `path` or its last components.

    `attn/(q|k|v)/kernel` matches `layers/attn/q/kernel`, but not `layers/cross_attn/q/kernel`.
    """
    return re.fullmatch(rf"(?:.*/)?(?:{pattern})", path) is not None


def apply_rules(rules: Rules, tree: Tree, *, name: str, all_used: bool = False, is_leaf: IsLeaf = None) -> Tree:
    """The value of the first matching rule for each leaf, as a tree of the same structure.

        rules [("norm/scale", 0), (".*", 1)], {"norm": {"scale": a}, "embed": {"kernel": b}}
        ->  {"norm": {"scale": 0}, "embed": {"kernel": 1}}

    Args:
      rules: ordered (pattern, value) pairs; see `matches`.
      tree: any pytree.
      name: what the table is called in messages.
      all_used: whether a rule that covers no leaf is an error too (for tables that users write).

    Raises:
      ValueError: naming the leaves without a rule, or the rules without a leaf.
    """
    used: set[str] = set()
    missing: list[str] = []

    def value(path: str, _leaf: Any) -> Any:
        for pattern, result in rules:
            if matches(pattern, path):
                used.add(pattern)
                return result
        missing.append(path)
        return None

    result = map_with_path(value, tree, is_leaf=is_leaf)
    if missing:
        raise ValueError(f"{name}: no rule covers {', '.join(missing)}; add a pattern for each")
    unused = [pattern for pattern, _ in rules if pattern not in used]
    if all_used and unused:
        known = ", ".join(leaves(tree, is_leaf=is_leaf))
        raise ValueError(f"{name}: {', '.join(unused)} matches no leaf; the leaves are {known}")
    return result


def stack(trees: Sequence[Tree]) -> Tree:
    """Trees of equal structure -> one tree with a new leading axis: ({"w": [D]}, {"w": [D]}) -> {"w": [2, D]}."""
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


def unstack(tree: Tree) -> tuple[Tree, ...]:
    """The inverse of `stack`: {"w": [N, D]} -> N trees {"w": [D]}."""
    count = jax.tree.leaves(tree)[0].shape[0]
    return tuple(jax.tree.map(lambda x, i=i: x[i], tree) for i in range(count))


def count(tree: Tree) -> int:
    """Number of elements over all leaves."""
    return sum(int(x.size) for x in jax.tree.leaves(tree))
