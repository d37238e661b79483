"""Optimizers as Optax chains, read top to bottom."""

import jax
import optax
from optax import contrib

from jaxlm import tree as trees
from jaxlm.nn.config import ModelConfig
from jaxlm.optim import layers, schedules
from jaxlm.optim.config import OptimizerConfig
from jaxlm.optim.multipliers import add_decayed_weights, scale_by_multipliers
from jaxlm.optim.rules import choices, directions
from jaxlm.optim.sam import sam
from jaxlm.params import axes
from jaxlm.params.mup import FAMILIES, Plan
from jaxlm.types import Tree


def make(
    config: OptimizerConfig, model: ModelConfig, tree: Tree, steps: int, plan: Plan | None = None
) -> optax.GradientTransformationExtraArgs:
    """The whole optimizer of a run.

    clip -> the rule (Adam's scaling, ...) -> muP factors -> weight decay -> layer-wise factors -> LoRA+ -> schedule
    -> -1, and SAM around all of it. So muP keeps learning rate times decay constant over width, and the rate of a
    layer scales its decay, as in parameter groups elsewhere. With SAM, `update` needs `grad_fn` and may be given
    `value`; see `sam`.

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
    parts = [directions(config, choices(config, tree, eps_values(config, tree, plan)))]
    if plan is not None:
        parts.append(scale_by_multipliers(plan.learning_rate))
    if config.weight_decay > 0:
        parts.append(add_decayed_weights(decay_rates(config, tree, plan)))
    if config.layer_lr is not None:
        parts.append(scale_by_multipliers(layers.multipliers(config.layer_lr, model, tree)))
    if model.lora is not None and model.lora.plus_ratio is not None:
        parts.append(scale_by_multipliers(adapter_rates(model.lora.plus_ratio, tree)))
    parts += [optax.scale_by_schedule(schedule), optax.scale(-1.0)]
    chain = optax.chain(*parts)
    if config.name == "schedule_free":
        chain = contrib.schedule_free(chain, schedule, config.b1)
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


def adapter_rates(ratio: float, tree: Tree) -> Tree:
    """LoRA+ (2402.12354): B of each adapter learns at `ratio` times the rate, everything else at the rate itself.

    {"q": {"a": [N, D, R], "b": [N, R, D]}}  ->  {"q": {"a": 1.0, "b": ratio}}
    """
    return axes.map_roles(lambda path, leaf, role: ratio if role.kind == "lora_b" else 1.0, tree)


def eps_values(config: OptimizerConfig, tree: Tree, plan: Plan | None = None) -> Tree:
    """Adam's eps of each leaf."""
    if plan is None:
        return jax.tree.map(lambda _: config.eps, tree)
    return jax.tree.map(lambda factor: config.eps * factor, plan.eps)


def evaluation_params(opt_state: Tree, params: Tree) -> Tree:
    """The parameters to evaluate and save: `params`, or for `schedule_free` the average that its state implies."""
    states = [s for s in jax.tree.leaves(opt_state, is_leaf=_is_averaging) if _is_averaging(s)]
    return contrib.schedule_free_eval_params(states[0], params) if states else params


def _is_averaging(node: object) -> bool:
    return isinstance(node, contrib.ScheduleFreeState)


def _check_plan(plan: Plan, config: OptimizerConfig, tree: Tree) -> None:
    if FAMILIES[plan.optimizer] != FAMILIES[config.name]:
        raise ValueError(
            f"optimizer.name: {config.name}, but the muP plan is for {plan.optimizer}; make the plan with this name"
        )
    if list(trees.leaves(plan.eps)) != list(trees.leaves(tree)):
        raise ValueError(
            "optim.make: the muP plan has other leaves than the trained tree; make it with mup.plan_tree of that tree"
        )
