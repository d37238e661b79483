"""muP: hyperparameters tuned on a small base model, carried over to a wider and deeper one.

Yang, Hu et al., Tensor Programs V (2203.03466) for width; Dey et al., CompleteP (2505.01618) for depth. Every rule is a
factor on the base model's value, and every factor is 1 at the base shape.
"""

import dataclasses
import warnings
from functools import partial
from typing import Literal, NamedTuple

import jax

from jaxlm.nn import transformer
from jaxlm.nn.config import ModelConfig
from jaxlm.params import axes
from jaxlm.params.axes import Role
from jaxlm.params.config import MupBase, MupConfig
from jaxlm.types import Array, Tree, Variables

__all__ = [
    "FAMILIES",
    "Fresh",
    "MupBase",
    "MupConfig",
    "Plan",
    "apply_to",
    "draw",
    "init",
    "plan",
    "plan_tree",
    "rescale",
]

Family = Literal["adam", "sgd", "adafactor", "muon"]

FAMILIES: dict[str, Family] = {
    "adamw": "adam",
    "lion": "adam",
    "adamw8bit": "adam",
    "schedule_free": "adam",
    "sgd": "sgd",
    "adafactor": "adafactor",
    "muon": "muon",
}
"""How the size of an optimizer's update depends on its gradient, which decides the rule for its learning rate."""

SMALL_EMBEDDING = 0.1


@dataclasses.dataclass(frozen=True)
class Plan:
    """Factors on the base model's values; trees of Python floats with the paths of the parameters.

    Attributes:
      init_std: of the standard deviation of fresh values.
      learning_rate: of the learning rate.
      weight_decay: of weight decay where it is multiplied by the leaf's learning rate under Adam (parameter groups of
        AdamW); 0 on leaves that do not decay. A matrix has its fan-in ratio to the power of the decay exponent.
      decay: of learning rate times weight decay, whatever the optimizer: Adam's `learning_rate * weight_decay`.
      eps: of Adam's eps.
      logits, attention, residual: forward factors of the hidden states before the head, of the attention scale
        head_dim^-0.5, and of each branch.
      optimizer: the optimizer that the learning rates are for.
      target, base: the two models.
    """

    init_std: Tree
    learning_rate: Tree
    weight_decay: Tree
    decay: Tree
    eps: Tree
    logits: float
    attention: float
    residual: float
    optimizer: str
    target: ModelConfig
    base: ModelConfig


def plan(
    target: ModelConfig,
    base: ModelConfig,
    optimizer: str = "adamw",
    decay_exponent: float = 1.0,
    depth_alpha: float = 0.0,
) -> Plan:
    """The factors for training `target` with what was tuned on `base`, for all parameters of the target.

    With r_in and r_out a leaf's own fan-in and fan-out ratios, m the ratio of d_model and m_N that of n_layers:

        kind     init std    Adam      SGD          weight decay
        matrix   r_in^-0.5   1/r_in    r_out/r_in   r_in^decay_exponent
        input    1           1         r_out        1 (embeddings) or 0
        output   1           1         r_in         1, with logits multiplied by 1/m
        router   1/r_in      1/r_in    1/r_in       r_in^decay_exponent

    eps is multiplied by 1/m. With depth_alpha > 0, leaves of layers have the further factors m_N^(depth_alpha - 1) on
    the learning rate (m_N^(2 depth_alpha - 1) for SGD, which feels the branch's factor once more in its gradient) and
    m_N^-depth_alpha on eps.

    Args:
      target: the model to train.
      base: the model that was tuned.
      optimizer: one of `FAMILIES`.
      decay_exponent: see `MupConfig`.
      depth_alpha: see `MupConfig`.

    Raises:
      ValueError: an unknown optimizer.
    """
    shapes = jax.eval_shape(partial(transformer.init, target), jax.random.key(0))["params"]
    settings = MupConfig(depth_alpha=depth_alpha, decay_exponent=decay_exponent)
    return plan_tree(shapes, target, base, settings, optimizer)


def plan_tree(
    tree: Tree, target: ModelConfig, base: ModelConfig, settings: MupConfig, optimizer: str = "adamw"
) -> Plan:
    """`plan` for any tree of trained leaves (adapters, heads, collections of both); `settings.base` is not read.

    Raises:
      ValueError: an unknown optimizer, or a leaf that the axis table does not know.
    """
    if optimizer not in FAMILIES:
        raise ValueError(f"optimizer: {optimizer!r} has no muP rule; the known ones are {', '.join(FAMILIES)}")
    leaf = partial(_leaf_factors, target, base, settings, FAMILIES[optimizer])
    factors = axes.map_roles(lambda path, _, role: leaf(path, role), tree)

    def column(name: str) -> Tree:
        return jax.tree.map(lambda f: getattr(f, name), factors, is_leaf=lambda x: isinstance(x, _Factors))

    return Plan(
        init_std=column("init_std"),
        learning_rate=column("learning_rate"),
        weight_decay=column("weight_decay"),
        decay=column("decay"),
        eps=column("eps"),
        logits=base.D / target.D,
        attention=(base.K / target.K) ** 0.5,
        residual=(target.N / base.N) ** -settings.depth_alpha,
        optimizer=optimizer,
        target=target,
        base=base,
    )


