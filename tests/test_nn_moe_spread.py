"""Experts on eight devices: the numbers, metrics and drops of one device, and no all-to-all beyond theory."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import tree as trees
from jaxlm.dist import mesh as meshes
from jaxlm.dist import place, rules, traffic
from jaxlm.dist.collectives import totals
from jaxlm.dist.mesh import MeshConfig
from jaxlm.nn import transformer
from jaxlm.nn.compute import Compute
from jaxlm.nn.config import ModelConfig, MoEConfig
from jaxlm.objectives.config import NextTokenConfig
from jaxlm.objectives.next_token import next_token
from jaxlm.optim import chain, schedules
from jaxlm.optim.config import OptimizerConfig
from jaxlm.training import balance
from jaxlm.training.step import Recipe, init_state, train_step

MOE = MoEConfig(experts=8, top_k=2, d_ff=16, balance="bias", bias_rate=0.01, z_weight=0.01)
CFG = ModelConfig(d_model=16, n_layers=2, n_heads=4, d_ff=32, vocab_size=32, max_length=16, moe=MOE)
ROWS, LENGTH, STEPS = 8, 8, 3

CASES = {
    "data and expert": (MeshConfig(data=2, expert=4), {}, "blocks"),
    "fsdp, tensor and expert": (MeshConfig(fsdp=2, tensor=2, expert=2), {"capacity_factor": 1.0}, "ragged"),
    "expert and context": (MeshConfig(expert=4, context=2), {"balance": "aux", "n_shared_experts": 1}, "ragged"),
}


def model(fields):
    return dataclasses.replace(CFG, moe=dataclasses.replace(MOE, **fields))


def recipe(cfg, shapes, mesh=None, backend="ragged"):
    compute = Compute(grouped=backend)
    if mesh is not None:
        compute = dataclasses.replace(compute, constrain=place.constrain(mesh), mesh=mesh)
    config = OptimizerConfig(learning_rate=1e-2)
    return Recipe(
        objective=next_token(NextTokenConfig()),
        apply=functools.partial(transformer.apply, cfg, compute=compute),
        optimizer=chain.make(config, cfg, shapes, STEPS),
        schedule=schedules.make(config, STEPS),
        extra=balance.extra(cfg),
    )


def batch(step):
    rng = np.random.default_rng(step)
    tokens = rng.integers(0, CFG.V, (ROWS, LENGTH + 1)).astype(np.int32)
    segments = (np.arange(LENGTH)[None, :] < LENGTH - np.arange(ROWS)[:, None] % 4).astype(np.int32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (ROWS, LENGTH))
    columns = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "mask": segments.astype(np.float32)}
    return columns | {"segments": segments, "positions": positions}


def initial(cfg):
    return jax.tree.map(np.asarray, transformer.init(cfg, jax.random.key(0)))


def on_one_device(cfg):
    made = recipe(cfg, initial(cfg))
    step = jax.jit(functools.partial(train_step, made))
    state, rows = init_state(made, jax.tree.map(jnp.asarray, initial(cfg))), []
    for i in range(STEPS):
        state, metrics = step(state, {}, batch(i))
        rows.append({name: float(value) for name, value in metrics.items()})
    return rows, state


def on_a_mesh(cfg, config, backend):
    mesh = meshes.make(config)
    made = recipe(cfg, initial(cfg), mesh, backend)
    params = place.put(initial(cfg), rules.shardings(initial(cfg), mesh))
    with jax.set_mesh(mesh):
        state = place.build(functools.partial(init_state, made), params, mesh=mesh, params=params)
        lies = jax.tree.map(lambda x: x.sharding, state)
        step = jax.jit(functools.partial(train_step, made), out_shardings=(lies, None), donate_argnums=0)
        program = step.lower(state, {}, place.place_batch(batch(0), mesh)).compile()
        rows = []
        for i in range(STEPS):
            state, metrics = program(state, {}, place.place_batch(batch(i), mesh))
            rows.append({name: float(value) for name, value in metrics.items()})
    return rows, state, program.as_text(), mesh


@pytest.mark.parametrize("name", CASES)
def test_experts_on_eight_devices_are_those_of_one(name):
    config, fields, backend = CASES[name]
    cfg = model(fields)
    expected, alone = on_one_device(cfg)
    rows, state, text, mesh = on_a_mesh(cfg, config, backend)
    for got, wanted in zip(rows, expected):
        assert got.keys() == wanted.keys() >= {"moe/load_max", "moe/load_max/1", "moe/dropped_fraction"}
        np.testing.assert_allclose([got[n] for n in wanted], list(wanted.values()), rtol=1e-5, atol=5e-6)
    for path, leaf in trees.leaves(place.gather((state.params, state.extra))).items():
        wanted = trees.leaves((alone.params, alone.extra))[path]
        np.testing.assert_allclose(leaf, wanted, rtol=0, atol=2e-4, err_msg=path)
    assert (expected[0]["moe/dropped_fraction"] > 0) == ("capacity_factor" in fields)
    kernel = state.params["params"]["layers"]["mlp"]["up"]["kernel"]
    parts = mesh.shape["fsdp"] * mesh.shape["tensor"] * mesh.shape["expert"]
    assert kernel.addressable_shards[0].data.size * parts == kernel.size
    sent = totals(text).get("all-to-all")
    assert (0 if sent is None else sent.bytes) == traffic.exchange_bytes(cfg, mesh, traffic.Shape(ROWS, LENGTH))
