"""Placement: global rows stay global rows, positions are cut over context, microbatches stay where they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxlm.dist import mesh as meshes
from jaxlm.dist import place, rules
from jaxlm.dist.collectives import collectives
from jaxlm.dist.mesh import MeshConfig


def batch(rows=8, length=6):
    tokens = np.arange(rows * length, dtype=np.int32).reshape(rows, length)
    return {"tokens": tokens, "mask": np.ones((rows, length), np.float32), "weight": np.arange(rows, dtype=np.float32)}


@pytest.mark.parametrize(
    "config",
    [
        MeshConfig(),
        MeshConfig(fsdp=2, tensor=2),
        MeshConfig(context=2, expert=2),
        MeshConfig(data=1, context=2, tensor=4),
    ],
)
def test_a_batch_is_spread_and_comes_back_unchanged(config):
    mesh, given = meshes.make(config), batch()
    placed = place.place_batch(given, mesh)
    for name, column in given.items():
        np.testing.assert_array_equal(place.gather(placed[name]), column)
    shard = placed["tokens"].addressable_shards[0].data
    rows = mesh.shape["data"] * mesh.shape["fsdp"] * mesh.shape["expert"]
    assert shard.shape == (8 // rows, 6 // mesh.shape["context"])
    assert placed["weight"].addressable_shards[0].data.shape == (8 // rows,)


def test_of_every_column_the_axis_of_positions_is_cut_over_context():
    mesh = meshes.make(MeshConfig(data=2, context=4))
    given = {"tokens": np.zeros((4, 2, 8)), "segments": np.ones((4, 2, 8)), "reference_log_probs": np.zeros((4, 2))}
    shapes = {n: x.addressable_shards[0].data.shape for n, x in place.place_batch(given, mesh).items()}
    assert shapes == {"tokens": (2, 2, 2), "segments": (2, 2, 2), "reference_log_probs": (2, 2)}
    given = {"tokens": np.zeros((4, 8)), "top": np.zeros((4, 8, 3)), "rewards": np.zeros((4, 3))}
    shapes = {n: x.addressable_shards[0].data.shape for n, x in place.place_batch(given, mesh).items()}
    assert shapes == {"tokens": (2, 2), "top": (2, 2, 3), "rewards": (2, 3)}


def test_what_cannot_be_spread_is_named():
    mesh = meshes.make(MeshConfig(data=2, context=4))
    with pytest.raises(ValueError, match=r"train.batch_size: 7 .*mesh.data 2"):
        place.place_batch(batch(rows=7), mesh)
    with pytest.raises(ValueError, match=r"data.sequence_length: 6 \(of tokens\).* mesh.context 4"):
        place.place_batch(batch(length=6), mesh)
    with pytest.raises(ValueError, match=r"tokens: 8 rows, but this process holds 16"):
        place.place_batch(batch(length=8), mesh, batch_size=16)


def test_one_process_reads_every_row():
    np.testing.assert_array_equal(place.host_rows(meshes.make(MeshConfig(fsdp=2, tensor=2)), 12), np.arange(12))


def test_microbatches_cover_the_rows_and_move_nothing():
    mesh = meshes.make(MeshConfig(data=4, context=2))
    placed = place.place_batch(batch(rows=16), mesh)["tokens"]
    split = jax.jit(lambda x: place.microbatches({"x": x}, 2)["x"])
    parts = split(placed)
    assert parts.shape == (2, 8, 6)
    assert sorted(np.asarray(parts).reshape(-1)) == list(range(96))
    assert collectives(split.lower(placed).compile().as_text()) == []
    assert parts.sharding.spec == P(None, "data", "context")


def test_constrain_cuts_rows_and_positions_only():
    mesh = meshes.make(MeshConfig(data=2, context=2, tensor=2))
    y = jax.jit(place.constrain(mesh))(jnp.ones((4, 6, 10)))
    assert y.addressable_shards[0].data.shape == (2, 3, 10)


def test_put_replicate_and_gather():
    mesh = meshes.make(MeshConfig(fsdp=8))
    tree = {"unembed": {"kernel": np.arange(128.0, dtype=np.float32).reshape(16, 8)}, "norm": {"scale": np.ones(8)}}
    spread = place.put(tree, rules.shardings(tree, mesh))
    assert spread["unembed"]["kernel"].addressable_shards[0].data.shape == (2, 8)
    whole = place.replicate(spread, mesh)
    assert whole["unembed"]["kernel"].is_fully_replicated
    jax.tree.map(np.testing.assert_array_equal, place.gather(whole), tree)
