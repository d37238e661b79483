"""What the model writes out for a mesh equals what one device computes: projections, lookups, attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from jaxlm.dist.collectives import totals
from jaxlm.nn import copies
from jaxlm.nn.kernels.attention import AttentionMask, reference_attention
from jaxlm.nn.kernels.matmul import matmul
from jaxlm.nn.kernels.spread import spread_attention

AXES = ("data", "fsdp", "tensor", "expert", "context")


def mesh_of(**sizes):
    return jax.make_mesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES, axis_types=(AxisType.Auto,) * 5)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def close(a, b, tolerance=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


def branch(weights, x):
    """Two projections of one input, and one back."""
    fan = copies.fan_out(x)
    hidden = copies.columns(matmul, fan, weights["gate"]) * copies.columns(matmul, fan, weights["up"])
    return jnp.sum(jnp.square(copies.rows(matmul, hidden, weights["down"])))


WEIGHTS = {"gate": normal(0, 8, 32), "up": normal(1, 8, 32), "down": normal(2, 32, 8)}


@pytest.mark.parametrize("sizes", [{"tensor": 8}, {"data": 2, "tensor": 4}, {"fsdp": 4, "tensor": 2}, {"data": 8}])
def test_a_branch_cut_over_tensor_equals_the_whole_one(sizes):
    x = normal(3, 8, 4, 8)
    expected = jax.jit(jax.value_and_grad(branch, (0, 1)))(WEIGHTS, x)
    with jax.set_mesh(mesh_of(**sizes)):
        close(jax.jit(jax.value_and_grad(branch, (0, 1)))(WEIGHTS, x), expected, 1e-4)


@pytest.mark.parametrize(("dtype", "width"), [(jnp.float32, 4), (jnp.bfloat16, 2)])
def test_a_branch_sums_once_a_pass_in_the_dtype_of_its_input(dtype, width):
    x = normal(3, 8, 4, 8).astype(dtype)
    mesh = mesh_of(tensor=8)

    def spec(name):
        return jax.NamedSharding(mesh, jax.P("tensor", None) if name == "down" else jax.P(None, "tensor"))

    weights = {name: jax.device_put(w, spec(name)) for name, w in WEIGHTS.items()}
    outside = {name: spec(name) for name in WEIGHTS}, jax.NamedSharding(mesh, jax.P())
    with jax.set_mesh(mesh):
        program = jax.jit(jax.grad(branch, (0, 1)), out_shardings=outside).lower(weights, x).compile()
    found = totals(program.as_text())
    assert {kind: total.bytes for kind, total in found.items()} == {"all-reduce": 2 * x.size * width}


@pytest.mark.parametrize("sizes", [{"data": 8}, {"fsdp": 4, "context": 2}, {"data": 2, "tensor": 4}])
def test_a_tied_table_is_looked_up_and_summed_once(sizes):
    table, tokens = normal(0, 24, 8), jnp.asarray(np.random.default_rng(1).integers(-2, 30, (8, 4)), jnp.int32)

    def loss(table):
        spread = copies.table_copies(table, tokens.shape)
        return jnp.sum(jnp.sin(copies.look_up(spread, tokens)) * normal(2, 8, 4, 8))

    expected = jax.value_and_grad(loss)(table)
    with jax.set_mesh(mesh_of(**sizes)):
        close(jax.jit(jax.value_and_grad(loss))(table), expected)


MASKS = {
    "causal": {},
    "window": {"window": 5},
    "both ways": {"causal": False},
    "segments": {"segments": True},
}


@pytest.mark.parametrize(
    ("sizes", "mask"),
    [
        ({"context": 8}, "causal"),
        ({"context": 8}, "window"),
        ({"context": 8}, "both ways"),
        ({"data": 2, "tensor": 2, "context": 2}, "segments"),
        ({"fsdp": 4, "tensor": 2}, "segments"),
    ],
)
def test_attention_shared_out_equals_the_whole(sizes, mask):
    q, k, v = normal(0, 4, 16, 4, 8), normal(1, 4, 16, 2, 8), normal(2, 4, 16, 2, 8)
    settings = dict(MASKS[mask])
    ids = jnp.asarray(np.sort(np.random.default_rng(3).integers(0, 3, (4, 16)), axis=1), jnp.int32)
    chosen = AttentionMask(segments_BxL=ids if settings.pop("segments", False) else None, **settings)

    def attend(q, k, v, *, mask):
        return reference_attention(q, k, v, mask=mask, scale=0.3)

    def loss(q, k, v):
        return jnp.sum(jnp.sin(spread_attention(attend, q, k, v, chosen)) * normal(4, 4, 16, 4, 8))

    expected = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(q, k, v)
    with jax.set_mesh(mesh_of(**sizes)):
        close(jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(q, k, v), expected)


def test_attention_over_a_cache_and_uneven_rows_are_left_whole():
    q, k, v = normal(0, 8, 1, 4, 8), normal(1, 8, 16, 4, 8), normal(2, 8, 16, 4, 8)
    mask = AttentionMask(q_offset=jnp.arange(8, dtype=jnp.int32), segments_BxS=jnp.ones((8, 16), jnp.int32))

    def attend(q, k, v, *, mask):
        return reference_attention(q, k, v, mask=mask, scale=0.3)

    expected = jax.jit(lambda *x: attend(*x, mask=mask))(q, k, v)
    with jax.set_mesh(mesh_of(data=4, tensor=2)):
        close(jax.jit(lambda *x: spread_attention(attend, *x, mask))(q, k, v), expected)
        three = jax.jit(lambda *x: spread_attention(attend, *x, AttentionMask(q_offset=15)))(q[:3], k[:3], v[:3])
    close(three, jax.jit(lambda *x: attend(*x, mask=AttentionMask(q_offset=15)))(q[:3], k[:3], v[:3]))
