"""Every objective with what is trained, experts, SAM, muP and layer-wise rates: all pairs, in one trace each."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm import config as configs
from jaxlm.dist import mesh as meshes
from jaxlm.nn.config import ModelConfig
from jaxlm.objectives.completions import reward_column
from jaxlm.training import setup
from jaxlm.training.step import train_step

REWARDS = {"rewards": ["rewards.py:score"], "max_new_tokens": 4}
OBJECTIVES = (
    {"kind": "next_token"},
    {"kind": "sft"},
    {"kind": "distill", "loss": "jsd"},
    {"kind": "dpo"},
    {"kind": "simpo"},
    {"kind": "orpo"},
    {"kind": "kto"},
    {"kind": "reward"},
    {"kind": "grpo", "group_size": 4, "beta": 0.1, "epochs": 2, **REWARDS},
    {"kind": "ppo", "epochs": 2, **REWARDS},
)
TRAINED = ({}, {"lora": {"r": 2}}, {"lora": {"r": 2}, "quantize": "nf4"})
EXPERTS = (
    None,
    {"experts": 4, "top_k": 2, "d_ff": 16, "balance": "aux"},
    {"experts": 4, "top_k": 2, "balance": "bias"},
)
SAMS = (None, {"rho": 0.05})
MUPS = (None, {"base": {"d_model": 8, "d_ff": 16}})
LAYER_RATES = (None, {"rate": 0.5})
FACTORS = (OBJECTIVES, TRAINED, EXPERTS, SAMS, MUPS, LAYER_RATES)

TABLE = [
    (
        kind,
        trained,
        (1 + kind % 2) * ((kind + trained) % 3 == 0),
        (kind + trained) % 2,
        (kind // 2 + trained) % 2,
        (kind // 3 + trained // 2 + trained) % 2,
    )
    for kind in range(10)
    for trained in range(3)
]
"""Numbers of levels; the 10 x 3 pairs of objective and what is trained are each there once. Experts are balanced by a
loss with one half of the objectives and by a bias with the other."""

ROWS, LENGTH, STEPS = 8, 8, 2


def test_the_table_has_every_pair():
    for a, b in itertools.combinations(range(len(FACTORS)), 2):
        pairs = len(OBJECTIVES) * 2 if (a, b) == (0, 2) else len(FACTORS[a]) * len(FACTORS[b])
        assert len({(row[a], row[b]) for row in TABLE}) == pairs, (a, b)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A directory with a model of another shape and the same vocabulary."""
    path = tmp_path_factory.mktemp("models") / "teacher"
    cfg = ModelConfig(d_model=12, n_layers=1, n_heads=1, d_ff=16, vocab_size=32)
    jaxlm.save(path, cfg, jaxlm.init(cfg, jax.random.key(9)))
    return str(path)


def settings(row, teacher):
    """The configuration of a row of the table."""
    objective, trained, moe, sam, mup, layer_lr = (f[level] for f, level in zip(FACTORS, row, strict=True))
    if objective["kind"] == "distill":
        objective = objective | {"teacher": teacher}
    model = {"d_model": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "d_ff": 32, "vocab_size": 32, "moe": moe}
    optimizer = {"sam": sam, "layer_lr": layer_lr, "learning_rate": 0.01, "schedule": "constant", "warmup": 0.0}
    train = {"batch_size": ROWS, "accumulation": 2, "steps": STEPS, "attention": "reference", "scan": False}
    raw = {"model": model, "data": {"sequence_length": LENGTH}, "objective": objective, "optimizer": optimizer}
    return configs.build(raw | trained | {"train": train, "mup": mup})


@functools.cache
def batch(kind):
    """Rows of random tokens in the columns of an objective, with unequal labels."""
    rng = np.random.default_rng(0)
    shape = (ROWS, 2, LENGTH) if kind in ("dpo", "simpo", "orpo", "reward") else (ROWS, LENGTH)
    tokens = rng.integers(0, 32, (*shape[:-1], LENGTH + 1)).astype(np.int32)
    places = np.arange(LENGTH, dtype=np.int32)
    ends = rng.integers(4, LENGTH + 1, (*shape[:-1], 1))
    segments = (places < ends).astype(np.int32)
    columns = {"tokens": tokens[..., :-1], "targets": tokens[..., 1:], "segments": segments}
    columns |= {"mask": (segments * (places > 1)).astype(np.float32), "positions": places * segments}
    if kind == "kto":
        columns["label"] = (np.arange(ROWS) % 2).astype(np.float32)
    if kind in ("grpo", "ppo"):
        columns["ended"] = (np.arange(ROWS) % 2).astype(np.float32)
        columns[reward_column(0)] = rng.normal(size=ROWS).astype(np.float32)
    return jax.tree.map(jnp.asarray, columns)


def words(row):
    """A name for a row of the table."""
    return f"{OBJECTIVES[row[0]]['kind']}-{('full', 'lora', 'nf4')[row[1]]}-{''.join(map(str, row[2:]))}"


@pytest.mark.filterwarnings("ignore:model.tie_embeddings")
@pytest.mark.parametrize("row", TABLE, ids=words)
def test_every_pair_trains_in_one_trace(row, teacher):
    config = settings(row, teacher)
    program = setup.assemble(config, config.architecture(), meshes.make(config.mesh, jax.devices()[:1]))
    rows, traces = batch(config.objective.kind), []

    @jax.jit
    def step(state, frozen, rows):
        traces.append(None)
        return train_step(program.recipe, state, frozen, rows)

    with jax.set_mesh(program.mesh):
        frozen = setup.load_frozen(config, program)
        before = jax.tree.map(np.asarray, frozen)
        state = first = setup.start(None, program, frozen)
        for _ in range(STEPS):
            state, metrics = step(state, frozen, rows)
    assert len(traces) == 1
    assert metrics["skipped"] == 0.0 and all(np.isfinite(value) for value in metrics.values())
    assert set(state.params) - {"value"} == ({"params"} if config.lora is None else {"lora"})
    moved = [np.any(np.asarray(a) != np.asarray(b)) for a, b in zip(*map(jax.tree.leaves, (first, state)), strict=True)]
    assert np.mean(moved) > 0.5
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, frozen))
    assert ("sam/sharpness" in metrics) == (config.optimizer.sam is not None)
    assert ("moe/load_max" in metrics) == (config.model.moe is not None)


def test_adapters_taken_out_of_their_base_are_compared_with_the_model_as_it_was():
    raw = {"model": {"d_model": 16, "n_layers": 1, "n_heads": 2, "vocab_size": 32}, "data": {"sequence_length": LENGTH}}
    raw |= {"lora": {"r": 2, "init": "pissa"}, "train": {"batch_size": ROWS, "attention": "reference", "scan": False}}
    config = configs.build(raw | {"objective": {"kind": "dpo"}})
    program = setup.assemble(config, config.architecture(), meshes.make(config.mesh, jax.devices()[:1]))
    with jax.set_mesh(program.mesh):
        frozen = setup.load_frozen(config, program)
        state, frozen = setup.start(None, program, frozen), setup.settle(program, frozen)
        _, metrics = jax.jit(train_step, static_argnums=0)(program.recipe, state, frozen, batch("dpo"))
    np.testing.assert_allclose(metrics["loss"], np.log(2), rtol=1e-5)
    config = configs.build(raw | {"objective": {"kind": "dpo", "reference": "adapter-off"}})
    with pytest.raises(ValueError, match=r"objective\.reference: adapter-off, but lora\.init pissa"):
        setup.assemble(config, config.architecture(), program.mesh)
