"""Tokenizers: exact round trips, byte counts, the end of text, and what a file may switch on."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, processors, trainers

from jaxlm.data import tokenizer as tok

TEXTS = ["def f(x):\n    return x + 1\n", "the quick brown fox, the lazy dog " * 20, "naïve café 日本語 🙂\r\n\ttabs"]


@pytest.fixture(scope="module")
def trained():
    return tok.train_tokenizer(TEXTS, 400)


@pytest.fixture(scope="module")
def sentencepiece_like():
    """As Llama's: a dummy space in front, ▁ for spaces, bytes for what is unknown, <s> put before every text."""
    backend = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    specials = ["<unk>", "<s>", "</s>"]
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=specials + alphabet, show_progress=False)
    backend.train_from_iterator(TEXTS[:2], trainer)
    backend.decoder = decoders.ByteFallback()
    description = json.loads(backend.to_str())
    description["added_tokens"] = [token for token in description["added_tokens"] if token["content"] in specials]
    backend = tokenizers.Tokenizer.from_str(json.dumps(description))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tok.Tokenizer(backend, backend.to_str(), 2)


@settings(deadline=None, max_examples=60)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_round_trips_and_its_bytes_add_up(trained, text):
    ids = trained.encode(text)
    assert trained.decode(ids, skip_special_tokens=False) == text
    assert tok.token_bytes(trained)[ids].sum() == len(text.encode("utf-8"))


@settings(deadline=None, max_examples=40)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), min_size=1, max_size=40))
def test_bytes_add_up_with_byte_fallback(sentencepiece_like, text):
    ids = sentencepiece_like.backend.encode(text, add_special_tokens=False).ids
    assert tok.token_bytes(sentencepiece_like)[ids].sum() == len(text.encode("utf-8")) + 1  # the dummy space


def test_special_tokens_stand_for_no_text_and_added_words_for_theirs(trained):
    backend = tokenizers.Tokenizer.from_str(trained.json)
    backend.add_special_tokens(["<|user|>"])
    backend.add_tokens([AddedToken("ünïcode", normalized=False)])
    longer = tok.parse_tokenizer(backend.to_str())
    sizes = tok.token_bytes(longer)
    assert sizes[trained.eos_id] == 0 and sizes[backend.token_to_id("<|user|>")] == 0
    assert sizes[backend.token_to_id("ünïcode")] == len("ünïcode".encode())
    assert tok.token_bytes(longer, 1000).shape == (1000,) and not tok.token_bytes(longer, 1000)[longer.size :].any()


def test_training_is_deterministic_and_respects_the_size(trained):
    code = (
        "import json, sys; from jaxlm.data.tokenizer import train_tokenizer;"
        "print(train_tokenizer(json.loads(sys.stdin.read()), 400).sha256)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(TEXTS), capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == trained.sha256
    assert tok.train_tokenizer(TEXTS, 300).size == 300
    assert tok.train_tokenizer(["ab"], 300).size < 300  # nothing left to merge
    with pytest.raises(ValueError, match=r"model.vocab_size: 256 is too small.*257"):
        tok.train_tokenizer(TEXTS, 256)


def test_saved_file_has_the_same_hash_and_loads_in_transformers(trained, tmp_path):
    import transformers

    trained.save(tmp_path / "tokenizer.json")
    assert hashlib.sha256((tmp_path / "tokenizer.json").read_bytes()).hexdigest() == trained.sha256
    loaded = tok.load_tokenizer(tmp_path)
    assert loaded == trained and loaded.eos_id == trained.eos_id
    peer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    for text in TEXTS:
        assert peer(text)["input_ids"] == loaded.encode(text)


def test_truncation_and_padding_of_a_file_are_off(trained, tmp_path):
    backend = tokenizers.Tokenizer.from_str(trained.json)
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    backend.save(str(tmp_path / "tokenizer.json"))
    loaded = tok.load_tokenizer(tmp_path / "tokenizer.json")
    assert loaded.encode(TEXTS[1]) == trained.encode(TEXTS[1])


def test_end_of_text_is_found(sentencepiece_like, tmp_path):
    sentencepiece_like.save(tmp_path / "tokenizer.json")
    assert tok.load_tokenizer(tmp_path).eos_id == 2  # by its common name
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<s>"}}))
    assert tok.load_tokenizer(tmp_path).eos_id == 1
    assert tok.load_tokenizer(tmp_path, eos_id=7).eos_id == 7
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(ValueError, match=r"tokenizer_config.json: not a JSON object"):
        tok.load_tokenizer(tmp_path)


def test_bad_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data.tokenizer: .*nowhere: no such file"):
        tok.load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(ValueError, match=r"tokenizer.json: not a tokenizer.json"):
        tok.load_tokenizer(tmp_path)


def test_long_documents_encode_as_if_whole(trained, monkeypatch):
    monkeypatch.setattr(tok, "PIECE_CHARACTERS", 50)
    monkeypatch.setattr(tok, "BATCH_CHARACTERS", 120)
    texts = [*TEXTS, "", "x" * 300, "a  b   c \n" * 40]
    for ids, text in zip(tok.encode_documents(trained, texts), texts, strict=True):
        assert ids.tolist() == [*trained.encode(text), trained.eos_id]


def test_documents_keep_what_the_file_adds(sentencepiece_like):
    (ids,) = tok.encode_documents(sentencepiece_like, ["the fox"])
    assert ids[0] == 1 and ids[-1] == 2 and ids[1:-1].tolist() == sentencepiece_like.encode("the fox")[1:]
    assert tok.added_by_template(sentencepiece_like) == ([1], [])
    assert ids.dtype == np.uint32
