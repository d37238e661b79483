"""Scoring in buckets: programs, order, padding, windows; questions and texts that cannot be read."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lm_eval import utils as lm_eval_utils

from jaxlm.data.tokenizer import train_tokenizer
from jaxlm.evals import choice, perplexity, scoring
from jaxlm.evals.scoring import Request, rolling_windows, score
from jaxlm.evals.subject import Subject
from jaxlm.nn import transformer
from jaxlm.nn.compute import Compute
from jaxlm.nn.config import ModelConfig, RopeConfig

PLAIN = Compute()
TOKENIZER = train_tokenizer(["the cat sat on the mat, the dog sat on the log"], 270)


def make_subject(batch_size: int = 4, compute: Compute = PLAIN, **changes) -> Subject:
    sizes = {"d_model": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "d_ff": 24, "vocab_size": 270}
    cfg = ModelConfig(**{**sizes, "max_length": 40, "logit_softcap": 4.0, **changes})
    variables = transformer.init(cfg, jax.random.key(0))
    variables = jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, variables)
    return Subject(cfg, variables, TOKENIZER, pathlib.Path("model"), compute, batch_size, 256, 256)


def make_requests(count: int, seed: int = 0, longest: int = 50) -> list[Request]:
    generator = np.random.default_rng(seed)

    def draw(low, high):
        return generator.integers(0, 270, generator.integers(low, high)).tolist()

    return [Request(draw(1, longest), draw(1, 9)) for _ in range(count)]


logits_of = jax.jit(transformer.logits, static_argnums=0)


def by_logits(subject: Subject, request: Request, length: int = 40) -> tuple[float, bool]:
    """A score from the logits of one row, followed by anything up to a length: attention is causal."""
    ids = [*request.context, *request.continuation][-(subject.cfg.max_length + 1) :][:-1]
    row = jnp.array([ids + [7] * (length - len(ids))])
    logits = np.asarray(logits_of(subject.cfg, subject.variables, row)[0], np.float64)
    rows = logits[len(ids) - len(request.continuation) : len(ids)]
    targets = np.array(request.continuation)
    log_probs = rows - np.log(np.sum(np.exp(rows), axis=-1, keepdims=True))
    return float(log_probs[np.arange(len(targets)), targets].sum()), bool(np.all(rows.argmax(-1) == targets))


def test_scores_are_those_of_the_logits():
    """Contexts that do not fit are cut from the left; results come in the order asked for."""
    subject = make_subject()
    requests = make_requests(9)
    row = jnp.array([[5, 6, 7] + [0] * 37])
    likeliest = int(jnp.argmax(logits_of(subject.cfg, subject.variables, row)[0, 2]))
    requests.append(Request([5, 6, 7], [likeliest]))
    for found, request in zip(score(subject, requests), requests, strict=True):
        expected, greedy = by_logits(subject, request)
        assert found.log_likelihood == pytest.approx(expected, rel=1e-5)
        assert found.is_greedy == greedy
    assert score(subject, requests)[-1].is_greedy


def test_one_program_for_each_padded_length():
    subject = make_subject(compute=Compute(remat="dots"))
    before = scoring._score._cache_size()
    for seed in range(4):
        score(subject, make_requests(30 + seed, seed))
    assert scoring._score._cache_size() - before == len({16, 32, 64})


@pytest.mark.parametrize("batch_size", [1, 3])
def test_scores_do_not_depend_on_the_batch(batch_size):
    requests = make_requests(11, longest=30)
    expected = score(make_subject(), requests)
    found = score(make_subject(batch_size), requests)
    np.testing.assert_allclose([x[0] for x in found], [x[0] for x in expected], rtol=1e-6)
    backwards = score(make_subject(), requests[::-1])[::-1]
    np.testing.assert_allclose([x[0] for x in backwards], [x[0] for x in expected], rtol=1e-6)


def test_rows_of_short_and_long_rope_do_not_share_a_batch():
    """One batch has one rotary table; with a long row beside it a short one would be scored by the wrong one."""
    factors = {"short_factor": (1.0,) * 4, "long_factor": (9.0,) * 4}
    subject = make_subject(rope=RopeConfig(kind="longrope", original_length=10, **factors))
    requests = [Request(list(range(n)), [5, 6]) for n in (3, 14, 8)]
    for found, request in zip(score(subject, requests), requests, strict=True):
        assert found.log_likelihood == pytest.approx(by_logits(subject, request, 0)[0], rel=1e-5)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([], [1]), r"requests\[1\]: no token in the context"),
        (Request([1], []), r"requests\[1\]: no token in the continuation"),
        (Request([1], [1] * 41), r"requests\[1\]: a continuation of 41 tokens does not fit the model's window of 40"),
    ],
)
def test_requests_that_cannot_be_scored_are_refused(request_, message):
    with pytest.raises(ValueError, match=message):
        score(make_subject(), [Request([1], [2]), request_])


def test_rolling_windows_are_lm_evals():
    for length in range(30):
        for window in (1, 2, 4, 7, 16):
            ids = list(range(length))
            theirs = lm_eval_utils.get_rolling_token_windows(ids, 99, window, context_len=1)
            expected = [Request(*map(list, lm_eval_utils.make_disjoint_window(pair))) for pair in theirs]
            assert rolling_windows(ids, 99, window) == expected


def test_progress_is_reported():
    seen = []
    subject = dataclasses.replace(make_subject(), report=lambda done, of: seen.append((done, of)))
    score(subject, make_requests(6, longest=9))
    assert seen == [(4, 6), (6, 6)]


def test_perplexity_counts_every_token_and_byte_once():
    subject = make_subject()
    texts = ["the cat sat on the mat", "dog " * 60]
    found = perplexity.evaluate(subject, [perplexity.Document("x:1", t) for t in texts], "x")
    windows = [w for t in texts for w in rolling_windows(TOKENIZER.encode(t), 256, 40)]
    nats = -sum(s.log_likelihood for s in score(subject, windows))
    tokens = sum(len(TOKENIZER.encode(t)) for t in texts)
    assert found.details["n-tokens"] == {"x": tokens}
    metrics = found.results["x"]
    assert metrics["loss,none"] == pytest.approx(nats / tokens, rel=1e-5)
    assert metrics["bits_per_byte,none"] == pytest.approx(nats / np.log(2) / len("".join(texts).encode()), rel=1e-5)


def test_without_a_prefix_token_a_text_starts_from_its_own_first():
    subject = dataclasses.replace(make_subject(), prefix_id=None)
    first, *rest = TOKENIZER.encode("the cat sat")
    found = perplexity.evaluate(subject, [perplexity.Document("x:1", "the cat sat")], "x")
    (expected,) = score(subject, [Request([first], rest)])
    assert found.results["x"]["loss,none"] == pytest.approx(-expected.log_likelihood / len(rest), rel=1e-5)
    skipped = len(TOKENIZER.decode([first]))
    bits = -expected.log_likelihood / np.log(2) / (len("the cat sat") - skipped)
    assert found.results["x"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-5)
    with pytest.raises(ValueError, match="no token begins or ends a text"):
        subject.encode_pair("", "x")


TEXTS = {
    "notes.txt": ("a cat\n", ["a cat\n"]),
    "notes": ("a cat\n", ["a cat\n"]),
    "rows.jsonl": ('{"text": "a cat"}\n\n{"text": ""}\n{"text": "a dog"}\n', ["a cat", "a dog"]),
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts_are_read(tmp_path, name):
    contents, expected = TEXTS[name]
    (tmp_path / name).write_text(contents)
    assert [document.text for document in perplexity.read_texts(tmp_path / name)] == expected


def test_texts_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "bytes.bin").write_bytes(b"x\n\xff")
    (tmp_path / "rows.jsonl").write_text('{"text": "x"}\n{"body": "x"}\n')
    with pytest.raises(FileNotFoundError, match="no such file"):
        perplexity.read_texts(tmp_path / "missing.txt")
    for name, message in (
        ("empty.txt", "no text in it"),
        ("bytes.bin", "bin:2: byte 0xff"),
        ("rows.jsonl", "jsonl:2: no"),
    ):
        with pytest.raises(ValueError, match=message):
            perplexity.read_texts(tmp_path / name)


QUESTION = {"id": "1", "question": "Q?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"}
WRONG = {
    "no question": {"question": None},
    "no texts": {"choices": {"label": ["A"]}},
    "choices": {"choices": "a, b"},
    "labels": {"choices": {"text": ["a", "b"], "label": ["A"]}},
    "key": {"answerKey": "C"},
    "no key": {"answerKey": None},
}


@pytest.mark.parametrize("case", WRONG)
def test_questions_that_cannot_be_asked_are_named(tmp_path, case):
    rows = [QUESTION, QUESTION | WRONG[case]]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=r"q\.jsonl:2: "):
        choice.read_questions(tmp_path / "q.jsonl")


def test_labels_may_be_numbers(tmp_path):
    row = QUESTION | {"choices": {"text": ["a", "b"], "label": [1, 2]}, "answerKey": "2"}
    (tmp_path / "q.jsonl").write_text(json.dumps(row))
    (question,) = choice.read_questions(tmp_path / "q.jsonl")
    assert (question.gold, question.prompt) == (1, "Question: Q?\nAnswer:")
