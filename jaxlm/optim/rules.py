"""Rules that turn gradients into directions, and which leaf follows which."""

import dataclasses
from collections.abc import Callable

import jax
import optax
from optax import contrib

from jaxlm import tree as trees
from jaxlm.optim.adam8bit import scale_by_adam8bit
from jaxlm.optim.config import OptimizerConfig
from jaxlm.params import axes
from jaxlm.params.axes import Role
from jaxlm.types import Array, Tree

MATRIX_RULES = {"muon": ("matrix",), "adamw8bit": ("matrix", "lora_a", "lora_b")}
"""Rules for matrices of layers, and the kinds of leaf that follow them; embeddings, norms, biases, routers and heads
follow AdamW beside them."""

MUON_RMS = 0.2
"""RMS of an entry of Muon's update, about that of AdamW's, so that both can have one learning rate (2502.16982)."""

MUON_MOMENTUM = 0.95


@dataclasses.dataclass(frozen=True, order=True)
class Choice:
    """The rule of a leaf. Leaves with equal choices share one transformation.

    Attributes:
      rule: a name of `RULES`.
      eps: of rules that add one to a denominator, else 0.
      batch: sizes of the leading axes (layers, experts) over which a rule that reduces over a leaf is mapped.
    """

    rule: str
    eps: float = 0.0
    batch: tuple[int, ...] = ()

    @property
    def label(self) -> str:
        parts = [self.rule, f"eps {self.eps:.4g}" if self.eps else "", "x".join(map(str, self.batch))]
        return " ".join(part for part in parts if part)


def choices(config: OptimizerConfig, tree: Tree, eps: Tree) -> Tree:
    """The choice of each leaf: {"norm": {"scale": [D]}}, muon -> {"norm": {"scale": Choice("adamw", 1e-8)}}."""

    def choose(path: str, leaf: Array, role: Role) -> Choice:
        name = config.name
        if role.kind not in MATRIX_RULES.get(name, (role.kind,)):
            name = "adamw"
        if name == "adafactor":
            return Choice(name, batch=tuple(leaf.shape[: leaf.ndim - role.rank]))
        return Choice(name, values[path] if name in ("adamw", "adamw8bit", "schedule_free") else 0.0)

    values = trees.leaves(eps)
    return axes.map_roles(choose, tree)


def directions(config: OptimizerConfig, chosen: Tree) -> optax.GradientTransformation:
    """The transformation that applies to each leaf the rule of `chosen`, a tree of `Choice`."""
    known = sorted(set(jax.tree.leaves(chosen)))
    rules = {choice.label: RULES[choice.rule](config, choice) for choice in known}
    if len(rules) == 1:
        return rules[known[0].label]
    return optax.partition(rules, jax.tree.map(lambda choice: choice.label, chosen))


def over_batch(rule: optax.GradientTransformation, axes_: int) -> optax.GradientTransformation:
    """`rule` for each index of the leading axes by itself, so that what it reduces over a leaf, it reduces per layer.

    Args:
      rule: a transformation that reduces over whole leaves.
      axes_: number of leading axes that all leaves share.
    """
    init, update = rule.init, rule.update
    for _ in range(axes_):
        init, update = jax.vmap(init), jax.vmap(update)
    return optax.GradientTransformation(init, update)


def _adamw(config: OptimizerConfig, choice: Choice) -> optax.GradientTransformation:
    return optax.scale_by_adam(config.b1, config.b2, choice.eps)


def _adamw8bit(config: OptimizerConfig, choice: Choice) -> optax.GradientTransformation:
    return scale_by_adam8bit(config.b1, config.b2, choice.eps)


def _lion(config: OptimizerConfig, choice: Choice) -> optax.GradientTransformation:
    return optax.scale_by_lion(config.b1, config.b2)


def _sgd(config: OptimizerConfig, choice: Choice) -> optax.GradientTransformation:
    return optax.identity() if config.momentum is None else optax.trace(config.momentum)


def _schedule_free(config: OptimizerConfig, choice: Choice) -> optax.GradientTransformation:
    """Adam without a first moment: the averaging of `optax.contrib.schedule_free` takes its place."""
    return optax.scale_by_rms(config.b2, choice.eps, eps_in_sqrt=False, bias_correction=True)


def _adafactor(config: OptimizerConfig, choice: Choice) -> optax.GradientTransformation:
    """Adafactor (1804.04235) with relative steps: `optax.adafactor` without its learning rate, decay and sign."""
    rule = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms())
    return over_batch(optax.GradientTransformation(rule.init, lambda u, s, p: rule.update(u, s, p)), len(choice.batch))


def _muon(config: OptimizerConfig, choice: Choice) -> optax.GradientTransformation:
    """Muon over the last two axes; leading axes (layers, experts) are batches of matrices."""

    def dimensions(tree: Tree) -> Tree:
        return jax.tree.map(lambda _: contrib.MuonDimensionNumbers(-2, -1), tree)

    momentum = MUON_MOMENTUM if config.momentum is None else config.momentum
    scale = optax.stateless(lambda u, _: jax.tree.map(lambda x: x * (MUON_RMS * max(x.shape[-2:]) ** 0.5), u))
    return optax.chain(contrib.scale_by_muon(beta=momentum, weight_dimension_numbers=dimensions), scale)


RULES: dict[str, Callable[[OptimizerConfig, Choice], optax.GradientTransformation]] = {
    "adamw": _adamw,
    "lion": _lion,
    "adafactor": _adafactor,
    "sgd": _sgd,
    "muon": _muon,
    "schedule_free": _schedule_free,
    "adamw8bit": _adamw8bit,
}
"""By name in the configuration."""
