"""Adapters joined to a model's parameters before its forward pass: replacements, scales, fused and small matrices."""

import jax.numpy as jnp
import numpy as np

from jaxlm import tree as trees
from jaxlm.nn.config import ModelConfig
from jaxlm.nn.copies import look_up
from jaxlm.nn.linear import added, dora_factor
from jaxlm.nn.targets import FUSED, Slot, resolve
from jaxlm.nn.walk import STACKS, layer_slots
from jaxlm.types import Array, Tree, Variables

FACTORS = ("a", "b", "magnitude")
"""Leaves of an adapter; every other leaf of the tree `lora` stands in for the parameter at its path."""

Node = dict[str, Array]


def attach(cfg: ModelConfig, variables: Variables, rows: Array | None = None) -> Variables:
    """Variables as the layers read them.

        {"params": {..}, "lora": {"layers": {"attn": {"q": {"a": a, "b": b}}}, "norm": {"scale": s}}}
        ->  {"params": {.., "norm": {"scale": s}}, "lora": {"layers": {"attn": {"q": {"a": a, "b": scale * b}}}}}

    Replacements take their place among the parameters. B is multiplied by its matrix's scale. Adapters of fused modules
    are handed out to our projections. Those of routers and of the head, which are small or needed whole, are added to
    the kernels. A tied model whose embedding is replaced, or whose head is adapted, gets a head of its own, `unembed`:
    as in PEFT, what is done to the embedding of a tied model changes the lookup alone.

    Args:
      cfg: the model, with `lora`.
      variables: of `apply`; without `lora` they are returned as they are. Layers stacked, or a tuple.
      rows: int32 [B], the adapter of each row, where leaves have an axis of adapters (`params.lora.stack`).

    Raises:
      ValueError: adapters without `cfg.lora`, or that it does not target.
    """
    if "lora" not in variables:
        return variables
    params, adapters = resolved(cfg, variables["params"], variables["lora"])
    kept: Tree = {}
    for path, node in adapters.items():
        if path.endswith("router") or path == "unembed":
            kernel = get(params, path)["kernel"]
            params = put(params, path, {"kernel": added(kernel, node)})
        elif path == "embed" and "magnitude" in node:
            kept[path] = node | {"factor": dora_factor(get(params, path)["kernel"], node)}
        elif rows is not None:
            rows = jnp.asarray(rows, jnp.int32)
            # The walk over layers cuts the first axis of every leaf.
            spread = rows if _single(path) else jnp.broadcast_to(rows[None], (node["a"].shape[0], *rows.shape))
            kept[path] = node | {"rows": spread}
        else:
            kept[path] = node
    return {**variables, "params": params, "lora": _nested(kept, variables["lora"])}


def resolved(cfg: ModelConfig, params: Tree, lora: Tree) -> tuple[Tree, dict[str, Node]]:
    """Parameters with the replacements in them, and adapters by the path of the matrix of ours that each belongs to.

    Args:
      cfg: the model, with `lora`. params, lora: as in `attach`.

    Returns:
      Parameters (what is not replaced is the very same array), with `unembed` where a tied model needs one; and
      adapters {"layers/attn/q": {"a", "b", ...}}, B multiplied by its scale (see `linear.ADAPTER`).
    """
    if cfg.lora is None:
        raise ValueError("lora: the variables hold adapters, but the configuration has none; set its field lora")
    nodes = _nodes(lora)
    replaced = {path: {k: x for k, x in node.items() if k not in FACTORS} for path, node in nodes.items()}
    if cfg.tie_embeddings and (replaced.get("embed") or "unembed" in nodes):
        params = {"unembed": {"kernel": params["embed"]["kernel"].T}, **params}
    for path, node in replaced.items():
        if node:
            params = put(params, path, node)
    adapters: dict[str, Node] = {}
    for path, node in nodes.items():
        if "a" in node:
            adapters |= _handed_out(cfg, path, _scaled(cfg, path, node))
    return params, adapters


