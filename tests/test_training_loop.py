"""A run from start to end: its files, and that stopping, killing and resuming change nothing."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from jaxlm import config as configs
from jaxlm.training.loop import train

pytestmark = pytest.mark.usefixtures("own_cache")

WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau".split()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("\n".join(" ".join(rng.choice(WORDS, 12)) for _ in range(600)))
    return path


def raw(text, directory, **train_changes):
    settings = {"steps": 12, "batch_size": 8, "accumulation": 2, "dropout": 0.1, "ema": 0.9, "eval_every": 6}
    settings |= {"checkpoint_every": 4, "attention": "reference", "scan": False, "prompts": ["alpha"]}
    return {
        "run": {"dir": str(directory), "seed": 3},
        "model": {"d_model": 16, "n_layers": 2, "n_heads": 2, "vocab_size": 270},
        "data": {"path": str(text), "sequence_length": 16},
        "train": settings | train_changes,
        "optimizer": {"learning_rate": 1e-2},
        "mesh": {"data": 4, "tensor": 2},
    }


def settings(text, directory, **changes):
    return configs.build(raw(text, directory, **changes))


def rows(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def weights(directory):
    return (directory / "hf" / "model.safetensors").read_bytes()


def by_step(directory):
    """Each step's training values; where a resumed run wrote a step again, both must be equal."""
    found = {}
    for row in rows(directory):
        kind = "eval" if "eval/loss" in row else "train"
        assert found.setdefault((kind, row["step"]), row) == row
    return found


