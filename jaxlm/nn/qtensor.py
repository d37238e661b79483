"""A weight matrix in 4 or 8 bits: a small pytree that stands where the kernel's array stood.

The numbers and their order are those of bitsandbytes, which quantises a torch weight [out, in] row by row, so that
files agree byte for byte. A kernel of this house is [in, out]; the turn is made when a product reads it, and costs
nothing there.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, TypeGuard

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.nn.panels import Panels
from jaxlm.types import Array, Tree

KINDS = ("nf4", "nf4-double", "int8")
"""4-bit NormalFloat in blocks of 64 (2305.14314), the same with its scales in 8 bits, and 8 bits with a scale a row."""

BLOCK, NESTED_BLOCK = 64, 256
"""Values that share a scale, and scales that share a scale of their own."""

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The 16 values of NormalFloat (2305.14314, appendix E)."""

INT8_STEP = 7.874015718698502e-3
"""1/127 as bitsandbytes rounds it."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("codes", "absmax", "nested", "offset"),
    meta_fields=("kind", "matrix", "dtype"),
)
@dataclasses.dataclass(frozen=True, eq=False)
class QTensor:
    """Quantised matrices [..., in, out], one or a stack of them (layers, experts); the parts carry the leading axes.

    A matrix is held as [out, in], in rows of values: its own rows where `in` is a multiple of the block, else one row
    of all out x in values, because then blocks run over the ends of rows.

    Attributes:
      codes: uint8 [..., rows, values / 2], the first of two values in the high half; int8 [..., out, in].
      absmax: the scales: float32 [..., rows, blocks]; uint8 codes of them for nf4-double; float32 [..., out, 1].
      nested: float32 [..., scales / 256] of nf4-double, else None: scales of the scales, counted over all rows.
      offset: float32 [...] of nf4-double, else None: the mean that was taken off the scales first.
      kind: one of `KINDS`. matrix: (in, out). dtype: what the weight was, and what its values are rounded to.
    """

    codes: Array
    absmax: Array
    nested: Array | None
    offset: Array | None
    kind: str
    matrix: tuple[int, int]
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the kernel that this stands for: [..., in, out]."""
        return (*self.codes.shape[:-2], *self.matrix)

    @property
    def ndim(self) -> int:
        return len(self.codes.shape)

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    def astype(self, dtype: Any) -> Array:
        """The kernels as an array, as `Array.astype`; see `dequantise`."""
        return dequantise(self, dtype)


def is_qtensor(value: Any) -> TypeGuard[QTensor]:
    """Whether a node of a tree is a quantised kernel; for `is_leaf`."""
    return isinstance(value, QTensor)


def check_kind(kind: str, where: str = "quantize") -> None:
    """Refuse an unknown kind.

    Raises:
      ValueError: with the known ones.
    """
    if kind not in KINDS:
        raise ValueError(f"{where}: {kind!r} is unknown; the known ones are {', '.join(KINDS)}")


