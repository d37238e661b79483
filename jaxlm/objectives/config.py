"""Settings of the objectives: one dataclass a kind, and the table of kinds."""

import dataclasses
from typing import Annotated, Literal

import msgspec

Share = Annotated[float, msgspec.Meta(ge=0, lt=1)]
NotNegative = Annotated[float, msgspec.Meta(ge=0)]


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """What all kinds share.

    Attributes:
      kind: the objective by name, a key of `KINDS`; it decides which other fields exist.
    """

    kind: str


@dataclasses.dataclass(frozen=True)
class NextTokenConfig(ObjectiveConfig):
    """Cross-entropy of each next token of running text.

    Attributes:
      z_loss: weight of mean(logsumexp(logits)^2), which keeps logits from drifting (PaLM, 2204.02311).
      label_smoothing: share of the target's probability spread evenly over the vocabulary.
    """

    kind: Literal["next_token"] = "next_token"
    z_loss: NotNegative = 0.0
    label_smoothing: Share = 0.0


KINDS: dict[str, type[ObjectiveConfig]] = {"next_token": NextTokenConfig}
"""The settings of each kind of objective."""
