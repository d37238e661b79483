"""Log-likelihoods of continuations, in batches of few shapes."""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.evals.subject import Subject, exact
from jaxlm.nn import transformer
from jaxlm.nn.compute import Compute
from jaxlm.nn.config import ModelConfig
from jaxlm.types import Array, Batch, Head, Variables

SMALLEST = 16
"""The shortest padded length."""
LOGIT_ROWS = 512
"""Positions whose logits exist at a time."""
BATCH_TOKENS = 1 << 16
"""Tokens of a batch at most: very long windows come in smaller batches."""


class Request(NamedTuple):
    """Token ids: `continuation` is scored given `context` and what comes before in itself."""

    context: Sequence[int]
    continuation: Sequence[int]


class Score(NamedTuple):
    """Sum of the continuation's log-probabilities in nats, and whether each of its tokens is the likeliest."""

    log_likelihood: float
    is_greedy: bool


class Rows(NamedTuple):
    """A batch of requests, padded on the right to a bucket.

    Attributes:
      tokens: int32 [B, L + 1]; L is a power of two.
      lengths: int32 [B], tokens of the row.
      labels: int32 [B], how many of them, at the end, are scored.
      chosen: of each row the request it comes from; the last batch is filled up by repeats, which are not listed.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray
    chosen: list[int]


def bucket(length: int) -> int:
    """The padded length: the next power of two, at least `SMALLEST`."""
    return max(SMALLEST, 1 << (length - 1).bit_length())


def score(subject: Subject, requests: Sequence[Request]) -> list[Score]:
    """Log-likelihoods of continuations.

    What does not fit the model's window loses tokens of the context, from the left, as in lm-eval. A program is
    compiled for each padded length.

    Args:
      subject: the model.
      requests: token ids.

    Returns:
      The scores, in the order of the requests.

    Raises:
      ValueError: an empty context or continuation, or a continuation longer than the window, by the request's number.
    """
    found: dict[int, Score] = {}
    for rows in batches(subject, requests):
        with exact():
            log_probs, greedy = jax.device_get(
                _score(subject.cfg, subject.compute, subject.variables, rows.tokens, rows.lengths, rows.labels)
            )
        for row, index in enumerate(rows.chosen):
            found[index] = Score(float(np.sum(log_probs[row], dtype=np.float64)), bool(greedy[row]))
        subject.report(len(found), len(requests))
    return [found[index] for index in range(len(requests))]


def batches(subject: Subject, requests: Sequence[Request]) -> Iterator[Rows]:
    """The requests, longest first, in batches of one padded length each; errors as in `score`."""
    window = subject.cfg.max_length
    fitted = [_fit(window, number, request) for number, request in enumerate(requests)]
    groups: dict[tuple[int, bool], list[int]] = {}
    for index in sorted(range(len(fitted)), key=lambda i: -len(fitted[i])):
        length = len(fitted[index]) - 1
        groups.setdefault((bucket(length), _stretched(subject.cfg, length)), []).append(index)
    for (length, _), indices in groups.items():
        size = max(1, min(subject.batch_size, BATCH_TOKENS // length))
        for start in range(0, len(indices), size):
            chosen = indices[start : start + size]
            filled = chosen + chosen[:1] * (size - len(chosen))
            tokens = np.zeros((size, length + 1), np.int32)
            for row, index in enumerate(filled):
                tokens[row, : len(fitted[index])] = fitted[index]
            lengths = np.array([len(fitted[index]) for index in filled], np.int32)
            labels = np.array([len(requests[index].continuation) for index in filled], np.int32)
            yield Rows(tokens, lengths, labels, chosen)


def rolling_windows(ids: Sequence[int], prefix: int, window: int) -> list[Request]:
    """A text as requests that score each of its tokens once, as lm-eval's rolling log-likelihood.

    Windows of `window` tokens follow each other, each after one token of context, `prefix` before the first. The last,
    shorter one is filled up by context.

    With ids 0 .. 9, window 4: (prefix | 0 1 2 3), (3 | 4 5 6 7), (5 6 7 | 8 9).
    """
    windows = []
    for start in range(0, len(ids), window):
        end = min(start + window, len(ids))
        context = ids[max(0, end - window - 1) : start] if start else [prefix]
        windows.append(Request(list(context), list(ids[start:end])))
    return windows


def _fit(window: int, number: int, request: Request) -> list[int]:
    """The tokens of a request that fit: `window` of input, and the last one, which is only predicted."""
    if not request.context or not request.continuation:
        part = "continuation" if request.context else "context"
        raise ValueError(f"requests[{number}]: no token in the {part}; give at least one")
    if len(request.continuation) > window:
        raise ValueError(
            f"requests[{number}]: a continuation of {len(request.continuation)} tokens does not fit the model's window "
            f"of {window}; shorten it"
        )
    return [*request.context, *request.continuation][-(window + 1) :]


def _stretched(cfg: ModelConfig, length: int) -> bool:
    """Whether rotary tables are those of long calls. A batch shares its tables, so it holds rows of one kind."""
    ropes = [rope for rope in (cfg.rope, cfg.local_rope) if rope is not None and rope.kind == "longrope"]
    return any(length > (rope.original_length or cfg.max_length) for rope in ropes)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score(
    cfg: ModelConfig, compute: Compute, variables: Variables, tokens_BxT: Array, lengths_B: Array, labels_B: Array
) -> tuple[Array, Array]:
    """Log-probabilities [B, L] of the labels, 0 elsewhere, and whether all of a row's are the likeliest [B]."""
    inputs = inputs_of(tokens_BxT, lengths_B, labels_B)
    output = transformer.apply(
        cfg,
        variables,
        inputs["tokens"],
        positions=inputs["positions"],
        segments=inputs["segments"],
        compute=compute,
    )
    labelled = inputs["mask"] > 0
    log_probs, likeliest = _label_scores(output.hidden, output.head, inputs["targets"], labelled)
    return jnp.where(labelled, log_probs, 0.0), jnp.all(likeliest | ~labelled, axis=1)


