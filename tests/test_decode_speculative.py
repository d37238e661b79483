"""Speculative decoding: greedy ids are the model's own whoever proposes, and draws keep its distribution."""

import dataclasses

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm.decode import loop, sampling
from jaxlm.decode.sampling import Choice
from jaxlm.decode.speculative import Draft, Lookup, speculate
from jaxlm.nn.config import ModelConfig

CFG = ModelConfig(d_model=16, n_layers=2, n_heads=2, vocab_size=13, d_ff=16)
SMALL = dataclasses.replace(CFG, n_layers=1)
PROMPT = [3, 4, 5, 3, 4]


def variables(cfg: ModelConfig, seed: int):
    tree = jax.tree.map(lambda x: 3.0 * x, jaxlm.init(cfg, jax.random.key(seed)))
    return loop.prepare(cfg, tree)


MODEL, OTHER = variables(CFG, 0), variables(SMALL, 1)
DRAFTS = {"itself": Draft(CFG, MODEL, 3), "another": Draft(SMALL, OTHER, 3), "repetitions": Lookup(3)}


@pytest.mark.parametrize("name", DRAFTS)
@pytest.mark.parametrize("choice", [Choice(), Choice(repetition_penalty=1.3)], ids=["plain", "penalty"])
def test_greedy_is_greedy(name, choice):
    for prompt in (PROMPT, [7]):
        want = jaxlm.generate(CFG, MODEL, [prompt], max_new_tokens=30, repetition_penalty=choice.repetition_penalty)[0]
        found = speculate(CFG, MODEL, prompt, 30, choice, DRAFTS[name])
        assert found.ids == want
        assert found.accepted <= found.proposed
        if name == "itself":
            assert found.acceptance == 1.0
            assert found.passes <= 8


def test_it_ends_at_the_end_token():
    plain = jaxlm.generate(CFG, MODEL, [PROMPT], max_new_tokens=30)[0]
    cfg = dataclasses.replace(CFG, eos_token_id=plain[6])
    found = speculate(cfg, MODEL, PROMPT, 30, draft=DRAFTS["itself"])
    assert found.ids == plain[: plain.index(plain[6]) + 1]


@pytest.mark.parametrize("name", ["another", "repetitions"])
def test_draws_keep_the_distribution(name):
    """The second new token, given the first, against the exact mixture over the first."""
    draws, choice = 300, Choice(temperature=2.0, top_p=0.95)
    counts = np.zeros((13, 13))
    for seed in range(draws):
        ids = speculate(CFG, MODEL, PROMPT, 2, choice._replace(seed=seed), DRAFTS[name]).ids
        counts[ids[0], ids[1]] += 1

    def distribution(text: list[int]) -> np.ndarray:
        scores = jaxlm.logits(CFG, {"params": STACKED["params"]}, np.array([text + [0] * (8 - len(text))]))
        s = sampling.settings([choice], [0], [[]])
        scores = sampling.process(scores[:, len(text) - 1], np.zeros((1, 13), bool), s)
        return np.asarray(jax.nn.softmax(scores, axis=1))[0]

    first = distribution(PROMPT)
    joint = np.stack([first[t] * distribution([*PROMPT, t]) for t in range(13)])
    assert counts[joint == 0].sum() == 0
    expected = draws * joint
    rare = expected < 5
    x = ((counts - expected)[~rare] ** 2 / expected[~rare]).sum()
    x += (counts[rare].sum() - expected[rare].sum()) ** 2 / max(expected[rare].sum(), 1e-9)
    df = int((~rare).sum())
    assert x < df + 4 * (2 * df) ** 0.5 + 8, (x, df)


STACKED = jax.tree.map(lambda x: 3.0 * x, jaxlm.init(CFG, jax.random.key(0)))


def test_a_draft_of_another_vocabulary_is_refused():
    cfg = dataclasses.replace(SMALL, vocab_size=14)
    with pytest.raises(ValueError, match="draft: a vocabulary of 14"):
        speculate(CFG, MODEL, PROMPT, 4, draft=Draft(cfg, OTHER))
    with pytest.raises(ValueError, match="ahead"):
        speculate(CFG, MODEL, PROMPT, 4, draft=Lookup(0))
