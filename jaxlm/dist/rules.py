"""Which dimension of which leaf is cut over which mesh axis: one ordered table, used for everything param-shaped.

Parameters, moments, averages, adapters and quantised parts all take their sharding from `RULES`; there are no boxes
or marks in the trees themselves.
"""

import re
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm import tree as trees
from jaxlm.tree import Rules
from jaxlm.types import Tree

Trailing = tuple[str | tuple[str, ...] | None, ...]
"""Mesh axes of the last dimensions of a leaf, a layer's own: the stacked axis N in front of them is never cut."""

RULES: Rules[Trailing] = (
    # The table is cut by rows: each device looks up the tokens it has and the parts are added, [B, L, D] in all.
    ("embed/kernel", ("tensor", "fsdp")),
    ("position_embed/kernel", (None, "fsdp")),
    ("unembed/kernel", ("fsdp", "tensor")),
    ("unembed/bias", ("tensor",)),
    # Megatron's split (1909.08053): the first product of each branch by columns, the second by rows.
    ("attn/(q|k|v)/kernel", ("fsdp", "tensor")),
    ("attn/(q|k|v)/bias", ("tensor",)),
    ("attn/o/kernel", ("tensor", "fsdp")),
    ("attn/o/bias", (None,)),
    ("mlp/router/kernel", ("fsdp", None)),
    ("mlp/router/bias", (None,)),
    ("mlp/(gate|up)/kernel", ("expert", "fsdp", "tensor")),
    ("mlp/(gate|up)/bias", ("expert", "tensor")),
    ("mlp/down/kernel", ("expert", "tensor", "fsdp")),
    ("mlp/down/bias", ("expert", None)),
    ("shared/(gate|up)/kernel", ("fsdp", "tensor")),
    ("shared/(gate|up)/bias", ("tensor",)),
    ("shared/down/kernel", ("tensor", "fsdp")),
    ("shared/down/bias", (None,)),
    # Adapters x A B: A is cut like the rows of the kernel it stands beside, B like its columns.
    ("attn/(q|k|v|qkv)/a", ("fsdp", None)),
    ("attn/(q|k|v|qkv)/b", (None, "tensor")),
    ("attn/(q|k|v|qkv)/magnitude", ("tensor",)),
    ("attn/o/a", ("tensor", None)),
    ("attn/o/b", (None, "fsdp")),
    ("mlp/(gate|up|gate_up)/a", ("expert", "fsdp", None)),
    ("mlp/(gate|up|gate_up)/b", ("expert", None, "tensor")),
    ("mlp/(gate|up|gate_up)/magnitude", ("expert", "tensor")),
    ("shared/(gate|up)/a", ("fsdp", None)),
    ("shared/(gate|up)/b", (None, "tensor")),
    ("shared/(gate|up)/magnitude", ("tensor",)),
    ("shared/down/a", ("tensor", None)),
    ("shared/down/b", (None, "fsdp")),
    ("mlp/down/a", ("expert", "tensor", None)),
    ("mlp/down/b", ("expert", None, "fsdp")),
    ("mlp/down/magnitude", ("expert", None)),
    ("embed/a", ("tensor", None)),
    ("embed/b", (None, "fsdp")),
    ("(unembed|router)/(a|b)", (None,)),
    # Quantised kernels lie the other way round, [out, in / 2] and [out, blocks of in].
    ("attn/(q|k|v)/kernel/(codes|absmax)", ("tensor", "fsdp")),
    ("attn/o/kernel/(codes|absmax)", ("fsdp", "tensor")),
    ("mlp/(gate|up)/kernel/(codes|absmax)", ("expert", "tensor", "fsdp")),
    ("mlp/down/kernel/(codes|absmax)", ("expert", "fsdp", "tensor")),
    ("shared/(gate|up)/kernel/(codes|absmax)", ("tensor", "fsdp")),
    ("shared/down/kernel/(codes|absmax)", ("fsdp", "tensor")),
    ("kernel/(nested|offset)", (None,)),
    ("(attn/o|shared/down|embed|unembed|router)/magnitude", (None,)),
    # Of size D or K: cutting them would cost a collective each and save nothing.
    ("([a-z]+_)?norm/(scale|bias)", (None,)),
    ("(score|value|projection/hidden)/(kernel|bias)", (None,)),
)
"""Ordered (pattern, axes). Entries that a leaf has no dimension for are dropped from the front, so `expert` counts
only where the leaf has an axis of experts: `layers/mlp/up/kernel` is [N, D, F], or [N, E, D, F] in a mixture."""

QUANTISED = "kernel/(codes|absmax)"
"""Parts of quantised kernels that are cut where they can be."""


