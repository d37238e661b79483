"""Settings of a run and of its loop: where it writes, how long it trains, how often it looks and saves."""

import dataclasses
from typing import Annotated, Literal

import msgspec

Count = Annotated[int, msgspec.Meta(ge=1)]
Seed = Annotated[int, msgspec.Meta(ge=0, lt=2**32)]
Share = Annotated[float, msgspec.Meta(ge=0, lt=1)]
Above0 = Annotated[float, msgspec.Meta(gt=0)]


@dataclasses.dataclass(frozen=True)
class RunSection:
    """Where a run writes, and what its randomness starts from.

    Attributes:
      dir: the run directory, relative to the current directory.
      seed: of initialisation, data order, dropout and sampling.
    """

    dir: str = "runs/run"
    seed: Seed = 0


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop, and what the compiled step trades for memory.

    Attributes:
      steps: optimiser steps.
      batch_size: rows of data per step, over all devices and microbatches.
      accumulation: microbatches a step is cut into; a divisor of batch_size.
      eval_every, checkpoint_every: steps between evaluations, and between saved states.
      eval_batches: batches of one evaluation; null is the whole validation set.
      patience: evaluations without a new best loss after which training ends early; null never does.
      keep: latest checkpoints that are kept, beside the best one.
      max_skips: steps in a row that may be skipped for a loss or gradient that is not finite.
      dropout: on embeddings and on each branch's output.
      ema: decay of an average of the parameters, which is then what is evaluated and exported; null keeps none.
      dtype: of the computation; null is bfloat16 on accelerators and float32 on CPU. Parameters stay float32.
      remat: what the backward pass computes again instead of keeping it.
      scan: whether the layers are walked by a scan; null decides by depth and device.
      attention: the attention backend by name; null chooses.
      experts: the backend of the experts' products by name; null chooses.
      memory_limit: GB (10^9 bytes) per device that the run may need by estimate; more is refused. Null is no limit.
      prompts: what the sample texts continue.
      tasks: what is scored before the first and after the last step, as `jaxlm eval --tasks` takes them: files of
        choice questions, `docstrings` and `docstrings_shuffled` of the embedded corpus, lm-eval's tasks.
      trackers: where metrics go beside metrics.jsonl.
    """

    steps: Count = 1000
    batch_size: Count = 16
    accumulation: Count = 1
    eval_every: Count = 100
    checkpoint_every: Count = 200
    eval_batches: Count | None = 16
    patience: Count | None = None
    keep: Annotated[int, msgspec.Meta(ge=2)] = 2
    max_skips: Count = 10
    dropout: Share = 0.0
    ema: Annotated[float, msgspec.Meta(gt=0, lt=1)] | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    remat: Literal["none", "dots", "block", "full", "offload"] = "none"
    scan: bool | None = None
    attention: str | None = None
    experts: Literal["reference", "blocks", "ragged", "pallas"] | None = None
    memory_limit: Above0 | None = None
    prompts: tuple[str, ...] = ("The ", "def ", "Return the ")
    tasks: tuple[str, ...] = ()
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()

    def validate(self) -> None:
        """Raise ValueError, naming both fields, for settings that cannot go together."""
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"train.batch_size: {self.batch_size} is not a multiple of train.accumulation {self.accumulation}; "
                "change one of them"
            )
