"""Sweeps: the grid, losses equal to those of training, resuming, divergence, and what is said about transfer."""

import json
import math
import signal

import jax
import numpy as np
import pytest

from jaxlm.cli import main
from jaxlm.config import grid, load
from jaxlm.evals import sweep, sweep_report, transfer
from jaxlm.evals.transfer import Result
from jaxlm.training import setup
from jaxlm.training.step import train_step

CONFIG = """
model: {d_model: 32, n_layers: 1, n_heads: null, head_dim: 16, vocab_size: 300, tie_embeddings: false}
data: {path: text.txt, sequence_length: 16}
train: {batch_size: 8, steps: 10}
optimizer: {clip: null}
mup: {base: {d_model: 16}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("sweep")
    words = np.random.default_rng(0).integers(0, 200, 6000)
    (path / "text.txt").write_text(" ".join(f"w{word}" for word in words))
    (path / "run.yaml").write_text(CONFIG.replace("text.txt", str(path / "text.txt")))
    return path


@pytest.fixture(scope="module")
def swept(folder):
    """A sweep of three rates, one of which diverges; its directory and cells."""
    run = folder / "swept"
    arguments = [f"run.dir={run}", "optimizer.learning_rate=1e-3, 1e-2, 1e15"]
    assert main(["sweep", str(folder / "run.yaml"), *arguments]) == 0
    return run, json.loads((run / "sweep.json").read_text())["cells"], arguments


def test_every_cell_is_there_under_both_parametrisations(swept):
    run, cells, _ = swept
    keys = [(cell["parametrisation"], cell["optimizer.learning_rate"]) for cell in cells]
    assert keys == [(p, rate) for rate in (1e-3, 1e-2, 1e15) for p in ("mup", "sp")]
    assert all(set(cell) == {"parametrisation", "optimizer.learning_rate", "loss"} for cell in cells)
    assert (run / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (run / "sweep.html").read_text()


def test_a_run_that_diverges_is_infinite(swept):
    run, cells, _ = swept
    assert [math.isinf(cell["loss"]) for cell in cells] == [False] * 4 + [True] * 2
    assert '"loss": Infinity' in (run / "sweep.json").read_text()


def test_a_cell_is_a_training_run(folder, swept):
    """The rate and the seed are arguments of the compiled step here, constants in training: the losses are equal."""
    config = load(folder / "run.yaml", ["optimizer.learning_rate=1e-2", f"run.dir={folder / 'unused'}"])
    prepared = setup.prepare(config)
    step = jax.jit(lambda state, batch: train_step(prepared.program.recipe, state, {}, batch))
    state, losses = setup.start(None, prepared.program), []
    for i in range(config.train.steps):
        state, metrics = step(
            state, setup.global_batch(prepared.data.train, prepared.loader.rows(i), prepared.program.mesh)
        )
        losses.append(float(metrics["loss"]))
    cell = next(c for c in swept[1] if c["parametrisation"] == "mup" and c["optimizer.learning_rate"] == 1e-2)
    assert cell["loss"] == pytest.approx(losses[-1], rel=1e-6)


def test_finished_cells_are_not_trained_again(folder, swept, monkeypatch):
    run, cells, arguments = swept
    trained = []
    real = sweep._train
    monkeypatch.setattr(sweep, "_train", lambda config, *rest: trained.append(config) or real(config, *rest))
    assert main(["sweep", str(folder / "run.yaml"), *arguments]) == 0
    assert not trained and json.loads((run / "sweep.json").read_text())["cells"] == cells
    lines = (run / "sweep_state.jsonl").read_text().splitlines(keepends=True)
    (run / "sweep_state.jsonl").write_text("".join(lines[:-1]) + lines[-1][:20])
    assert main(["sweep", str(folder / "run.yaml"), *arguments]) == 0
    assert len(trained) == 1 and json.loads((run / "sweep.json").read_text())["cells"] == cells


def test_a_key_changes_with_the_run_and_its_data(folder):
    config, content = load(folder / "run.yaml"), {None: None, str(folder / "text.txt"): "a"}
    key = sweep.key_of(config, content.get)
    assert key == sweep.key_of(load(folder / "run.yaml", ["run.dir=elsewhere"]), content.get)
    assert key != sweep.key_of(load(folder / "run.yaml", ["train.steps=11"]), content.get)
    assert key != sweep.key_of(config, (content | {str(folder / "text.txt"): "b"}).get)


def test_an_interrupted_sweep_goes_on(folder, capsys, monkeypatch):
    run = folder / "interrupted"
    arguments = ["sweep", str(folder / "run.yaml"), "mup=null", f"run.dir={run}", "run.seed=0,1"]
    clock = sweep._Clock.cell

    def interrupt(self, cell, loss):
        clock(self, cell, loss)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(sweep._Clock, "cell", interrupt)
        assert main(arguments) == 130
    assert "the same command again" in capsys.readouterr().err
    assert len(sweep.known_losses(run)) == 1 and not (run / "sweep.json").exists()
    assert main(arguments) == 0
    assert "1 of 2 runs were done before" in capsys.readouterr().err
    cells = json.loads((run / "sweep.json").read_text())["cells"]
    assert [cell["run.seed"] for cell in cells] == [0, 1] and {c["parametrisation"] for c in cells} == {"sp"}
    assert cells[0]["loss"] != cells[1]["loss"]


def test_the_loss_is_the_mean_of_the_last_tenth():
    assert sweep.summary_loss([9.0] * 18 + [1.0, 2.0], 20) == 1.5
    assert sweep.summary_loss([3.0, 2.0], 2) == 2.0
    assert sweep.summary_loss([3.0, math.nan], 2) == math.inf
    assert sweep.summary_loss([3.0], 20) == math.inf


LISTS = {
    "1,2": ["1", "2"],
    "[1, 2]": ["[1, 2]"],
    '"a,b",c': ['"a,b"', "c"],
    "{a: [1, 2], b: 3},null": ["{a: [1, 2], b: 3}", "null"],
    "it's": ["it's"],
}


@pytest.mark.parametrize(("text", "parts"), LISTS.items(), ids=LISTS)
def test_lists_are_split_at_their_own_commas(text, parts):
    assert grid.split(text) == parts


def test_the_grid_is_the_product_of_its_axes():
    plain, axes = grid.axes(["train.steps=5", "a.b=1e-3,2e-3", "c=x,null"])
    assert plain == ["train.steps=5"]
    points = list(grid.points(axes))
    assert [point.values for point in points] == [{"a.b": a, "c": c} for a in (1e-3, 2e-3) for c in ("x", None)]
    assert points[0].overrides == ("a.b=1e-3", "c=x")


REFUSED = {
    "empty value": (["train.steps=1,,2"], "train.steps: 1,,2 has an empty value"),
    "value twice": (["optimizer.learning_rate=1e-3,0.001"], "optimizer.learning_rate: 1e-3 stands twice"),
    "two lists": (["train.steps=1,2", "train.steps=3,4"], "train.steps: two lists of values"),
    "unknown field": (["train.stepz=1,2"], "train.stepz: unknown field; did you mean steps?"),
    "wrong value": (["train.steps=5,many"], "train.steps: "),
    "missing data": (["data.path=nowhere.txt", "train.steps=1,2"], "data.path: "),
}


@pytest.mark.parametrize(("overrides", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals_are_one_line(folder, capsys, overrides, message):
    code = main(["sweep", str(folder / "run.yaml"), f"run.dir={folder / 'refused'}", *overrides])
    err = capsys.readouterr().err
    assert code == 2 and err.count("\n") == 1 and err.startswith(f"jaxlm: error: {message}")
    assert not (folder / "refused").exists()


def results(vertices, sizes=(64, 128, 256), rates=(0.25, 0.5, 1.0, 2.0, 4.0)):
    """Parabolas over log2 rate, lowest at the given octave for each size; larger is better by 0.1."""
    return [
        Result(p, {"model.d_model": size, transfer.RATE: rate}, (math.log2(rate) - low) ** 2 - i / 10)
        for p, lows in vertices.items()
        for i, (size, low) in enumerate(zip(sizes, lows, strict=True))
        for rate in rates
    ]


def test_transfer_is_read_off_parabolas():
    mup, sp = transfer.transfers(results({"mup": (0.2, 0.1, 0.0), "sp": (0.8, 0.0, -1.2)}))
    assert (mup.parametrisation, mup.field, mup.grid_steps) == ("mup", "model.d_model", 0)
    assert mup.octaves == pytest.approx(-0.2) and mup.regret == pytest.approx(0.0)
    assert sp.octaves == pytest.approx(-2.0) and sp.grid_steps == -2
    assert sp.regret == pytest.approx(2.2**2 - 0.2**2)
    assert (mup.wider_is_better, sp.wider_is_better, sp.rates) == (3, 2, 5)


def test_edges_and_divergence_keep_to_the_grid():
    found = transfer.transfers(results({"sp": (9.0, 9.0, 9.0)}))[0]
    assert found.octaves == 0.0 and found.optima[0].octave == 2.0
    lost = [r._replace(loss=math.inf) if r.values[transfer.RATE] > 1 else r for r in results({"sp": (0.4, 0.1, -0.9)})]
    found = transfer.transfers(lost)[0]
    assert found.optima[0].octave == 0.0 and math.isfinite(found.regret)
    gone = [r._replace(loss=math.inf) for r in lost]
    assert math.isnan(transfer.transfers(gone)[0].regret)


def test_seeds_are_averaged():
    twice = [
        Result(r.parametrisation, {**r.values, "run.seed": seed}, r.loss + seed)
        for r in results({"sp": (0.4, 0.1, -0.9)})
        for seed in (0, 1)
    ]
    (found,) = transfer.transfers(twice)
    assert found.optima[0].loss == pytest.approx(0.4**2 + 0.5)


def test_tables_and_pages_say_what_was_found(tmp_path):
    found = results({"mup": (0.2, 0.1, 0.0), "sp": (0.8, 0.0, -1.2)})
    text = sweep_report.table(found)
    assert "muP: from model.d_model 64 to 256 the best learning rate moves by -0.20 octaves (+0 steps" in text
    assert text.count("*") == 6
    words = [Result("sp", {"optimizer.name": name}, loss) for name, loss in (("adamw", 1.0), ("lion", math.inf))]
    paths = sweep_report.write(words, tmp_path)
    assert {path.name for path in paths} == {"sweep.json", "sweep.html", "sweep.png"}
    assert "transfer" not in json.loads((tmp_path / "sweep.json").read_text())
    assert "lion" in sweep_report.table(words)
