"""Attention over a sequence that is cut over devices, as a ring: equal to the whole, and no byte more than it must."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxlm.dist.collectives import totals
from jaxlm.nn.kernels.attention import AttentionMask, attention, choose, reference_attention
from jaxlm.nn.kernels.spread import spread_attention

AXES = ("data", "fsdp", "tensor", "expert", "context")
TOKENS = PartitionSpec(("data", "fsdp", "expert"), "context", "tensor")
SHAPE = {"q": (4, 32, 4, 8), "k": (4, 32, 2, 8), "v": (4, 32, 2, 8), "do": (4, 32, 4, 8)}


def mesh_of(**sizes):
    return jax.make_mesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES, axis_types=(AxisType.Auto,) * 5)


def operands(dtype="float32"):
    return [
        jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype) for seed, shape in enumerate(SHAPE.values())
    ]


def program(form):
    def compute(q, k, v, do):
        o, pull = jax.vjp(form, q, k, v)
        return o, *pull(do)

    return compute


PACKED = jnp.asarray([[1] * 11 + [2] * 21, [1] * 3 + [2] * 20 + [0] * 9, [0] * 32, [4] * 32], jnp.int32)


@pytest.mark.parametrize(
    ("sizes", "mask", "softcap", "through"),
    [
        ({"context": 8}, AttentionMask(), None, "attention"),
        ({"context": 4, "tensor": 2}, AttentionMask(window=6), 3.0, "spread"),
        ({"context": 2, "data": 2, "tensor": 2}, AttentionMask(segments_BxL=PACKED), None, "spread"),
        ({"context": 4, "fsdp": 2}, AttentionMask(False, 9, PACKED), None, "attention"),
    ],
)
def test_the_ring_equals_the_whole(sizes, mask, softcap, through):
    settings = {"scale": 0.4, "softcap": softcap}
    expected = jax.jit(program(functools.partial(reference_attention, mask=mask, **settings)))(*operands())
    ring = functools.partial(attention, backend="ring", **settings)
    with jax.set_mesh(mesh_of(**sizes)):
        if through == "spread":
            form = lambda q, k, v: spread_attention(ring, q, k, v, mask, gather=False)  # noqa: E731
        else:
            form = functools.partial(ring, mask=mask)
        found = jax.jit(program(form))(*operands())
    for name, a, b in zip(("o", "dq", "dk", "dv"), found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_ring_sends_what_it_must(dtype):
    devices = 4
    mesh = mesh_of(context=devices, data=2)
    q, k, v, do = (
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, TOKENS)) for x in operands(dtype)
    )
    with jax.set_mesh(mesh):
        form = functools.partial(attention, mask=AttentionMask(), scale=0.4, backend="ring")
        compiled = jax.jit(program(form)).lower(q, k, v, do).compile()
    found = totals(compiled.as_text())
    elements = 2 * k.size // (devices * 2)
    width = k.dtype.itemsize
    # Forward: keys and values, n - 1 times. Backward: the same, and as often their gradients in float32. The first hop
    # is the same in both, and the compiler makes one of the two.
    assert set(found) == {"collective-permute"}
    hops = devices - 1
    whole = elements * (2 * hops * width + hops * 4)
    assert found["collective-permute"].bytes in (whole, whole - elements * width)


def test_a_ring_without_devices_is_an_error():
    q = jax.ShapeDtypeStruct((2, 30, 4, 8), "float32")
    with pytest.raises(ValueError, match="no mesh in force whose axis context has more than one device"):
        choose(q, q, mask=AttentionMask(), backend="ring")
    with jax.set_mesh(mesh_of(context=8)), pytest.raises(ValueError, match="multiple of 8, not 30"):
        choose(q, q, mask=AttentionMask(), backend="ring")
