"""What a trained model should beat on the same tokens: a unigram, an interpolated bigram, and zlib."""

import zlib
from typing import NamedTuple

import numpy as np

from jaxlm.data.dataset import Dataset
from jaxlm.data.tokenizer import Tokenizer, token_bytes

TRAIN_TOKENS = 4_000_000
EM_STEPS = 30
MOST = 0.999
"""Largest share of the bigram: a pair never seen must keep some probability."""


class Baselines(NamedTuple):
    """Scores on the labels of the validation rows.

    Attributes:
      unigram, bigram: nats per token.
      unigram_bits_per_byte, bigram_bits_per_byte: bits per byte of the text.
      zlib_bits_per_byte: zlib at level 9 over the text of the labels.
      weight: share of the bigram in the interpolation.
      train_tokens: labels of the training rows that were counted.
    """

    unigram: float
    bigram: float
    unigram_bits_per_byte: float
    bigram_bits_per_byte: float
    zlib_bits_per_byte: float
    weight: float
    train_tokens: int


def baselines(train: Dataset, validation: Dataset, tokenizer: Tokenizer) -> Baselines:
    """Count on the training rows, score the labels of the validation rows.

    `p(y | x) = w c(x, y) / c(x) + (1 - w) (c(y) + 1) / (n + V)`; w maximises the likelihood of the last tenth of the
    training labels under counts of the rest (by EM, Jelinek and Mercer 1980), and is 0 after an x never seen.

    Args:
      train: counted, evenly spaced rows of it where it is large (4 million tokens).
      validation: scored whole.
      tokenizer: that of both.
    """
    length = max(train.rows[0]["tokens"].shape[0], 1) if len(train) else 1
    context, target = _labels(train.spread(max(TRAIN_TOKENS // length, 1)))
    context_v, target_v = _labels(validation)
    size = 1 + int(max(part.max(initial=0) for part in (context, target, context_v, target_v)))
    size = max(size, tokenizer.size)
    cut = len(target) - len(target) // 10
    weight = _fit(_probabilities((context[:cut], target[:cut]), (context[cut:], target[cut:]), size))
    unigram, bigram, seen = _probabilities((context, target), (context_v, target_v), size)
    mixture = np.where(seen, weight * bigram + (1 - weight) * unigram, unigram)
    sizes = token_bytes(tokenizer, size)[target_v]
    count, total = max(len(target_v), 1), max(int(sizes.sum()), 1)
    nats = {"unigram": -float(np.log(unigram).sum()), "bigram": -float(np.log(mixture).sum())}
    compressed = len(zlib.compress(tokenizer.decode(target_v).encode("utf-8"), 9))
    return Baselines(
        unigram=nats["unigram"] / count,
        bigram=nats["bigram"] / count,
        unigram_bits_per_byte=nats["unigram"] / total / float(np.log(2)),
        bigram_bits_per_byte=nats["bigram"] / total / float(np.log(2)),
        zlib_bits_per_byte=8 * compressed / total,
        weight=weight,
        train_tokens=len(target),
    )


def _labels(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """int64 contexts and targets of all labels."""
    contexts, targets = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
    for index in range(len(dataset)):
        row = dataset.rows[index]
        label = row["mask"] > 0
        contexts.append(row["tokens"][label])
        targets.append(row["targets"][label])
    return np.concatenate(contexts).astype(np.int64), np.concatenate(targets).astype(np.int64)


Pairs = tuple[np.ndarray, np.ndarray]


def _probabilities(counted: Pairs, scored: Pairs, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unigram and bigram probability of each scored target, and whether its context was counted."""
    unigrams = np.bincount(counted[1], minlength=size)
    contexts = np.bincount(counted[0], minlength=size)
    codes, counts = np.unique(counted[0] * size + counted[1], return_counts=True)
    wanted = scored[0] * size + scored[1]
    at = np.searchsorted(codes, wanted)
    found = at < len(codes)
    found[found] = codes[at[found]] == wanted[found]
    pairs = np.zeros(len(wanted))
    pairs[found] = counts[at[found]]
    seen = contexts[scored[0]] > 0
    unigram = (unigrams[scored[1]] + 1) / (len(counted[1]) + size)
    return unigram, pairs / np.maximum(contexts[scored[0]], 1), seen


def _fit(probabilities: tuple[np.ndarray, np.ndarray, np.ndarray]) -> float:
    """The weight of the bigram that maximises the likelihood, by EM from one half."""
    unigram, bigram, seen = (part[probabilities[2]] for part in probabilities)
    weight = 0.5
    for _ in range(EM_STEPS if seen.size else 0):
        share = weight * bigram
        weight = min(float(np.mean(share / (share + (1 - weight) * unigram))), MOST)
    return weight
