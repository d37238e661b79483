"""Settings of optimisation: the chain, its schedule, sharpness-aware steps, layer-wise rates."""

import dataclasses
from typing import Annotated, Literal

import msgspec

Above0 = Annotated[float, msgspec.Meta(gt=0)]
AtLeast0 = Annotated[float, msgspec.Meta(ge=0)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Decay = Annotated[float, msgspec.Meta(ge=0, lt=1)]
Count = Annotated[int, msgspec.Meta(ge=1)]


@dataclasses.dataclass(frozen=True)
class SamConfig:
    """Sharpness-aware minimisation (Foret et al., 2010.01412), off by default.

    Attributes:
      rho: radius of the perturbation, in the norm of all trained leaves together.
      variant: `sam`, or `asam`, whose radius is relative to each weight (2102.11600; rho about ten times larger).
      granularity: one perturbation for the whole `batch` of a step, or one for each `micro`batch of accumulation
        (m-sharpness with m the microbatch; the gradient's norm in the metrics is then that of the second gradients).
      interval: perturb every so many steps and reuse the sharpness direction in between (LookSAM, 2203.02714).
      look_weight: LookSAM's weight of the reused direction.
      eta: ASAM adds it to the size of a weight.
      bias: whether ASAM scales biases and gains by their size like other leaves, or by 1.
    """

    rho: Above0 = 0.05
    variant: Literal["sam", "asam"] = "sam"
    granularity: Literal["batch", "micro"] = "batch"
    interval: Count = 1
    look_weight: AtLeast0 = 0.7
    eta: AtLeast0 = 0.01
    bias: Literal["scaled", "unit"] = "scaled"

    def validate(self) -> None:
        """Raise ValueError, naming the fields, for combinations that cannot be."""
        if self.interval > 1 and self.granularity == "micro":
            raise ValueError(
                f"optimizer.sam.interval: {self.interval} reuses a direction of the whole batch, but "
                "optimizer.sam.granularity is micro; set one of them back"
            )


@dataclasses.dataclass(frozen=True)
class LayerLrConfig:
    """Learning rates by distance: embeddings, each layer, and the head with the final norm are one apart.

    Attributes:
      mode: `decay_to_input`: rate^distance from the head (ELECTRA, BEiT); `decay_to_output`: rate^distance from the
        embedding, so early layers move faster; `list`: the factors themselves.
      rate: the base of the power.
      factors: for `list`, n_layers + 2 numbers from the embedding to the head.
    """

    mode: Literal["decay_to_input", "decay_to_output", "list"] = "decay_to_input"
    rate: Above0 = 0.9
    factors: tuple[AtLeast0, ...] | None = None

    def validate(self) -> None:
        """Raise ValueError, naming the fields, for combinations that cannot be."""
        if (self.mode == "list") != (self.factors is not None):
            raise ValueError(
                f"optimizer.layer_lr.factors: {'missing' if self.factors is None else 'given'}, but "
                f"optimizer.layer_lr.mode is {self.mode}; factors belong to mode list"
            )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """One chain: clip, a rule for the direction, muP factors, decoupled weight decay, layer-wise factors, schedule.

    Attributes:
      name: the rule. `adamw8bit` keeps Adam's moments in 8 bits; `schedule_free` averages instead of decaying the rate
        and needs schedule `constant`; `muon` steers matrices and leaves the rest to AdamW, at one learning rate.
      learning_rate: at the peak of the schedule.
      weight_decay: decoupled; kernels and embeddings only. A step shrinks them by learning rate times this.
      clip: largest global norm of the gradient; null is off.
      schedule: shape of the learning rate after the warm-up. `wsd` holds it and then falls linearly, `wsd_sqrt` with
        1 - sqrt; `restarts` is `cycles` cosines.
      warmup: share of steps in which the rate climbs from 0 to the peak.
      end: learning rate at the end over that at the peak.
      decay: share of steps in which `wsd` and `wsd_sqrt` fall.
      cycles: number of cosines of `restarts`.
      b1, b2: decay of the moments (Adam, Lion).
      eps: added to Adam's denominator.
      momentum: of `sgd` (null: none) and `muon` (null: 0.95).
      sam: null is off.
      layer_lr: null gives all layers the same rate.
    """

    name: Literal["adamw", "lion", "adafactor", "sgd", "muon", "schedule_free", "adamw8bit"] = "adamw"
    learning_rate: Above0 = 3.0e-3
    weight_decay: AtLeast0 = 0.1
    clip: Above0 | None = 1.0
    schedule: Literal["warmup_cosine", "linear", "constant", "wsd", "wsd_sqrt", "rsqrt", "restarts"] = "warmup_cosine"
    warmup: Share = 0.1
    end: Share = 0.0
    decay: Share = 0.2
    cycles: Count = 4
    b1: Decay = 0.9
    b2: Decay = 0.95
    eps: AtLeast0 = 1e-8
    momentum: Decay | None = None
    sam: SamConfig | None = None
    layer_lr: LayerLrConfig | None = None

    def validate(self) -> None:
        """Raise ValueError, naming the fields, for combinations that cannot be."""
        if self.name == "schedule_free" and self.schedule != "constant":
            raise ValueError(
                f"optimizer.schedule: {self.schedule}, but optimizer.name schedule_free averages instead of decaying "
                "the learning rate; use constant"
            )
        if self.name == "schedule_free" and self.b1 == 0:
            raise ValueError("optimizer.b1: 0, but optimizer.name schedule_free divides by it; use e.g. 0.9")
        if self.schedule.startswith("wsd") and self.warmup + self.decay > 1:
            raise ValueError(
                f"optimizer.warmup: {self.warmup} and optimizer.decay {self.decay} add up to more than 1; lower one"
            )
        if self.momentum is not None and self.name not in ("sgd", "muon"):
            raise ValueError(
                f"optimizer.momentum: {self.momentum}, but optimizer.name {self.name} has none; use b1, or sgd or muon"
            )
        if self.sam is not None:
            self.sam.validate()
        if self.layer_lr is not None:
            self.layer_lr.validate()
