"""From logits to the next token, each row by its own settings, which are arrays: no setting compiles anew.

Order and meaning are those of transformers: repetition penalty, temperature, top-k, top-p, min-p. Nothing is sorted:
thresholds are found by bisection over the bits of float32, which is exact and an order of magnitude cheaper on CPU.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.types import Array

NEVER = -jnp.inf
SMALLEST_ENDS = 4


class Settings(NamedTuple):
    """How each row is sampled, and where it ends.

    Attributes:
      temperature: float32 [B]; 0 takes the likeliest token.
      top_k: int32 [B]; the k likeliest and what ties with the k-th; 0 is all.
      top_p: float32 [B]; the likeliest that sum to p; 1 is all.
      min_p: float32 [B]; those at least p times as likely as the likeliest; 0 is all.
      repetition_penalty: float32 [B]; scores of tokens seen are divided by it, or multiplied if negative; 1 is off.
      key: uint32 [B, 2], raw data of each row's own key.
      ends: int32 [B, E], tokens at which the row ends; -1 is none.
    """

    temperature: Array
    top_k: Array
    top_p: Array
    min_p: Array
    repetition_penalty: Array
    key: Array
    ends: Array


class Choice(NamedTuple):
    """How a row is to be continued, as the caller states it.

    Attributes:
      temperature, top_k, top_p, min_p, repetition_penalty: see `Settings`.
      seed: equal seeds give equal ids.
      stop: token ids and sequences (tuples) of token ids that end the row, which are included.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[int | tuple[int, ...], ...] = ()


_LIMITS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("temperature", lambda x: 0.0 <= x < float("inf"), "a number from 0 (greedy) up"),
    ("top_k", lambda x: x >= 0 and x == int(x), "a whole number from 0 (off) up"),
    ("top_p", lambda x: 0.0 <= x <= 1.0, "a number in [0, 1]; 1 is off"),
    ("min_p", lambda x: 0.0 <= x <= 1.0, "a number in [0, 1]; 0 is off"),
    ("repetition_penalty", lambda x: 0.0 < x < float("inf"), "a positive number; 1 is off"),
    ("seed", lambda x: x == int(x), "a whole number"),
)


def settings(choices: Sequence[Choice], streams: Sequence[int], ends: Sequence[Sequence[int]]) -> Settings:
    """Arrays for rows of these choices.

    Args:
      choices: one a row.
      streams: one a row; rows of equal seed and different stream are independent draws.
      ends: one sequence of tokens a row; padded to a bucket.

    Raises:
      ValueError: naming the setting that cannot be.
    """
    for choice in set(choices):
        for name, good, wanted in _LIMITS:
            value = getattr(choice, name)
            if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not good(value):
                raise ValueError(f"{name}: {value!r} cannot be; give {wanted}")

    def column(name: str, dtype: type) -> Any:
        return np.array([getattr(choice, name) for choice in choices], dtype)

    most = max(map(len, ends), default=0)
    ends_BxE: Any = np.full((len(choices), max(SMALLEST_ENDS, 1 << max(0, most - 1).bit_length())), -1, np.int32)
    for row, tokens in enumerate(ends):
        ends_BxE[row, : len(tokens)] = tokens
    seeds = np.array([int(c.seed) % 2**64 for c in choices], np.uint64)
    words = np.stack([seeds & np.uint64(0xFFFFFFFF), seeds >> np.uint64(32)], axis=1).astype(np.uint32)
    return Settings(
        temperature=column("temperature", np.float32),
        top_k=np.minimum(column("top_k", np.int64), np.iinfo(np.int32).max).astype(np.int32),
        top_p=column("top_p", np.float32),
        min_p=column("min_p", np.float32),
        repetition_penalty=column("repetition_penalty", np.float32),
        key=_row_keys(words, np.array(streams, np.uint32)),
        ends=ends_BxE,
    )


@jax.jit
def _row_keys(words_Bx2: Array, streams_B: Array) -> Array:
    def row(words: Array, stream: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0, impl="threefry2x32"), words[0]), words[1])
        return jax.random.key_data(jax.random.fold_in(key, stream))

    return jax.vmap(row)(words_Bx2, streams_B)


