"""Prompts -> arrays of few shapes: checks, buckets, padding on the left."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxlm.nn.config import ModelConfig

SMALLEST_PROMPT, SMALLEST_CACHE = 16, 64


class Prompts(NamedTuple):
    """Prompts of a call, padded to a bucket.

    Attributes:
      tokens: int32 [B, P + 1], padded on the left; P, what a prefill reads, is a bucket.
      segments: int32 [B, P + 1]; 0 is padding; rows beyond `count` are padding alone.
      lengths: int32 [B].
      count: rows that are prompts.
    """

    tokens: np.ndarray
    segments: np.ndarray
    lengths: np.ndarray
    count: int  # type: ignore[assignment]


def bucket(number: int, smallest: int = 1) -> int:
    """The next power of two, at least `smallest`."""
    return max(smallest, 1 << max(0, number - 1).bit_length())


def cache_bucket(number: int) -> int:
    """A length of the cache: powers of two, and from 512 on the middle between two as well."""
    size = bucket(number, SMALLEST_CACHE)
    return size * 3 // 4 if size > 512 and number <= size * 3 // 4 else size


def pad(prompts: Sequence[Sequence[int]], longest: int = 0) -> Prompts:
    """Lists of ids -> `Prompts`, as wide as for a prompt of `longest` tokens."""
    rows, width = bucket(len(prompts)), 1 + bucket(max(longest, *map(len, prompts), 1) - 1, SMALLEST_PROMPT)
    tokens, segments = np.zeros((rows, width), np.int32), np.zeros((rows, width), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = prompt
        segments[row, width - len(prompt) :] = 1
    lengths = np.array([len(p) for p in prompts] + [0] * (rows - len(prompts)), np.int32)
    return Prompts(tokens, segments, lengths, len(prompts))


def check(cfg: ModelConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
    """The prompts as lists of ints.

    Raises:
      ValueError: an empty prompt, an id outside the vocabulary (its position is named), more tokens than the model has
        positions for, or a `max_new_tokens` that cannot be.
    """
    if isinstance(max_new_tokens, bool) or int(max_new_tokens) != max_new_tokens or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens: {max_new_tokens!r} cannot be; give a whole number from 0 up")
    checked = []
    for row, prompt in enumerate(prompts):
        if isinstance(prompt, str | int | np.integer):
            raise ValueError(f"prompts[{row}]: {prompt!r} is no list of token ids; encode the text first")
        ids = [int(token) for token in prompt]
        if not ids:
            raise ValueError(f"prompts[{row}]: empty; give at least one token, e.g. the beginning-of-text token")
        wrong = next((i for i, token in enumerate(ids) if not 0 <= token < cfg.V), None)
        if wrong is not None:
            raise ValueError(
                f"prompts[{row}][{wrong}]: token id {ids[wrong]} is outside the vocabulary of {cfg.V}; "
                "encode with the model's own tokenizer"
            )
        if cfg.positions == "learned" and len(ids) + max_new_tokens > cfg.max_length:
            raise ValueError(
                f"prompts[{row}]: {len(ids)} tokens and {max_new_tokens} new ones are more than the model's "
                f"{cfg.max_length} positions; shorten the prompt or lower max_new_tokens"
            )
        checked.append(ids)
    return checked
