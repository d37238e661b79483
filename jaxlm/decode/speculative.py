"""Speculative decoding: something cheap proposes tokens, the model judges them all in one pass.

Proposals come from a draft model or from repetitions in the text so far. What is accepted follows the model alone
(Leviathan et al., 2211.17192): greedy decoding gives the same tokens, sampling the same distribution.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.decode import batch, loop, sampling
from jaxlm.decode.generation import GREEDY, ends_of
from jaxlm.decode.sampling import Choice, Settings
from jaxlm.nn import cache as kv
from jaxlm.nn import transformer
from jaxlm.nn.compute import Compute
from jaxlm.nn.config import ModelConfig
from jaxlm.types import Array, Variables

ACCEPT, CORRECT, PROPOSE = 1, 2, 3
"""Purposes of random draws at one position."""

LONGEST_MATCH = 3


class Draft(NamedTuple):
    """A model of the same vocabulary that proposes `ahead` tokens a pass."""

    cfg: ModelConfig
    variables: Variables
    ahead: int = 4


class Lookup(NamedTuple):
    """Proposes what followed the last tokens where they stood before, up to `ahead` tokens a pass."""

    ahead: int = 4


class Speculation(NamedTuple):
    """What came of it.

    Attributes:
      ids: new tokens, the ending one included.
      proposed, accepted: numbers of proposals judged, and of those taken.
      passes: of the model.
    """

    ids: list[int]
    proposed: int
    accepted: int
    passes: int

    @property
    def acceptance(self) -> float | None:
        """Share of proposals taken; None without any."""
        return self.accepted / self.proposed if self.proposed else None


def speculate(
    cfg: ModelConfig,
    variables: Variables,
    prompt: Sequence[int],
    max_new_tokens: int = 64,
    choice: Choice = GREEDY,
    draft: Draft | Lookup = Lookup(),  # noqa: B008
) -> Speculation:
    """Continue one prompt; greedy ids in float32 are those of `generate`. Whether it is faster depends on the draft.

    Args:
      cfg, variables, prompt, max_new_tokens: as in `generate`.
      choice: how to sample; draws differ from those of `generate`, their distribution does not.
      draft: who proposes.

    Raises:
      ValueError: as `generate`; also if the draft has another vocabulary, or `ahead` is below 1.
    """
    ahead = draft.ahead
    if ahead < 1:
        raise ValueError(f"ahead: {ahead} cannot be; propose at least 1 token a pass")
    if isinstance(draft, Draft) and draft.cfg.V != cfg.V:
        raise ValueError(f"draft: a vocabulary of {draft.cfg.V}, but the model's is {cfg.V}; use a draft of the same")
    for model in (cfg, draft.cfg) if isinstance(draft, Draft) else (cfg,):
        ids = batch.check(model, [prompt], max_new_tokens)
    padded = batch.pad(ids)
    first = padded.tokens.shape[1]
    room = batch.cache_bucket(first + max_new_tokens + ahead)
    judge = _Reader(cfg, variables, padded, room)
    proposer = _Reader(draft.cfg, draft.variables, padded, room) if isinstance(draft, Draft) else None
    settings = sampling.settings([choice], [0], [ends_of(cfg)])
    text, seen = ids[0], judge.seen
    end, proposed, accepted, passes = len(text) + max_new_tokens, 0, 0, 0
    pad = first - len(text)
    while len(text) < end:
        wanted = min(ahead, end - len(text) - 1)
        if proposer is None:
            found, probs = _look_up(text, wanted), None
            wanted = len(found)
        else:
            found, probs = proposer.propose(text, pad, seen, settings, ahead)
        tokens = [*found[:wanted], *[0] * (ahead - wanted)]
        taken, token, seen = judge.verify(text, pad, seen, settings, (tokens, probs, wanted))
        new = [*tokens[:taken], token]
        cut = next((i + 1 for i, t in enumerate(new) if t in ends_of(cfg)), None)
        text = [*text, *new[:cut]]
        proposed, accepted, passes = proposed + wanted, accepted + taken, passes + 1
        if cut is not None:
            break
    return Speculation(text[len(ids[0]) :], proposed, accepted, passes)


def _look_up(text: list[int], most: int) -> list[int]:
    """What followed the latest earlier place of the text's last tokens; the longest match counts."""
    for size in range(min(LONGEST_MATCH, len(text) - 1), 0, -1):
        tail = text[-size:]
        for start in range(len(text) - size - 1, -1, -1):
            if text[start : start + size] == tail:
                return text[start + size : start + size + most]
    return []


class _Reader:
    """A model with its cache of one text."""

    def __init__(self, cfg: ModelConfig, variables: Variables, padded: batch.Prompts, room: int) -> None:
        cfg = self.cfg = loop.program_of(cfg)
        self.variables = loop.prepare(cfg, variables)
        self.compute = loop.compute_of(self.variables)
        state = loop.prefill(cfg, self.compute, self.variables, padded.tokens, padded.segments)
        state = loop.grow(state, room)
        self.cache, self.seen = state.cache, state.seen

    def propose(
        self, text: list[int], pad: int, seen: Array, settings: Settings, ahead: int
    ) -> tuple[list[int], Array]:
        # The last two tokens are read (again): after a pass whose proposals were all taken the last but one is new.
        newest = np.array([([0] * 2 + text)[-2:]], np.int32)
        state = _Reading(self.cache, jnp.int32(len(text) - 2), jnp.int32(pad), seen)
        found, probs, self.cache = _propose((self.cfg, self.compute), ahead, self.variables, newest, state, settings)
        return np.asarray(found).tolist(), probs

    def verify(
        self, text: list[int], pad: int, seen: Array, settings: Settings, given: tuple[list[int], Array | None, int]
    ) -> tuple[int, int, Array]:
        tokens, probs, wanted = given
        block = np.array([[text[-1], *tokens]], np.int32)
        state = _Reading(self.cache, jnp.int32(len(text) - 1), jnp.int32(pad), seen)
        judged = (block, probs, np.int32(wanted))
        taken, token, seen, self.cache = _verify(self.cfg, self.compute, self.variables, judged, state, settings)
        return int(taken), int(token), seen