def process(scores_BxV: Array, seen_BxV: Array, s: Settings) -> Array:
    """Scores after all processors, float32 [B, V], -inf where dropped; rows of temperature 0 have the penalty alone.

    Args:
      scores_BxV: float32 logits.
      seen_BxV: bool, tokens of the prompt and of the output so far.
      s: see `Settings`.
    """
    scores = penalise(scores_BxV, seen_BxV, s.repetition_penalty)
    warm = s.temperature > 0.0
    scores = scores / jnp.where(warm, s.temperature, 1.0)[:, None]
    top_k, top_p, min_p = jnp.where(warm, s.top_k, 0), jnp.where(warm, s.top_p, 1.0), jnp.where(warm, s.min_p, 0.0)
    scores = _when(top_k > 0, keep_top_k, scores, top_k)
    scores = _when(top_p < 1.0, keep_top_p, scores, top_p)
    return _when(min_p > 0.0, keep_min_p, scores, min_p)


def _when(on_B: Array, keep: Callable[[Array, Array], Array], scores: Array, value_B: Array) -> Array:
    """`keep` where it is on; if it is on in no row, it is not computed at all."""

    def some() -> Array:
        return jnp.where(on_B[:, None], keep(scores, value_B), scores)

    return jax.lax.cond(jnp.any(on_B), some, lambda: scores)


def penalise(scores_BxV: Array, seen_BxV: Array, penalty_B: Array) -> Array:
    """Scores of seen tokens divided by the penalty if positive, else multiplied (Keskar et al., 1909.05858)."""
    by = penalty_B[:, None]
    return jnp.where(seen_BxV, jnp.where(scores_BxV < 0.0, scores_BxV * by, scores_BxV / by), scores_BxV)


def keep_top_k(scores_BxV: Array, k_B: Array) -> Array:
    """-inf below the k-th largest score; all that tie with it stay."""
    bits = _ordered(scores_BxV)
    k = jnp.minimum(k_B, scores_BxV.shape[1])
    level = _largest(lambda t: jnp.sum(bits >= t[:, None], axis=1, dtype=jnp.int32) >= k, k)
    return jnp.where(bits >= level[:, None], scores_BxV, NEVER)


def keep_top_p(scores_BxV: Array, p_B: Array) -> Array:
    """-inf for the least likely tokens, as many as sum to no more than 1 - p; one always stays.

    Of equal scores at the limit the first go first, as in a stable ascending sort.
    """
    bits, probs = _ordered(scores_BxV), jax.nn.softmax(scores_BxV, axis=1)
    room = 1.0 - p_B

    def below(t: Array) -> Array:
        return jnp.sum(jnp.where(bits < t[:, None], probs, 0.0), axis=1)

    # The largest score whose strictly smaller ones still fit into the room: all of those go, none above it does.
    level = _largest(lambda t: below(t) <= room, p_B)
    level = jnp.minimum(level, jnp.max(bits, axis=1))
    ties = bits == level[:, None]
    # The level is itself a score if anything ties with it; otherwise the next score above it is the limit.
    nearest = jnp.min(jnp.where(bits >= level[:, None], bits, jnp.iinfo(jnp.int32).max), axis=1)
    ties = bits == nearest[:, None]
    each = jnp.max(jnp.where(ties, probs, 0.0), axis=1)
    fit = jnp.floor((room - below(nearest)) / jnp.where(each > 0.0, each, 1.0)).astype(jnp.int32)
    fit = jnp.minimum(fit, jnp.sum(ties, axis=1, dtype=jnp.int32) - 1)
    rank = _rank(ties)
    gone = (bits < nearest[:, None]) | (ties & (rank < fit[:, None]))
    return jnp.where(gone, NEVER, scores_BxV)


def keep_min_p(scores_BxV: Array, p_B: Array) -> Array:
    """-inf where a token is less than p times as likely as the likeliest."""
    probs = jax.nn.softmax(scores_BxV, axis=1)
    return jnp.where(probs < p_B[:, None] * jnp.max(probs, axis=1, keepdims=True), NEVER, scores_BxV)


def argmax(scores_BxV: Array) -> Array:
    """The first index of the largest score, int32 [B]; a plain argmax takes four times as long on CPU."""
    top = jnp.max(scores_BxV, axis=1, keepdims=True)
    index = jnp.arange(scores_BxV.shape[1], dtype=jnp.int32)[None, :]
    last = scores_BxV.shape[1] - 1
    return jnp.min(jnp.where(scores_BxV == top, index, last), axis=1)


