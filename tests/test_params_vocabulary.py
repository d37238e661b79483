"""More tokens for a model: rows that begin as the mean, and a run that learns them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import transformers

import jaxlm
from jaxlm import config as configs
from jaxlm.data.tokenizer import train_tokenizer
from jaxlm.nn.config import ModelConfig
from jaxlm.params.vocabulary import extended
from jaxlm.training.loop import train

NEW = "<|call|>"


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_are_the_mean_and_old_logits_stay(tied):
    cfg = ModelConfig(d_model=16, n_layers=1, n_heads=2, vocab_size=20, tie_embeddings=tied)
    params = jaxlm.init(cfg, jax.random.key(0))["params"]
    longer = extended(params, 23)
    tokens = jnp.array([[1, 5, 19, 3]])
    before = jaxlm.logits(cfg, {"params": params}, tokens)
    after = jaxlm.logits(ModelConfig(**{**cfg.__dict__, "vocab_size": 23}), {"params": longer}, tokens)
    np.testing.assert_array_equal(after[..., :20], before)
    np.testing.assert_allclose(after[..., 20:], np.broadcast_to(before.mean(-1, keepdims=True), (1, 4, 3)), atol=1e-5)
    for row in longer["embed"]["kernel"][20:]:
        np.testing.assert_allclose(row, params["embed"]["kernel"].mean(0), atol=1e-6)
    assert extended(params, 20) is params
    with pytest.raises(ValueError, match=r"model\.vocab_size: 19 is less than the model's 20"):
        extended(params, 19)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small model with its tokenizer, a tokenizer with one token more, and data that use it."""
    root = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(["question answer call it the fox"], 280)
    tokenizer.save(root / "tokenizer.json")
    cfg = ModelConfig(d_model=16, n_layers=1, n_heads=2, vocab_size=tokenizer.size, max_length=32, eos_token_id=0)
    jaxlm.save(root / "base", cfg, jaxlm.init(cfg, jax.random.key(0)), tokenizer=root / "tokenizer.json")
    backend = tokenizers.Tokenizer.from_str(tokenizer.json)
    backend.add_special_tokens([NEW])
    backend.save(str(root / "longer.json"))
    rows = [{"prompt": f"question {i}", "completion": f"{NEW} it"} for i in range(20)]
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root, tokenizer.size


def settings(root, directory, **model):
    return {
        "run": {"dir": str(directory)},
        "model": {"path": str(root / "base"), **model},
        "data": {"path": str(root / "rows.jsonl"), "tokenizer": str(root / "longer.json"), "sequence_length": 24},
        "objective": {"kind": "sft"},
        "train": {"steps": 3, "batch_size": 8, "prompts": [], "scan": False},
        "optimizer": {"learning_rate": 1e-2, "warmup": 0.0},
    }


def test_a_tokenizer_with_more_tokens_is_refused_unless_they_are_asked_for(model, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXLM_CACHE", str(tmp_path / "cache"))
    root, size = model
    with pytest.raises(ValueError, match=rf"id {size}, outside the vocabulary of {size}; .*larger model\.vocab_size"):
        train(configs.build(settings(root, tmp_path / "run")))
    with pytest.raises(ValueError, match=rf"model\.vocab_size: {size - 1} contradicts {size} in .*give more to add"):
        configs.build(settings(root, tmp_path / "run", vocab_size=size - 1))
    with pytest.raises(ValueError, match=rf"model\.vocab_size: {size + 1} adds tokens .*without lora first"):
        train(configs.build(settings(root, tmp_path / "run", vocab_size=size + 1) | {"lora": {"r": 2}}))
    assert not (tmp_path / "run").exists()
    assert train(configs.build(settings(root, tmp_path / "run", vocab_size=size + 1))) == 0
    cfg, variables = jaxlm.load(tmp_path / "run")
    _, base = jaxlm.load(root / "base")
    table, old = variables["params"]["embed"]["kernel"], base["params"]["embed"]["kernel"]
    assert cfg.vocab_size == size + 1 == len(table)
    assert 0.001 < np.abs(table[size] - old.mean(0)).max() < 0.1, "begun at the mean, and learnt"
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "hf")
    assert peer.convert_tokens_to_ids(NEW) == size
