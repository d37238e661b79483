"""Everything about optimisation together: each pair of choices trains, in one trace, and eight devices equal one."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm import config as configs
from jaxlm import tree as trees
from jaxlm.dist import mesh as meshes
from jaxlm.dist import place
from jaxlm.training import setup
from jaxlm.training.step import init_state, train_step
from jaxlm.types import Objective

OPTIMIZERS = ("adamw", "lion", "adafactor", "sgd", "muon", "schedule_free", "adamw8bit")
SAMS = (
    None,
    {"rho": 0.05},
    {"rho": 0.2, "variant": "asam"},
    {"rho": 0.05, "granularity": "micro"},
    {"rho": 0.05, "interval": 2},
)
LAYER_RATES = (None, {"mode": "decay_to_input", "rate": 0.5}, {"mode": "decay_to_output", "rate": 0.5})
MUPS = (None, {"base": {"d_model": 8, "n_heads": 2, "n_kv_heads": 1, "head_dim": 4, "d_ff": 16, "n_layers": 1}})
"""Width grows by 2, the feed-forward layer by 1.5, the queries by 2 and depth by 2."""

ACCUMULATIONS = (1, 2)
AVERAGES = (None, 0.5)
FACTORS = (OPTIMIZERS, SAMS, LAYER_RATES, MUPS, ACCUMULATIONS, AVERAGES)

REST = list(itertools.product(*(range(len(factor)) for factor in FACTORS[2:])))
TABLE = [(row // 5, row % 5, *REST[7 * row % len(REST)]) for row in range(35)]
"""Numbers of levels; the 7 x 5 pairs of rule and SAM are each there once, so no smaller table has all pairs."""

MESHES = ({"data": 8}, {"data": 1, "fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2})
SPREAD = [TABLE[row] for row in (3, 6, 12, 18, 20, 29, 31)]
"""Rows that train the whole model, on one device and on eight: every rule, every SAM, all pairs of the rest."""

MODEL = {"d_model": 16, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 24, "vocab_size": 32}
ROWS, LENGTH, STEPS = 16, 8, 3
RATES = {"sgd": 0.3, "adamw": 0.02, "adamw8bit": 0.02, "muon": 0.02, "schedule_free": 0.02, "adafactor": 0.1}


def test_the_table_has_every_pair():
    for a, b in itertools.combinations(range(len(FACTORS)), 2):
        assert len({(row[a], row[b]) for row in TABLE}) == len(FACTORS[a]) * len(FACTORS[b])
    for factor in range(2):
        assert {row[factor] for row in SPREAD} == set(range(len(FACTORS[factor])))
    for a, b in itertools.combinations(range(2, len(FACTORS)), 2):
        assert len({(row[a], row[b]) for row in SPREAD}) == len(FACTORS[a]) * len(FACTORS[b])


def settings(row, mesh=None):
    """The configuration of a row of the table."""
    name, sam, layer_lr, mup, accumulation, ema = (f[level] for f, level in zip(FACTORS, row, strict=True))
    optimizer = {"name": name, "sam": sam, "layer_lr": layer_lr, "learning_rate": RATES.get(name, 0.005)}
    optimizer |= {"schedule": "constant", "warmup": 0.0}
    train = {"batch_size": ROWS, "accumulation": accumulation, "ema": ema, "steps": STEPS}
    raw = {"model": MODEL, "data": {"sequence_length": LENGTH}, "optimizer": optimizer, "mup": mup}
    raw["train"] = train | {"attention": "reference", "scan": False}
    return configs.build(raw | {"mesh": mesh or {}})


def words(value):
    """A name for a row of the table or for a mesh."""
    if isinstance(value, dict):
        return "-".join(value)
    name, sam, *_ = row = value
    return f"{OPTIMIZERS[name]}-{['off', 'sam', 'asam', 'micro', 'look'][sam]}-{''.join(map(str, row[2:]))}"


@functools.cache
def batch():
    """Rows of a simple language, with unequal labels: the next token is this one plus one, or two."""
    rng = np.random.default_rng(0)
    tokens = (rng.integers(0, 32, (ROWS, 1)) + np.cumsum(rng.integers(1, 3, (ROWS, LENGTH + 1)), axis=1)) % 32
    tokens = tokens.astype(np.int32)
    mask = np.arange(LENGTH)[None, :] < rng.integers(2, LENGTH + 1, (ROWS, 1))
    columns = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "mask": mask.astype(np.float32)}
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (ROWS, LENGTH)).copy()
    return columns | {"segments": np.ones((ROWS, LENGTH), np.int32), "positions": positions}


def advance(recipe, state, rows, jit=jax.jit):
    """A few steps on one batch, traced once: losses, norms and the last state."""

    traces = []

    @jit
    def step(state, frozen, rows):
        traces.append(None)
        return train_step(recipe, state, frozen, rows)

    history = []
    for _ in range(STEPS):
        state, metrics = step(state, {}, rows)
        history.append(metrics)
    assert len(traces) == 1
    return [float(m["loss"]) for m in history], jax.tree.map(float, history[-1]), state


KERNELS = ("embed/kernel", "layers/mlp/gate/kernel", "norm/scale")


def few(variables):
    """A tree with the paths of some of the model's leaves."""
    found = {path: leaf for path, leaf in trees.leaves(variables["params"]).items() if path in KERNELS}
    return {"params": nest(found)}


