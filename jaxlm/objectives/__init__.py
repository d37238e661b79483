"""What a step minimises: each objective is three pure functions (`jaxlm.types.Objective`).

The modules are imported when an objective is made, so that reading a configuration does not wait for JAX.
"""

import importlib
from typing import TYPE_CHECKING

from jaxlm.objectives.config import ObjectiveConfig

if TYPE_CHECKING:
    from jaxlm.types import Objective

OBJECTIVES = {
    "next_token": "jaxlm.objectives.next_token:next_token",
    "sft": "jaxlm.objectives.next_token:supervised",
    "dpo": "jaxlm.objectives.preference:dpo",
    "simpo": "jaxlm.objectives.preference:simpo",
    "orpo": "jaxlm.objectives.preference:orpo",
    "kto": "jaxlm.objectives.kto:kto",
    "reward": "jaxlm.objectives.reward:reward",
    "distill": "jaxlm.objectives.distill:distill",
    "grpo": "jaxlm.objectives.grpo:grpo",
    "ppo": "jaxlm.objectives.ppo:ppo",
}
"""Kind -> `module:function`, the function from its configuration to the objective."""


def make(config: ObjectiveConfig) -> "Objective":
    """The objective that the configuration's kind names.

    Raises:
      ValueError: there is none of that kind.
    """
    if config.kind not in OBJECTIVES:
        known = ", ".join(OBJECTIVES)
        raise ValueError(f"objective.kind: {config.kind} cannot be trained; the known ones are {known}")
    module, _, function = OBJECTIVES[config.kind].partition(":")
    return getattr(importlib.import_module(module), function)(config)
