"""The compiled part of decoding: prefill of a batch of prompts, and a loop of single steps over a cache.

Prefill leaves each prompt's last token to the loop's first step, so that the head and the choice of tokens are compiled
once, and no step's work is thrown away.

Programs depend on the model and on bucketed shapes alone. How rows are sampled, where they end and how many steps are
taken are arrays.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm import tree
from jaxlm.decode import sampling
from jaxlm.decode.sampling import Settings
from jaxlm.nn import cache as kv
from jaxlm.nn import transformer, walk
from jaxlm.nn.compute import Compute
from jaxlm.nn.config import ModelConfig
from jaxlm.nn.kernels.tiles import one_cpu_device
from jaxlm.nn.panels import panels
from jaxlm.nn.qtensor import is_qtensor
from jaxlm.params.lora import merge
from jaxlm.params.quantize import is_projection
from jaxlm.types import Array, Tree, Variables


class State(NamedTuple):
    """A batch that is being continued.

    Attributes:
      cache: keys and values of all tokens but the newest.
      tokens: int32 [B, S + 1] by array position: padding, prompt, new tokens.
      log_probs: float32 [B, S + 1] of the new tokens, see `sampling.sample`; 0 elsewhere.
      end: int32 scalar, array position after the newest token.
      lengths: int32 [B], tokens of the row, prompt included, up to its end.
      done: bool [B], rows that have ended.
      seen: bool [B, V], tokens of prompt and output.
    """

    cache: kv.Cache
    tokens: Array
    log_probs: Array
    end: Array
    lengths: Array
    done: Array
    seen: Array


@functools.partial(jax.jit, static_argnums=0)
def _unstack(cfg: ModelConfig, variables: Variables) -> Variables:
    def converted(x: Array) -> Array:
        # On CPU 16-bit weights would be converted in every step.
        half = x.dtype in (jnp.bfloat16, jnp.float16) and jax.default_backend() == "cpu"
        return x.astype(jnp.float32) if half else x

    return unstack(cfg, jax.tree.map(converted, variables))


def unstack(cfg: ModelConfig, variables: Variables) -> Variables:
    """One tree a layer; adapters of float32 weights are merged, so that a step reads one matrix in place of three.

    Weights of lower precision would lose the adapter in their rounding, and quantised ones grow; there it stays apart.
    On one CPU device float32 matrices come in panels, a tied head as a second copy.
    """
    leaves = jax.tree.leaves(variables["params"], is_leaf=is_qtensor)
    if "lora" in variables and not any(is_qtensor(leaf) or leaf.dtype != jnp.float32 for leaf in leaves):
        merged = merge(cfg, variables["params"], variables["lora"])
        variables = {name: tree for name, tree in variables.items() if name != "lora"} | {"params": merged}
    found = {name: walk.unstack(cfg, tree) for name, tree in variables.items()}
    return {**found, "params": _in_panels(found["params"])} if one_cpu_device() and "lora" not in found else found


def _in_panels(params: Tree) -> Tree:
    def laid_out(path: str, x: Any) -> Any:
        matrix = x.ndim == 2 and x.dtype == jnp.float32
        return panels(x) if matrix and (is_projection(path) or path == "unembed/kernel") else x

    if "unembed" not in params:
        params = {**params, "unembed": {"kernel": params["embed"]["kernel"].T}}
    return tree.map_with_path(laid_out, params)


def prepare(cfg: ModelConfig, variables: Variables) -> Variables:
    """Variables as decoding wants them: one tree a layer, float32 on CPU. What is prepared already passes as it is.

    Preparing copies the weights; who decodes often with the same ones prepares them once.
    """
    if isinstance(variables["params"]["layers"], tuple):
        return variables
    return _unstack(cfg, variables)


def program_of(cfg: ModelConfig) -> ModelConfig:
    """The part of a configuration that compiled programs depend on: special tokens and the like are no part of it."""
    family, lora = None, None
    if cfg.lora is not None:
        # Its targets go by the names of the family.
        family, lora = cfg.family, dataclasses.replace(cfg.lora, base=None, dropout=0.0, plus_ratio=None)
    tokens: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    return dataclasses.replace(cfg, **tokens, family=family, lora=lora, dropout=0.0)


def compute_of(variables: Variables) -> Compute:
    """Decoding computes in the dtype of the (prepared) embedding."""
    return Compute(dtype=str(variables["params"]["embed"]["kernel"].dtype))


@functools.partial(jax.jit, static_argnums=(0, 1))
def prefill(cfg: ModelConfig, compute: Compute, variables: Variables, tokens_BxT: Array, segments_BxT: Array) -> State:
    """Read the prompts but for their last tokens; the cache has room for that alone.

    Args:
      cfg, compute: static.
      variables: prepared.
      tokens_BxT, segments_BxT: see `batch.Prompts`.
    """
    batch, width = tokens_BxT.shape
    rest = segments_BxT[:, :-1]
    output = transformer.apply(
        cfg,
        variables,
        tokens_BxT[:, :-1],
        positions=jnp.maximum(jnp.cumsum(rest, axis=1) - 1, 0),
        segments=rest,
        compute=compute,
        cache=kv.empty(cfg, batch, width - 1, compute.dtype),
    )
    lengths = jnp.sum(segments_BxT, axis=1, dtype=jnp.int32)
    rows = jnp.arange(batch, dtype=jnp.int32)[:, None]
    seen = jnp.zeros((batch, cfg.V), bool).at[rows, tokens_BxT].max(segments_BxT > 0)
    log_probs = jnp.zeros(tokens_BxT.shape, jnp.float32)
    return State(output.cache, tokens_BxT, log_probs, jnp.int32(width), lengths, lengths == 0, seen)


def _append(state: State, scores_BxV: Array, settings: Settings) -> State:
    token, log_prob = sampling.sample(scores_BxV, state.seen, settings, state.lengths)
    zero = jnp.zeros((), state.end.dtype)
    rows = jnp.arange(token.shape[0], dtype=jnp.int32)
    return State(
        cache=state.cache,
        tokens=jax.lax.dynamic_update_slice(state.tokens, token[:, None], (zero, state.end)),
        log_probs=jax.lax.dynamic_update_slice(state.log_probs, log_prob[:, None], (zero, state.end)),
        end=state.end + 1,
        lengths=state.lengths + ~state.done,
        done=state.done | jnp.any(token[:, None] == settings.ends, axis=1),
        seen=state.seen.at[rows, token].set(True),
    )


@functools.partial(jax.jit, static_argnums=1)
def grow(state: State, length: int) -> State:
    """The state with room for `length` tokens in the cache."""

    def wider(x: Array, axis: int, size: int = length) -> Array:
        rest = [(0, 0)] * x.ndim
        rest[axis] = (0, size - x.shape[axis])
        return jnp.pad(x, rest)

    k, v = tuple(wider(x, kv.KEYS) for x in state.cache.k), tuple(wider(x, kv.VALUES) for x in state.cache.v)
    cache = state.cache._replace(k=k, v=v, segments=wider(state.cache.segments, 1))
    tokens, log_probs = (wider(x, 1, length + 1) for x in (state.tokens, state.log_probs))
    return state._replace(cache=cache, tokens=tokens, log_probs=log_probs)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def extend(
    cfg: ModelConfig, compute: Compute, variables: Variables, state: State, settings: Settings, stop: Array
) -> State:
    """Steps until every row has ended or the tokens reach array position `stop` (int32, at most S + 1)."""

    def going(state: State) -> Array:
        return (state.end < stop) & ~jnp.all(state.done)

    def step(state: State) -> State:
        newest = jax.lax.dynamic_slice_in_dim(state.tokens, state.end - 1, 1, axis=1)
        # A row that has ended goes on beside the others, unseen; its position stands still.
        positions = jnp.maximum(state.lengths - 1, 0)[:, None]
        segments = (state.lengths > 0)[:, None].astype(jnp.int32)
        output = transformer.apply(
            cfg, variables, newest, positions=positions, segments=segments, compute=compute, cache=state.cache
        )
        scores = transformer.head_logits(output.hidden[:, 0], output.head)
        return _append(state._replace(cache=output.cache), scores, settings)

    return jax.lax.while_loop(going, step, state)
