"""Adapters on packed examples with every kind of noise: resuming changes no bit, the base stays, its hash is kept."""

import json
import shutil

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm import config as configs
from jaxlm import tree
from jaxlm.cli import main
from jaxlm.data.tokenizer import train_tokenizer
from jaxlm.evals.subject import load_subject
from jaxlm.interop.load import text_directory
from jaxlm.nn.config import ModelConfig
from jaxlm.training import checkpoint
from jaxlm.training.export import export
from jaxlm.training.loop import train


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny model, examples of many lengths, and general text."""
    root = tmp_path_factory.mktemp("finetune")
    rng = np.random.default_rng(0)
    words = ["red", "green", "blue", "black", "white"]
    lines = [" ".join(rng.choice(words, rng.integers(1, 12))) for _ in range(400)]
    tokenizer = train_tokenizer(lines, 290)
    tokenizer.save(root / "tokenizer.json")
    cfg = ModelConfig(d_model=16, n_layers=2, n_heads=2, vocab_size=tokenizer.size, max_length=32, eos_token_id=0)
    jaxlm.save(root / "base", cfg, jaxlm.init(cfg, jax.random.key(0)), tokenizer=root / "tokenizer.json")
    rows = [{"prompt": a, "completion": " " + b} for a, b in zip(lines[:200], lines[200:], strict=True)]
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (root / "general.txt").write_text("\n".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXLM_CACHE", str(root / "cache"))
        yield root


def settings(place, directory, **train_changes):
    train = {
        "steps": 6, "batch_size": 8, "accumulation": 2, "dropout": 0.1, "eval_every": 6, "checkpoint_every": 3,
        "prompts": [], "scan": False, "attention": "reference",
    }  # fmt: skip
    return {
        "run": {"dir": str(directory), "seed": 5},
        "model": {"path": str(place / "base")},
        "data": {
            "path": str(place / "rows.jsonl"), "sequence_length": 32, "packing": True,
            "mixture": {"path": str(place / "general.txt"), "ratio": 0.2},
        },
        "objective": {"kind": "sft", "neftune": 5.0},
        "train": train | train_changes,
        "optimizer": {"learning_rate": 1e-2, "schedule": "constant", "warmup": 0.0},
        "lora": {"r": 2, "alpha": 4, "dropout": 0.2},
        "mesh": {"data": 4, "tensor": 2},
    }  # fmt: skip


def steps(directory):
    """Training values by step; where a step was taken twice, both must be equal."""
    found = {}
    for row in map(json.loads, (directory / "metrics.jsonl").read_text().splitlines()):
        if "loss" in row:
            assert found.setdefault(row["step"], row) == row
    return found


@pytest.fixture(scope="module")
def run(place):
    assert train(configs.build(settings(place, place / "whole"))) == 0
    return place / "whole"


def test_resumed_is_uninterrupted_to_the_last_bit(run, place):
    """Dropout, noise on embeddings, packing, general text: all of it goes on from the step alone."""
    parts = place / "parts"
    assert train(configs.build(settings(place, parts, steps=3))) == 0
    assert train(configs.build(settings(place, parts))) == 0
    assert steps(parts) == steps(run) and len(steps(run)) == 6
    files = [(directory / "hf" / "adapter_model.safetensors").read_bytes() for directory in (parts, run)]
    assert files[0] == files[1]


def test_only_adapters_move_and_only_they_are_saved(run, place):
    _, base = jaxlm.load(place / "base")
    _, tuned = jaxlm.load(run)
    assert jax.tree.all(
        jax.tree.map(lambda a, b: (np.asarray(a) == np.asarray(b)).all(), base["params"], tuned["params"])
    )
    moved = tree.leaves(tuned["lora"])
    assert all(np.abs(leaf).max() > 0 for path, leaf in moved.items() if path.endswith("/b"))
    saved = checkpoint.read(run / "checkpoints", print, ("params",))
    assert set(saved.state["params"]) == {"lora"}
    assert tree.count(saved.state["params"]) == tree.count(tuned["lora"])
    assert saved.meta["base"]


def test_a_run_of_adapters_is_a_model(run, place, tmp_path, capsys):
    """It speaks, is scored and is quantised by its name alone, with the base's tokenizer where it has none."""
    assert main(["generate", str(run), "--prompt", "red", "--max-new-tokens", "2"]) == 0
    assert capsys.readouterr().out.strip()
    assert set(load_subject(run).variables) == {"params", "lora"}
    assert main(["quantize", str(run), str(tmp_path / "small"), "--kind", "int8"]) == 0
    # As it is, it cannot be trained, which only its weights say; the attempt leaves nothing.
    refused = settings(place, tmp_path / "refused") | {"model": {"path": str(tmp_path / "small")}, "lora": None}
    with pytest.raises(ValueError, match="quantised as int8"):
        train(configs.build(refused))
    assert not (tmp_path / "refused").exists()
    assert text_directory(run) == run / "hf"
    shutil.copytree(run / "hf", tmp_path / "adapter", ignore=lambda _, names: [n for n in names if "token" in n])
    assert text_directory(tmp_path / "adapter") == place / "base"


def test_another_base_is_refused(run, place, tmp_path, capsys):
    """A base of the same shape and other weights would make nonsense of the adapters."""
    cfg, _ = jaxlm.load(place / "base")
    other = tmp_path / "other"
    shutil.copytree(run, other)
    kept = tmp_path / "base"
    shutil.copytree(place / "base", kept)
    try:
        jaxlm.save(place / "base", cfg, jaxlm.init(cfg, jax.random.key(9)), tokenizer=place / "tokenizer.json")
        with pytest.raises(ValueError, match="base"):
            train(configs.build(settings(place, other, steps=9)))
        assert len(capsys.readouterr().err.splitlines()) < 3  # the message makes three at most
        with pytest.raises(ValueError, match="base"):
            export(other, tmp_path / "out", configs.load(other / "config.yaml"), print)
    finally:
        shutil.rmtree(place / "base")
        shutil.copytree(kept, place / "base")
