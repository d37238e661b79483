"""The weight of the KL penalty, where it follows the divergence instead of standing still."""

from collections.abc import Sequence

import jax.numpy as jnp

from jaxlm.objectives.config import ObjectiveConfig, PpoConfig
from jaxlm.objectives.policy_gradient import adapted_kl
from jaxlm.objectives.ppo import COEFFICIENT
from jaxlm.training.step import Extra, Metrics
from jaxlm.types import Variables


def extra(objective: ObjectiveConfig, rows: int) -> Extra | None:
    """Keeps the KL coefficient of `ppo` with a `kl_target`; None for everything else.

    Args:
      objective: the `objective` section.
      rows: completions of a step.
    """
    if not isinstance(objective, PpoConfig) or objective.kl_target is None:
        return None
    target, horizon = objective.kl_target, objective.kl_horizon

    def start() -> Variables:
        return {COEFFICIENT: jnp.float32(objective.kl_coef)}

    def adjust(state: Variables, metrics: Metrics) -> tuple[Variables, Metrics]:
        # Called in every pass over a rollout, so each takes its share of the rows.
        observed, share = metrics["objective/kl"], rows / objective.epochs
        coefficient = adapted_kl(state[COEFFICIENT], observed, target, share, horizon)
        return {**state, COEFFICIENT: coefficient}, metrics | {"objective/kl_coef": state[COEFFICIENT]}

    return Extra(start, adjust)


def joined(parts: Sequence[Extra | None]) -> Extra | None:
    """Several as one, each with its own collections; None where there is none."""
    known = [part for part in parts if part is not None]
    if len(known) < 2:
        return known[0] if known else None

    def start() -> Variables:
        return {name: tree for part in known for name, tree in part.start().items()}

    def adjust(state: Variables, metrics: Metrics) -> tuple[Variables, Metrics]:
        for part in known:
            state, metrics = part.adjust(state, metrics)
        return state, metrics

    return Extra(start, adjust)
