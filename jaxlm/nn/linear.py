"""The one projection of the house: every weight matrix of a layer is applied here."""

import math

import flax.linen as nn
import jax

from jaxlm.nn.config import LoraConfig
from jaxlm.nn.copies import Fan, columns, rows, whole
from jaxlm.nn.dropout import dropout
from jaxlm.nn.kernels.matmul import matmul
from jaxlm.types import Array


def lora_scale(lora: LoraConfig, rank: int) -> float:
    """`alpha / r`, or `alpha / sqrt(r)` for rank-stabilised adapters."""
    return lora.alpha / (math.sqrt(rank) if lora.rslora else rank)


class Linear(nn.Module):
    """`x [..., D] -> x W (+ b) (+ scale * dropout(x) A B) [..., F]`, products accumulated in float32.

    The kernel [D, F] is drawn from N(0, (init_scale / sqrt(D))^2). An adapter is applied where the collection `lora`
    holds `a` [D, R] and `b` [R, F] under this module's path. Under tensor parallelism the columns of the kernel are
    spread, or, if the projection leads `inward` to the residual stream, its rows.
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
        kernel = self.param("kernel", init, (width, self.features))
        y = rows(matmul, whole(x), kernel) if self.inward else columns(matmul, x, kernel)
        if self.lora is not None and self.has_variable("lora", "a"):
            y = y + self._adapter(whole(x), self.lora)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            y = y + bias.astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
        return y

    def _adapter(self, x: Array, lora: LoraConfig) -> Array:
        a: Array = self.get_variable("lora", "a")
        b: Array = self.get_variable("lora", "b")
        key: jax.Array | None = self.make_rng("dropout") if self.has_rng("dropout") else None
        return matmul(matmul(dropout(x, lora.dropout, key), a), b) * lora_scale(lora, a.shape[-1])