def apply_to(cfg: ModelConfig, plan: Plan) -> ModelConfig:
    """`cfg` with the forward factors of the plan. Warns about embeddings under which transfer is known to fail."""
    if cfg.tie_embeddings or (cfg.embed_std is not None and cfg.embed_std < SMALL_EMBEDDING):
        what = "model.tie_embeddings: true" if cfg.tie_embeddings else f"model.embed_std: {cfg.embed_std}"
        warnings.warn(
            f"{what}: muP transfers poorly with small embeddings, which start too small and move too slowly; "
            "use tie_embeddings: false and embed_std: 1.0",
            stacklevel=2,
        )
    return dataclasses.replace(
        cfg, logits_multiplier=plan.logits, attention_multiplier=plan.attention, residual_multiplier=plan.residual
    )


@dataclasses.dataclass(frozen=True)
class Fresh:
    """Variables as the standard parametrisation draws them. Only these can be rescaled, and rescaling returns plain
    variables: so nothing is rescaled twice, and nothing that comes from a checkpoint is."""

    cfg: ModelConfig
    variables: Variables


def draw(cfg: ModelConfig, key: Array) -> Fresh:
    """Fresh variables of `transformer.init`, marked as such."""
    return Fresh(cfg, transformer.init(cfg, key))


def rescale(fresh: Fresh, base: ModelConfig) -> Variables:
    """Fresh variables, each leaf multiplied so that it has the standard deviation that muP asks for.

    That is `plan.init_std` times the base model's. A matrix drawn from N(0, 1/fan_in) has it already up to the base's
    depth factor; the head is multiplied by sqrt(m), back to the base's deviation.

    Raises:
      ValueError: the argument is not fresh: it was rescaled before, trained, or read from a file.
    """
    if not isinstance(fresh, Fresh):
        raise ValueError(
            "mup.rescale: these variables were rescaled already or come from a checkpoint; rescale the result of "
            "mup.draw, once, before training"
        )
    target = fresh.cfg
    leaf = partial(_leaf_factors, target, base, MupConfig(), "adam")

    def scaled(path: str, value: Array, role: Role) -> Array:
        drawn = axes.standard_std(target, path, role)
        wanted = axes.standard_std(base, path, role) * leaf(path, role).init_std
        return value if drawn == wanted else value * (wanted / drawn)

    return axes.map_roles(scaled, fresh.variables)


def init(cfg: ModelConfig, base: ModelConfig, key: Array) -> Variables:
    """Fresh variables of a muP run. Pure; at the base shape the very bits of `transformer.init`."""
    return rescale(draw(cfg, key), base)


class _Factors(NamedTuple):
    init_std: float
    learning_rate: float
    weight_decay: float
    decay: float
    eps: float


def _leaf_factors(
    target: ModelConfig, base: ModelConfig, settings: MupConfig, family: Family, path: str, role: Role
) -> _Factors:
    r_in = 1.0 if role.fan_in is None else axes.size(target, role.fan_in) / axes.size(base, role.fan_in)
    r_out = 1.0 if role.fan_out is None else axes.size(target, role.fan_out) / axes.size(base, role.fan_out)
    init_std = {"matrix": r_in**-0.5, "lora_a": r_in**-0.5, "router": 1 / r_in}.get(role.kind, 1.0)
    grows = role.kind in ("matrix", "router", "lora_a")
    adam = 1 / r_in if grows else 1.0
    rate = adam
    if family == "sgd":
        rate = r_out / r_in if grows else r_out * r_in
    elif family == "adafactor":
        rate = adam / init_std  # its updates are relative to the size of the weights
    elif family == "muon" and role.kind == "matrix":
        rate = _muon_factor(target, base, role)
    deep, eps = 1.0, base.D / target.D
    if settings.depth_alpha > 0 and axes.stack_name(path) is not None:
        m_N, alpha = target.N / base.N, settings.depth_alpha
        deep = m_N ** (alpha - 1)
        rate *= m_N ** (2 * alpha - 1) if family == "sgd" else deep
        eps *= m_N**-alpha
    weight_decay = (r_in**settings.decay_exponent if grows else 1.0) if role.decayed else 0.0
    return _Factors(init_std, rate, weight_decay, weight_decay * adam * deep, eps)


def _muon_factor(target: ModelConfig, base: ModelConfig, role: Role) -> float:
    """What takes Muon's update, 0.2 sqrt(max(fan_in, fan_out)) in RMS terms, to sqrt(fan_out / fan_in) over shapes."""
    into, out = role.fan_in, role.fan_out
    assert into is not None and out is not None

    def wanted_over_given(cfg: ModelConfig) -> float:
        fan_in, fan_out = axes.size(cfg, into), axes.size(cfg, out)
        return (fan_out / fan_in / max(fan_in, fan_out)) ** 0.5

    return wanted_over_given(target) / wanted_over_given(base)