def draw(probs_BxV: Array, u_B: Array) -> Array:
    """A token of each row by inversion of the distribution function: int32 [B].

    Args:
      probs_BxV: float32, not negative; need not sum to 1.
      u_B: float32 in [0, 1).
    """
    batch, vocabulary = probs_BxV.shape
    width = max(1, int(vocabulary**0.5))
    pieces = jnp.pad(probs_BxV, ((0, 0), (0, -vocabulary % width))).reshape(batch, -1, width)
    totals = jnp.cumsum(jnp.sum(pieces, axis=2), axis=1)
    wanted = u_B * totals[:, -1]
    piece = _first_above(totals, wanted)
    before = jnp.where(piece > 0, _at(totals, jnp.maximum(piece - 1, 0)), 0.0)
    chosen = jnp.take_along_axis(pieces, piece[:, None, None], axis=1)[:, 0]
    inside = jnp.cumsum(chosen, axis=1)
    # Rounding may leave the target just outside the piece: then the last token with any weight takes it.
    token = _first_above(inside, jnp.minimum(wanted - before, inside[:, -1] * (1 - 2**-23)))
    return piece * width + token


def sample(scores_BxV: Array, seen_BxV: Array, s: Settings, position_B: Array) -> tuple[Array, Array]:
    """The next token of every row, and its log-probability.

    A row's draw depends on its key, its position and its scores alone.

    Args:
      scores_BxV: float32 logits.
      seen_BxV: see `process`.
      s: see `Settings`.
      position_B: int32, tokens of the row so far.

    Returns:
      int32 [B], and float32 [B]: log softmax(scores / temperature) at the token, before penalty and filters
      (temperature 0 counts as 1).
    """
    warm = s.temperature > 0.0
    greedy = argmax(penalise(scores_BxV, seen_BxV, s.repetition_penalty))

    def drawn() -> Array:
        scores = process(scores_BxV, seen_BxV, s)
        probs = jnp.exp(scores - jnp.max(scores, axis=1, keepdims=True))
        return jnp.where(warm, draw(probs, uniform(s.key, position_B)), greedy)

    token = jax.lax.cond(jnp.any(warm), drawn, lambda: greedy)
    scores = scores_BxV / jnp.where(warm, s.temperature, 1.0)[:, None]
    return token, _at(scores, token) - jax.nn.logsumexp(scores, axis=1)


def uniform(key_Bx2: Array, position_B: Array, purpose: int = 0) -> Array:
    """float32 [B] in [0, 1), from the row's key and position; draws of different purpose are independent."""

    def row(key: Array, position: Array) -> Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), position)
        return jax.random.uniform(key if purpose == 0 else jax.random.fold_in(key, purpose))

    return jax.vmap(row)(key_Bx2, position_B)


def _at(x_BxV: Array, index_B: Array) -> Array:
    return jnp.take_along_axis(x_BxV, index_B[:, None], axis=1)[:, 0]


def _first_above(rising_BxV: Array, level_B: Array) -> Array:
    """The first index whose value is above the level; the last index if none is."""
    index = jnp.sum(rising_BxV <= level_B[:, None], axis=1, dtype=jnp.int32)
    return jnp.minimum(index, rising_BxV.shape[1] - 1)


def _ordered(x: Array) -> Array:
    """int32 in the order of the float32 values; both zeros are one."""
    bits = jax.lax.bitcast_convert_type(x + 0.0, jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _largest(holds: Callable[[Array], Array], like_B: Array) -> Array:
    """The largest int32 [B] for which `holds`, which is true up to some point and false from there on."""

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low | high) - ((low ^ high) >> 1)  # rounded up, without overflow
        good = holds(middle)
        return jnp.where(good, middle, low), jnp.where(good, high, middle - 1)

    limits = jnp.iinfo(jnp.int32)
    ends = (jnp.full(like_B.shape, limits.min, jnp.int32), jnp.full(like_B.shape, limits.max, jnp.int32))
    return jax.lax.fori_loop(0, 32, halve, ends)[0]


def _rank(marked_BxV: Array) -> Array:
    """How many marked entries stand before each one, int32 [B, V]."""
    batch, vocabulary = marked_BxV.shape
    width = max(1, int(vocabulary**0.5))
    pieces = jnp.pad(marked_BxV, ((0, 0), (0, -vocabulary % width))).reshape(batch, -1, width).astype(jnp.int32)
    totals = jnp.sum(pieces, axis=2)
    before = jnp.cumsum(totals, axis=1) - totals
    inside = jnp.cumsum(pieces, axis=2) - pieces
    return (before[:, :, None] + inside).reshape(batch, -1)[:, :vocabulary]