def shardings(tree: Tree, mesh: Mesh, rules: Rules[Trailing] = RULES) -> Tree:
    """How each parameter lies on the mesh.

        {"norm": {"scale": [D]}, "unembed": {"kernel": [D, V]}}
        ->  {"norm": {"scale": P(None)}, "unembed": {"kernel": P("fsdp", "tensor")}}   (as NamedSharding)

    Args:
      tree: parameters, adapters, or both in a dict; arrays or ShapeDtypeStructs.
      mesh: the mesh; axes that a rule names must be axes of it.
      rules: ordered (pattern, axes of the trailing dimensions).

    Returns:
      A tree of NamedSharding with the structure of `tree`.

    Raises:
      ValueError: naming the leaf, if no rule covers it, a rule names an unknown axis or an axis twice, or a dimension
        is not a multiple of its axes.
    """
    values = trees.apply_rules(rules, tree, name="sharding rules")

    def place(path: str, leaf: Any, axes: Trailing) -> NamedSharding:
        axes = _dividing(leaf.shape, axes, mesh.shape) if trees.matches(QUANTISED, path) else axes
        return NamedSharding(mesh, spec(path, tuple(leaf.shape), axes, mesh.shape))

    return trees.map_with_path(place, tree, values)


def _dividing(shape: tuple[int, ...], axes: Trailing, sizes: Mapping[str, int]) -> Trailing:
    """`axes` without those that do not divide their dimension: small quantised kernels are whole on every device."""
    fitted = axes[max(len(axes) - len(shape), 0) :]
    dims = shape[len(shape) - len(fitted) :]
    return tuple(a if isinstance(a, str) and n % sizes[a] == 0 else None for a, n in zip(fitted, dims, strict=True))


def spec(path: str, shape: tuple[int, ...], axes: Trailing, sizes: Mapping[str, int]) -> PartitionSpec:
    """The partition of one leaf: `axes` fitted to its trailing dimensions, and checked.

    Args:
      path: of the leaf; under `layers/` or `dense_layers/` without an index its first dimension is the stacked layers.
      shape: of the leaf.
      axes: mesh axes of the trailing dimensions.
      sizes: of the mesh axes by name.

    Raises:
      ValueError: see `shardings`.
    """
    own = len(shape) - stacked(path)
    fitted = axes[max(len(axes) - own, 0) :]
    full = (None,) * (len(shape) - len(fitted)) + fitted
    seen: set[str] = set()
    for index, entry in enumerate(full):
        names = (entry,) if isinstance(entry, str) else entry or ()
        for name in names:
            if name not in sizes:
                raise ValueError(f"{path}: its rule names axis {name!r}; the axes of the mesh are {', '.join(sizes)}")
            if name in seen:
                raise ValueError(f"{path}: its rule {full} uses axis {name!r} twice; an axis cuts one dimension only")
            seen.add(name)
        parts = 1
        for name in names:
            parts *= sizes[name]
        if shape[index] % parts:
            shown = " x ".join(f"mesh.{name} {sizes[name]}" for name in names)
            raise ValueError(
                f"{path}: dimension {index} of {list(shape)} is {shape[index]}, not a multiple of {shown}; change one"
            )
    return PartitionSpec(*full)


def stacked(path: str) -> bool:
    """Whether a leaf of this path has the stacked layers as its first dimension."""
    return re.search(r"(?:^|/)(?:dense_)?layers/(?!\d+/)", path) is not None


def shardings_like(tree: Tree, params: Tree, mesh: Mesh, rules: Rules[Trailing] = RULES) -> Tree:
    """How the leaves of any state around parameters lie on the mesh: moments, averages, counters.

    A leaf whose path ends in the path of a parameter (the longest counts) and that has its shape lies as that
    parameter does; every other leaf (counts, Adafactor's factored moments) is replicated.

        tree {"mu": {"norm": {"scale": [D]}}, "count": []}, params {"norm": {"scale": [D]}}
        ->  {"mu": {"norm": {"scale": the parameter's}}, "count": replicated}

    Args:
      tree: the state, as arrays or ShapeDtypeStructs; any pytree, Optax states and wrappers included.
      params: the parameters that the state is about.
      mesh: the mesh.
      rules: as in `shardings`.

    Returns:
      A tree of NamedSharding with the structure of `tree`.
    """
    shapes = {path: tuple(leaf.shape) for path, leaf in trees.leaves(params).items()}
    placed = trees.leaves(shardings(params, mesh, rules))
    replicated = NamedSharding(mesh, PartitionSpec())

    def place(path: str, leaf: Any) -> NamedSharding:
        owner = _owner(path, shapes)
        return placed[owner] if owner is not None and shapes[owner] == tuple(leaf.shape) else replicated

    return trees.map_with_path(place, tree)


def _owner(path: str, known: Mapping[str, Any]) -> str | None:
    """The longest suffix of whole components of `path` that is a known path."""
    parts = path.split("/")
    suffixes = ("/".join(parts[start:]) for start in range(len(parts)))
    return next((suffix for suffix in suffixes if suffix in known), None)