def blank(kind: str, shape: tuple[int, ...], dtype: str, make: Callable[[tuple[int, ...], str], Any]) -> QTensor:
    """A QTensor for kernels [..., in, out] whose parts are `make(shape, dtype)`."""
    lead, matrix = shape[:-2], (shape[-2], shape[-1])
    width, out = matrix
    if kind == "int8":
        return QTensor(
            make((*lead, out, width), "int8"), make((*lead, out, 1), "float32"), None, None, kind, matrix, dtype
        )
    rows, values = row_layout(matrix)
    blocks = -(-values // BLOCK)
    codes = make((*lead, rows, -(-values // 2)), "uint8")
    if kind == "nf4":
        return QTensor(codes, make((*lead, rows, blocks), "float32"), None, None, kind, matrix, dtype)
    nested = make((*lead, -(-rows * blocks // NESTED_BLOCK)), "float32")
    absmax = make((*lead, rows, blocks), "uint8")
    return QTensor(codes, absmax, nested, make(lead, "float32"), kind, matrix, dtype)


def row_layout(matrix: tuple[int, int]) -> tuple[int, int]:
    """(rows, values in each) of a 4-bit matrix (in, out)."""
    width, out = matrix
    return (out, width) if width % BLOCK == 0 else (1, out * width)


def dequantise(q: QTensor, dtype: str | jnp.dtype | None = None) -> Array:
    """The kernels [..., in, out], in `dtype` or in the weight's own."""
    return jnp.swapaxes(dequantise_rows(q, dtype), -1, -2)


def dequantise_rows(q: QTensor, dtype: Any = None) -> Array:
    """The matrices as files have them, [..., out, in]: `table[code] * absmax` in float32, rounded to the weight's dtype
    as bitsandbytes does, then to `dtype`."""
    width, out = q.matrix
    lead = q.codes.shape[:-2]
    if q.kind == "int8":
        values = q.codes.astype(jnp.float32) * q.absmax * INT8_STEP
    else:
        pairs = jnp.stack([q.codes >> 4, q.codes & 15], axis=-1)
        codes = pairs.reshape(*q.codes.shape[:-1], 2 * q.codes.shape[-1])
        scales = jnp.repeat(scales_of(q), BLOCK, axis=-1)[..., : codes.shape[-1]]
        values = _table(np.array(NF4, np.float32), codes) * scales
        values = values[..., : row_layout(q.matrix)[1]].reshape(*lead, out, width)
    return values.astype(q.dtype).astype(dtype or q.dtype)


def scales_of(q: QTensor) -> Array:
    """The scales in float32, [..., rows, blocks]; those of nf4-double are `table[code] * nested + offset`."""
    if q.nested is None or q.offset is None:
        return q.absmax
    lead, count = q.absmax.shape[:-2], math.prod(q.absmax.shape[-2:])
    codes = q.absmax.reshape(*lead, count)
    products = _table(dynamic_map(), codes) * jnp.repeat(q.nested, NESTED_BLOCK, axis=-1)[..., :count]
    # Fused, product and sum would be rounded once, where bitsandbytes rounds twice; this keeps XLA from it.
    products = jnp.maximum(products, np.finfo(np.float32).min)
    return (products + q.offset[..., None]).reshape(q.absmax.shape)


def _table(table: np.ndarray, codes: Array) -> Array:
    return jnp.take(jnp.asarray(table), codes.astype(jnp.int32), axis=0, mode="clip")


@functools.cache
def dynamic_map() -> np.ndarray:
    """The 256 values of signed dynamic 8-bit numbers, ascending (1511.04561): seven decades, each twice as fine as the
    one below it, with 0 and 1."""
    found = [0.0, 1.0]
    low, high = np.float32(0.1), np.float32(1)
    for decade in range(7):
        count = 2**decade
        # Counted from both ends with one rounding, as torch.linspace does it, so that every bit is the same.
        step, index = np.float64((high - low) / np.float32(count)), np.arange(count + 1)
        edges = np.where(index < (count + 1) // 2, low + step * index, high - step * (count - index)).astype(np.float32)
        means = (edges[:-1] + edges[1:]) / np.float32(2)
        values = np.float32(10.0 ** (decade - 6)) * means
        found += [*values.tolist(), *(-values).tolist()]
    return np.sort(np.array(found, np.float32))


def kernel_param(module: nn.Module, init: Callable[..., Array], shape: tuple[int, ...]) -> Array | QTensor | Panels:
    """A module's parameter `kernel`: the array, made by `init` where the module is initialised, or what stands in its
    place.

    Raises:
      ValueError: what stands for another shape.
    """
    if module.has_variable("params", "kernel"):
        stored: Any = module.get_variable("params", "kernel")
        if isinstance(stored, QTensor | Panels):
            if stored.shape != shape:
                path, kind = "/".join(module.path), "quantised" if is_qtensor(stored) else "in panels"
                raise ValueError(f"{path}/kernel: {kind} {stored.shape}, but the model asks for {shape}")
            return stored
    return module.param("kernel", init, shape)


def outline(tree: Tree) -> Tree:
    """Shapes and dtypes of a tree, a quantised kernel being the one array that it stands for."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree, is_leaf=is_qtensor)
