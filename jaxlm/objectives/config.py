"""Settings of the objectives: one dataclass a kind, and the table of kinds."""

import dataclasses
from typing import Annotated, Literal

import msgspec

Share = Annotated[float, msgspec.Meta(ge=0, lt=1)]
Ratio = Annotated[float, msgspec.Meta(ge=0, le=1)]
NotNegative = Annotated[float, msgspec.Meta(ge=0)]
Above0 = Annotated[float, msgspec.Meta(gt=0)]
Count = Annotated[int, msgspec.Meta(ge=1)]
Reference = Literal["adapter-off", "copy", "precomputed"]


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """What all kinds share.

    Attributes:
      kind: the objective by name, a key of `KINDS`; it decides which other fields exist.
    """

    kind: str

    def validate(self) -> None:
        """Raise ValueError, naming the fields, for values that cannot be together."""


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


@dataclasses.dataclass(frozen=True)
class SftConfig(ObjectiveConfig):
    """Cross-entropy of the labels of prompt and completion, of chats, of instructions.

    Attributes:
      label_smoothing: as in next_token.
      neftune: alpha of uniform noise on the embeddings in training, alpha / sqrt(length * width) (2310.05914).
    """

    kind: Literal["sft"] = "sft"
    label_smoothing: Share = 0.0
    neftune: NotNegative = 0.0


@dataclasses.dataclass(frozen=True)
class DistillConfig(ObjectiveConfig):
    """A student imitates a teacher: `kd_weight * divergence + (1 - kd_weight) * cross-entropy` on the labels.

    Attributes:
      teacher: a Hugging Face or run directory with the same tokenizer.
      loss: the divergence. `hinton` is forward KL at a temperature, times its square (1503.02531).
      temperature: divides the logits of both.
      kd_weight: 0 is the student alone.
      beta: weight of the teacher in the mixture of `jsd` (GKD, 2306.13649).
      skew: weight of the teacher in the mixture of `skew_kl` (2402.03898).
      init: the student starts `random` (or from `model.path`), or as a choice of the `teacher`'s layers, heads and
        channels (`params.select`).
      hidden_weight: of matching hidden states, layer by layer, through learned projections (1412.6550).
      attention_weight: of matching attention, layer by layer, mean over heads (2002.10957).
      cache: a folder with the teacher's most likely tokens on the training rows, made there if it is missing; the
        teacher is then not loaded for training. Null: the teacher runs beside the student.
      top_k: how many tokens of each position the cache keeps; all others are one.
      on_policy: share of steps whose rows are the student's own samples (GKD, 2306.13649).
    """

    kind: Literal["distill"] = "distill"
    teacher: str = ""
    loss: Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "hinton"] = "forward_kl"
    temperature: Above0 = 1.0
    kd_weight: Ratio = 0.5
    beta: Ratio = 0.5
    skew: Share = 0.1
    init: Literal["random", "teacher"] = "random"
    hidden_weight: NotNegative = 0.0
    attention_weight: NotNegative = 0.0
    cache: str | None = None
    top_k: Count = 32
    on_policy: Ratio = 0.0


@dataclasses.dataclass(frozen=True)
class DpoConfig(ObjectiveConfig):
    """Direct preference optimisation (2305.18290) and its relatives, by TRL's names.

    Attributes:
      loss: what is minimised of the margin between chosen and rejected.
      beta: strength of the pull to the reference.
      label_smoothing: share of preferences taken to be wrong, for `cdpo` and `robust`.
      reference: what log-probabilities are compared with: the base without adapters, a frozen copy, or values written
        to a cache before training. Null is `adapter-off` with adapters, else `copy`.
    """

    kind: Literal["dpo"] = "dpo"
    loss: Literal["sigmoid", "hinge", "ipo", "robust", "sigmoid_norm", "cdpo"] = "sigmoid"
    beta: Above0 = 0.1
    label_smoothing: Share = 0.0
    reference: Reference | None = None

    def validate(self) -> None:
        """Raise ValueError, naming the fields, for values that cannot be together."""
        if self.label_smoothing and self.loss not in ("robust", "cdpo"):
            raise ValueError(
                f"objective.label_smoothing: {self.label_smoothing} means nothing to objective.loss {self.loss}; use "
                "robust or cdpo, or set it to 0"
            )
        if self.loss == "robust" and self.label_smoothing >= 0.5:
            raise ValueError(
                f"objective.label_smoothing: {self.label_smoothing} of all preferences wrong leaves nothing to learn; "
                "stay below 0.5"
            )


@dataclasses.dataclass(frozen=True)
class SimpoConfig(ObjectiveConfig):
    """Reference-free preferences on length-normalised log-probabilities (2405.14734).

    Attributes:
      beta: scale of the reward.
      gamma: margin, in units of reward.
    """

    kind: Literal["simpo"] = "simpo"
    beta: Above0 = 2.0
    gamma: NotNegative = 1.0


