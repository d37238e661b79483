"""A whole run by two real processes: the numbers of one, and one process takes over where they stopped."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from jaxlm import config as configs
from jaxlm.training.loop import train

ROOT = Path(__file__).parent.parent
WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau".split()
STEPS = 6


def raw(directory, text, **mesh):
    return {
        "run": {"dir": str(directory), "seed": 3},
        "model": {"d_model": 16, "n_layers": 2, "n_heads": 2, "vocab_size": 270},
        "data": {"path": str(text), "sequence_length": 16},
        "train": {
            "steps": STEPS,
            "batch_size": 8,
            "checkpoint_every": 3,
            "eval_batches": 1,
            "dropout": 0.1,
            "prompts": [],
        },
        "optimizer": {"learning_rate": 1e-2, "warmup": 0.0},
        "mesh": mesh,
    }


def losses(directory):
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row], [row["eval/loss"] for row in rows if "eval/loss" in row]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    rng = np.random.default_rng(0)
    path.write_text("\n".join(" ".join(rng.choice(WORDS, 12)) for _ in range(300)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXLM_CACHE", str(path.parent / "cache"))
        yield path


@pytest.fixture(scope="module")
def by_one(text, tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "one"
    assert train(configs.build(raw(directory, text))) == 0
    return directory


@pytest.fixture(scope="module")
def by_two(text, tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "two"
    file = directory.parent / "two.yaml"
    file.write_text(yaml.safe_dump(raw(directory, text, data=1, fsdp=2, tensor=2)))
    command = [sys.executable, "scripts/launch_local.py", "-n", "2", "--devices", "2", "--"]
    command += [sys.executable, "-m", "jaxlm", "train", str(file)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    return directory


def test_two_processes_train_evaluate_and_export_as_one(by_one, by_two):
    for two, one in zip(losses(by_two), losses(by_one), strict=True):
        np.testing.assert_allclose(two, one, rtol=0, atol=5e-6)
    assert len(losses(by_two)[0]) == STEPS, "one process writes"
    assert (by_two / "hf" / "model.safetensors").stat().st_size == (by_one / "hf" / "model.safetensors").stat().st_size


def test_one_process_on_another_mesh_goes_on_from_two(by_two, text):
    before, _ = losses(by_two)
    last = by_two / "checkpoints" / str(STEPS)
    assert last.is_dir()
    shutil.rmtree(last)
    assert train(configs.build(raw(by_two, text, data=4, fsdp=2))) == 0
    after, _ = losses(by_two)
    np.testing.assert_allclose(after[-3:], before[-3:], rtol=0, atol=5e-6)
    assert len(after) > len(before)
