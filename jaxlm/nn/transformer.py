"""The decoder-only transformer: pure functions from trees and tokens to hidden states."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.nn import cache as kv
from jaxlm.nn import walk as layers
from jaxlm.nn.adapters import adapted_rows, attach
from jaxlm.nn.attention import Context
from jaxlm.nn.block import Block
from jaxlm.nn.compute import Compute
from jaxlm.nn.config import ModelConfig
from jaxlm.nn.copies import look_up, table_copies
from jaxlm.nn.dropout import dropout, embedding_noise
from jaxlm.nn.kernels.matmul import matmul
from jaxlm.nn.norms import make_norm
from jaxlm.nn.panels import Panels
from jaxlm.nn.rope import tables
from jaxlm.types import Array, Head, Output, Tree, Variables

LEARNED_POSITION_STD = 0.02


def init(cfg: ModelConfig, key: Array) -> Variables:
    """Fresh parameters in float32: {"params": tree}, layers stacked on a leading axis N.

    Matrices are drawn from N(0, 1/fan_in); attention's and feed-forward's output projections are smaller by
    sqrt(2N), so that the residual stream keeps unit variance at any depth. Pure: works under `jax.eval_shape`.

    Args:
      cfg: the model; `vocab_size` must be set.
      key: a typed PRNG key, `jax.random.key(seed)`.
    """
    cfg.validate()
    return _init(cfg, key)


@functools.partial(jax.jit, static_argnums=0)
def _init(cfg: ModelConfig, key: Array) -> Variables:
    embed_key, head_key, position_key, layer_key = jax.random.split(key, 4)
    embed_std = cfg.embed_std or (0.02 if cfg.tie_embeddings else 1.0)
    params: Tree = {"embed": {"kernel": embed_std * jax.random.normal(embed_key, (cfg.V, cfg.D))}}
    if cfg.positions == "learned":
        table = LEARNED_POSITION_STD * jax.random.normal(position_key, (cfg.max_length, cfg.D))
        params["position_embed"] = {"kernel": table}
    keys = jax.random.split(layer_key, cfg.N)
    slots, kinds = layers.layer_slots(cfg), layers.kinds(cfg)
    for name in layers.STACKS:
        chosen = [i for i, (stack, _) in enumerate(slots) if stack == name]
        if chosen:
            block = Block(cfg, Compute(), kinds[chosen[0]].layer_type, kinds[chosen[0]].sparse)
            params[name] = jax.vmap(lambda k, block=block: _init_block(cfg, block, k))(keys[jnp.array(chosen)])
    params["norm"] = make_norm(cfg, "norm").init(layer_key, jnp.zeros((1, cfg.D)))["params"]
    if not cfg.tie_embeddings:
        params["unembed"] = {"kernel": jax.random.normal(head_key, (cfg.D, cfg.V)) / math.sqrt(cfg.D)}
    return {"params": params}


def apply(
    cfg: ModelConfig,
    variables: Variables,
    tokens: Array,
    *,
    positions: Array | None = None,
    segments: Array | None = None,
    key: Array | None = None,
    compute: Compute | None = None,
    cache: kv.Cache | None = None,
    noise: float = 0.0,
    collect: tuple[str, ...] = (),
    adapters: Array | None = None,
) -> Output:
    """Run the model.

    Args:
      cfg: the model.
      variables: {"params": tree} and, for adapters, {"lora": tree}; layers stacked, or a tuple of per-layer trees.
      tokens: int32 [B, L].
      positions: int32 [B, L], or None for 0..L-1 (counted from the cache's index, if there is one).
      segments: int32 [B, L]; 0 is padding, equal ids may attend to each other. None: one segment, no padding.
      key: PRNG key of dropout; None in evaluation.
      compute: precision, memory policy, kernels, placement.
      cache: keys and values of earlier tokens; the new ones are appended at `cache.index`.
      noise: alpha of the noise on embeddings (`dropout.embedding_noise`); without a key there is none.
      collect: what to return of every layer, see `Compute.collect`; stacked layers without a cache only.
      adapters: int32 [B], which of several stacked adapters each row is for (`jaxlm.params.lora.stack`).

    Returns:
      Output with hidden [B, L, D] in `compute.dtype`.
    """
    variables = attach(cfg, variables, adapters)
    params, compute = variables["params"], dataclasses.replace(compute or Compute(), collect=collect)
    context, cache = _context(cfg, tokens, positions, segments, cache)
    tables = params if cache is not None else _spread_tables(params, tokens.shape)
    x = _embed(cfg, {**variables, "params": tables}, tokens, positions, cache, compute)
    if noise and key is not None:
        x = embedding_noise(x, segments, noise, jax.random.fold_in(key, cfg.N + 1))
    if cfg.dropout and key is not None:
        x = dropout(x, cfg.dropout, jax.random.fold_in(key, cfg.N))
    x = compute.constrain(x)
    unstacked = isinstance(params["layers"], tuple)
    if unstacked or cache is not None:
        x, aux, cache = _loop(cfg, variables, x, context, cache, compute)
    else:
        x, aux = _walk(cfg, variables, x, context, key, compute)
    x = make_norm(cfg, "norm").apply({"params": params["norm"]}, x)  # type: ignore[assignment]
    if cfg.logits_multiplier != 1.0:
        x = x * cfg.logits_multiplier
    table = tables["embed"]["kernel"]
    copies = table if "unembed" not in params and table.ndim == 3 else None
    joined = _join(aux)
    states = {name: joined.pop(name) for name in collect}
    return Output(x, head(cfg, params)._replace(copies=copies), joined, cache, states)


def head(cfg: ModelConfig, params: Tree) -> Head:
    """The output head: the embedding itself where there is no other."""
    if "unembed" not in params:
        return Head(params["embed"]["kernel"], None, cfg.logit_softcap, tied=True)
    return Head(params["unembed"]["kernel"], params["unembed"].get("bias"), cfg.logit_softcap)


def logits(
    cfg: ModelConfig,
    variables: Variables,
    tokens: Array,
    positions: Array | None = None,
    segments: Array | None = None,
    *,
    compute: Compute | None = None,
) -> Array:
    """Float32 logits [B, L, V], for evaluation and inspection; training never makes this array.

    Args:
      cfg, variables: of `init` or `jaxlm.load`.
      tokens, positions, segments: integers [B, L], arrays or nested lists; as in `apply`.
      compute: as in `apply`.

    Raises:
      ValueError: a token id outside the vocabulary, with its row and column, or arrays of different shapes.
    """
    inputs = [None if x is None else _checked(name, x, tokens, cfg.V) for name, x in
              (("tokens", tokens), ("positions", positions), ("segments", segments))]  # fmt: skip
    return _logits(cfg, compute or Compute(), variables, *inputs)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _logits(
    cfg: ModelConfig,
    compute: Compute,
    variables: Variables,
    tokens: Array,
    positions: Array | None,
    segments: Array | None,
) -> Array:
    output = apply(cfg, variables, tokens, positions=positions, segments=segments, compute=compute)
    return head_logits(output.hidden, output.head)


def _checked(name: str, values: Array, tokens: Array, vocabulary: int) -> Array:
    """int32 [B, L]; ids are looked at unless they are being traced. Out of range, a gather would clip in silence."""
    try:
        array = jnp.asarray(values, jnp.int32)
    except ValueError:
        raise ValueError(f"{name}: not integers [B, L]; rows of one length are needed, pad the shorter ones") from None
    if array.ndim != 2 or array.shape != np.shape(tokens):
        raise ValueError(f"{name}: shape {array.shape}, tokens {np.shape(tokens)}; give integers [B, L] for all")
    if name == "tokens" and not isinstance(array, jax.core.Tracer):
        wrong = np.argwhere((np.asarray(array) < 0) | (np.asarray(array) >= vocabulary))
        if wrong.size:
            row, column = wrong[0].tolist()
            raise ValueError(
                f"tokens: id {int(array[row, column])} in row {row}, column {column} is outside the vocabulary of "
                f"{vocabulary}; use the model's tokenizer"
            )
    return array


def head_logits(hidden_xD: Array, head_: Head) -> Array:
    """Float32 logits [..., V] of hidden states [..., D]."""
    if isinstance(head_.kernel, Panels):
        out = matmul(hidden_xD.astype(jnp.float32), head_.kernel)
    else:
        kernel = head_.kernel.astype(hidden_xD.dtype)
        contract = (((hidden_xD.ndim - 1,), (1 if head_.tied else 0,)), ((), ()))
        out = jax.lax.dot_general(hidden_xD, kernel, contract, preferred_element_type=jnp.float32)
    if head_.bias is not None:
        out = out + head_.bias.astype(jnp.float32).reshape((1,) * (out.ndim - 1) + (-1,))
    return out if head_.softcap is None else head_.softcap * jnp.tanh(out / head_.softcap)


def _init_block(cfg: ModelConfig, block: Block, key: Array) -> Tree:
    """Parameters of one layer. The forward pass that Linen traces for it runs on one token and is thrown away."""
    positions = jnp.zeros((1, 1), jnp.int32)
    context = Context(_rope(cfg, positions, 1))
    return block.init(key, jnp.zeros((1, 1, cfg.D)), context)["params"]


def _rope(cfg: ModelConfig, positions: Array, length: int | None) -> dict[str, tuple[Array, Array]]:
    if cfg.positions != "rope":
        return {}
    types = {kind.layer_type for kind in layers.kinds(cfg)}
    ropes = {"full": cfg.rope, "sliding": cfg.local_rope or cfg.rope}
    return {t: tables(ropes[t], cfg.K, cfg.max_length, positions, length) for t in sorted(types)}


def _positions(tokens: Array, positions: Array | None, cache: kv.Cache | None) -> Array:
    if positions is not None:
        return positions
    steps = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
    return steps if cache is None else steps + cache.index


def _context(
    cfg: ModelConfig, tokens: Array, positions: Array | None, segments: Array | None, cache: kv.Cache | None
) -> tuple[Context, kv.Cache | None]:
    # With default positions the length of the call is known while tracing; length-dependent tables need not ask.
    length = tokens.shape[1] if positions is None and cache is None else None
    rope = _rope(cfg, _positions(tokens, positions, cache), length)
    if cache is None:
        return Context(rope, segments), None
    if segments is None:
        segments = jnp.ones(tokens.shape, jnp.int32)
    marked = kv.mark(cache.segments, segments, cache.index)
    return Context(rope, segments, marked, cache.index), cache._replace(segments=marked)


def _spread_tables(params: Tree, shape: tuple[int, ...]) -> Tree:
    """The parameters with tables that tokens are looked up in as copies for the mesh in force, if there is one."""
    names = [name for name in ("embed", "position_embed") if name in params]
    return {**params, **{name: {"kernel": table_copies(params[name]["kernel"], shape)} for name in names}}


def _embed(
    cfg: ModelConfig,
    variables: Variables,
    tokens: Array,
    positions: Array | None,
    cache: kv.Cache | None,
    compute: Compute,
) -> Array:
    params = variables["params"]
    x = look_up(params["embed"]["kernel"], tokens)
    if "embed" in variables.get("lora", {}):
        x = adapted_rows(x, variables["lora"]["embed"], tokens)
    if cfg.positions == "learned":
        where = jnp.broadcast_to(_positions(tokens, positions, cache), tokens.shape)
        x = x + look_up(params["position_embed"]["kernel"], where)
    x = x.astype(compute.dtype)
    return x if cfg.embed_scale is None else x * jnp.asarray(cfg.embed_scale, x.dtype)


def _walk(
    cfg: ModelConfig, variables: Variables, x: Array, context: Context, key: Array | None, compute: Compute
) -> tuple[Array, list[Tree]]:
    def layer(x: Array, tree: Tree, kind: layers.Kind, index: Array) -> tuple[Array, Tree]:
        def body(x: Array, tree: Tree, context: Context) -> tuple[Array, Tree]:
            rngs = None if key is None else {"dropout": jax.random.fold_in(key, index)}
            block = Block(cfg, compute, kind.layer_type, kind.sparse)
            x, _, aux = block.apply(tree, x, context, rngs=rngs)  # type: ignore[misc]
            x = compute.constrain(x)
            return x, aux | ({"hidden": x} if "hidden" in compute.collect else {})

        return layers.checkpoint(body, compute.remat)(x, tree, context)

    stacks = {c: tree for c, tree in variables.items() if any(name in tree for name in layers.STACKS)}
    return layers.walk(cfg, layer, x, stacks, compute.scan)


def _loop(
    cfg: ModelConfig, variables: Variables, x: Array, context: Context, cache: kv.Cache | None, compute: Compute
) -> tuple[Array, list[Tree], kv.Cache | None]:
    unstacked = {c: layers.unstack(cfg, tree) for c, tree in variables.items()}
    trees = {c: tree["layers"] for c, tree in unstacked.items() if "layers" in tree}
    ks, vs, aux = [], [], []
    for i, kind in enumerate(layers.kinds(cfg)):
        block = Block(cfg, compute, kind.layer_type, kind.sparse)
        cached = None if cache is None else (cache.k[i], cache.v[i])
        layer = {c: tree[i] for c, tree in trees.items()}
        x, cached, extra = block.apply(layer, x, context, cached)  # type: ignore[misc]
        aux.append(extra)
        if cached is not None:
            ks.append(cached[0])
            vs.append(cached[1])
    if cache is not None:
        cache = kv.Cache(tuple(ks), tuple(vs), cache.segments, cache.index + x.shape[1])
    return x, aux, cache


def _join(aux: list[Tree]) -> dict[str, Array]:
    """Auxiliary values by name, stacked over the layers that have them: [layers, ...]."""
    names = sorted({name for tree in aux for name in tree})
    return {name: jnp.stack([tree[name] for tree in aux if name in tree]) for name in names}
