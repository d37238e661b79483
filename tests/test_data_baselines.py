"""Baselines: right on chains whose entropy is known, ordered as they must be, and blind to what is no label."""

import numpy as np
import pytest

from jaxlm.data.baselines import baselines
from jaxlm.data.dataset import Dataset
from jaxlm.data.packing import Examples, rows_of
from jaxlm.data.tokenizer import token_bytes, train_tokenizer

TOKENIZER = train_tokenizer(["abcabc"], 260)
LETTERS = [TOKENIZER.backend.token_to_id(letter) for letter in "abcd"]


def dataset(tokens, labels=None, length=128):
    tokens = np.array(tokens, np.int32)
    labels = np.ones(len(tokens), bool) if labels is None else labels
    ends = np.append(np.arange(0, len(tokens), length + 1), len(tokens))
    return Dataset(rows_of(Examples(tokens, labels, ends.astype(np.int64)), length, False), {}, "x")


def chain(count, seed, stay=0.9):
    """A Markov chain over four letters that stays with probability 0.9."""
    rng = np.random.default_rng(seed)
    steps = np.where(rng.random(count) < stay, 0, rng.integers(1, 4, count))
    return np.array(LETTERS)[np.cumsum(steps) % 4]


def test_the_entropies_of_a_chain_are_found():
    found = baselines(dataset(chain(60_000, 0)), dataset(chain(20_000, 1)), TOKENIZER)
    entropy = -0.9 * np.log(0.9) - 0.1 * np.log(0.1 / 3)
    assert found.unigram == pytest.approx(np.log(4), rel=0.02)
    assert found.bigram == pytest.approx(entropy, rel=0.02)
    assert found.weight > 0.95
    assert found.bigram_bits_per_byte == pytest.approx(found.bigram / np.log(2))  # one byte a token
    assert found.unigram_bits_per_byte == pytest.approx(found.unigram / np.log(2))
    assert found.bigram_bits_per_byte < found.zlib_bits_per_byte < 2.5


def test_independent_tokens_need_no_bigram():
    rng = np.random.default_rng(0)
    train, held_out = (np.array(LETTERS)[rng.integers(0, 4, count)] for count in (60_000, 20_000))
    found = baselines(dataset(train), dataset(held_out), TOKENIZER)
    assert found.bigram == pytest.approx(found.unigram, abs=0.01)


def test_tokens_and_contexts_never_seen_are_finite():
    train = dataset(np.full(300, LETTERS[0]))
    found = baselines(train, dataset(np.array([LETTERS[1], LETTERS[2]] * 50)), TOKENIZER)
    assert np.isfinite(found).all() and found.bigram == pytest.approx(found.unigram)


def test_only_labels_count():
    tokens = chain(10_000, 3)
    labels = np.arange(len(tokens)) % 2 == 0
    noise = np.where(labels, tokens, LETTERS[3])
    kept = baselines(dataset(tokens), dataset(tokens, labels), TOKENIZER)
    changed = baselines(dataset(tokens), dataset(noise, labels), TOKENIZER)
    assert kept.unigram == pytest.approx(changed.unigram) and kept.train_tokens < len(tokens)


def test_bits_per_byte_is_nats_over_bytes():
    tokenizer = train_tokenizer(["hello world, hello words " * 50], 290)
    ids = tokenizer.encode("hello world, hello words " * 30)
    found = baselines(dataset(ids), dataset(ids), tokenizer)
    row = dataset(ids)
    targets = np.concatenate([row.rows[i]["targets"][row.rows[i]["mask"] > 0] for i in range(len(row))])
    per_token = token_bytes(tokenizer)[targets].mean()
    assert found.unigram_bits_per_byte == pytest.approx(found.unigram / np.log(2) / per_token)
