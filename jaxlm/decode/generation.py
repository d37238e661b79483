"""Continuing prompts: token ids in, new token ids out."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxlm.decode import batch, loop, sampling
from jaxlm.decode.sampling import Choice
from jaxlm.nn.config import ModelConfig
from jaxlm.types import Variables

CHUNK = 8
"""Steps between looks at the output, where someone waits for it or multi-token stops are to be found."""

Stops = Sequence[int | Sequence[int]]
GREEDY = Choice()


class Samples(NamedTuple):
    """Continuations of a batch.

    Attributes:
      ids: int32 [B, M], new tokens from the left, the ending token included; 0 behind.
      lengths: int32 [B].
      log_probs: float32 [B, M]: log softmax(logits / temperature) of each token under the model, before repetition
        penalty and filters (temperature 0 counts as 1); 0 behind the end.
    """

    ids: np.ndarray
    lengths: np.ndarray
    log_probs: np.ndarray


def generate(
    cfg: ModelConfig,
    variables: Variables,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    stop: Stops = (),
) -> list[list[int]]:
    """Continue prompts.

    A row ends at one of `cfg.eos_token_id`, at one of `stop`, which are included, or after `max_new_tokens`. The same
    seed gives the same ids; rows are independent draws.

    Args:
      cfg, variables: a model, as from `jaxlm.load`; `loop.prepare` saves copying the weights in every call.
      prompts: lists of token ids.
      max_new_tokens: at most so many new tokens a row.
      temperature: 0 takes the likeliest token.
      top_k: of the k likeliest tokens; 0 is all.
      top_p: of the likeliest tokens that sum to p; 1 is all.
      min_p: of tokens at least p times as likely as the likeliest; 0 is all.
      repetition_penalty: for tokens of prompt and output; 1 is off.
      seed: of the draws.
      stop: token ids, or sequences of token ids.

    Returns:
      The new ids of each prompt.

    Raises:
      ValueError: a prompt or setting that cannot be, by name and position.
    """
    choice = Choice(temperature, top_k, top_p, min_p, repetition_penalty, seed, _stops(stop))
    samples = sample(cfg, variables, prompts, max_new_tokens, choice)
    return [row[:n].tolist() for row, n in zip(samples.ids, samples.lengths, strict=True)]


def sample(
    cfg: ModelConfig,
    variables: Variables,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 64,
    choice: Choice | Sequence[Choice] = GREEDY,
) -> Samples:
    """`generate` with log-probabilities, and with settings for each row.

    Args:
      cfg, variables, prompts, max_new_tokens: as in `generate`.
      choice: one for all rows, or one a row.

    Raises:
      ValueError: as `generate`.
    """
    *_, samples = chunks(cfg, variables, prompts, max_new_tokens, choice, size=None)
    return samples


def chunks(
    cfg: ModelConfig,
    variables: Variables,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 64,
    choice: Choice | Sequence[Choice] = GREEDY,
    size: int | None = CHUNK,
) -> Iterator[Samples]:
    """`sample`, as it grows: all that there is after every `size` tokens; the last one is the whole."""
    ids = batch.check(cfg, prompts, max_new_tokens)
    choices = [choice] * len(ids) if isinstance(choice, Choice) else list(choice)
    if len(choices) != len(ids):
        raise ValueError(f"choice: {len(choices)} for {len(ids)} prompts; give one, or one for each")
    ends = [[*ends_of(cfg), *(s for s in c.stop if not isinstance(s, tuple))] for c in choices]
    sequences = [[list(s) for s in c.stop if isinstance(s, tuple)] for c in choices]
    rows = batch.bucket(max(1, len(ids)))
    ends += [[]] * (rows - len(ids))
    settings = sampling.settings([*choices, *[GREEDY] * (rows - len(ids))], range(rows), ends)
    if not ids or not max_new_tokens:
        none = np.zeros((len(ids), 0))
        yield Samples(none.astype(np.int32), np.zeros(len(ids), np.int32), none.astype(np.float32))
        return
    padded = batch.pad(ids)
    cfg = loop.program_of(cfg)
    variables = loop.prepare(cfg, variables)
    compute = loop.compute_of(variables)
    state = loop.prefill(cfg, compute, variables, padded.tokens, padded.segments)
    first = padded.tokens.shape[1]
    end, last = first, first + max_new_tokens
    state = loop.grow(state, batch.cache_bucket(last - 1))
    stride = size or (CHUNK if any(sequences) else max_new_tokens)
    while True:
        # Whoever waits gets the first token at once.
        end = min(last, end + (stride if size is None or end > first else 1))
        state = loop.extend(cfg, compute, variables, state, settings, np.int32(end))
        samples, found = _read(state, padded, end, sequences)
        if found.any():
            state = state._replace(done=jnp.asarray(np.asarray(state.done) | found))
        if end == last or np.all(state.done):
            break
        if size is not None:
            yield samples
    yield samples


def _read(
    state: loop.State, padded: batch.Prompts, end: int, sequences: list[list[list[int]]]
) -> tuple[Samples, np.ndarray]:
    """New tokens so far, cut after the first stop sequence, and the rows that have one."""
    width, count = padded.tokens.shape[1], padded.count
    tokens, log_probs, lengths = (np.asarray(x) for x in (state.tokens, state.log_probs, state.lengths))
    ids, log_probs = tokens[:count, width:end].copy(), log_probs[:count, width:end].copy()
    lengths = (lengths - padded.lengths)[:count].copy()
    found = np.zeros(len(padded.lengths), bool)
    for row in range(count):
        cut = _cut(ids[row, : lengths[row]].tolist(), sequences[row])
        if cut is not None:
            lengths[row], found[row] = cut, True
    behind = np.arange(ids.shape[1])[None, :] >= lengths[:, None]
    ids[behind], log_probs[behind] = 0, 0.0
    return Samples(ids, lengths, log_probs), found


def _cut(ids: list[int], sequences: list[list[int]]) -> int | None:
    """The length up to the end of the sequence that is complete first."""
    ends = [i + len(s) for s in sequences for i in range(len(ids) - len(s) + 1) if ids[i : i + len(s)] == s]
    return min(ends, default=None)


def ends_of(cfg: ModelConfig) -> list[int]:
    """The tokens that end a text."""
    eos = cfg.eos_token_id
    return [] if eos is None else list(eos) if isinstance(eos, tuple) else [eos]


def _stops(stop: Stops) -> tuple[int | tuple[int, ...], ...]:
    """Single tokens as ints, sequences of several as tuples."""
    if isinstance(stop, str | int | np.integer):
        raise ValueError(f"stop: {stop!r} is no list; give token ids or sequences of token ids in a list")
    if any(isinstance(s, str) for s in stop):
        raise ValueError("stop: text cannot be compared with token ids; give the ids of the tokens to stop at")
    sequences = [(int(s),) if isinstance(s, int | np.integer) else tuple(int(i) for i in s) for s in stop]
    if () in sequences:
        raise ValueError("stop: an empty sequence; give at least one token id")
    return tuple(s[0] if len(s) == 1 else s for s in sequences)
