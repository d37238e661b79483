"""The dense product: numbers, dtypes and sums of all three products."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from jaxlm.nn.kernels import matmul as products
from jaxlm.nn.kernels.matmul import matmul, outer


def normal(seed, shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@pytest.fixture(params=[True, False], ids=["one device", "many"])
def devices(request, monkeypatch):
    """Both ways to make weight gradients: laid out anew on one CPU device, or left to the compiler."""
    monkeypatch.setattr(products, "one_cpu_device", lambda: request.param)


def exact(x, w, dy, transposed):
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    w = w.T if transposed else w
    rows, columns = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    dw = rows.T @ columns
    return x @ w, dy @ w.T, dw.T if transposed else dw


def products_of(x, w, dy, **settings):
    def compute(x, w, dy):
        y, pull = jax.vjp(functools.partial(matmul, **settings), x, w)
        return y, *pull(dy)

    return jax.jit(compute)(x, w, dy)


SHAPES = {
    "rows and columns": ((2, 5, 8), 12),
    "wide input": ((9, 1024), 4),
    "one row": ((1, 1, 8), 12),
    "a vector": ((8,), 12),
    "odd": ((3, 7), 1),
}


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("transposed", [False, True])
def test_values_and_gradients(shape, dtype, tolerance, transposed):
    x_shape, width = SHAPES[shape]
    x = normal(0, x_shape, dtype)
    w = normal(1, (width, x_shape[-1]) if transposed else (x_shape[-1], width), dtype)
    dy = normal(2, (*x_shape[:-1], width), dtype)
    expected = exact(x, w, dy, transposed)
    found = products_of(x, w, dy, transposed=transposed)
    reference = products_of(x, w, dy, transposed=transposed, backend="reference")
    for name, a, b, c, like in zip(("y", "dx", "dw"), found, reference, expected, (dy, x, w), strict=True):
        assert a.shape == b.shape == like.shape
        assert a.dtype == b.dtype == like.dtype
        scale = max(1.0, np.abs(c).max())
        np.testing.assert_allclose(np.asarray(a, np.float64), c, atol=tolerance * scale, err_msg=name)
        np.testing.assert_allclose(np.asarray(b, np.float64), c, atol=tolerance * scale, err_msg=name)


@pytest.mark.usefixtures("devices")
def test_the_gradient_of_float32_weights_is_never_rounded():
    x, w, dy = normal(0, (64, 16), "bfloat16"), normal(1, (16, 8)), normal(2, (64, 8), "bfloat16")
    y, dx, dw = products_of(x, w, dy)
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(dw, exact(x, w, dy, False)[2], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("devices")
def test_all_three_products_have_low_precision_operands_and_float32_sums():
    x, w, dy = normal(0, (64, 16), "bfloat16"), normal(1, (16, 8)), normal(2, (64, 8), "bfloat16")
    jaxpr = jax.make_jaxpr(lambda x, w, dy: jax.vjp(matmul, x, w)[1](dy))(x, w, dy)
    dots = [equation for equation in jaxpr.eqns if equation.primitive.name == "dot_general"]
    nested = [
        equation
        for outside in jaxpr.eqns
        for inside in jaxprs_in_params(outside.params)
        for equation in inside.eqns
        if equation.primitive.name == "dot_general"
    ]
    assert len(dots + nested) == 3
    for equation in dots + nested:
        assert {v.aval.dtype for v in equation.invars} == {jnp.dtype("bfloat16")}
        assert equation.outvars[0].aval.dtype == jnp.float32


def test_a_sum_of_many_rows_keeps_small_terms(monkeypatch):
    monkeypatch.setattr(products, "one_cpu_device", lambda: True)
    rows = 4096
    found = outer(jnp.ones((rows, 4), jnp.bfloat16), jnp.full((rows, 2), 1.0, jnp.bfloat16))
    np.testing.assert_array_equal(found, np.full((4, 2), rows, np.float32))


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize("width", [4, 64])
def test_a_gradient_may_be_transposed_by_whoever_takes_it(width):
    x, w, dy = normal(0, (32, 16), "bfloat16"), normal(1, (16, width)), normal(2, (32, width), "bfloat16")
    found = jax.jit(lambda x, w, dy: jax.vjp(matmul, x, w)[1](dy)[1].T)(x, w, dy)
    np.testing.assert_allclose(found, exact(x, w, dy, False)[2].T, rtol=1e-5, atol=1e-4)


def test_the_reference_has_forward_mode_and_second_derivatives():
    x, w = normal(0, (6, 4)), normal(1, (4, 3))

    def loss(w, backend):
        return jnp.sum(jnp.sin(matmul(x, w, backend=backend)))

    gradient = jax.grad(functools.partial(loss, backend="reference"))
    direction = normal(2, w.shape)
    _, product = jax.jvp(gradient, (w,), (direction,))
    step = 1e-3
    slope = (gradient(w + step * direction) - gradient(w - step * direction)) / (2 * step)
    np.testing.assert_allclose(product, slope, atol=2e-3)
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(functools.partial(loss, backend=None), (w,), (direction,))


@pytest.mark.parametrize(
    ("shape", "settings", "words"),
    [
        ((5, 3), {}, r"x \(2, 4\) does not fit w \(5, 3\); give x \[..., D\] and w \[D, F\]"),
        ((4, 3), {"transposed": True}, r"w \[F, D\]"),
        ((4, 3), {"backend": "blas"}, "'blas' is unknown; use one of own, reference"),
    ],
)
def test_operands_that_do_not_fit_are_named(shape, settings, words):
    with pytest.raises(ValueError, match=words):
        matmul(jnp.zeros((2, 4)), jnp.zeros(shape), **settings)