@pytest.fixture(scope="module")
def straight(text, tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "straight"
    assert train(settings(text, directory)) == 0
    return directory


def test_the_files_of_a_run(straight):
    present = {p.name for p in straight.iterdir()}
    assert present >= {"config.yaml", "metrics.jsonl", "checkpoints", "tokenizer.json", "report.html", "hf"}
    steps = [r["step"] for r in rows(straight) if "loss" in r]
    assert steps == list(range(1, 13))
    for row in rows(straight):
        names = {"eval/loss", "eval/bits_per_byte"} if "eval/loss" in row else set()
        assert names <= row.keys() if names else {"loss", "learning_rate", "grad_norm", "tokens"} <= row.keys()
    assert [r["step"] for r in rows(straight) if "eval/loss" in r] == [0, 6, 12]
    assert [r["tokens"] for r in rows(straight) if "tokens" in r][-1] == 12 * 8 * 16
    kept = sorted(int(p.name) for p in (straight / "checkpoints").iterdir() if p.name.isdigit())
    assert kept[-2:] == [8, 12]


def test_the_resolved_configuration_runs_again(straight, text):
    again = configs.load(straight / "config.yaml")
    assert again == settings(text, straight)


def test_the_loss_falls(straight):
    losses = [r["loss"] for r in rows(straight) if "loss" in r]
    assert losses[-1] < losses[0] - 0.5


def _interrupt_at(directory, step, number):
    """Send this process a signal once the metrics show the step."""

    def wait():
        file = directory / "metrics.jsonl"
        while not (file.exists() and f'"step": {step},' in file.read_text()):
            time.sleep(0.005)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_fewer_steps_than_were_taken_are_refused(straight, text):
    with pytest.raises(ValueError, match=r"train\.steps: 8, but .* is at step 12 already"):
        train(settings(text, straight, steps=8))
    assert configs.load(straight / "config.yaml").train.steps == 12


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_same_command_goes_on(straight, text, tmp_path, number, code, capfd):
    directory = tmp_path / "run"
    thread = _interrupt_at(directory, 5, number)
    assert train(settings(text, directory, steps=12)) == code
    thread.join()
    assert "the same command again" in capfd.readouterr().err
    assert train(settings(text, directory)) == 0
    assert weights(directory) == weights(straight)
    assert by_step(directory) == by_step(straight)


def test_a_killed_run_goes_on_to_the_same_end(straight, text, tmp_path):
    """SIGKILL at some moment, in a process of its own; the same command then gives the same bits."""
    directory = tmp_path / "run"
    file = tmp_path / "run.json"
    file.write_text(json.dumps(raw(text, directory)))
    command = [sys.executable, "-m", "jaxlm", "train", str(file)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if (directory / "metrics.jsonl").exists() and len((directory / "metrics.jsonl").read_text().splitlines()) >= 8:
            process.kill()
            break
        time.sleep(0.01)
    assert process.wait() in (-signal.SIGKILL, 0)
    assert train(settings(text, directory)) == 0
    assert weights(directory) == weights(straight)
    assert by_step(directory) == by_step(straight)


@pytest.fixture
def begun(text, tmp_path):
    """A run stopped at step 8, with steps 4 and 8 saved."""
    directory = tmp_path / "run"
    thread = _interrupt_at(directory, 7, signal.SIGTERM)
    assert train(settings(text, directory)) == 143
    thread.join()
    return directory


def test_a_damaged_step_is_named_and_the_one_before_is_used(begun, straight, text, capfd):
    newest = max((p for p in (begun / "checkpoints").iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
    biggest = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(biggest.read_bytes())
    data[len(data) // 2] ^= 1
    biggest.write_bytes(bytes(data))
    assert train(settings(text, begun)) == 0
    assert f"step {newest.name} is damaged" in capfd.readouterr().err
    assert weights(begun) == weights(straight)


@pytest.mark.parametrize(
    "section, change, word",
    [
        ("model", {"d_model": 32}, "model.d_model"),
        ("run", {"seed": 4}, "run.seed"),
        ("data", {"sequence_length": 32}, "data.sequence_length"),
    ],
)
def test_another_configuration_is_refused_at_resume(begun, text, section, change, word):
    changed = raw(text, begun)
    changed[section] |= change
    with pytest.raises(ValueError, match=word):
        train(configs.build(changed))


def test_changed_data_is_refused_at_resume(begun, text, tmp_path):
    copy = tmp_path / "text.txt"
    copy.write_text(text.read_text())
    original = text.read_text()
    try:
        text.write_text(original.replace("alpha", "alphb", 1))
        with pytest.raises(ValueError, match="data"):
            train(settings(text, begun))
    finally:
        text.write_text(original)


def test_another_mesh_may_go_on(begun, straight, text):
    changed = raw(text, begun)
    changed["mesh"] = {"data": 2, "fsdp": 2, "tensor": 2}
    assert train(configs.build(changed)) == 0
    ours, theirs = ([r["loss"] for r in rows(d) if "loss" in r][-1] for d in (begun, straight))
    assert abs(ours - theirs) < 1e-4


@pytest.mark.parametrize(
    "section, change, word",
    [
        ("data", {"path": "/nowhere/text.txt"}, "/nowhere/text.txt"),
        ("mesh", {"fsdp": 3}, "mesh.fsdp"),
        ("train", {"batch_size": 4}, "train.batch_size"),
        ("train", {"memory_limit": 1e-6}, "train.memory_limit"),
        ("model", {"n_heads": 3}, "model.n_heads"),
        ("data", {"sequence_length": 100_000}, "data.sequence_length"),
    ],
)
def test_a_refused_first_start_leaves_nothing(text, tmp_path, section, change, word):
    changed = raw(text, tmp_path / "run")
    changed[section] = changed.get(section, {}) | change
    with pytest.raises((ValueError, FileNotFoundError), match=word):
        train(configs.build(changed))
    assert not (tmp_path / "run").exists()


def test_a_loss_that_stays_bad_ends_the_run_and_keeps_the_last_good_state(begun, text):
    config = settings(text, begun, steps=60, max_skips=3, checkpoint_every=100, eval_every=100)
    broken = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, learning_rate=1e30))
    before = {p.name for p in (begun / "checkpoints").iterdir()}
    with pytest.raises(RuntimeError, match=r"loss: not finite.* for 3 steps in a row.*optimizer.learning_rate"):
        train(broken)
    assert before <= {p.name for p in (begun / "checkpoints").iterdir()}
    assert train(settings(text, begun)) == 0


def test_early_stopping_ends_well(text, tmp_path):
    config = settings(text, tmp_path / "run", steps=40, eval_every=2, patience=2, dropout=0.0)
    flat = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, learning_rate=1e-12))
    assert train(flat) == 0
    assert max(r["step"] for r in rows(tmp_path / "run")) < 40
    assert (tmp_path / "run" / "report.html").exists()
    assert pathlib.Path(tmp_path / "run" / "hf" / "config.json").exists()
