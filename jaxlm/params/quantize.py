"""Kernels -> quantised kernels, and back: nf4, nf4 with double quantisation, int8, number by number as bitsandbytes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import tree
from jaxlm.nn.config import ModelConfig
from jaxlm.nn.qtensor import (
    BLOCK,
    NESTED_BLOCK,
    NF4,
    QTensor,
    check_kind,
    dequantise,
    dynamic_map,
    is_qtensor,
    row_layout,
)
from jaxlm.nn.transformer import logits
from jaxlm.params import lora
from jaxlm.params.summation import torch_sum
from jaxlm.types import Array, Tree, Variables

PROJECTIONS = "(attn/(q|k|v|o)|(mlp|shared)/(gate|up|down))/kernel"
"""The leaves that are quantised: the matrix products of layers. Embedding, head, router and norms stay as they are."""

PROBE = 64
"""Tokens on which a merged model is compared with its parts."""

GRID = 65535
"""Steps of [-1, 1] to which bitsandbytes rounds a scale before it looks up the nearest 8-bit number."""


def is_projection(path: str) -> bool:
    """Whether the leaf of this path is one that is quantised."""
    return tree.matches(PROJECTIONS, path)


def quantize(params: Tree, kind: str) -> Tree:
    """The parameters with every projection of the layers quantised; traceable, so `jax.eval_shape` works on it.

        {"embed": {"kernel": a}, "layers": {"attn": {"q": {"kernel": [N, D, F]}}}}
        ->  {"embed": {"kernel": a}, "layers": {"attn": {"q": {"kernel": QTensor}}}}

    Args:
      params: a model's parameters; kernels floating.
      kind: one of `nf4`, `nf4-double`, `int8`.

    Raises:
      ValueError: an unknown kind, parameters that are quantised already, or a tree without projections.
    """
    check_kind(kind)
    leaves = tree.leaves(params, is_leaf=is_qtensor)
    done = [path for path, leaf in leaves.items() if is_qtensor(leaf)]
    if done:
        raise ValueError(f"{done[0]}: quantised already, as {leaves[done[0]].kind}; dequantize the parameters first")
    if not any(is_projection(path) for path in leaves):
        raise ValueError(f"params: no projection of a layer among {', '.join(leaves)}; give a model's parameters")
    return tree.map_with_path(lambda path, x: quantize_kernel(x, kind) if is_projection(path) else x, params)


def refuse_quantised(params: Tree, where: str) -> None:
    """Refuse parameters that are to be trained themselves and cannot.

    Raises:
      ValueError: naming `where` they come from.
    """
    kinds = sorted({q.kind for q in jax.tree.leaves(params, is_leaf=is_qtensor) if is_qtensor(q)})
    if kinds:
        advice = "set lora to train an adapter, or start from the model before it was quantised"
        raise ValueError(f"{where}: quantised as {', '.join(kinds)}, so it cannot be trained; {advice}")


def dequantize(params: Tree) -> Tree:
    """The inverse of `quantize`, up to what quantising lost: every QTensor as an array of its own dtype."""
    return jax.tree.map(lambda x: _dequantise(x) if is_qtensor(x) else x, params, is_leaf=is_qtensor)


@jax.jit
def _dequantise(q: QTensor) -> Array:
    return dequantise(q)


@functools.partial(jax.jit, static_argnames="kind")
def quantize_kernel(kernel: Array, kind: str) -> QTensor:
    """Kernels [..., in, out] -> QTensor, one matrix after the other so that little memory is needed."""
    lead = kernel.shape[:-2]
    matrices = kernel.reshape(-1, *kernel.shape[-2:])
    found = jax.lax.map(lambda w: quantize_rows(w.T, kind), matrices)
    return jax.tree.map(lambda part: part.reshape(*lead, *part.shape[1:]), found)


def merged_with_gap(cfg: ModelConfig, variables: Variables) -> tuple[ModelConfig, Variables, str]:
    """An adapter merged into the dequantised weights of its base, and how far the result is from the two apart.

    The merged weights are rounded to the dtype that the base had, so they differ a little from base and adapter.

    Args:
      cfg, variables: the model; {"params": tree with QTensors, "lora": tree}.

    Returns:
      Configuration and variables of the merged model, and the gap in words: the largest and the mean difference of the
      logits of `PROBE` random tokens, and the deviation of the logits themselves.
    """
    params = dequantize(lora.merge(cfg, variables["params"], variables["lora"]))
    whole = lora.merged_config(cfg, params)
    tokens = jax.random.randint(jax.random.key(0), (1, min(PROBE, cfg.max_length)), 0, cfg.V)
    apart, merged = logits(cfg, variables, tokens), logits(whole, {"params": params}, tokens)
    gap = jnp.abs(apart - merged)
    words = f"logits of {tokens.size} tokens move by {gap.max():.2g} at most and {gap.mean():.2g} on average"
    return whole, {"params": params}, f"{words}, their own deviation being {jnp.std(apart):.2g}"


def quantize_rows(w_FxD: Array, kind: str) -> QTensor:
    """One matrix as files have it, [out, in] -> QTensor."""
    out, width = w_FxD.shape
    dtype, w_FxD = str(w_FxD.dtype), w_FxD.astype(jnp.float32)
    if kind == "int8":
        codes, absmax = _int8(w_FxD)
        return QTensor(codes, absmax, None, None, kind, (width, out), dtype)
    codes, absmax = _nf4(w_FxD.reshape(row_layout((width, out))))
    if kind == "nf4":
        return QTensor(codes, absmax, None, None, kind, (width, out), dtype)
    scales, nested, offset = _double(absmax)
    return QTensor(codes, scales, nested, offset, kind, (width, out), dtype)


def _int8(w_FxD: Array) -> tuple[Array, Array]:
    absmax = jnp.max(jnp.abs(w_FxD), axis=1, keepdims=True)
    scale = jnp.where(absmax > 0, 127.0 * (1.0 / absmax), 0.0)
    return jnp.rint(w_FxD * scale).astype(jnp.int8), absmax


def _nf4(values: Array) -> tuple[Array, Array]:
    """Rows of values -> packed codes [rows, values / 2] and scales [rows, blocks]."""
    rows, length = values.shape
    blocks = -(-length // BLOCK)
    padded = jnp.pad(values, ((0, 0), (0, blocks * BLOCK - length))).reshape(rows, blocks, BLOCK)
    absmax = jnp.max(jnp.abs(padded), axis=-1)
    wide = absmax[..., None]
    # A short last block is divided, the others multiplied by the inverse, which may round differently.
    short = (jnp.arange(blocks) == length // BLOCK)[None, :, None]
    scaled = jnp.where(wide > 0, jnp.where(short, padded / wide, padded * (1.0 / wide)), 0.0)
    table = np.array(NF4, np.float32)
    codes = jnp.zeros(padded.shape, jnp.uint8)
    for bound in (table[:-1] + table[1:]) / np.float32(2):
        codes = codes + (scaled > bound).astype(jnp.uint8)
    codes = codes.reshape(rows, blocks * BLOCK)[:, : length + length % 2]
    return (codes[:, ::2] << 4) | codes[:, 1::2], absmax


def _double(absmax: Array) -> tuple[Array, Array, Array]:
    """Scales [rows, blocks] -> 8-bit codes of them, their scales, and the mean that was taken off first."""
    flat = absmax.reshape(-1)
    padding = -flat.size % NESTED_BLOCK
    # By a constant, XLA would multiply with its inverse.
    offset = torch_sum(flat) / jax.lax.optimization_barrier(jnp.float32(flat.size))
    centred = jnp.pad(flat - offset, (0, padding)).reshape(-1, NESTED_BLOCK)
    nested = jnp.max(jnp.abs(centred), axis=1)
    wide = nested[:, None]
    scaled = jnp.where(wide > 0, centred / wide, 0.0)
    steps = jnp.floor((scaled + 1.0) * 0.5 * GRID + 0.5).astype(jnp.int32)
    codes = jnp.take(jnp.asarray(_grid_codes()), steps, axis=0, mode="clip")
    return codes.reshape(-1)[: flat.size].reshape(absmax.shape), nested, offset


@functools.cache
def _grid_codes() -> np.ndarray:
    """For every step of the grid the code of the nearest 8-bit number."""
    table = dynamic_map()
    values = np.arange(GRID + 1, dtype=np.float32) / np.float32(GRID / 2) - np.float32(1)
    return np.searchsorted((table[:-1] + table[1:]) / np.float32(2), values).astype(np.uint8)
