"""The one door: what a `data` section becomes, how it is identified, and what is refused."""

import dataclasses
import json

import numpy as np
import pytest

from jaxlm.data import supply
from jaxlm.data.config import DataConfig
from jaxlm.data.loader import Loader
from jaxlm.data.prepare import prepare
from jaxlm.data.supply import open_data
from jaxlm.data.tokenizer import train_tokenizer

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "wizards", "box"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXLM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def text(tmp_path):
    """A text file of 100 kB."""
    rng = np.random.default_rng(0)
    words = rng.choice(WORDS, 20_000)
    lines = [" ".join(words[i : i + 10]) for i in range(0, len(words), 10)]
    path = tmp_path / "some.txt"
    path.write_text("\n".join(lines))
    return path


def rows_file(path, count, **columns):
    with path.open("w") as stream:
        for number in range(count):
            row = {"prompt": f"question {number}", "completion": f" answer {number}"} | columns
            stream.write(json.dumps(row) + "\n")
    return path


def changed(first, second):
    return {
        key
        for key in first.identity.keys() | second.identity.keys()
        if first.identity.get(key) != second.identity.get(key)
    }


def test_any_text_file_fills_batches(text):
    data = open_data(DataConfig(path=str(text)))
    batch = Loader(data.train, 16).batch(0)
    assert batch["tokens"].shape == (16, 256) and batch["mask"].all()
    assert len(data.validation) >= 1 and data.train.tokens == len(data.train) * 256
    assert data.token_bytes.shape == (data.tokenizer.size,)
    held_out = data.validation.rows
    validation = data.tokenizer.decode(np.concatenate([held_out[i]["tokens"] for i in range(len(held_out))]))
    assert validation.strip()[:200] in text.read_text()


def test_warm_equals_cold(text):
    cold = open_data(DataConfig(path=str(text)), vocab_size=300)
    warm = open_data(DataConfig(path=str(text)), vocab_size=300)
    assert cold.tokenizer == warm.tokenizer and cold.train.fingerprint == warm.train.fingerprint
    assert all((cold.train.rows[0][name] == warm.train.rows[0][name]).all() for name in cold.train.rows[0])


def test_the_fingerprint_follows_everything_that_matters(text, tmp_path):
    config = DataConfig(path=str(text), sequence_length=64)
    first = open_data(config, vocab_size=300).train
    assert changed(first, open_data(dataclasses.replace(config, sequence_length=65), vocab_size=300).train) == {
        "data.sequence_length"
    }
    assert changed(first, open_data(config, vocab_size=301).train) == {"data.tokenizer"}
    tokenizer = train_tokenizer([text.read_text()], 300)
    assert "data.tokenizer" in changed(first, open_data(config, tokenizer=tokenizer).train)
    other = rows_file(tmp_path / "validation.jsonl", 3, text="the quick brown fox")
    with_validation = dataclasses.replace(config, validation=str(other))
    assert changed(
        open_data(config, tokenizer=tokenizer).train, open_data(with_validation, tokenizer=tokenizer).train
    ) == {"data.validation"}
    raw = text.read_bytes()
    text.write_bytes(raw[:5000] + b"#" + raw[5001:])
    assert changed(open_data(config, tokenizer=tokenizer).train, first) >= {"data.path"}
    rows = rows_file(tmp_path / "rows.jsonl", 5)
    plain = DataConfig(path=str(rows), sequence_length=64)
    packed = dataclasses.replace(plain, packing=True)
    assert changed(*(open_data(c, kind="sft", tokenizer=tokenizer).train for c in (plain, packed))) == {"data.packing"}


