"""SAM through the step and the loop: resume, microbatches, devices, frozen trees, cost; and the plan a run keeps."""

import functools
import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm import config as configs
from jaxlm.dist import mesh as meshes
from jaxlm.dist import place
from jaxlm.nn.config import ModelConfig
from jaxlm.optim import chain
from jaxlm.optim.config import OptimizerConfig, SamConfig
from jaxlm.training import loop, setup
from jaxlm.training.step import Recipe, init_state, train_step
from jaxlm.types import Objective

pytestmark = pytest.mark.usefixtures("own_cache")

ROWS, LENGTH = 16, 8
MODEL = {"d_model": 16, "n_layers": 2, "n_heads": 2, "d_ff": 24}
LOOK = {"rho": 0.1, "variant": "asam", "interval": 2}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("\n".join(" ".join(rng.choice("alpha beta gamma delta epsilon".split(), 9)) for _ in range(400)))
    return path


def settings(text, directory):
    """LookSAM of ASAM, whose state goes on from step to step, under an average, layer-wise rates and muP."""
    raw = {"run": {"dir": str(directory)}, "model": MODEL | {"vocab_size": 262}}
    raw["data"] = {"path": str(text), "sequence_length": 16}
    raw["train"] = {"steps": 7, "batch_size": 8, "ema": 0.9, "attention": "reference", "scan": False, "prompts": []}
    raw["optimizer"] = {"sam": LOOK, "layer_lr": {"mode": "decay_to_input", "rate": 0.5}, "learning_rate": 1e-2}
    return configs.build(raw | {"mup": {"base": {"d_model": 8}}})


def records(directory):
    """Training values by step, without what depends on the clock."""
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    names = ("loss", "grad_norm", "learning_rate", "sam/sharpness")
    return {row["step"]: [row[name] for name in names] for row in rows if "loss" in row}


@pytest.fixture(scope="module")
def straight(text, tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "straight"
    assert loop.train(settings(text, directory)) == 0
    return directory


@pytest.mark.parametrize("last", [3, 4])
def test_a_stopped_run_goes_on_to_the_same_bits(straight, text, tmp_path, monkeypatch, last):
    """Stopped before a step that reuses a direction, and before one that perturbs."""
    step = loop.Run._step

    def interrupted(self, index, batch):
        step(self, index, batch)
        if index + 1 == last:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "_step", interrupted)
        assert loop.train(settings(text, tmp_path / "run")) == 143
    assert max(records(tmp_path / "run")) == last
    assert loop.train(settings(text, tmp_path / "run")) == 0
    assert records(tmp_path / "run") == records(straight)
    weights = [(folder / "hf" / "model.safetensors").read_bytes() for folder in (tmp_path / "run", straight)]
    assert weights[0] == weights[1]


def test_a_run_keeps_what_every_leaf_is_given(straight):
    lines = (straight / "plan.txt").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("leaf "))
    names = ["leaf", "shape", "init std", "learning rate", "weight decay", "eps", "class", "optimizer"]
    assert [lines[start].index(name) for name in names] == sorted(lines[start].index(name) for name in names)
    columns = [lines[start].index(name) for name in names]
    rows = [
        [line[a:b].strip() for a, b in zip(columns, [*columns[1:], None], strict=True)] for line in lines[start + 1 :]
    ]
    given = {row[0]: dict(zip(names, row, strict=True)) for row in rows}
    assert len(given) == 2 * 9 + 2
    # muP: the width is twice the base's, so a matrix has half the rate. Layers: half of it for each one below the head.
    assert float(given["layers.1.attn.q"]["learning rate"]) == pytest.approx(1e-2 / 2 / 2)
    assert float(given["layers.0.attn.q"]["learning rate"]) == pytest.approx(1e-2 / 2 / 4)
    assert float(given["embed"]["learning rate"]) == pytest.approx(1e-2 / 8)
    assert given["layers.0.attn.q"]["shape"] == "[16, 16]"
    assert given["layers.0.attn.q"]["class"] == "matrix"
    assert {row["optimizer"] for row in given.values()} == {"adamw"}
    assert float(given["norm"]["weight decay"]) == 0.0


def regression(seen=None):
    """An objective of two trees, one of them frozen: a mean over unequally weighted rows, in the rows' precision."""

    def prepare(apply, params, frozen, batch, key):
        return batch

    def loss(apply, params, frozen, rows, weights, key):
        if seen is not None:
            seen.append(frozen["params"]["norm"]["scale"])
        q = params["params"]["layers"]["attn"]["q"]["kernel"][0]
        h = jnp.tanh((rows["x"] * frozen["params"]["norm"]["scale"][None, :]) @ q)
        return jnp.sum(rows["mask"] * jnp.sum((h - rows["y"]) ** 2, axis=1)) / weights["rows"], {}

    return Objective(prepare, lambda batch: {"rows": jnp.sum(batch["mask"])}, loss)