class _Reading(NamedTuple):
    """Where a reader stands.

    Attributes:
      cache: what it has read.
      position: int32 scalar, of the first token to be read, padding aside; what the cache holds from there is void.
      pad: int32 scalar, padding before the text.
      seen: bool [1, V].
    """

    cache: kv.Cache
    position: Array
    pad: Array
    seen: Array


def _read(
    cfg: ModelConfig, compute: Compute, variables: Variables, tokens_1xL: Array, at: _Reading
) -> tuple[Array, kv.Cache]:
    """Float32 logits [L, V] and the new cache."""
    positions = at.position + jnp.arange(tokens_1xL.shape[1], dtype=jnp.int32)[None, :]
    output = transformer.apply(
        cfg,
        variables,
        tokens_1xL,
        positions=jnp.maximum(positions, 0),
        segments=(positions >= 0).astype(jnp.int32),
        compute=compute,
        cache=at.cache._replace(index=at.position + at.pad),
    )
    return transformer.head_logits(output.hidden[0], output.head), output.cache


def _probabilities(scores_LxV: Array, seen_LxV: Array, s: Settings) -> Array:
    """What the settings make of scores, as distributions; greedy ones are certain."""
    rows = scores_LxV.shape[0]
    s = jax.tree.map(lambda x: jnp.broadcast_to(x, (rows, *x.shape[1:])), s)
    scores = sampling.process(scores_LxV, seen_LxV, s)
    sure = jax.nn.one_hot(sampling.argmax(scores), scores.shape[1])
    return jnp.where((s.temperature > 0.0)[:, None], jax.nn.softmax(scores, axis=1), sure)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _propose(
    model: tuple[ModelConfig, Compute], ahead: int, variables: Variables, newest_1x2: Array, at: _Reading, s: Settings
) -> tuple[Array, Array, kv.Cache]:
    """Tokens int32 [ahead], the distributions they were drawn from [ahead, V], and the cache."""
    cfg, compute = model
    scores, cache = _read(cfg, compute, variables, newest_1x2, at)
    scores, seen, tokens, probs = scores[-1:], at.seen, [], []
    for i in range(ahead):
        probs.append(_probabilities(scores, seen, s))
        position = at.position + 2 + i
        tokens.append(sampling.draw(probs[-1], sampling.uniform(s.key, position[None], PROPOSE)))
        seen = seen | jax.nn.one_hot(tokens[-1], cfg.V, dtype=bool)
        if i + 1 < ahead:
            scores, cache = _read(
                cfg, compute, variables, tokens[-1][:, None], at._replace(cache=cache, position=position)
            )
    return jnp.concatenate(tokens), jnp.concatenate(probs), cache


@functools.partial(jax.jit, static_argnums=(0, 1))
def _verify(
    cfg: ModelConfig, compute: Compute, variables: Variables, judged: tuple, at: _Reading, s: Settings
) -> tuple[Array, Array, Array, kv.Cache]:
    """How many proposals are taken, the token after them, what is then seen, and the cache."""
    block_1xL, q_AxV, wanted = judged
    proposals_A = block_1xL[0, 1:]
    scores_LxV, cache = _read(cfg, compute, variables, block_1xL, at)
    one_hot_AxV = jax.nn.one_hot(proposals_A, cfg.V)
    before_LxV = jnp.cumsum(jnp.pad(one_hot_AxV, ((1, 0), (0, 0))), axis=0) > 0
    seen_LxV = before_LxV | at.seen
    p_LxV = _probabilities(scores_LxV, seen_LxV, s)
    # A token that was looked up is certain to be proposed.
    q_AxV = one_hot_AxV if q_AxV is None else q_AxV
    index = jnp.arange(proposals_A.shape[0], dtype=jnp.int32)
    p_A = jnp.take_along_axis(p_LxV[:-1], proposals_A[:, None], axis=1)[:, 0]
    q_A = jnp.take_along_axis(q_AxV, proposals_A[:, None], axis=1)[:, 0]
    u_A = sampling.uniform(jnp.broadcast_to(s.key, (index.shape[0], 2)), at.position + 1 + index, ACCEPT)
    good = (u_A * q_A < p_A) & (index < wanted)
    taken = jnp.sum(jnp.cumprod(good.astype(jnp.int32)), dtype=jnp.int32)
    p_V = p_LxV[taken]
    q_V = jnp.where(taken < wanted, jnp.pad(q_AxV, ((0, 1), (0, 0)))[taken], 0.0)
    rest_V = jnp.maximum(p_V - q_V, 0.0)
    # Equal distributions leave nothing but rounding to correct by.
    rest_V = jnp.where(jnp.sum(rest_V) > 0.0, rest_V, p_V)
    u_1 = sampling.uniform(s.key, (at.position + 1 + taken)[None], CORRECT)
    token = sampling.draw(rest_V[None], u_1)[0]
    return taken, token, (seen_LxV[taken] | (jnp.arange(cfg.V) == token))[None], cache
