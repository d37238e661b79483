"""Name tables: which tensor of a file is which piece of our tree, in both directions from the same rows."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax

from jaxlm import tree
from jaxlm.nn.config import ModelConfig
from jaxlm.nn.qtensor import is_qtensor
from jaxlm.nn.transformer import init
from jaxlm.nn.walk import layer_slots
from jaxlm.types import Tree


class Row(NamedTuple):
    """One tensor of a file, and the leaves of ours that it holds.

    Attributes:
      theirs: name in the file; in layer rows relative to the layer, with `{e}` for the expert where each has its own.
      ours: leaf paths (in layer rows relative to the layer); several are side by side along our last axis.
      transpose: whether the last two axes are swapped, as in torch's Linear.
    """

    theirs: str
    ours: tuple[str, ...]
    transpose: bool = False


class Table(NamedTuple):
    """All tensors of a family for one configuration.

    Attributes:
      prefix: of all names but the head; files of a bare backbone lack it.
      layer: prefix of layer names, with `{i}`.
      top: rows outside the layers. dense, sparse: rows of layers without and with a mixture of experts.
      fused: rows instead of `sparse` where a file keeps all experts of a layer in one tensor.
      buffers: endings of names that hold no weights and are passed over.
    """

    prefix: str
    layer: str
    top: tuple[Row, ...]
    dense: tuple[Row, ...]
    sparse: tuple[Row, ...] = ()
    fused: tuple[Row, ...] = ()
    buffers: tuple[str, ...] = (".rotary_emb.inv_freq",)


class Part(NamedTuple):
    """A piece of one leaf: `leaf[index]`, which has `shape`."""

    path: str
    index: tuple[int, ...]  # type: ignore[assignment]
    shape: tuple[int, ...]


class Target(NamedTuple):
    """A tensor of a file as pieces of leaves, concatenated along the last axis, then perhaps transposed."""

    parts: tuple[Part, ...]
    transpose: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the file."""
        first = self.parts[0].shape
        shape = (*first[:-1], sum(part.shape[-1] for part in self.parts))
        return (*shape[:-2], shape[-1], shape[-2]) if self.transpose else shape


def linear(theirs: str, ours: str, bias: bool = False) -> list[Row]:
    """Rows of a torch Linear `theirs.weight` [out, in] (and `theirs.bias`): our `ours/kernel` [in, out]."""
    rows = [Row(f"{theirs}.weight", (f"{ours}/kernel",), transpose=True)]
    return [*rows, Row(f"{theirs}.bias", (f"{ours}/bias",))] if bias else rows


def plain(theirs: str, ours: str) -> Row:
    """A row without rearrangement."""
    return Row(theirs, (ours,))


def abstract(cfg: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Leaves of the parameters that `cfg` has, by path, without making any."""
    shapes = jax.eval_shape(lambda: init(cfg, jax.random.key(0)))
    return tree.leaves(shapes["params"])


def nest(leaves: Mapping[str, Any]) -> Tree:
    """{"a/b": x}  ->  {"a": {"b": x}}"""
    root: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = root
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    assert tree.leaves(root, is_leaf=is_qtensor).keys() == leaves.keys()
    return root


def targets(
    cfg: ModelConfig, table: Table, leaves: dict[str, jax.ShapeDtypeStruct], fused: bool = False
) -> dict[str, Target]:
    """Every tensor of a file, by full name.

    Args:
      cfg: the model. table: its family's. leaves: `abstract(cfg)`. fused: whether each layer's experts share a tensor.

    Raises:
      ValueError: a leaf is not produced, or produced twice: the table does not fit the model.
    """
    found: dict[str, Target] = {}
    for row in table.top:
        found[row.theirs] = Target(tuple(Part(p, (), _shape(leaves, p)) for p in row.ours), row.transpose)
    for i, (stack, place) in enumerate(layer_slots(cfg)):
        sparse = cfg.moe is not None and i not in cfg.moe.dense_layers
        rows = table.dense if not sparse else table.fused if fused else table.sparse
        for row in rows:
            paths = [f"{stack}/{path}" for path in row.ours]
            experts: Iterable[int | None] = range(cfg.moe.experts) if "{e}" in row.theirs and cfg.moe else [None]
            for e in experts:
                index = (place,) if e is None else (place, e)
                parts = tuple(Part(p, index, _shape(leaves, p)[len(index) :]) for p in paths)
                found[table.layer.format(i=i) + row.theirs.format(e=e)] = Target(parts, row.transpose)
    _check_cover(leaves, found)
    return found


def _shape(leaves: dict[str, jax.ShapeDtypeStruct], path: str) -> tuple[int, ...]:
    if path not in leaves:
        raise ValueError(f"name table: {path} is no leaf of the model; the leaves are {', '.join(leaves)}")
    return leaves[path].shape


def _check_cover(leaves: dict[str, jax.ShapeDtypeStruct], found: dict[str, Target]) -> None:
    filled = dict.fromkeys(leaves, 0)
    pieces = [part for target in found.values() for part in target.parts]
    for part in pieces:
        filled[part.path] += math.prod(part.shape)
    wrong = [path for path, leaf in leaves.items() if filled[path] != leaf.size]
    if wrong or len({(part.path, part.index) for part in pieces}) < len(pieces):
        raise ValueError(f"name table: leaves not produced exactly once: {', '.join(wrong) or 'some, twice'}")


def match(names: Iterable[str], wanted: dict[str, Target], table: Table, where: str) -> dict[str, str]:
    """Names in a file -> names in the table: equal, or equal once the backbone's prefix is put in front.

    Raises:
      ValueError: naming what is missing, what is unexpected, or what is there twice.
    """
    chosen: dict[str, str] = {}
    missing, unexpected = set(wanted), []
    for name in names:
        full = name if name in wanted else table.prefix + name
        if full in missing:
            chosen[name] = full
            missing.remove(full)
        elif not name.endswith(table.buffers):
            unexpected.append(name)
    problems = [f"missing {_some(sorted(missing))}"] if missing else []
    problems += [f"unexpected {_some(sorted(unexpected))}"] if unexpected else []
    if problems:
        raise ValueError(f"{where}: {'; '.join(problems)}; the weights do not fit config.json")
    return chosen


def _some(names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