@dataclasses.dataclass(frozen=True)
class OrpoConfig(ObjectiveConfig):
    """Likelihood of the chosen plus an odds-ratio penalty (2403.07691).

    Attributes:
      beta: weight of the penalty.
    """

    kind: Literal["orpo"] = "orpo"
    beta: Above0 = 0.1


@dataclasses.dataclass(frozen=True)
class KtoConfig(ObjectiveConfig):
    """Desirable and undesirable completions, not in pairs (2402.01306).

    Attributes:
      beta: strength of the pull to the reference.
      desirable_weight, undesirable_weight: of the two kinds of rows.
      reference: as in dpo.
    """

    kind: Literal["kto"] = "kto"
    beta: Above0 = 0.1
    desirable_weight: NotNegative = 1.0
    undesirable_weight: NotNegative = 1.0
    reference: Reference | None = None

    def validate(self) -> None:
        """Raise ValueError, naming the fields, for values that cannot be together."""
        if self.reference == "precomputed":
            raise ValueError(
                "objective.reference: precomputed, but kto compares pairs with the reference that only a step makes; "
                "use copy, or adapter-off with lora"
            )


@dataclasses.dataclass(frozen=True)
class RewardConfig(ObjectiveConfig):
    """A scalar head that ranks chosen above rejected (Bradley-Terry).

    Attributes:
      center: weight of mean((r_chosen + r_rejected)^2), which keeps rewards around 0; null is off.
    """

    kind: Literal["reward"] = "reward"
    center: Above0 | None = None


@dataclasses.dataclass(frozen=True)
class GrpoConfig(ObjectiveConfig):
    """Policy gradients with advantages relative to a group of completions of one prompt (2402.03300).

    Attributes:
      variant: how token losses are averaged, and whether advantages are divided by the group's deviation.
      group_size: completions per prompt.
      beta: weight of the KL divergence from the reference.
      epsilon: clip of the probability ratio.
      rewards: `path/file.py:function` or `module:function` each, or the directory of a reward model; they are added up.
      max_new_tokens, temperature: of the rollouts.
      stop: a completion ends with the first token whose text has this in it; null: with the end of text alone.
      epochs: gradient passes over one rollout.
      kl_correction: whether the divergence of a token is weighed by its probability ratio, as TRL does since 1.16.
      reference: as in dpo; only used where beta is not 0.
    """

    kind: Literal["grpo"] = "grpo"
    variant: Literal["grpo", "bnpo", "dapo", "dr_grpo", "rloo"] = "grpo"
    group_size: Annotated[int, msgspec.Meta(ge=2)] = 8
    beta: NotNegative = 0.0
    epsilon: Above0 = 0.2
    rewards: tuple[str, ...] = ()
    max_new_tokens: Count = 64
    temperature: Above0 = 1.0
    stop: str | None = None
    epochs: Count = 1
    kl_correction: bool = True
    reference: Reference | None = None


@dataclasses.dataclass(frozen=True)
class PpoConfig(ObjectiveConfig):
    """Proximal policy optimisation against a reward, with a KL penalty per token (1707.06347, 2203.02155).

    Attributes:
      kl_coef: weight of the KL penalty in the reward.
      kl_target: nats per completion that the penalty is steered to, from `kl_coef` on (1909.08593); null: it stays.
      kl_horizon: completions in which the steering may change the penalty by a fifth.
      epsilon: clip of the probability ratio and of the value.
      value_coef: weight of the value loss.
      gamma, lam: discount and smoothing of the advantages (GAE, 1506.02438).
      rewards, max_new_tokens, temperature, stop, epochs, reference: as in grpo.
    """

    kind: Literal["ppo"] = "ppo"
    kl_coef: NotNegative = 0.05
    kl_target: Above0 | None = None
    kl_horizon: Above0 = 10000.0
    epsilon: Above0 = 0.2
    value_coef: NotNegative = 0.1
    gamma: Ratio = 1.0
    lam: Ratio = 0.95
    rewards: tuple[str, ...] = ()
    max_new_tokens: Count = 64
    temperature: Above0 = 1.0
    stop: str | None = None
    epochs: Count = 1
    reference: Reference | None = None


KINDS: dict[str, type[ObjectiveConfig]] = {
    "next_token": NextTokenConfig,
    "sft": SftConfig,
    "distill": DistillConfig,
    "dpo": DpoConfig,
    "simpo": SimpoConfig,
    "orpo": OrpoConfig,
    "kto": KtoConfig,
    "reward": RewardConfig,
    "grpo": GrpoConfig,
    "ppo": PpoConfig,
}
"""The settings of each kind of objective."""
