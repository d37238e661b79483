"""Runs on preferences: the reference made before is the one made during, and evaluation does not depend on batches."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxlm import config as configs
from jaxlm.training import evaluate
from jaxlm.training.loop import train
from jaxlm.training.setup import load_frozen, prepare, start

ROOT = pathlib.Path(__file__).parents[1]

pytestmark = pytest.mark.usefixtures("own_cache")

WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu".split()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Ten pairs, and six others."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    text = lambda most: " ".join(rng.choice(WORDS, rng.integers(1, most)))  # noqa: E731
    paths = []
    for name, count in (("train", 10), ("validation", 6)):
        rows = [{"prompt": text(4), "chosen": " " + text(6), "rejected": " " + text(3)} for _ in range(count)]
        paths.append(folder / f"{name}.jsonl")
        paths[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(path) for path in paths]


def settings(files, directory, objective, batch_size=4, lora=None):
    return configs.build({
        "run": {"dir": str(directory)},
        "model": {"d_model": 16, "n_layers": 1, "n_heads": 2, "vocab_size": 270},
        "data": {"path": files[0], "validation": files[1], "sequence_length": 48},
        "objective": objective,
        "train": {"steps": 3, "batch_size": batch_size, "eval_every": 3, "checkpoint_every": 3, "scan": False,
                  "attention": "reference", "prompts": []},
        "optimizer": {"learning_rate": 1e-2, "warmup": 0.0},
        "lora": lora,
        "mesh": {"data": 4, "tensor": 2},
    })  # fmt: skip


def metrics(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_a_reference_made_before_training_is_the_same_to_the_last_bit(files, tmp_path):
    """In a process without the tests' own flags: two programs round alike only as XLA compiles them for users."""
    cases = (("copy", "copy"), ("first", "precomputed"), ("second", "precomputed"))
    runs = [settings(files, tmp_path / name, {"kind": "dpo", "reference": kind}).yaml() for name, kind in cases]
    for i, text in enumerate(runs):
        (tmp_path / f"{i}.yaml").write_text(text)
    code = """if True:
        import sys
        from jaxlm import config
        from jaxlm.training.loop import train
        for path in sys.argv[1:]:
            print("RUN", file=sys.stderr, flush=True)
            assert train(config.load(path, [])) == 0"""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "PYTHONPATH": str(ROOT)}
    paths = [str(tmp_path / f"{i}.yaml") for i in range(len(runs))]
    done = subprocess.run([sys.executable, "-c", code, *paths], env=os.environ | flags, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # The second time the values are found in the cache.
    said = ["reference's log-probabilities" in part for part in done.stderr.split("RUN\n")[1:]]
    assert said == [False, True, False]
    wanted, first, second = (metrics(tmp_path / name) for name in ("copy", "first", "second"))
    for row in (*wanted, *first, *second):
        # Without a reference at hand, the trained model answers this.
        row.pop("eval/accuracy_unconditional", None)
    assert first == wanted and second == wanted
    assert wanted[1]["loss"] == np.float32(np.log(2.0)) and wanted[1]["rewards/accuracies"] == 0.0
    assert wanted[-1]["eval/rewards/margins"] != 0.0 and "eval/accuracy_without_prompt" in wanted[-1]


def test_other_data_have_another_reference(files, tmp_path, capsys):
    objective = {"kind": "dpo", "reference": "precomputed"}
    assert train(settings(files[::-1], tmp_path, objective, lora={"r": 2})) == 0
    assert "reference's log-probabilities" in capsys.readouterr().err
    assert metrics(tmp_path)[1]["rewards/margins"] == 0.0


@pytest.mark.parametrize("kind", ["orpo", "reward"])
def test_evaluation_does_not_depend_on_the_size_of_batches(kind, files, tmp_path):
    found = []
    for size in (4, 8):
        setup = prepare(settings(files, tmp_path, {"kind": kind}, size))
        with jax.set_mesh(setup.program.mesh):
            frozen = load_frozen(setup.config, setup.program)
            state = start(None, setup.program, frozen)
            found.append(evaluate.make(setup)(state.params, frozen))
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        assert found[1][name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    names = {"orpo": ["nll_loss", "rewards/accuracies"], "reward": ["min_reward", "max_reward", "accuracy"]}
    assert set(names[kind]) <= found[0].keys()


REFUSED = {
    "smoothing": ({"kind": "dpo", "label_smoothing": 0.1}, 4, "objective.label_smoothing: 0.1 means nothing"),
    "half": ({"kind": "dpo", "loss": "robust", "label_smoothing": 0.5}, 4, "objective.label_smoothing: 0.5 of all"),
    "one row": ({"kind": "kto"}, 1, "train.batch_size: 1, but objective.kind kto"),
    "kto before": ({"kind": "kto", "reference": "precomputed"}, 4, "objective.reference: precomputed, but kto"),
    "beta": ({"kind": "dpo", "beta": 0.0}, 4, "objective.beta"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused(case, files, tmp_path):
    objective, size, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        settings(files, tmp_path, objective, size)


def test_adapters_that_are_not_there_cannot_be_turned_off(files, tmp_path):
    with pytest.raises(ValueError, match=r"objective.reference: adapter-off, but lora is null"):
        prepare(settings(files, tmp_path, {"kind": "dpo", "reference": "adapter-off"}))
