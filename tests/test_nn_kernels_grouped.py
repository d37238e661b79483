"""The grouped product: equal to one product a group, forward and backward, for all sizes; and the dispatch to it."""

import types

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from jaxlm.nn.dispatch import Boxes, dispatch, from_experts, to_experts
from jaxlm.nn.kernels import grouped_gpu
from jaxlm.nn.kernels import grouped_matmul as grouped
from jaxlm.nn.kernels.grouped_matmul import BACKENDS, UNIT, grouped_matmul

SIZES = {
    "even": [32, 32, 32],
    "one has all": [0, 96, 0],
    "last empty": [48, 16, 0],
    "rows left over": [16, 0, 32],
    "more than a block": [560, 16, 144],
}


def by_hand(x, w, sizes):
    y, start = np.zeros((x.shape[0], w.shape[2])), 0
    for e, size in enumerate(sizes):
        y[start : start + size] = x[start : start + size] @ w[e]
        start += size
    return y


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_equal_one_product_a_group(backend, name, transposed):
    whole = grouped.unit(backend)
    sizes = [-(-size // whole) * whole for size in SIZES[name]]
    rows = max(sum(sizes), 96) + 5 * (whole > UNIT)
    rng = np.random.default_rng(0)
    x, w, dy = rng.standard_normal((rows, 6)), rng.standard_normal((3, 6, 5)), rng.standard_normal((rows, 5))
    inside = (np.arange(rows) < sum(sizes))[:, None]
    wanted = by_hand(x, w, sizes)
    dx = by_hand(dy, w.swapaxes(1, 2), sizes)
    ends = np.cumsum(sizes)
    dw = np.stack([x[end - n : end].T @ dy[end - n : end] for n, end in zip(sizes, ends)])
    given = jnp.asarray(w.swapaxes(1, 2) if transposed else w, jnp.float32)

    def product(x, w):
        return grouped_matmul(x, w, jnp.array(sizes, jnp.int32), transposed=transposed, backend=backend)

    y, back = jax.vjp(jax.jit(product), jnp.asarray(x, jnp.float32), given)
    np.testing.assert_allclose(y, wanted, atol=2e-5)
    got_x, got_w = back(jnp.asarray(dy * inside, jnp.float32))
    np.testing.assert_allclose(got_x, dx * inside, atol=2e-5)
    np.testing.assert_allclose(got_w.swapaxes(1, 2) if transposed else got_w, dw, atol=2e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_low_precision_operands_have_float32_sums(backend):
    """4,096 ones: a bfloat16 sum would stop at 256. The weight's gradient stays float32."""
    size = max(16, grouped.unit(backend))
    x, w = jnp.ones((2 * size, 4096), jnp.bfloat16), jnp.ones((2, 4096, 3))
    y, back = jax.vjp(lambda x, w: grouped_matmul(x, w, jnp.array([size, size]), backend=backend), x, w)
    assert y.dtype == jnp.bfloat16 and float(y[0, 0]) == 4096.0
    dx, dw = back(jnp.ones_like(y))
    assert dx.dtype == jnp.bfloat16 and dw.dtype == jnp.float32 and float(dw[0, 0, 0]) == size


def test_wrong_shapes_are_named():
    x, w, sizes = jnp.zeros((16, 4)), jnp.zeros((2, 4, 3)), jnp.zeros(2, jnp.int32)
    with pytest.raises(ValueError, match=r"x \(16, 4\) does not fit w"):
        grouped_matmul(x, w, sizes, transposed=True)
    with pytest.raises(ValueError, match="3,\\) sizes for 2 matrices"):
        grouped_matmul(x, w, jnp.zeros(3, jnp.int32))
    with pytest.raises(ValueError, match="'dense' is unknown; use one of reference, blocks, ragged, pallas"):
        grouped_matmul(x, w, sizes, backend="dense")  # type: ignore[arg-type]


choices = st.integers(1, 4).flatmap(
    lambda k: st.lists(st.lists(st.integers(0, 6), min_size=k, max_size=k), min_size=1, max_size=8)
)


@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(choices, st.sampled_from([1, 4]), st.booleans())
def test_every_choice_has_a_row_of_its_expert_and_every_row_one_choice(chosen, unit, boxed):
    """Six experts, and the choice 6 for nobody; in two boxes of three experts, or one after the other."""
    chosen = np.array(chosen, np.int32)
    tokens, k = chosen.shape
    boxes = Boxes(2, tokens * k + 3 * (unit - 1)) if boxed else None
    plan = jax.device_get(dispatch(jnp.asarray(chosen), 6, unit, boxes))
    rows = len(plan.pair_P)
    starts = np.cumsum(plan.sizes_E) - plan.sizes_E
    if boxes is not None:
        starts = np.concatenate([np.cumsum(s) - s + i * boxes.rows for i, s in enumerate(plan.sizes_E.reshape(2, 3))])
    assert np.all(plan.sizes_E % unit == 0)
    np.testing.assert_array_equal(plan.counts_E, [np.sum(chosen == e) for e in range(6)])
    seen = set()
    for t, j in np.ndindex(tokens, k):
        row, e = plan.row_Txk[t, j], chosen[t, j]
        if e == 6:
            assert row == rows
            continue
        assert starts[e] <= row < starts[e] + plan.counts_E[e] and plan.pair_P[row] == t * k + j
        seen.add(int(row))
    assert all(plan.pair_P[row] == tokens * k for row in range(rows) if row not in seen)


def test_gradients_of_the_dispatch_are_those_of_plain_indexing_and_scatter_nothing():
    rng = np.random.default_rng(1)
    chosen = jnp.asarray(rng.integers(0, 5, (9, 2)), jnp.int32)
    x, gates, scale = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((9, 3), (9, 2), (5, 3)))
    plan = dispatch(chosen, 4, 4)

    def ours(x, gates, scale):
        rows = to_experts(x, plan) * scale[jnp.minimum(grouped.group_of(plan.pair_P.size, plan.sizes_E), 4)]
        return from_experts(rows, gates, plan)

    def plain(x, gates, scale):
        kept = jnp.where(chosen < 4, gates, 0.0)
        return jnp.sum(kept[..., None] * x[:, None, :] * scale[chosen], axis=1)

    np.testing.assert_allclose(ours(x, gates, scale), plain(x, gates, scale), atol=1e-6)
    weight = jnp.cos(jnp.arange(27.0)).reshape(9, 3)
    got, wanted = (jax.grad(lambda *a, f=f: jnp.sum(f(*a) * weight), (0, 1))(x, gates, scale) for f in (ours, plain))
    for a, b in zip(got, wanted):
        np.testing.assert_allclose(a, b, atol=1e-5)
    back = jax.make_jaxpr(jax.grad(lambda x, g: jnp.sum(ours(x, g, scale) * weight), (0, 1)))(x, gates)
    assert "scatter" not in str(back)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_kernel_can_be_lowered_for_a_gpu(dtype):
    """What is interpreted here is what a GPU would get: forward and both backward products, at odd widths."""
    x, w, sizes = jnp.zeros((256, 200), dtype), jnp.zeros((3, 200, 70)), jnp.array([128, 0, 128])

    def loss(x, w):
        return jnp.sum(grouped_matmul(x, w, sizes, backend="pallas").astype(jnp.float32))

    kernel = "__gpu$xla.gpu.triton"
    allowed = [jax.export.DisabledSafetyCheck.custom_call(kernel)]
    step = jax.jit(jax.value_and_grad(loss, (0, 1)))
    device = AbstractDevice("NVIDIA H200", 132, "gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("data",), abstract_device=device)):
        lowered = jax.export.export(step, platforms=["cuda"], disabled_checks=allowed)(x, w).mlir_module()
    assert lowered.count(f"@{kernel}") == 3


def test_the_kernel_is_for_gpus_with_its_tensor_cores():
    def device(platform, kind, capability=None):
        return types.SimpleNamespace(platform=platform, device_kind=kind, compute_capability=capability)

    assert grouped_gpu.runs_on(device("gpu", "NVIDIA H200", "9.0"))
    assert grouped_gpu.runs_on(device("gpu", "NVIDIA B200", "10.0"))
    assert not grouped_gpu.runs_on(device("gpu", "Tesla T4 NVIDIA", "7.5"))
    assert not grouped_gpu.runs_on(device("gpu", "AMD Instinct MI300X", "gfx942"))
    assert not grouped_gpu.runs_on(jax.devices()[0])


def test_units_are_those_that_the_blocks_need():
    assert grouped.unit("blocks") == UNIT and grouped.unit("ragged") == grouped.unit("reference") == 1
    assert grouped.unit("pallas") == grouped_gpu.ROWS
    assert all(block % UNIT == 0 for block in grouped.BLOCKS) and grouped.BLOCKS[-1] == UNIT
