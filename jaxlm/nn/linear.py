"""The one projection of the house: every weight matrix of a layer is applied here, and adapters beside it."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.nn.config import LoraConfig
from jaxlm.nn.copies import Fan, columns, rows, whole
from jaxlm.nn.dropout import dropout
from jaxlm.nn.kernels.matmul import matmul
from jaxlm.nn.panels import Panels
from jaxlm.nn.qtensor import QTensor, dequantise, kernel_param
from jaxlm.types import Array

ADAPTER = ("a", "b", "magnitude", "on", "rows")
"""What an attached adapter can have: A [in, R], B [R, out] times its scale, DoRA's magnitude [out], a bool that says
whether this layer has an adapter (where not all have), and the adapter of each row [B] where A and B are several."""


def added(kernel: Array | QTensor, adapter: dict[str, Array]) -> Array:
    """The kernel with an attached adapter in it, in the kernel's dtype: `W + A B`, with DoRA `m (W + A B) / |W + A B|`.

    Args:
      kernel: [..., in, out], with leading axes of experts.
      adapter: `a` [..., in, R], `b` [..., R, out], and perhaps `magnitude` [..., out] and `on` [...].
    """
    plain = dense(kernel)
    total = _sum(plain, adapter)
    if "magnitude" in adapter:
        total = total * dora_factor(plain, adapter)[..., None, :]
    total = total.astype(plain.dtype)
    return jnp.where(adapter["on"][..., None, None], total, plain) if "on" in adapter else total


def dense(kernel: Array | QTensor) -> Array:
    """The values of a kernel, which may be quantised."""
    return dequantise(kernel) if isinstance(kernel, QTensor) else kernel


def dora_factor(kernel: Array | QTensor, adapter: dict[str, Array]) -> Array:
    """DoRA's `m / |W + A B|` by output (2402.09353), float32 [..., out]; arguments as in `added`.

    The norm is a constant to the gradient, as in section 4.3 there.
    """
    total = jax.lax.stop_gradient(_sum(kernel, adapter))
    factor = adapter["magnitude"].astype(jnp.float32) / jnp.sqrt(jnp.sum(jnp.square(total), axis=-2))
    return jnp.where(adapter["on"][..., None], factor, jnp.ones_like(factor)) if "on" in adapter else factor


def _sum(kernel: Array | QTensor, adapter: dict[str, Array]) -> Array:
    a, b = (adapter[name].astype(jnp.float32) for name in "ab")
    return kernel.astype(jnp.float32) + a @ b


class Linear(nn.Module):
    """`x [..., D] -> x W (+ dropout(x) A B) (+ b) [..., F]`, products accumulated in float32.

    The kernel [D, F] is drawn from N(0, (init_scale / sqrt(D))^2). An adapter is applied where the collection `lora`,
    as `adapters.attach` leaves it, holds one under this module's path. With a magnitude (DoRA) the products, not the
    bias, are multiplied by it over the norm. Under tensor parallelism the columns of the kernel are spread, or, if the
    projection leads `inward` to the residual stream, its rows.
    """

    features: int
    use_bias: bool = False
    init_scale: float = 1.0
    lora: LoraConfig | None = None
    inward: bool = False

    @nn.compact
    def __call__(self, x: Array | Fan) -> Array:
        width = whole(x).shape[-1]
        init = nn.initializers.normal(self.init_scale / math.sqrt(width))
        kernel = kernel_param(self, init, (width, self.features))
        y = rows(matmul, whole(x), kernel) if self.inward else columns(matmul, x, kernel)
        if self.lora is not None and self.has_variable("lora", "a"):
            assert not isinstance(kernel, Panels), "adapters are merged before a kernel is laid out in panels"
            y = self._adapted(y, whole(x), kernel, self.lora)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            y = y + bias.astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
        return y

    def _adapted(self, y: Array, x: Array, kernel: Array | QTensor, lora: LoraConfig) -> Array:
        adapter: dict[str, Array] = {
            name: self.get_variable("lora", name) for name in ADAPTER if self.has_variable("lora", name)
        }
        key: jax.Array | None = self.make_rng("dropout") if self.has_rng("dropout") else None
        x = dropout(x, lora.dropout, key)
        product = matmul
        a, b = adapter["a"], adapter["b"]
        if "rows" in adapter:
            product, a, b = jax.vmap(matmul), a[adapter["rows"]], b[adapter["rows"]]
        y = y + product(product(x, a), b)
        if "magnitude" in adapter:
            factor = dora_factor(kernel, adapter).astype(y.dtype)
            y = y * factor.reshape((1,) * (y.ndim - 1) + (-1,))
        return y
