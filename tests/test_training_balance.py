"""Balance in training: the bias follows the whole batch, is saved, and evens a skewed router as the aux loss does."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm import config as configs
from jaxlm.nn import transformer
from jaxlm.nn.compute import Compute
from jaxlm.nn.config import ModelConfig, MoEConfig
from jaxlm.objectives.config import NextTokenConfig
from jaxlm.objectives.next_token import next_token
from jaxlm.optim import chain, schedules
from jaxlm.optim.config import OptimizerConfig
from jaxlm.training import balance
from jaxlm.training.balance import DEAD_AFTER, PATIENCE, Alarm
from jaxlm.training.export import export
from jaxlm.training.loop import train
from jaxlm.training.setup import load_frozen, prepare, start
from jaxlm.training.step import Recipe, init_state, train_step

pytestmark = pytest.mark.usefixtures("own_cache")

MOE = MoEConfig(experts=4, top_k=1, d_ff=8, aux_weight=0.3, bias_rate=0.02, renormalize=False)
CFG = ModelConfig(d_model=16, n_layers=2, n_heads=2, d_ff=16, vocab_size=16, max_length=8, moe=MOE)


def recipe(cfg, accumulation=1):
    settings = OptimizerConfig(learning_rate=3e-3, warmup=0.0, weight_decay=0.0)
    shapes = jax.eval_shape(functools.partial(transformer.init, cfg), jax.random.key(0))
    return Recipe(
        objective=next_token(NextTokenConfig()),
        apply=functools.partial(transformer.apply, cfg, compute=Compute(grouped="ragged")),
        optimizer=chain.make(settings, cfg, shapes, 1000),
        schedule=schedules.make(settings, 1000),
        accumulation=accumulation,
        extra=balance.extra(cfg),
    )


def batch(step):
    tokens = np.random.default_rng(step).integers(0, 16, (8, 9)).astype(np.int32)
    ones = np.ones((8, 8), np.int32)
    columns = {"tokens": tokens[:, :-1], "targets": tokens[:, :-1], "segments": ones, "mask": ones.astype(np.float32)}
    return columns | {"positions": np.broadcast_to(np.arange(8, dtype=np.int32), (8, 8))}


def skewed(cfg):
    """Every embedding has a common part, which the router of each layer reads as the first expert."""
    params = transformer.init(cfg, jax.random.key(0))
    params["params"]["embed"]["kernel"] += 0.03
    router = params["params"]["layers"]["mlp"]["router"]
    router["kernel"] = 0.05 * router["kernel"] + 0.1 * jnp.array([1.0, 0.0, -0.5, -1.0])[None, None, :]
    return params


@functools.cache
def curve(kind, accumulation=1, steps=100):
    """Metrics of each step, and what the first one left in `extra`."""
    cfg = dataclasses.replace(CFG, moe=dataclasses.replace(MOE, balance=kind))
    made = recipe(cfg, accumulation)
    state, loads, first = init_state(made, skewed(cfg)), [], None
    step = jax.jit(functools.partial(train_step, made))
    for i in range(steps):
        state, metrics = step(state, {}, batch(i))
        loads.append({name: float(value) for name, value in metrics.items()})
        first = jax.device_get(state.extra) if i == 0 else first
    return loads, first


@pytest.mark.parametrize(("kind", "evens"), [("aux", True), ("bias", True), ("none", False)])
def test_a_skewed_router_is_balanced_by_either_way_and_not_without(kind, evens):
    loads, _ = curve(kind)
    assert loads[0]["moe/load_max"] > 3
    last = np.mean([row["moe/load_max"] for row in loads[-20:]])
    assert (last <= 1.5) == evens, last


def test_the_bias_moves_by_the_load_of_the_whole_batch():
    rows, extra = curve("bias", accumulation=2, steps=1)
    whole, alone = curve("bias")
    for name in ("moe/load_max", "moe/load_max/0", "moe/load_entropy", "moe/router_entropy", "moe/dead_experts"):
        assert rows[0][name] == pytest.approx(whole[0][name], rel=1e-5)
    bias = extra["moe_state"]["layers"]["mlp"]["router"]["bias"]
    np.testing.assert_array_equal(bias, alone["moe_state"]["layers"]["mlp"]["router"]["bias"])
    made = recipe(dataclasses.replace(CFG, moe=dataclasses.replace(MOE, balance="bias")))
    output = made.apply(skewed(CFG), batch(0)["tokens"])
    counts = np.asarray(output.aux["moe/counts"])
    np.testing.assert_allclose(bias, 0.02 * np.sign(counts.mean(1, keepdims=True) - counts), atol=1e-7)


def test_auxiliary_losses_are_in_the_loss():
    rows, _ = curve("aux")
    plain, _ = curve("none")
    assert rows[0]["loss"] > plain[0]["loss"] + 0.9 * MOE.aux_weight


def test_an_expert_is_dead_after_fifty_steps_without_a_token():
    extra = balance.extra(CFG)
    state, dead = extra.start(), []
    for i in range(DEAD_AFTER + 3):
        counts = jnp.array([[5.0, 1.0 if i == 1 else 0.0, 1.0, 0.0]] * 2)
        zeros = jnp.zeros(2)
        metrics = {"moe/counts": counts, "moe/dropped": zeros, "moe/router_entropy": zeros}
        state, metrics = extra.adjust(state, metrics)
        dead.append(float(metrics["moe/dead_experts"]))
    assert dead[:2] == [2.0, 1.0] and dead[DEAD_AFTER] == 1.0 and dead[DEAD_AFTER + 1] == 2.0
    assert float(metrics["moe/load_max"]) == pytest.approx(4 * 5 / 6)


def test_alarms_come_once():
    alarm, said = Alarm(), []
    for step in range(1, 2 * PATIENCE + 10):
        said += alarm.look(step, {"moe/load_max": 3.0, "moe/dead_experts": 1.0 if step > 60 else 0.0})
    assert len(said) == 2 and "load" in said[0] and "dead" not in said[0] and "1 experts" in said[1]
    assert alarm.look(1, {"loss": 1.0}) == []


@pytest.fixture(scope="module")
def biased(tmp_path_factory):
    """Settings of a run of two steps with a selection bias, which has ended."""
    raw = {
        "run": {"dir": str(tmp_path_factory.mktemp("biased") / "run")},
        "model": {"d_model": 16, "n_layers": 1, "n_heads": 2, "vocab_size": 280,
                  "moe": {"experts": 4, "top_k": 2, "d_ff": 8, "balance": "bias", "bias_rate": 0.05}},
        "data": {"sequence_length": 16},
        "train": {"steps": 2, "batch_size": 8, "checkpoint_every": 1, "eval_batches": 1, "prompts": []},
    }  # fmt: skip
    assert train(configs.build(raw)) == 0
    return raw


def bias_of(variables):
    return variables["moe_state"]["layers"]["mlp"]["router"]["bias"]


def test_a_run_saves_the_bias_and_its_export_chooses_by_it(biased, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(biased["run"]["dir"], run)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {"moe/load_max", "moe/load_max/0", "moe/dead_experts"} <= rows[1].keys()
    assert train(configs.build(biased | {"run": {"dir": str(run)}, "train": biased["train"] | {"steps": 4}})) == 0
    config = json.loads((run / "hf/config.json").read_text())
    assert config["architectures"] == ["MixtralForCausalLM"]
    cfg, variables = jaxlm.load(run)
    bias = bias_of(variables)
    assert bias.shape == (1, 4)
    # Four steps of 0.05: a resumed run that had lost the first two would end at 0, 0.05 or 0.1.
    np.testing.assert_allclose(np.asarray(bias) / 0.05 % 1.0 % 0.999, 0.0, atol=2e-3)
    assert float(jnp.abs(bias).max()) > 0.1
    assert jaxlm.logits(cfg, variables, [[1, 2, 3]]).shape == (1, 3, cfg.V)


def test_a_run_that_is_exported_from_its_checkpoint_keeps_the_bias(biased, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(biased["run"]["dir"], run)
    shutil.rmtree(run / "hf")
    export(run, tmp_path / "out", configs.build(biased), lambda line: None)
    ours, wanted = (bias_of(jaxlm.load(path)[1]) for path in (tmp_path / "out", biased["run"]["dir"]))
    np.testing.assert_array_equal(ours, wanted)
    assert np.any(wanted)


@pytest.mark.parametrize("kind", ["next_token", "lora", "dpo"])
def test_a_run_starts_from_the_bias_of_its_directory(biased, tmp_path, kind):
    """So does what its model is compared with."""
    pairs = tmp_path / "pairs.jsonl"
    lines = ({"prompt": f"{i} and", "chosen": " two", "rejected": " three"} for i in range(8))
    pairs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    sections = {
        "next_token": {},
        "lora": {"lora": {"r": 2}},
        "dpo": {"objective": {"kind": "dpo"}, "data": {"path": str(pairs), "validation": str(pairs)}},
    }[kind]
    directory = biased["run"]["dir"]
    raw = biased | {"model": {"path": directory}, "run": {"dir": str(tmp_path / "run")}, **sections}
    setup = prepare(configs.build(raw))
    frozen = load_frozen(setup.config, setup.program)
    state = start(directory, setup.program, frozen)
    for model in (state.extra, frozen.get("reference", state.extra)):
        np.testing.assert_array_equal(bias_of(model), bias_of(jaxlm.load(directory)[1]))