def adapted_rows(x_BxLxD: Array, adapter: Node, tokens_BxL: Array) -> Array:
    """Rows looked up in a table, with an attached adapter of the table: `E[t] + A[t] B`, with DoRA times its factor."""
    a, b = adapter["a"], adapter["b"]
    if "rows" in adapter:
        low_BxLxR = a[adapter["rows"][:, None], tokens_BxL]
        return x_BxLxD + jnp.einsum("BLR,BRD->BLD", low_BxLxR, b[adapter["rows"]])
    x_BxLxD = x_BxLxD + look_up(a, tokens_BxL) @ b
    return x_BxLxD * adapter["factor"][None, None, :] if "factor" in adapter else x_BxLxD


def _scaled(cfg: ModelConfig, path: str, node: Node) -> Node:
    """The adapter with its scale in B, and with `on` where some layers of the leaf have none."""
    slot, place = _slot(cfg, path)
    scales, b = slot.scales[place], node["b"]
    adapter = {name: node[name] for name in FACTORS if name in node}
    if np.any(scales != 1.0):
        factor = jnp.asarray(scales, jnp.float32).reshape(scales.shape + (1,) * (b.ndim - scales.ndim))
        adapter["b"] = (b.astype(jnp.float32) * factor).astype(b.dtype)
    if not slot.ranks.all():
        adapter["on"] = jnp.asarray(slot.ranks[place] > 0)
    return adapter


def _slot(cfg: ModelConfig, path: str) -> tuple[Slot, tuple[int, ...]]:
    """The slot of a path, and the place in it; paths of unstacked layers have the layer's number after `layers`."""
    parts, place = path.split("/"), ()
    if len(parts) > 1 and parts[1].isdigit():
        stack, index = layer_slots(cfg)[int(parts[1])]
        parts, place = [stack, *parts[2:]], (index,)  # type: ignore[assignment]
    slot = resolve(cfg).get("/".join(parts))
    if slot is None:
        raise ValueError(
            f"lora: an adapter at {path}, which lora.targets does not name; give the adapter's own settings"
        )
    return slot, place


def _handed_out(cfg: ModelConfig, path: str, node: Node) -> dict[str, Node]:
    """A fused module's adapter as one for each of our projections: A in common, outputs cut."""
    parent, _, name = path.rpartition("/")
    if name not in FUSED:
        return {path: node}
    moe = cfg.moe if "dense_layers" not in path else None
    width = cfg.F if moe is None or moe.d_ff is None else moe.d_ff
    sizes = (cfg.H * cfg.K, cfg.G * cfg.K, cfg.G * cfg.K) if name == "qkv" else (width, width)
    found, start = {}, 0
    for part, size in zip(FUSED[name], sizes, strict=True):
        cut = {k: x[..., start : start + size] if k in ("b", "magnitude") else x for k, x in node.items()}
        found[f"{parent}/{part}"] = cut
        start += size
    return found


def _nodes(lora: Tree) -> dict[str, Node]:
    """Leaves by module: {"layers/attn/q": {"a": .., "b": ..}}."""
    found: dict[str, Node] = {}
    for path, leaf in trees.leaves(lora).items():
        parent, _, name = path.rpartition("/")
        found.setdefault(parent, {})[name] = leaf
    return found


def _single(path: str) -> bool:
    """Whether leaves at a path belong to one layer, or to none, and so have no axis of layers."""
    parts = path.split("/")
    return parts[0] not in STACKS or parts[1].isdigit()


def _nested(nodes: dict[str, Node], like: Tree) -> Tree:
    """A tree of adapters from their paths; the layers are a tuple where those of `like` are."""
    root: Tree = {}
    if isinstance(like.get("layers"), tuple):
        root["layers"] = tuple({} for _ in like["layers"])
    for path, node in nodes.items():
        root = put(root, path, node)
    return root


def get(tree: Tree, path: str) -> Tree:
    """The subtree at a path; numbers are places in tuples."""
    for part in path.split("/"):
        tree = tree[int(part)] if isinstance(tree, tuple) else tree[part]
    return tree


def put(tree: Tree, path: str, node: Node) -> Tree:
    """A copy of the tree with the leaves of `node` at a path; the rest is shared.

    put({"norm": {"scale": a}}, "norm", {"scale": b})  ->  {"norm": {"scale": b}}
    """
    if not path:
        return {**tree, **node}
    head, _, rest = path.partition("/")
    if isinstance(tree, tuple):
        place = int(head)
        return (*tree[:place], put(tree[place], rest, node), *tree[place + 1 :])
    return {**tree, head: put(tree.get(head, {}), rest, node)}
