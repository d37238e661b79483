"""What every parameter is really given: one row per leaf, or per layer where layers differ."""

import dataclasses

import numpy as np

from jaxlm import tree as trees
from jaxlm.nn.config import ModelConfig
from jaxlm.optim import layers
from jaxlm.optim.chain import adapter_rates, decay_rates, eps_values
from jaxlm.optim.config import OptimizerConfig
from jaxlm.optim.rules import choices
from jaxlm.params import axes
from jaxlm.params.axes import Role
from jaxlm.params.mup import Plan
from jaxlm.types import Tree


@dataclasses.dataclass(frozen=True)
class Row:
    """Absolute, effective values of one leaf.

    Attributes:
      leaf: dotted, as in `layers.0.attn.q`; a trailing `kernel` or `scale` is dropped.
      shape: of one layer, for a stacked leaf.
      kind: class in the axis table.
      init_std: standard deviation of fresh values; 0 where they are constant.
      learning_rate: at the peak of the schedule.
      weight_decay: such that a step shrinks the leaf by learning_rate * weight_decay.
      eps: Adam's, or None for rules without one.
      optimizer: the rule; `frozen` if the leaf is not trained.
    """

    leaf: str
    shape: tuple[int, ...]
    kind: str
    init_std: float
    learning_rate: float
    weight_decay: float
    eps: float | None
    optimizer: str

    @property
    def frozen(self) -> bool:
        return self.optimizer == "frozen"


def effective(
    config: OptimizerConfig, model: ModelConfig, tree: Tree, plan: Plan | None = None, frozen: Tree | None = None
) -> list[Row]:
    """The table, in order of the model: embeddings, layers, final norm, head, then what is frozen.

    Args:
      config, model, tree, plan: as for `chain.make`.
      frozen: trees that are used but not trained, or None.

    Raises:
      ValueError: a leaf that the axis table does not know.
    """
    rows = _rows(model, tree, _trained(config, model, tree, plan))
    if frozen is not None:
        std = {path: axes.standard_std(model, path, role) for path, role in axes.roles(frozen).items()}
        rows += _rows(model, frozen, {path: [_Values(value, 0.0, 0.0, None, "frozen")] for path, value in std.items()})
    return rows


@dataclasses.dataclass(frozen=True)
class _Values:
    init_std: float
    learning_rate: float
    weight_decay: float
    eps: float | None
    optimizer: str


def _trained(config: OptimizerConfig, model: ModelConfig, tree: Tree, plan: Plan | None) -> dict[str, list[_Values]]:
    """By path, the values of each layer, or one for all."""
    decay = trees.leaves(decay_rates(config, tree, plan))
    chosen = trees.leaves(choices(config, tree, eps_values(config, tree, plan)))
    by_layer = {} if config.layer_lr is None else trees.leaves(layers.multipliers(config.layer_lr, model, tree))
    rate = {} if plan is None else trees.leaves(plan.learning_rate)
    plus = model.lora.plus_ratio if model.lora is not None else None
    adapters = {} if plus is None else trees.leaves(adapter_rates(plus, tree))
    std = {} if plan is None else trees.leaves(plan.init_std)

    def values(path: str, role: Role) -> list[_Values]:
        factor, choice = rate.get(path, 1.0), chosen[path]
        peaks = config.learning_rate * factor * adapters.get(path, 1.0) * np.ravel(by_layer.get(path, 1.0))
        init_std = axes.standard_std(model if plan is None else plan.base, path, role) * std.get(path, 1.0)
        eps = choice.eps or None
        found = [_Values(init_std, float(peak), decay[path] / factor, eps, choice.rule) for peak in peaks]
        return found if len(set(found)) > 1 else found[:1]

    return {path: values(path, role) for path, role in axes.roles(tree).items()}


def _rows(model: ModelConfig, tree: Tree, values: dict[str, list[_Values]]) -> list[Row]:
    """Rows of all leaves, by layer id and then in tree order."""
    known, ids = axes.roles(tree), trees.leaves(axes.layer_ids(tree, model))
    rows = []
    for path, leaf in trees.leaves(tree).items():
        stack = axes.stack_name(path)
        shape = tuple(leaf.shape[1:] if stack else leaf.shape)
        for number, value in zip(np.ravel(ids[path]).tolist(), values[path], strict=False):
            row = Row(_shown(path, stack, number - 1), shape, known[path].kind, **dataclasses.asdict(value))
            rows.append((number, row))
    return [row for _, row in sorted(rows, key=lambda pair: pair[0])]


def _shown(path: str, stack: str | None, layer: int) -> str:
    """params/layers/attn/q/kernel, layer 0  ->  layers.0.attn.q"""
    parts = path.split("/")
    if parts[0] in ("params", "lora"):
        parts = parts[1:]
    if stack is not None:
        parts = ["layers", str(layer), *parts[parts.index(stack) + 1 :]]
    return ".".join(parts[:-1] if parts[-1] in ("kernel", "scale") and len(parts) > 1 else parts)
