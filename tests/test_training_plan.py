"""The plan of a run as a command, and its memory formula beside the compiler's account."""

import pytest

from jaxlm import config as configs
from jaxlm.cli import main
from jaxlm.training import plan

SHAPE = "model: {d_model: 32, n_layers: 2, n_heads: 2, vocab_size: 300}\ndata: {sequence_length: 32}\n"


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(f"run: {{dir: {tmp_path / 'run'}}}\n{SHAPE}train: {{batch_size: 8}}\n")
    return path


def test_a_plan_beyond_the_limit_is_shown_and_refused(config, capsys):
    assert main(["plan", str(config), "train.memory_limit=1e-4", "model.path=/nowhere"]) == 2
    out, err = capsys.readouterr()
    assert out.startswith("parameters") and "memory by the XLA compiler" in out
    assert err.startswith("jaxlm: error: train.memory_limit: 0.0001 GB, but the run needs ")
    assert len(err.splitlines()) == 1
    assert not (config.parent / "run").exists()
    assert main(["plan", str(config), "train.memory_limit=1"]) == 0


def test_a_mixture_shows_what_is_active(config, capsys):
    assert main(["plan", str(config), "model.moe={experts: 4, top_k: 1, d_ff: 48}"]) == 0
    lines = dict(line.rsplit(None, 1) for line in capsys.readouterr().out.splitlines()[:3])
    counts = {name.strip(): int(count.replace(",", "")) for name, count in lines.items()}
    assert counts["parameters"] - counts["active per token"] == 2 * 3 * 3 * 32 * 48


@pytest.mark.parametrize(
    ("remat", "scan", "length"),
    [("none", True, 256), ("none", False, 64), ("dots", True, 128), ("block", True, 256), ("full", True, 128)],
)
def test_memory_by_formula_is_near_the_compilers(remat, scan, length):
    train = {"batch_size": 64, "remat": remat, "scan": scan, "dtype": "float32", "attention": "reference"}
    model = {"d_model": 128, "n_layers": 6, "n_heads": 2, "vocab_size": 1024}
    raw = {"model": model, "data": {"sequence_length": length}, "train": train}
    found = plan.make_plan(configs.build(raw))
    assert found.compiled is not None
    assert abs(found.memory.total / found.compiled - 1) < 0.25


def test_remat_walks_by_scan_where_unrolling_would_undo_it():
    raw = {"model": {"d_model": 32, "n_layers": 2, "n_heads": 2, "vocab_size": 300}}
    kept = [
        plan.make_plan(
            configs.build(raw | {"train": {"remat": remat, "scan": scan}}), compiled=False
        ).memory.activations
        for remat, scan in (("none", None), ("full", None), ("full", False))
    ]
    assert kept[1] < kept[0] == kept[2]
