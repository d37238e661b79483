"""Distillation: a student learns from a teacher's distributions, and from its layers where that is asked for.

    total = kd_weight * divergence + (1 - kd_weight) * cross-entropy
            + hidden_weight * hidden states + attention_weight * attention

All terms are means over the labels of the whole step. The teacher runs once a step, in `prepare`; of its outputs only
hidden states are kept, and its logits are made chunk by chunk together with the student's.
"""

import functools

import jax.numpy as jnp

from jaxlm.objectives import layer_matching
from jaxlm.objectives.config import DistillConfig
from jaxlm.objectives.cross_entropy import cross_entropy
from jaxlm.objectives.distill_loss import Labels, Online, TopK, distillation
from jaxlm.objectives.divergence import Divergence
from jaxlm.objectives.forward import forward
from jaxlm.objectives.next_token import token_weights
from jaxlm.types import Apply, Array, Batch, Objective, Variables

COLUMNS = ("teacher_ids", "teacher_log_probs")
"""Columns of a batch that come from a cache of the teacher: the fields of `TopK`."""


def distill(config: DistillConfig) -> Objective:
    """The objective of a student.

    The batch has the columns of `jaxlm.types.Batch`, and those of a cache (`COLUMNS`), or `own` [B], 1 where the
    student wrote the row itself, which then counts in the divergence alone. Without a cache `frozen["teacher"]` holds
    the teacher's variables, unless nothing asks for it. `prepare` adds columns whose names begin with `teacher_`.
    Metrics: `supervised_tokens`, `distill/kd` and `distill/cross_entropy` (nats per label), `distill/hidden`,
    `distill/attention`.
    """
    divergence = Divergence(config.loss, config.temperature, config.beta, config.skew)
    matching = layer_matching.Matching(config.hidden_weight, config.attention_weight)

    def prepare(apply: Apply, params: Variables, frozen: Variables, batch: Batch, key: Array | None) -> Batch:
        if not needs_teacher(config) or (cached(batch) and not matching.collect):
            return batch
        output = apply(
            frozen["teacher"],
            batch["tokens"],
            model="teacher",
            positions=batch["positions"],
            segments=batch["segments"],
            collect=matching.collect,
        )
        found = batch | matching.columns(output)
        return found if cached(batch) or not config.kd_weight else found | {"teacher_hidden": output.hidden}

    def loss(
        apply: Apply, params: Variables, frozen: Variables, batch: Batch, weights: dict[str, Array], key: Array | None
    ) -> tuple[Array, dict[str, Array]]:
        student = functools.partial(apply, collect=matching.collect) if matching.collect else apply
        output, auxiliary, metrics = forward(student, params, frozen, batch, weights, key)
        metrics = metrics | {"supervised_tokens": jnp.sum(batch["mask"])}
        count, labels = weights["tokens"], labels_of(batch)
        if config.kd_weight:
            teacher = TopK(*(batch[name] for name in COLUMNS)) if cached(batch) else online(apply, frozen, batch)
            settings = (config.kd_weight, divergence)
            total, sums = distillation(output.hidden, output.head, teacher, labels, settings)
            metrics |= {"distill/kd": sums["kd"] / count}
        else:
            total, sums = cross_entropy(output.hidden, output.head, labels.targets, labels.data)
        metrics |= {"distill/cross_entropy": sums["nll"] / count}
        total = total / count + auxiliary
        if matching.collect:
            matched = matching.sums(params.get("projection", {}), output, batch)
            total += sum(matching.weights[name] * value / count for name, value in matched.items())
            metrics |= {f"distill/{name}": value / count for name, value in matched.items()}
        return total, metrics

    return Objective(prepare, token_weights, loss, matching.init)


def labels_of(batch: Batch) -> Labels:
    """The labels of a batch; in rows that the student wrote itself (`own`) there is no cross-entropy."""
    mask = batch["mask"]
    data = mask * (1.0 - batch["own"])[:, None] if "own" in batch else mask
    return Labels(batch["targets"], mask, data)


def needs_teacher(config: DistillConfig) -> bool:
    """Whether a teacher must run beside the student, a cache of its distributions aside."""
    return config.kd_weight > 0 or config.hidden_weight > 0 or config.attention_weight > 0


def cached(batch: Batch) -> bool:
    """Whether the batch brings the teacher's distributions along."""
    return COLUMNS[0] in batch


def online(apply: Apply, frozen: Variables, batch: Batch) -> Online:
    """The teacher's hidden states of `prepare` with its head; the forward pass behind the head is dead code."""
    head = apply(frozen["teacher"], batch["tokens"], model="teacher").head
    return Online(batch["teacher_hidden"], head)
