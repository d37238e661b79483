"""Low-rank adapters as trees: making them, merging them, counting them, and stacking several for one batch."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import tree as trees
from jaxlm.nn.adapters import get, put, resolved
from jaxlm.nn.config import LoraConfig, ModelConfig
from jaxlm.nn.linear import added, dense
from jaxlm.nn.qtensor import is_qtensor
from jaxlm.nn.targets import FUSED, Slot, modules, nearest, resolve, saves
from jaxlm.types import Array, Tree, Variables


def init(cfg: ModelConfig, key: Array, params: Tree) -> Tree:
    """A fresh adapter tree for `cfg.lora`, beside `params`; float32, and of no effect yet.

        {"layers": {"attn": {"q": {"kernel": [N, D, HK]}}}, "unembed": {"kernel": [D, V]}}, modules_to_save: [lm_head]
        ->  {"layers": {"attn": {"q": {"a": [N, D, R], "b": [N, R, HK]}}}, "unembed": {"kernel": [D, V]}}

    A is uniform in +- in^-0.5 and B zero (Kaiming-uniform with slope sqrt(5), as in PEFT); of an embedding A is zero
    and B normal. With `init: pissa` (2404.02948) they are the principal components of the weight, and the model to go
    with them is `residual`. With `dora` there is a `magnitude` [N, out] too, the norm of each output's weights.
    Modules to save are copies. Where ranks differ over the layers of one leaf, R is the largest, and what is beyond a
    layer's own rank is zero and stays so.

    Args:
      cfg: the model, with `lora`.
      key: a typed PRNG key.
      params: the base: arrays, quantised or not. ShapeDtypeStructs give a tree of the right shapes; its magnitudes,
        components and copies mean nothing then. Pure: works under `jax.eval_shape`.

    Raises:
      ValueError: settings that name no module, or change nothing; see `targets.resolve`.
    """
    slots = resolve(cfg)
    tree: Tree = {}
    for (path, slot), path_key in zip(sorted(slots.items()), jax.random.split(key, max(len(slots), 1)), strict=False):
        tree = put(tree, path, _fresh(cfg, path, slot, path_key, params))
    for path in _saved_paths(cfg, params):
        node = {name: _value(leaf).astype(jnp.float32) for name, leaf in _module(cfg, params, path).items()}
        # A copy, because a step gives its trained arrays away while the base stays in use.
        tree = put(tree, path, {name: jnp.array(leaf, copy=True) for name, leaf in node.items()})
    return tree


def residual(cfg: ModelConfig, params: Tree, lora: Tree) -> Tree:
    """The base that goes with a fresh `init: pissa` adapter, `W - scale A B`; any other adapter leaves it as it is.

    Args:
      cfg: the model, with `lora`. params: the base, which must not be quantised: quantise the result.
      lora: of `init` with the same base, untrained.

    Raises:
      ValueError: the base is quantised, or its tied head adapted.
    """
    if cfg.lora is None or cfg.lora.init != "pissa":
        return params
    if any(is_qtensor(leaf) for leaf in jax.tree.leaves(params, is_leaf=is_qtensor)):
        raise ValueError("lora.init: pissa changes the base, which is quantised; take default, or quantise afterwards")
    if cfg.tie_embeddings and "unembed" in lora:
        raise ValueError("lora.init: pissa would take its start out of a head that is the embedding; leave lm_head out")
    _, adapters = resolved(cfg, params, lora)
    for path, node in adapters.items():
        if path != "embed":
            taken = {name: x for name, x in node.items() if name != "magnitude"} | {"b": -node["b"]}
            params = put(params, path, {"kernel": _added(get(params, path)["kernel"], taken)})
    return params


def merge(cfg: ModelConfig, params: Tree, lora: Tree) -> Tree:
    """The parameters with an adapter merged into them, one layer at a time.

    What the adapter does not touch is the very same array, and in a leaf that it touches for some layers only, the
    others keep their bits. Quantised kernels are merged as the values that they stand for, and are plain arrays then.
    Where the result has `unembed` although the model is tied, the adapter changed embedding and head differently:
    `merged_config` says so.

    Args:
      cfg: the model, with `lora`. params: the base. lora: of `init`, trained.

    Returns:
      Parameters in the dtypes of the base, for the configuration `merged_config(cfg, result)`.
    """
    merged, adapters = resolved(cfg, params, lora)
    if cfg.tie_embeddings and "embed" in adapters and "unembed" not in merged:
        merged = {**merged, "unembed": {"kernel": merged["embed"]["kernel"].T}}
    for path, node in adapters.items():
        merged = put(merged, path, {"kernel": _added(get(merged, path)["kernel"], node)})
    dtypes = {path: leaf.dtype for path, leaf in _plain_leaves(params).items()}
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x.astype(dtypes.get(path, x.dtype)) if x.dtype == jnp.float32 else x, merged
    )


def merged_config(cfg: ModelConfig, merged: Tree) -> ModelConfig:
    """The configuration of what `merge` returned: without adapters, and untied if there is a head now."""
    return dataclasses.replace(cfg, lora=None, tie_embeddings=cfg.tie_embeddings and "unembed" not in merged)


def count(cfg: ModelConfig, lora: Tree) -> int:
    """Trained numbers of an adapter tree (arrays or ShapeDtypeStructs), as PEFT counts them: without what is zero for
    good because a layer's rank is smaller than its leaf's."""
    slots = resolve(cfg)
    total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(lora):
        *parents, name = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        slot = slots.get("/".join(parents))
        if slot is None or name not in ("a", "b", "magnitude"):
            total += leaf.size
        elif name == "magnitude":
            total += int((slot.ranks > 0).sum()) * leaf.shape[-1]
        else:
            total += int(slot.ranks.sum()) * leaf.shape[-2 if name == "a" else -1]
    return total


def trained(cfg: ModelConfig, collections: Variables) -> int:
    """Trained numbers of all collections of a run, adapters as `count` counts them."""
    return sum(count(cfg, tree) if name == "lora" else trees.count(tree) for name, tree in collections.items())


def stack(cfg: ModelConfig, adapters: Sequence[tuple[LoraConfig, Tree] | None]) -> tuple[ModelConfig, Tree]:
    """Several adapters of one base as one tree, for batches whose rows need different ones.

        [(r 8, {"q": {"a": [N, D, 8], ..}}), (r 16, {"q": {"a": [N, D, 16], ..}}), None]
        ->  {"q": {"a": [N, 3, D, 16], "b": [N, 3, 16, HK]}}, for `apply(..., adapters=[0, 2, 1, 0])`

    Args:
      cfg: the base. adapters: settings and tree of each; None is the base itself.

    Returns:
      `cfg` with the `lora` that the tree needs, and the tree. Scales are multiplied into B.

    Raises:
      ValueError: what cannot differ from row to row: DoRA, replaced modules, adapters of experts, routers and the head.
    """
    found = [{} if one is None else _rows_of(dataclasses.replace(cfg, lora=one[0]), one[1]) for one in adapters]
    shapes = {path: node for nodes in found for path, node in nodes.items()}
    rank = max((node["a"].shape[-1] for nodes in found for node in nodes.values()), default=1)
    tree: Tree = {}
    for path, like in shapes.items():
        axis = like["a"].ndim - 2
        zero = {name: jnp.zeros_like(x) for name, x in like.items()}
        nodes = [nodes.get(path, zero) for nodes in found]
        a = jnp.stack([_padded(node["a"], rank, -1) for node in nodes], axis)
        tree = put(tree, path, {"a": a, "b": jnp.stack([_padded(node["b"], rank, -2) for node in nodes], axis)})
    names = tuple(sorted({m.name for m in modules(cfg) if m.path in shapes}))
    return dataclasses.replace(cfg, lora=LoraConfig(r=rank, alpha=float(rank), targets=names)), tree


def _rows_of(cfg: ModelConfig, lora: Tree) -> dict[str, dict[str, Array]]:
    params = {"embed": {"kernel": jnp.zeros((0, 0))}}
    base, found = resolved(cfg, params, lora)
    whole = [path for path in found if path.endswith("router") or path == "unembed" or found[path]["a"].ndim > 3]
    replaced = base.keys() - params.keys()
    if whole or replaced or any("magnitude" in node for node in found.values()):
        what = ", ".join([*whole, *sorted(replaced)]) or "dora"
        raise ValueError(f"lora.stack: {what}: cannot differ from row to row; merge this adapter instead")
    return {path: {"a": node["a"], "b": node["b"]} for path, node in found.items()}


def _padded(x: Array, rank: int, axis: int) -> Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, rank - x.shape[axis])
    return jnp.pad(x, widths)


def _fresh(cfg: ModelConfig, path: str, slot: Slot, key: Array, params: Tree) -> dict[str, Array]:
    kernels = [node["kernel"] for node in _matrices(cfg, params, path)]
    *lead, width, _ = kernels[0].shape
    out, rank = sum(kernel.shape[-1] for kernel in kernels), slot.rank
    used = jnp.asarray(np.arange(rank) < slot.ranks[..., None])
    lora = cfg.lora
    assert lora is not None
    node: dict[str, Array]
    if path == "embed":
        node = {"a": jnp.zeros((width, rank)), "b": jax.random.normal(key, (rank, out))}
    elif lora.init == "pissa":
        node = _principal(_value_of(kernels), slot, used)
    else:
        bound = 1 / math.sqrt(width)
        a = jax.random.uniform(key, (*lead, width, rank), jnp.float32, -bound, bound)
        node = {"a": a * used[..., None, :], "b": jnp.zeros((*lead, rank, out))}
    if lora.dora:
        node["magnitude"] = jnp.sqrt(jnp.sum(jnp.square(_value_of(kernels)), axis=-2))
    return node


def _principal(kernel: Array, slot: Slot, used: Array) -> dict[str, Array]:
    """A = U sqrt(S / scale), B = sqrt(S / scale) V^T of the largest singular values, one matrix at a time."""
    scales = jnp.asarray(np.where(slot.scales > 0, slot.scales, 1.0), jnp.float32)

    def split(entry: tuple[Array, Array, Array]) -> dict[str, Array]:
        w, scale, used_R = entry
        u, s, v = jnp.linalg.svd(w, full_matrices=False)
        root_R = jnp.sqrt(s[: slot.rank] / scale) * used_R
        return {"a": u[:, : slot.rank] * root_R[None, :], "b": root_R[:, None] * v[: slot.rank]}

    for _ in range(kernel.ndim - 2):
        split = _mapped(split)
    return split((kernel, scales, used))


def _mapped(function: Any) -> Any:
    return lambda entries: jax.lax.map(function, entries)


def _added(kernel: Any, node: dict[str, Array]) -> Array:
    """`linear.added`, one layer at a time where there are several."""
    if kernel.ndim == 2:
        return added(kernel, node)
    return _added_layers(kernel, node)


@jax.jit
def _added_layers(kernel: Any, node: dict[str, Array]) -> Array:
    return jax.lax.map(lambda entry: added(*entry), (kernel, node))


def _matrices(cfg: ModelConfig, params: Tree, path: str) -> list[Tree]:
    """The nodes of our projections at a path: one, or those of a fused module."""
    parent, _, name = path.rpartition("/")
    return [_module(cfg, params, f"{parent}/{part}" if parent else part) for part in FUSED.get(name, (name,))]


def _module(cfg: ModelConfig, params: Tree, path: str) -> Tree:
    """The node at a path; of a tied model's head, the embedding turned."""
    if path != "unembed" or path in params:
        return get(params, path)
    kernel = params["embed"]["kernel"]
    if isinstance(kernel, jax.ShapeDtypeStruct):
        return {"kernel": jax.ShapeDtypeStruct(kernel.shape[::-1], kernel.dtype)}
    return {"kernel": kernel.T}


