"""Checksums of leaves: the same on every mesh and on host and device, and changed by every flipped bit."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm.training import integrity

DTYPES = ["float32", "bfloat16", "float16", "int8", "uint16", "int32", "bool", "float8_e4m3fn"]


def leaf_of(shape, dtype, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * 5).astype(dtype)


def checksum(leaf):
    return integrity.checksums({"leaf": leaf})[0]


CASES = [
    *[((6, 8), P("data", "fsdp"), dtype) for dtype in DTYPES],
    *[(shape, spec, "bfloat16") for shape, spec in [((), P()), ((7,), P()), ((8,), P("fsdp"))]],
    ((4, 6, 8), P(None, "data", "fsdp"), "float32"),
]


@pytest.mark.parametrize(("shape", "spec", "dtype"), CASES)
def test_the_checksum_does_not_depend_on_where_or_how_a_leaf_lies(shape, spec, dtype):
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    leaf = leaf_of(shape, dtype)
    sharded = jax.device_put(leaf, NamedSharding(mesh, spec))
    expected = checksum(np.asarray(leaf))
    assert checksum(leaf) == checksum(sharded) == expected
    assert int(integrity._device_sum(leaf)) == int(integrity._device_sum(sharded)) == expected


def test_a_leaf_larger_than_a_chunk_is_hashed_whole():
    for shape in [(3, integrity.CHUNK + 5), (integrity.CHUNK // 50, 123), (2 * integrity.CHUNK + 1,)]:
        leaf = leaf_of(shape, "float32")
        assert checksum(leaf) == int(integrity._device_sum(leaf))


def test_numpy_leaves_of_eight_bytes():
    leaf = np.arange(12, dtype=np.int64).reshape(3, 4)
    other = leaf.copy()
    other[1, 2] += 1 << 40
    assert checksum(leaf) != checksum(other)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(DTYPES[:4]), st.data())
def test_every_flipped_bit_and_every_swap_changes_the_checksum(dtype, data):
    contents = np.asarray(leaf_of((5, 6), dtype))
    raw = bytearray(contents.tobytes())
    bit = data.draw(st.integers(0, 8 * len(raw) - 1))
    raw[bit // 8] ^= 1 << bit % 8
    flipped = np.frombuffer(bytes(raw), contents.dtype).reshape(contents.shape)
    assert checksum(flipped) != checksum(contents)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: -x,
        lambda x: np.ascontiguousarray(x[::-1]),
        lambda x: np.zeros_like(x),
        lambda x: np.where(np.isin(np.arange(x.size), [3, 9]).reshape(x.shape), -x, x),
    ],
    ids=["all signs", "order", "zeros", "two signs"],
)
def test_larger_changes_change_the_checksum(change):
    contents = np.asarray(leaf_of((8, 8), "float32"))
    assert checksum(change(contents)) != checksum(contents)


def test_the_manifest_notices_a_change_of_itself(tmp_path):
    (tmp_path / "data").write_bytes(b"x" * 100)
    leaves = integrity.describe({"w": leaf_of((3,), "bfloat16")})
    integrity.seal(tmp_path, leaves, float("nan"))
    found = integrity.read(tmp_path)
    assert found.leaves == leaves and found.metric != found.metric
    assert integrity.damaged_files(tmp_path, found.files) == {}
    text = (tmp_path / integrity.FILE).read_text()
    (tmp_path / integrity.FILE).write_text(text.replace('"bfloat16"', '"float16"'))
    with pytest.raises(integrity.Damaged, match="contents changed"):
        integrity.read(tmp_path)
    (tmp_path / integrity.FILE).write_text(json.dumps([1]))
    with pytest.raises(integrity.Damaged, match="contents changed"):
        integrity.read(tmp_path)
