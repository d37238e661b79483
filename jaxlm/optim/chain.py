"""Optimizers as Optax chains, read top to bottom."""

from collections.abc import Callable

import jax
import optax

from jaxlm.nn.config import ModelConfig
from jaxlm.optim import layers, schedules
from jaxlm.optim.config import OptimizerConfig
from jaxlm.optim.multipliers import add_decayed_weights, scale_by_multipliers
from jaxlm.optim.sam import sam
from jaxlm.params import axes
from jaxlm.params.mup import FAMILIES, Plan
from jaxlm.types import Tree

Core = Callable[[OptimizerConfig, Tree, Tree], optax.GradientTransformation]
"""(config, tree of the trained leaves, tree of eps) -> the rule that turns gradients into directions."""


def make(
    config: OptimizerConfig, model: ModelConfig, tree: Tree, steps: int, plan: Plan | None = None
) -> optax.GradientTransformationExtraArgs:
    """The whole optimizer of a run.

    clip -> the rule (Adam's scaling, ...) -> muP factors -> weight decay -> layer-wise factors -> schedule -> -1, and
    SAM around all of it. So muP keeps learning rate times decay constant over width, and the rate of a layer scales
    its decay, as in parameter groups elsewhere. With SAM, `update` needs `grad_fn` and may be given `value`; see `sam`.

    Args:
      config: names and numbers.
      model: the model whose leaves are trained; for layer-wise rates.
      tree: the trained leaves as they will be passed to `init`, arrays or ShapeDtypeStructs; any collections of them.
      steps: updates in the whole run.
      plan: muP factors of exactly these leaves (`mup.plan_tree`), made for this optimizer; None is standard
        parametrisation.

    Raises:
      ValueError: a leaf that the axis table does not know, fields that contradict each other, or a plan for another
        tree or optimizer.
    """
    config.validate()
    if plan is not None:
        _check_plan(plan, config, tree)
    schedule = schedules.make(config, steps)
    eps = jax.tree.map(lambda factor: config.eps * factor, _ones(tree) if plan is None else plan.eps)
    parts = [RULES[config.name](config, tree, eps)]
    if plan is not None:
        parts.append(scale_by_multipliers(plan.learning_rate))
    if config.weight_decay > 0:
        parts.append(add_decayed_weights(decay_rates(config, tree, plan)))
    if config.layer_lr is not None:
        parts.append(scale_by_multipliers(layers.multipliers(config.layer_lr, model, tree)))
    parts += [optax.scale_by_schedule(schedule), optax.scale(-1.0)]
    chain = optax.chain(*parts)
    if config.clip is not None:
        chain = optax.chain(optax.clip_by_global_norm(config.clip), chain)
    if config.sam is not None and config.sam.granularity == "batch":
        return sam(chain, config.sam)
    return optax.with_extra_args_support(chain)


def decay_rates(config: OptimizerConfig, tree: Tree, plan: Plan | None = None) -> Tree:
    """Weight decay of each leaf behind the muP factors; 0 where nothing decays."""
    if plan is None:
        return axes.map_roles(lambda path, leaf, role: config.weight_decay if role.decayed else 0.0, tree)
    return jax.tree.map(lambda factor: config.weight_decay * factor, plan.decay)


def adam(config: OptimizerConfig, eps: Tree) -> optax.GradientTransformation:
    """Adam's scaling with an eps per leaf: one `scale_by_adam` for each value of eps."""
    return by_value(lambda value: optax.scale_by_adam(config.b1, config.b2, value), eps)


def by_value(rule: Callable[[float], optax.GradientTransformation], values: Tree) -> optax.GradientTransformation:
    """`rule(value)` for the leaves of each value: one transformation where all leaves have the same."""
    known = sorted(set(jax.tree.leaves(values)))
    if len(known) == 1:
        return rule(known[0])
    labels = jax.tree.map(lambda value: f"{value:.6g}", values)
    return optax.partition({f"{value:.6g}": rule(value) for value in known}, labels)


def _adamw(config: OptimizerConfig, tree: Tree, eps: Tree) -> optax.GradientTransformation:
    return adam(config, eps)


def _lion(config: OptimizerConfig, tree: Tree, eps: Tree) -> optax.GradientTransformation:
    return optax.scale_by_lion(config.b1, config.b2)


def _sgd(config: OptimizerConfig, tree: Tree, eps: Tree) -> optax.GradientTransformation:
    return optax.identity() if config.momentum is None else optax.trace(config.momentum)


RULES: dict[str, Core] = {"adamw": _adamw, "lion": _lion, "sgd": _sgd}
"""By name in the configuration."""


def _ones(tree: Tree) -> Tree:
    return jax.tree.map(lambda _: 1.0, tree)


def _check_plan(plan: Plan, config: OptimizerConfig, tree: Tree) -> None:
    if FAMILIES[plan.optimizer] != FAMILIES[config.name]:
        raise ValueError(
            f"optimizer.name: {config.name}, but the muP plan is for {plan.optimizer}; make the plan with this name"
        )
    if jax.tree.structure(plan.eps) != jax.tree.structure(tree):
        raise ValueError(
            "optim.make: the muP plan has other leaves than the trained tree; make it with mup.plan_tree of that tree"
        )
