"""How a model is computed, apart from what it is: precision, memory policy, kernels, placement."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from jaxlm.nn.kernels.grouped_matmul import Backend
from jaxlm.types import Array

RematPolicy = Literal["none", "dots", "block", "full", "offload"]


def unconstrained(x: Array) -> Array:
    """The placement constraint of a single device: none."""
    return x


@dataclasses.dataclass(frozen=True)
class Compute:
    """Run-time choices that leave the numbers alone, up to rounding.

    Attributes:
      dtype: of activations and of the operands of matrix products; parameters keep their own.
      remat: what the backward pass may keep of a layer: `none` recomputes nothing, `dots` keeps matrix products,
        `block` the outputs of attention and feed-forward, `full` only the layer's input, `offload` as `block` but in
        host memory.
      scan: whether stacked layers are walked by `jax.lax.scan` (short compile) or unrolled (faster steps on CPU).
      attention: a forced attention backend; None chooses by platform, shape and feature.
      grouped: a forced backend of the experts' products; None chooses by platform.
      constrain: places activations [B, L, D] on the mesh at layer boundaries.
      mesh: the device mesh, for kernels that communicate by themselves.
      collect: what to keep of every layer besides: `hidden` is its output [B, L, D], `attention` who attends to whom,
        mean over heads, float32 [B, L, S].
    """

    dtype: str = "float32"
    remat: RematPolicy = "none"
    scan: bool = True
    attention: str | None = None
    grouped: Backend | None = None
    constrain: Callable[[Array], Array] = unconstrained
    mesh: Any = None
    collect: tuple[str, ...] = ()
