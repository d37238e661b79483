"""The mesh: sizes from the configuration, axis types, slices, and messages for what cannot be."""

import dataclasses
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest

from jaxlm.dist import mesh as meshes
from jaxlm.dist.mesh import AXES, MeshConfig
from jaxlm.nn.config import ModelConfig, MoEConfig


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (MeshConfig(), (8, 1, 1, 1, 1)),
        (MeshConfig(fsdp=4), (2, 4, 1, 1, 1)),
        (MeshConfig(data=1, fsdp=-1, tensor=2), (1, 4, 2, 1, 1)),
        (MeshConfig(data=2, fsdp=2, tensor=1, expert=1, context=2), (2, 2, 1, 1, 2)),
        (MeshConfig(data=1, expert=-1), (1, 1, 1, 8, 1)),
    ],
)
def test_make_fills_the_devices(config, sizes):
    mesh = meshes.make(config)
    assert tuple(mesh.shape.items()) == tuple(zip(AXES, sizes, strict=True))
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
    assert len(set(mesh.devices.flat)) == 8


def test_make_on_some_devices():
    assert meshes.make(MeshConfig(fsdp=2), jax.devices()[:4]).shape["data"] == 2


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (MeshConfig(fsdp=3), ["mesh.fsdp: 3", "8 devices"]),
        (MeshConfig(tensor=0), ["mesh.tensor: 0"]),
        (MeshConfig(context=-2), ["mesh.context: -2"]),
        (MeshConfig(fsdp=-1), ["mesh.fsdp: -1", "mesh.data"]),
        (MeshConfig(data=2, fsdp=2), ["mesh.data 2 x mesh.fsdp 2: 4", "8 devices"]),
        (MeshConfig(data=1), ["mesh.data 1", "8 devices"]),
        (MeshConfig(fsdp=4, tensor=4), ["mesh.fsdp 4 x mesh.tensor 4: 16", "8 devices"]),
        (MeshConfig(data=16), ["mesh.data: 16", "8 devices"]),
    ],
)
def test_sizes_that_cannot_be_are_named(config, words):
    with pytest.raises(ValueError) as error:
        meshes.make(config)
    assert all(word in str(error.value) for word in words), error.value


def test_only_data_crosses_slices():
    devices = [
        SimpleNamespace(id=i, platform="cpu", device_kind="cpu", process_index=i // 2, slice_index=i // 4)
        for i in range(8)
    ]
    assert meshes.slices(devices) == 2
    grid = meshes.sliced_grid(MeshConfig(fsdp=2, tensor=2).sizes(8), devices)
    assert grid.shape == (2, 2, 2, 1, 1)
    for row in grid:
        assert len({device.slice_index for device in row.flat}) == 1
    with pytest.raises(ValueError, match=r"mesh.data: 1 .* 2 slices"):
        meshes.sliced_grid(MeshConfig(fsdp=8).sizes(8), devices)


MODEL = ModelConfig(d_model=48, n_layers=2, n_heads=6, n_kv_heads=3, d_ff=96, vocab_size=100)


@pytest.mark.parametrize(
    ("mesh", "model", "words"),
    [
        ({"tensor": 4}, {}, ["model.n_heads: 6", "mesh.tensor 4"]),
        ({"tensor": 2}, {}, ["model.n_kv_heads: 3", "mesh.tensor 2"]),
        ({"tensor": 8}, {"n_heads": 8, "n_kv_heads": 8}, ["model.vocab_size: 100", "mesh.tensor 8"]),
        ({"tensor": 2}, {"n_kv_heads": 2, "d_ff": 95}, ["model.d_ff: 95", "mesh.tensor 2"]),
        ({"fsdp": 8}, {"d_model": 36}, ["model.d_model: 36", "mesh.fsdp 8"]),
        ({"expert": 8}, {"moe": MoEConfig(experts=4)}, ["model.moe.experts: 4", "mesh.expert 8"]),
        ({"tensor": 2}, {"n_kv_heads": 2, "moe": MoEConfig(d_ff=7)}, ["model.moe.d_ff: 7", "mesh.tensor 2"]),
        ({"expert": 2}, {}, ["mesh.expert: 2", "model.moe"]),
    ],
)
def test_model_dimensions_that_cannot_be_cut_are_named(mesh, model, words):
    with pytest.raises(ValueError) as error:
        meshes.check_model(MeshConfig(**mesh).sizes(8), dataclasses.replace(MODEL, **model))
    assert all(word in str(error.value) for word in words), error.value


def test_batch_must_spread_evenly():
    sizes = MeshConfig(data=2, fsdp=2, context=2).sizes(8)
    meshes.check_batch(sizes, 8, 64, accumulation=2)
    with pytest.raises(ValueError, match=r"train.batch_size: 6 .*mesh.data 2 x mesh.fsdp 2"):
        meshes.check_batch(sizes, 6, 64)
    with pytest.raises(ValueError, match=r"train.batch_size: 12 / train.accumulation 2 .* multiple of 8"):
        meshes.check_batch(sizes, 12, 64, accumulation=2)
    with pytest.raises(ValueError, match=r"train.batch_size: 8 .* train.accumulation 3"):
        meshes.check_batch(sizes, 8, 64, accumulation=3)
    with pytest.raises(ValueError, match=r"data.sequence_length: 63 .* mesh.context 2"):
        meshes.check_batch(sizes, 8, 63)


def test_reading_the_configuration_does_not_import_jax():
    code = "import sys, jaxlm.dist.mesh as m; m.MeshConfig(fsdp=2).sizes(8); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
