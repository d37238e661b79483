"""bitsandbytes' quantised weights on disk: 4-bit NF4, with or without quantised scales, and int8 by rows.

A torch Linear `X` of 4 bits is `X.weight` (packed codes) with `X.weight.absmax`, `X.weight.quant_map`, for quantised
scales `X.weight.nested_absmax` and `X.weight.nested_quant_map`, and `X.weight.quant_state.bitsandbytes__nf4`, the rest
as bytes of JSON. One of 8 bits is `X.weight` (int8) with `X.SCB`, the largest magnitude of each row.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.dist import place
from jaxlm.interop.names import Target
from jaxlm.interop.safetensors import Entry, Tensor
from jaxlm.nn.qtensor import (
    BLOCK,
    NESTED_BLOCK,
    NF4,
    QTensor,
    blank,
    dequantise_rows,
    dynamic_map,
    is_qtensor,
    scales_of,
)
from jaxlm.params.quantize import is_projection, quantize_rows

STATE = ".quant_state.bitsandbytes__"
METHOD = "bitsandbytes"
SKIPPED = ("lm_head", "score", "gate")
"""Modules that stay as they are, by the ends of their names; `gate` is a router, not a projection."""

Leaves = Mapping[str, Any]


class Packed(NamedTuple):
    """A quantised weight of a file, to be used like a `safetensors.Entry` of the float weight that it stands for.

    Attributes:
      file, offset: of its codes.
      dtype, shape: of the float weight.
      kind: as in `qtensor.KINDS`.
      parts: entries of the codes and scales by QTensor's names. shift: the mean of nf4-double's scales.
      turned: whether `shape` is [in, out]; the codes are of [out, in] always.
    """

    file: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]
    kind: str
    parts: dict[str, Entry]
    shift: float = 0.0
    turned: bool = False

    @property
    def matrix(self) -> tuple[int, int]:
        """(in, out)."""
        first, second = self.shape
        return (first, second) if self.turned else (second, first)

    def qtensor(self) -> QTensor:
        """The weight as it is, mapped from the file."""
        like = blank(self.kind, self.matrix, str(self.dtype), jax.ShapeDtypeStruct)
        arrays: dict[str, Any] = {n: e.view().reshape(getattr(like, n).shape) for n, e in self.parts.items()}
        if self.kind == "nf4-double":
            arrays["offset"] = np.float32(self.shift)
        return dataclasses.replace(like, **arrays)

    def view(self) -> np.ndarray:
        """The weight dequantised, in `shape`."""
        rows = np.asarray(_rows(self.qtensor()))
        return rows.T if self.turned else rows


@jax.jit
def _rows(q: QTensor) -> jax.Array:
    return dequantise_rows(q)


def without_quantisation(raw: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """A config.json without its `quantization_config`.

    Raises:
      ValueError: it is not bitsandbytes' with NF4 or int8.
    """
    found = raw.get("quantization_config")
    if found is None:
        return raw
    method = found.get("quant_method", METHOD) if isinstance(found, Mapping) else found
    if method != METHOD:
        raise ValueError(f"{where}: quantization_config: quant_method {method!r} is not supported; only {METHOD} is")
    kind = found.get("bnb_4bit_quant_type", "nf4")
    if found.get("load_in_4bit") and kind != "nf4":
        raise ValueError(f"{where}: quantization_config: bnb_4bit_quant_type {kind!r} is not supported; only nf4 is")
    return {name: value for name, value in raw.items() if name != "quantization_config"}


def stated_kind(raw: Mapping[str, Any]) -> str | None:
    """How the weights are quantised by a config.json, as in `qtensor.KINDS`; None where they are not."""
    found = raw.get("quantization_config")
    if not isinstance(found, Mapping):
        return None
    if found.get("load_in_8bit"):
        return "int8"
    return "nf4-double" if found.get("bnb_4bit_use_double_quant") else "nf4"


def gathered(entries: Mapping[str, Entry]) -> dict[str, Entry | Packed]:
    """The tensors of a directory with those that make up a quantised weight as one, under the name of the weight.

    Raises:
      ValueError: naming the file and the tensor that is missing, of another kind, or does not fit.
    """
    found: dict[str, Entry | Packed] = dict(entries)
    for name in entries:
        if STATE in name:
            base, _, kind = name.partition(STATE)
            if kind != "nf4":
                raise ValueError(f"{entries[name].file}: {base}: 4-bit kind {kind!r} is not supported; only nf4 is")
            found[base] = _four_bits(base, found)
        elif name.endswith(".SCB"):
            base = name.removesuffix("SCB") + "weight"
            found[base] = _eight_bits(base, found)
    return found


def _four_bits(name: str, found: dict[str, Entry | Packed]) -> Packed:
    codes, packed = _take(found, name), _take(found, f"{name}{STATE}nf4")
    where = f"{codes.file}: {name}"
    try:
        state = json.loads(packed.view().tobytes())
        dtype, shape = np.dtype(getattr(jnp, state["dtype"])), tuple(int(n) for n in state["shape"])
        block, nested = state["blocksize"], "nested_offset" in state
        shift, nested_block = float(state.get("nested_offset", 0.0)), state.get("nested_blocksize", NESTED_BLOCK)
        assert len(shape) == 2
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError):
        raise ValueError(f"{where}: its quant_state is malformed; the file is damaged") from None
    if (block, nested_block) != (BLOCK, NESTED_BLOCK):
        raise ValueError(f"{where}: blocks of {block} are not supported; quantise again with blocks of {BLOCK}")
    parts = {"codes": codes, "absmax": _take(found, f"{name}.absmax")}
    _same(where, _take(found, f"{name}.quant_map"), np.array(NF4, np.float32))
    if nested:
        parts["nested"] = _take(found, f"{name}.nested_absmax")
        _same(where, _take(found, f"{name}.nested_quant_map"), dynamic_map())
    kind = "nf4-double" if nested else "nf4"
    return _checked(Packed(codes.file, codes.offset, dtype, shape, kind, parts, shift), where)


def _eight_bits(name: str, found: dict[str, Entry | Packed]) -> Packed:
    codes, scales = _take(found, name), _take(found, f"{name.removesuffix('weight')}SCB")
    where = f"{codes.file}: {name}"
    form = found.pop(f"{name}_format", None)
    if form is not None and int(form.view().reshape(-1)[0]) != 0:
        raise ValueError(f"{where}: weight_format {form.view()} is not supported; only row-wise int8 is")
    if len(codes.shape) != 2:
        raise ValueError(f"{where}: shape {list(codes.shape)} is no matrix; the file is damaged")
    # Files do not say what the weight was; bitsandbytes computes with int8 in half precision, jaxlm in float32.
    dtype = np.dtype(np.float32)
    parts = {"codes": codes, "absmax": scales}
    return _checked(Packed(codes.file, codes.offset, dtype, codes.shape, "int8", parts), where)


def _take(found: dict[str, Entry | Packed], name: str) -> Entry:
    if name not in found:
        raise ValueError(f"{name}: missing, though it belongs to a quantised weight of the file; download it again")
    entry = found.pop(name)
    assert isinstance(entry, Entry)
    return entry


def _same(where: str, entry: Entry, table: np.ndarray) -> None:
    if entry.shape != table.shape or not np.allclose(entry.view(), table, rtol=1e-6, atol=1e-9):
        raise ValueError(f"{where}: its table of values is not bitsandbytes' own; only that is supported")


def _checked(packed: Packed, where: str) -> Packed:
    like = blank(packed.kind, packed.matrix, str(packed.dtype), jax.ShapeDtypeStruct)
    for name, entry in packed.parts.items():
        wanted = getattr(like, name)
        if math.prod(entry.shape) != wanted.size or entry.dtype != wanted.dtype:
            raise ValueError(
                f"{where}: {name} are {entry.dtype} {list(entry.shape)}, but {wanted.size} values of {wanted.dtype} "
                "belong to it; save it before its first use on CPU, which rearranges it"
            )
    return packed


def fitted(entry: Entry | Packed, target: Target) -> Entry | Packed:
    """The entry in the layout of its family: weights that torch keeps as [in, out] are quantised as [out, in]."""
    if isinstance(entry, Packed) and not target.transpose:
        return entry._replace(shape=entry.shape[::-1], turned=True)
    return entry


def forms(
    pairs: Iterable[tuple[Entry | Packed, Target]], leaves: Leaves, kind: str | None, dtypes: Mapping[str, Any]
) -> dict[str, QTensor]:
    """The leaves that are to be quantised, without arrays.

    Args:
      pairs: what is in the files and where it belongs.
      leaves: shapes of all leaves by path.
      kind: what projections are to be, or None: what they are in the files.
      dtypes: of the leaves that are made from floats.

    Raises:
      ValueError: the files are quantised in another way than `kind`.
    """
    stored: dict[str, set[tuple[str | None, str] | None]] = {}
    for entry, target in pairs:
        if isinstance(entry, Packed) and kind not in (None, entry.kind):
            raise ValueError(
                f"{entry.file}: quantised as {entry.kind} already, so it cannot be loaded as {kind}; leave quantize out"
            )
        form = (_kept_kind(entry, target), str(entry.dtype)) if isinstance(entry, Packed) else None
        for part in target.parts:
            stored.setdefault(part.path, set()).add(form)
    found = {}
    for path in filter(is_projection, stored):
        known = [form for form in stored[path] if form is not None and form[0] is not None]
        if kind is None and (len(known) != 1 or len(stored[path]) != 1):
            continue  # quantised in part or in different ways: kept as floats
        chosen = known[0] if known else (kind, str(jnp.dtype(dtypes[path])))
        found[path] = blank(str(chosen[0]), leaves[path].shape, chosen[1], jax.ShapeDtypeStruct)
    return found


def _kept_kind(packed: Packed, target: Target) -> str | None:
    """What the pieces of a weight can be kept as: parts of one share the scales of their scales, so they lose them."""
    if len(target.parts) == 1:
        return packed.kind
    if packed.kind != "int8" and packed.matrix[0] % BLOCK:
        return None
    return "nf4" if packed.kind == "nf4-double" else packed.kind


def pieces(
    entry: Entry | Packed, target: Target, forms: Mapping[str, QTensor]
) -> Iterator[tuple[str, tuple[int, ...], np.ndarray]]:
    """One tensor of a file as (path of a part, index into it, array) of the quantised leaves that it belongs to."""
    start = 0
    for part in target.parts:
        rows, like = slice(start, start + part.shape[-1]), forms[part.path]
        start = rows.stop
        if isinstance(entry, Packed):
            whole = entry.qtensor()
            yield from _parts(part.path, part.index, whole if len(target.parts) == 1 else _cut(whole, rows))
            continue
        tensor = entry.view() if target.transpose else np.swapaxes(entry.view(), -1, -2)
        for i in np.ndindex(tensor.shape[:-2]):
            matrix = jnp.asarray(tensor[i][rows]).astype(like.dtype)
            yield from _parts(part.path, (*part.index, *i), _quantised(matrix, kind=like.kind))


_quantised = functools.partial(jax.jit, static_argnames="kind")(quantize_rows)


def _parts(path: str, index: tuple[int, ...], q: QTensor) -> Iterator[tuple[str, tuple[int, ...], np.ndarray]]:
    for field in ("codes", "absmax", "nested", "offset"):
        if getattr(q, field) is not None:
            yield f"{path}/{field}", index, np.asarray(getattr(q, field))


def _cut(q: QTensor, rows: slice) -> QTensor:
    """Rows of a weight [out, in]; nf4-double becomes nf4, with the same values."""
    width, _ = q.matrix
    absmax = np.asarray(scales_of(q))
    kind = "nf4" if q.kind == "nf4-double" else q.kind
    matrix = (width, rows.stop - rows.start)
    return QTensor(q.codes[rows], absmax[rows], None, None, kind, matrix, q.dtype)  # type: ignore[arg-type]


def joined(qs: list[QTensor]) -> QTensor:
    """The inverse of cutting: weights of the same width one below the other.

    Raises:
      ValueError: blocks run over the ends of their rows.
    """
    if len(qs) == 1:
        return qs[0]
    width = qs[0].matrix[0]
    if qs[0].kind != "int8" and width % BLOCK:
        raise ValueError(f"width {width} is not a multiple of {BLOCK}, so the parts cannot be joined; use int8")
    codes, absmax = (np.concatenate([np.asarray(get(q)) for q in qs]) for get in (lambda q: q.codes, scales_of))
    kind = "nf4" if qs[0].kind == "nf4-double" else qs[0].kind
    return QTensor(codes, absmax, None, None, kind, (width, sum(q.matrix[1] for q in qs)), qs[0].dtype)  # type: ignore[arg-type]


def tensors(name: str, target: Target, leaves: Leaves, folds: Leaves) -> list[Tensor]:
    """A quantised weight as the tensors of a file.

    Args:
      name: of the weight in the file, `X.weight`.
      target: its parts. leaves: all leaves by path, QTensors where quantised.
      folds: paths of leaves that muP's scalars are to be multiplied into.

    Raises:
      ValueError: only a part of it is quantised, parts that cannot be joined, or a scalar to be multiplied in.
    """
    folded = [part.path for part in target.parts if part.path in folds]
    if folded:
        raise ValueError(f"{folded[0]}: muP's factor does not go into a quantised weight; export first, then quantise")
    parts = [leaves[part.path] for part in target.parts]
    if len({(getattr(leaf, "kind", None), str(leaf.dtype)) for leaf in parts}) != 1:
        raise ValueError(f"{name}: its parts are quantised in different ways; quantise all or none")

    def make() -> QTensor:
        one = [jax.tree.map(lambda a, i=part.index: place.gather(a[i]), leaves[part.path]) for part in target.parts]
        try:
            return joined(one)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    # The text of the offset must be known before anything is written.
    q = make()
    if q.kind == "int8":
        arrays = {name: ("codes", q.codes.shape), f"{name.removesuffix('weight')}SCB": ("absmax", (q.matrix[1],))}
        fixed = {f"{name}_format": np.zeros((), np.uint8)}
    else:
        arrays = {name: ("codes", (q.codes.size, 1)), f"{name}.absmax": ("absmax", (q.absmax.size,))}
        fixed = {f"{name}.quant_map": np.array(NF4, np.float32), f"{name}{STATE}nf4": _state(q)}
        if q.nested is not None:
            arrays[f"{name}.nested_absmax"] = ("nested", q.nested.shape)
            fixed[f"{name}.nested_quant_map"] = dynamic_map()

    def part(field: str, shape: tuple[int, ...]) -> np.ndarray:
        return np.asarray(getattr(make(), field)).reshape(shape)

    found = [
        Tensor(n, np.dtype(getattr(q, field).dtype), shape, functools.partial(part, field, shape))
        for n, (field, shape) in arrays.items()
    ]
    return found + [
        Tensor(n, array.dtype, array.shape, functools.partial(np.asarray, array)) for n, array in fixed.items()
    ]


def _state(q: QTensor) -> np.ndarray:
    width, out = q.matrix
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": q.dtype, "shape": [out, width]}
    if q.offset is not None:
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": float(q.offset)}
    return np.frombuffer(json.dumps(state).encode(), np.uint8)


def quantization_config(leaves: Leaves, dtype: str) -> dict[str, Any]:
    """`{"quantization_config": ...}` of config.json, by which transformers makes quantised modules before it reads
    weights; empty without quantised leaves."""
    kinds = {leaf.kind for leaf in leaves.values() if is_qtensor(leaf)}
    if not kinds:
        return {}
    four = "int8" not in kinds
    config = {
        "quant_method": METHOD,
        "_load_in_4bit": four,
        "_load_in_8bit": not four,
        "load_in_4bit": four,
        "load_in_8bit": not four,
        "bnb_4bit_quant_type": "nf4" if four else "fp4",
        "bnb_4bit_use_double_quant": "nf4-double" in kinds,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": list(SKIPPED),
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
    }
    return {"quantization_config": config}