def regression_run(accumulation, sam, steps=5, seen=None):
    """Some steps of the regression in float64 with the whole chain; also the frozen tree, before and after."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 12, 4))
    rows = {"x": x, "y": y, "mask": rng.integers(1, 9, 12).astype(float)}
    params = {"params": {"layers": {"attn": {"q": {"kernel": rng.standard_normal((1, 4, 4))}}}}}
    frozen = {"params": {"norm": {"scale": rng.standard_normal(4)}}}
    cfg = ModelConfig(d_model=4, n_layers=1, n_heads=1, vocab_size=5)
    config = OptimizerConfig(learning_rate=0.05, clip=0.5, schedule="linear", sam=sam)
    params, frozen, rows = jax.tree.map(jnp.asarray, (params, frozen, rows))
    optimizer = chain.make(config, cfg, params, steps)
    recipe = Recipe(regression(seen), None, optimizer, optax.constant_schedule(0.05), accumulation, sam=sam)
    step = functools.partial(train_step, recipe)
    step = jax.jit(step) if seen is None else step
    state = init_state(recipe, params)
    for _ in range(steps):
        state, metrics = step(state, frozen, rows)
    return state.params, float(metrics["sam/sharpness"]), frozen


@pytest.mark.parametrize("variant", ["sam", "asam"])
def test_microbatches_equal_the_batch_to_the_last_digits(variant):
    with jax.enable_x64(True):
        whole, sharpness, _ = regression_run(1, SamConfig(rho=0.3, variant=variant))
        for accumulation in (2, 3):
            parts, same, _ = regression_run(accumulation, SamConfig(rho=0.3, variant=variant))
            np.testing.assert_allclose(*jax.tree.leaves((whole, parts)), rtol=0, atol=1e-12)
            assert sharpness == pytest.approx(same, rel=1e-6)
        one_by_one, _, _ = regression_run(2, SamConfig(rho=0.3, variant=variant, granularity="micro"))
    assert np.abs(np.subtract(*jax.tree.leaves((whole, one_by_one)))).max() > 1e-5


@pytest.mark.parametrize("granularity", ["batch", "micro"])
def test_no_pass_sees_a_frozen_leaf_perturbed(granularity):
    seen = []
    with jax.disable_jit():
        _, sharpness, frozen = regression_run(1, SamConfig(rho=0.5, granularity=granularity), steps=2, seen=seen)
    before = np.random.default_rng(0)
    before.standard_normal((2, 12, 4)), before.integers(1, 9, 12), before.standard_normal((1, 4, 4))
    expected = np.asarray(jnp.asarray(before.standard_normal(4)))
    assert len(seen) == 4 and sharpness > 0
    for scale in [*seen, frozen["params"]["norm"]["scale"]]:
        np.testing.assert_array_equal(scale, expected)


def program(sam, mesh, devices):
    raw = {"model": MODEL | {"vocab_size": 32}, "data": {"sequence_length": LENGTH}, "mesh": mesh}
    raw["train"] = {"steps": 4, "batch_size": ROWS, "attention": "reference", "scan": False}
    raw["optimizer"] = {"name": "sgd", "momentum": 0.9, "learning_rate": 0.2, "warmup": 0.0, "sam": sam}
    config = configs.build(raw)
    return setup.assemble(config, config.architecture(), meshes.make(config.mesh, jax.devices()[:devices]))


def batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 32, (ROWS, LENGTH + 1)).astype(np.int32)
    columns = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "mask": np.ones((ROWS, LENGTH), np.float32)}
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (ROWS, LENGTH)).copy()
    return columns | {"segments": np.ones((ROWS, LENGTH), np.int32), "positions": positions}


def compiled(program):
    """The compiled step, its first state and its batch."""
    with jax.set_mesh(program.mesh):
        state, rows = setup.start(None, program), place.place_batch(batch(), program.mesh)
        step = jax.jit(functools.partial(train_step, program.recipe), out_shardings=(program.shardings, None))
        return step.lower(state, {}, rows).compile(), state, rows


def test_eight_devices_equal_one_and_a_step_costs_two():
    single, state, rows = compiled(program({"rho": 0.1}, {}, 1))
    base = compiled(program(None, {}, 1))[0]
    assert 1.9 < single.cost_analysis()["flops"] / base.cost_analysis()["flops"] < 2.1
    spread, spread_state, spread_rows = compiled(program({"rho": 0.1}, {"data": 2, "fsdp": 2, "tensor": 2}, 8))
    first = jax.tree.map(np.asarray, state.params)
    for _ in range(4):
        state, ours = single(state, {}, rows)
        spread_state, theirs = spread(spread_state, {}, spread_rows)
        assert abs(float(ours["sam/sharpness"]) - float(theirs["sam/sharpness"])) < 1e-6
        assert float(ours["sam/sharpness"]) > 1e-3
    for a, b, c in zip(*map(jax.tree.leaves, (state.params, place.gather(spread_state.params), first)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
        assert np.abs(a - c).max() > 1e-4