def inputs_of(tokens: Array, lengths: Array, labels: Array) -> Batch:
    """The arrays of `Rows` as `types.Batch`: every array [B, L], the mask 1 on what is scored."""
    tokens_BxL, targets_BxL = tokens[:, :-1], tokens[:, 1:]
    steps = jnp.broadcast_to(jnp.arange(tokens_BxL.shape[1], dtype=jnp.int32)[None, :], tokens_BxL.shape)
    used = steps < lengths[:, None] - 1
    labelled = used & (steps >= (lengths - labels)[:, None] - 1)
    return {
        "tokens": tokens_BxL,
        "targets": targets_BxL,
        "mask": labelled.astype(jnp.float32),
        "segments": used.astype(jnp.int32),
        "positions": jnp.where(used, steps, 0),
    }


def _label_scores(hidden_BxLxD: Array, head: Head, targets_BxL: Array, labelled_BxL: Array) -> tuple[Array, Array]:
    """Log-probability of each target and whether it is the likeliest, chunk by chunk; chunks of context are skipped."""
    batch, length = targets_BxL.shape
    step = min(length, 1 << max(0, (LOGIT_ROWS // batch).bit_length() - 1))

    def chunks(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(batch, length // step, step, *x.shape[2:]), 1, 0)

    def measure(hidden: Array, targets: Array) -> tuple[Array, Array]:
        logits = transformer.head_logits(hidden, head)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == targets

    def skip(hidden: Array, targets: Array) -> tuple[Array, Array]:
        del hidden
        return jnp.zeros(targets.shape, jnp.float32), jnp.zeros(targets.shape, bool)

    def one(chunk: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        hidden, targets, labelled = chunk
        return jax.lax.cond(jnp.any(labelled), measure, skip, hidden, targets)

    values = jax.lax.map(one, (chunks(hidden_BxLxD), chunks(targets_BxL), chunks(labelled_BxL)))
    log_probs, likeliest = (jnp.moveaxis(x, 0, 1).reshape(batch, length) for x in values)
    return log_probs, likeliest
