"""What objectives on rollouts share: log-probabilities at the sampling temperature, rewards of rows, numbers to report.

A rollout's batch has, for R completions, the columns of `jaxlm.types.Batch` with `mask` 1 where the target is a token
of the completion (its end included), and

    reward_0, reward_1, ...   float32 [R]   of each entry of `objective.rewards`; NaN is not scorable
    ended                     float32 [R]   1 if the completion ended by itself, 0 if it was cut at its longest
"""

from collections.abc import Sequence

import jax.numpy as jnp

from jaxlm.objectives.cross_entropy import token_statistics
from jaxlm.objectives.reward import score_head, scores
from jaxlm.types import Apply, Array, Batch, Head, Output, Variables

REPORT = "report"
"""The column [R, M] that `reported` adds up."""

EMBEDDED = "jaxlm.data.questions:exact_match"
"""The reward of the embedded questions."""


def statistics(output: Output, targets_BxL: Array, temperature: float) -> tuple[Array, Array]:
    """Log-probability of the target and entropy, float32 [B, L], of the distribution softmax(logits / temperature)."""
    hidden, head = output.hidden, output.head
    if temperature != 1.0:
        hidden, head = hidden / temperature, _cooled(head, temperature)
    return token_statistics(hidden, head, targets_BxL)


def _cooled(head: Head, temperature: float) -> Head:
    """The head whose logits for `hidden / temperature` are those of the given one, divided by the temperature."""
    bias = None if head.bias is None else head.bias / temperature
    return head._replace(bias=bias, softcap=None if head.softcap is None else head.softcap / temperature)


def run(apply: Apply, variables: Variables, batch: Batch, model: str = "policy") -> Output:
    """A whole model on the batch, without dropout."""
    columns = {name: batch[name] for name in ("positions", "segments")}
    return apply(variables, batch["tokens"], model=model, **columns)


def is_function(entry: str) -> bool:
    """Whether an entry of `objective.rewards` names a function (`file.py:name`), not the directory of a model."""
    return entry.rpartition(":")[2].isidentifier() and ":" in entry


def reward_names(rewards: Sequence[str]) -> tuple[str, ...]:
    """What each entry of `objective.rewards` is called in the metrics: the function, or the directory's last part.

    Raises:
      ValueError: there is none, or two have one name.
    """
    names = tuple(e.rpartition(":")[2] if is_function(e) else e.rstrip("/").rpartition("/")[2] for e in rewards)
    if not names:
        raise ValueError(f"objective.rewards: empty; name a function as path/file.py:function, or use {EMBEDDED}")
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"objective.rewards: two are called {min(twice)}, and so would be their metrics; rename one")
    return names


def reward_column(index: int) -> str:
    """The name of the column that holds the rewards of one entry of `objective.rewards`."""
    return f"reward_{index}"


def rewards_of(rewards: Sequence[str], apply: Apply, frozen: Variables, batch: Batch) -> tuple[Array, Array]:
    """The rewards of each function or model, float32 [R, F], and their sum [R], NaN where nothing could be scored.

    The model in `frozen["reward"]` scores a row by its head at the last token that is no padding.
    """
    each = jnp.stack([batch[reward_column(i)] for i in range(len(rewards))], axis=1)
    for column, entry in enumerate(rewards):
        if not is_function(entry):
            model = frozen["reward"]
            output = run(apply, model, batch, "reward")
            each = each.at[:, column].set(scores(output, score_head(model)["kernel"], batch["segments"]))
    none = jnp.all(jnp.isnan(each), axis=1)
    return each, jnp.where(none, jnp.nan, jnp.nansum(each, axis=1))


def moments(values: Array) -> tuple[Array, Array]:
    """Mean and unbiased deviation of what is not NaN; NaN where there is too little."""
    known = ~jnp.isnan(values)
    count = jnp.sum(known, dtype=jnp.float32)
    mean = jnp.sum(jnp.where(known, values, 0.0)) / jnp.where(count > 0, count, jnp.nan)
    squares = jnp.sum(jnp.where(known, jnp.square(values - mean), 0.0))
    return mean, jnp.sqrt(squares / jnp.where(count > 1, count - 1.0, jnp.nan))


def report(batch: Batch, values: Sequence[Array]) -> Batch:
    """The batch with numbers that belong to all of it spread over its rows, so that microbatches add up to them."""
    rows = batch["tokens"].shape[0]
    share = jnp.stack([jnp.asarray(value, jnp.float32) for value in values]) / rows
    return {**batch, REPORT: jnp.broadcast_to(share[None, :], (rows, len(values)))}


def reported(batch: Batch, names: Sequence[str]) -> dict[str, Array]:
    """What these rows have of the numbers given to `report`, in its order."""
    return dict(zip(names, jnp.sum(batch[REPORT], axis=0), strict=True))