def _value_of(kernels: list[Any]) -> Array:
    return jnp.concatenate([_value(kernel).astype(jnp.float32) for kernel in kernels], axis=-1)


def _value(leaf: Any) -> Array:
    if any(isinstance(part, jax.ShapeDtypeStruct) for part in jax.tree.leaves(leaf)):
        return jnp.zeros(leaf.shape, leaf.dtype)
    return dense(leaf)


def _saved_paths(cfg: ModelConfig, params: Tree) -> list[str]:
    """Paths of the modules that `modules_to_save` names, by Hugging Face's names or ours."""
    lora = cfg.lora
    assert lora is not None
    known = [(m.name, m.path) for m in modules(cfg)] + [("model.norm", "norm"), ("transformer.ln_f", "norm")]
    known += [(path.replace("/", "."), path) for path in _module_paths(params)]
    found: dict[str, None] = {}
    for name in lora.modules_to_save:
        paths = [path for full, path in known if saves(name, full)]
        if not paths:
            raise ValueError(
                f"lora.modules_to_save: {name!r} is no module of this model; {nearest(name, modules(cfg))}"
            )
        for path in paths:
            parent, _, last = path.rpartition("/")
            found |= dict.fromkeys(f"{parent}/{part}" if parent else part for part in FUSED.get(last, (last,)))
    return list(found)


def _module_paths(params: Tree) -> list[str]:
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda x: hasattr(x, "shape"))
    paths = (jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves)
    return sorted({path.rpartition("/")[0] for path in paths})


def _plain_leaves(params: Tree) -> dict[Any, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda x: hasattr(x, "shape"))
    return {path: leaf for path, leaf in leaves if isinstance(leaf, jax.Array | np.ndarray)}
