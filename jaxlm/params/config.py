"""Settings of muP, apart from its code so that reading a configuration stays light."""

import dataclasses
from typing import Annotated

import msgspec

from jaxlm.nn.config import ModelConfig

Count = Annotated[int, msgspec.Meta(ge=1)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


@dataclasses.dataclass(frozen=True)
class MupBase:
    """The shape at which hyperparameters were tuned; what is null is as in the model."""

    d_model: Count | None = None
    n_layers: Count | None = None
    n_heads: Count | None = None
    n_kv_heads: Count | None = None
    head_dim: Count | None = None
    d_ff: Count | None = None


@dataclasses.dataclass(frozen=True)
class MupConfig:
    """Transfer from a base shape.

    Attributes:
      base: the model's fields that are other in the base; nulls are resolved after replacing.
      depth_alpha: branches are multiplied by `(N / N_base)^-depth_alpha`: 0 leaves depth alone, 0.5 is Depth-muP,
        1 is CompleteP.
      decay_exponent: how weight decay grows with the fan-in ratio of a matrix; 1 keeps learning rate times decay
        constant over width, 0 keeps the decay.
    """

    base: MupBase = MupBase()
    depth_alpha: Share = 0.0
    decay_exponent: Share = 1.0

    def base_of(self, model: ModelConfig) -> ModelConfig:
        """The base model: `model` with the fields of `base` replaced."""
        given = {name: value for name, value in dataclasses.asdict(self.base).items() if value is not None}
        return dataclasses.replace(model, **given)