def nest(leaves):
    made = {}
    for path, leaf in leaves.items():
        *folders, name = path.split("/")
        functools.reduce(lambda node, part: node.setdefault(part, {}), folders, made)[name] = leaf
    return made


def token_mixer(base):
    """A model of few leaves in an objective: a token predicts the next through every layer's kernel."""

    def loss(apply, params, frozen, rows, weights, key):
        p = params["params"]
        x = jnp.take(p["embed"]["kernel"], rows["tokens"], axis=0)
        gate = p["layers"]["mlp"]["gate"]["kernel"]
        h = jnp.tanh(jnp.einsum("bld,ndf->blnf", x, gate))
        x = x + jnp.einsum("blnf,ndf->bld", h, gate)
        logits = (x * p["norm"]["scale"][None, None]) @ p["embed"]["kernel"].T
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, rows["targets"])
        return jnp.sum(nll * rows["mask"]) / weights["tokens"], {}

    return Objective(base.prepare, base.weights, loss)


@pytest.mark.parametrize("row", TABLE, ids=words)
def test_every_pair_trains_in_one_trace(row, monkeypatch):
    """The step of a whole configuration, over a model of three leaves, which is what keeps 35 compilations short."""
    init = setup._fresh
    monkeypatch.setattr(setup, "_fresh", lambda *args: few(init(*args)))
    config = settings(row)
    program = setup.assemble(config, config.architecture(), meshes.make(config.mesh, jax.devices()[:1]))
    recipe = program.recipe._replace(objective=token_mixer(program.recipe.objective))
    state = init_state(recipe, program.fresh(program.base()))
    losses, last, after = advance(recipe, state, batch())
    assert np.all(np.isfinite(losses)) and last["skipped"] == 0.0
    assert losses[-1] < losses[0]
    assert ("sam/sharpness" in last) == (config.optimizer.sam is not None)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(after))
    assert int(after.applied) == STEPS


@functools.cache
def fresh(mup):
    """Parameters of the whole model at step 0, as numpy arrays, with or without muP."""
    config = settings((0, 0, 0, mup, 0, 0))
    program = setup.assemble(config, config.architecture(), meshes.make(config.mesh, jax.devices()[:1]))
    return jax.tree.map(np.asarray, program.fresh(program.base()))


def trained(row, mesh, devices):
    """Losses and parameters of a few steps of a row on a mesh."""
    config = settings(row, mesh)
    program = setup.assemble(config, config.architecture(), meshes.make(config.mesh, jax.devices()[:devices]))
    with jax.set_mesh(program.mesh):
        state = init_state(program.recipe, jax.tree.map(jnp.asarray, fresh(row[3])))
        state = place.put(state, program.shardings)
        jit = functools.partial(jax.jit, out_shardings=(program.shardings, None))
        losses, _, after = advance(program.recipe, state, place.place_batch(batch(), program.mesh), jit)
        return losses, place.gather((after.params, after.ema))


@pytest.mark.parametrize("row, mesh", list(zip(SPREAD, itertools.cycle(MESHES), strict=False)), ids=words)
def test_eight_devices_equal_one(row, mesh):
    """Losses within 1e-5; parameters and their average within a thousandth of the way that they have come.

    Adam and its kin divide by the size of a gradient, however small, which is where rounding shows.
    """
    losses, single = trained(row, None, 1)
    spread_losses, spread = trained(row, mesh, 8)
    assert np.all(np.isfinite(losses))
    assert losses[-1] < losses[0]
    np.testing.assert_allclose(spread_losses, losses, rtol=0, atol=1e-5)
    way = distance(single[0], fresh(row[3]))
    assert way > 0.01
    for ours, theirs in zip(single, spread, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or distance(ours, theirs) < 1e-3 * way


def distance(a, b):
    """Euclidean distance between trees."""
    return np.sqrt(sum(np.sum((x - y) ** 2) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)))