def test_validation_text_is_used_whole_and_to_the_last_token(text, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("the lazy dog " * 100)
    data = open_data(DataConfig(path=str(text), validation=str(other), sequence_length=32), vocab_size=300)
    ids = [*data.tokenizer.encode(other.read_text()), data.tokenizer.eos_id]
    rows = [data.validation.rows[i] for i in range(len(data.validation))]
    targets = np.concatenate([row["targets"][row["mask"] > 0] for row in rows])
    assert targets.tolist() == ids[1:]
    assert len(open_data(DataConfig(path=str(text), sequence_length=32), vocab_size=300).train) < len(data.train)


def test_the_embedded_corpus_trains_and_is_held_out_by_module(tmp_path, monkeypatch):
    documents = [
        d for d in supply.text_parts.__globals__["standard_library"]() if "/json/" in d.where or "/re/" in d.where
    ]
    monkeypatch.setitem(supply.text_parts.__globals__, "standard_library", lambda: documents)
    data = open_data(DataConfig(validation_rows=7, sequence_length=32), vocab_size=400)
    assert len(data.train) > 100 and len(data.validation) == 7
    assert "embedded corpus" in data.train.name
    with pytest.raises(ValueError, match=r"data.path: the embedded corpus: .* fewer than one batch"):
        Loader(data.train, 10**6)


def test_docstring_tasks_are_what_sft_trains_on_without_a_path(monkeypatch):
    tasks = {
        split: [{"prompt": f"{split} {i}", "completion": "does it", "module": "m", "function": "f"} for i in range(9)]
        for split in ("train", "validation")
    }
    monkeypatch.setattr(supply, "docstring_tasks", tasks.__getitem__)
    data = open_data(DataConfig(sequence_length=64), kind="sft", vocab_size=300)
    for part, name in ((data.train, "train"), (data.validation, "validation")):
        texts = {data.tokenizer.decode(part.rows[i]["tokens"]).rstrip() for i in range(len(part))}
        assert len(part) == 9 and all(text.startswith(f"{name} ") for text in texts)


def test_rows_are_held_out_or_the_user_is_told(tmp_path):
    few = open_data(
        DataConfig(path=str(rows_file(tmp_path / "few.jsonl", 8)), sequence_length=64), kind="sft", vocab_size=300
    )
    assert len(few.train) == len(few.validation) == 8  # a batch of all rows is possible
    assert any("nothing is held out of 8 rows" in note for note in few.notes)
    path = rows_file(tmp_path / "many.jsonl", 200)
    many = open_data(DataConfig(path=str(path), sequence_length=64), kind="sft", vocab_size=900)
    assert len(many.train) + len(many.validation) == 200 and len(many.validation) == 10
    assert many.notes == (f"data: the text gave {many.tokenizer.size} tokens, fewer than model.vocab_size 900",)
    own = DataConfig(path=str(path), validation=str(tmp_path / "few.jsonl"), sequence_length=64, packing=True)
    packed = open_data(own, kind="distill", vocab_size=300)
    assert len(packed.train) < 100 and packed.validation.tokens == few.validation.tokens


def test_truncation_is_told(tmp_path):
    path = rows_file(tmp_path / "rows.jsonl", 5, completion="x y z " * 50)
    data = open_data(DataConfig(path=str(path), sequence_length=16), kind="sft", vocab_size=300)
    assert any("5 of 5 examples were cut to 17 tokens; 0 of them" in note for note in data.notes)


def test_plain_text_is_running_text_for_every_kind(text):
    config = DataConfig(path=str(text), sequence_length=32)
    assert (
        open_data(config, kind="distill", vocab_size=300).train.tokens
        == len(open_data(config, vocab_size=300).train) * 32
    )


def test_token_bins(text, tmp_path):
    bins = prepare(str(text), tmp_path / "bins", vocab_size=300)
    config = DataConfig(path=str(tmp_path / "bins"), sequence_length=32)
    data = open_data(config)
    same = open_data(DataConfig(path=str(text), sequence_length=32), vocab_size=300)
    assert data.tokenizer == same.tokenizer and len(data.train) == len(same.train)
    assert (data.train.rows[5]["tokens"] == same.train.rows[5]["tokens"]).all()
    assert len(data.validation) == len(same.validation)
    other = train_tokenizer([text.read_text()], 280)
    with pytest.raises(ValueError, match=r"data.tokenizer: not the one that made the token bins"):
        open_data(config, tokenizer=other)
    with pytest.raises(ValueError, match=r"tokens.bin: token \d+ \(in document 1, from 1\) is id 2\d\d, .* of 270"):
        open_data(config, vocab_size=270)
    for name in ("tokens.bin", "documents.bin", "manifest.json"):
        (bins.folder / "validation" / name).unlink()
    alone = open_data(config)  # nothing held out beside it: the end of the tokens is
    assert alone.train.tokens + alone.validation.tokens == pytest.approx(len(bins.tokens), rel=0.01)
    assert 0.03 < alone.validation.rows.input_tokens / len(bins.tokens) < 0.08
    with_text = open_data(dataclasses.replace(config, validation=str(text)))
    assert with_text.validation.tokens > len(bins.tokens)
    with_bins = open_data(dataclasses.replace(config, validation=str(tmp_path / "bins")))
    assert with_bins.validation.tokens == len(bins.tokens) - 1


def test_a_tokenizer_file(text, tmp_path):
    tokenizer = train_tokenizer([text.read_text()], 280)
    (tmp_path / "tok").mkdir()
    tokenizer.save(tmp_path / "tok" / "tokenizer.json")
    config = DataConfig(path=str(text), tokenizer=str(tmp_path / "tok"), sequence_length=32)
    other = train_tokenizer(["x"], 260)
    assert open_data(config, tokenizer=other).tokenizer == tokenizer
    assert open_data(dataclasses.replace(config, tokenizer=None), tokenizer=other).tokenizer == other
    with pytest.raises(
        ValueError, match=r"some.txt: token \d+ \(in document 1, from 1\) is id 2\d\d, outside the vocabulary of 270"
    ):
        open_data(config, vocab_size=270)
    rows = rows_file(tmp_path / "rows.jsonl", 5)
    with pytest.raises(ValueError, match=r"rows.jsonl: token .* outside the vocabulary of 70"):
        open_data(dataclasses.replace(config, path=str(rows)), kind="sft", vocab_size=70)


def test_what_is_refused(tmp_path, text):
    empty, blank, short = tmp_path / "empty.txt", tmp_path / "blank.jsonl", tmp_path / "short.txt"
    empty.write_text("")
    blank.write_text("\n\n")
    short.write_text("a few words only")
    cases = [
        (DataConfig(path=str(empty)), "next_token", r"data.path: .*empty.txt: no text"),
        (DataConfig(path=str(blank)), "sft", r"data.path: .*blank.jsonl: no rows"),
        (DataConfig(path=str(short)), "next_token", r"data.path: .*short.txt: \d+ tokens do not fill one row of 256"),
        (DataConfig(path=str(text), validation=str(empty)), "next_token", r"data.validation: .*empty.txt: no text"),
        (DataConfig(path=str(text), sequence_length=0), "next_token", r"data.sequence_length: 0 is not positive"),
        (DataConfig(path=""), "next_token", r"data.path: empty"),
        (DataConfig(path=str(text)), "telepathy", r"objective.kind: no rows for telepathy"),
    ]
    rows = rows_file(tmp_path / "rows.jsonl", 5)
    cases.append((DataConfig(path=str(rows), validation=str(blank)), "sft", r"data.validation: .*blank.jsonl: no rows"))
    for config, kind, message in cases:
        with pytest.raises(ValueError, match=message):
            open_data(config, kind=kind, vocab_size=300)
    with pytest.raises(FileNotFoundError, match=r"data.path: .*gone.txt: no such file"):
        open_data(DataConfig(path=str(tmp_path / "gone.txt")))
    with pytest.raises(FileNotFoundError, match=r"data.validation: .*gone.txt: no such file"):
        open_data(DataConfig(path=str(text), validation=str(tmp_path / "gone.txt")))
    with pytest.raises(FileNotFoundError, match=r"data.tokenizer: .*gone.json: no such file"):
        open_data(DataConfig(path=str(text), tokenizer=str(tmp_path / "gone.json")))


def test_configuration_stays_small():
    assert len(dataclasses.fields(DataConfig)) <= 10
