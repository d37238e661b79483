"""What happens inside a model: the activations that a coordinate check looks at, of one forward pass."""

import jax.numpy as jnp

from jaxlm.nn import transformer
from jaxlm.nn.attention import Context
from jaxlm.nn.block import Block
from jaxlm.nn.compute import Compute
from jaxlm.nn.config import ModelConfig
from jaxlm.nn.mlp import ACTIVATIONS
from jaxlm.nn.rope import rotate, tables
from jaxlm.nn.walk import kinds, unstack
from jaxlm.types import Array, Batch, Tree, Variables

ACTIVATION_NAMES = (
    "embedding",
    "attention_out",
    "mlp_hidden",
    "mlp_out",
    "final_residual",
    "attention_logits",
    "logits",
)
"""In the order of tables."""


def activations(cfg: ModelConfig, variables: Variables, batch: Batch) -> dict[str, Array]:
    """The activations of `ACTIVATION_NAMES`, in float32.

    Those inside a layer are of the last one, where what the layers before it did wrong has added up.

    Args:
      cfg: a dense model.
      variables: {"params": tree}, layers stacked.
      batch: tokens, segments, positions, each [B, L].

    Returns:
      embedding, attention_out (what the branch adds to the residual stream, before muP's residual factor), mlp_out (the
      same), final_residual (behind the last layer, before the norm): [B, L, D]. mlp_hidden: what goes into the down
      projection, [B, L, F]. attention_logits: scores before the softmax, [B, H, L, L], 0 where a query may not look.
      logits: [B, L, V].
    """
    stream: list[Array] = []

    def look(x: Array) -> Array:
        stream.append(x)
        return x

    # The placement hook sees the residual stream before the first layer and behind each, so the model's own forward
    # pass is what is measured; layers are walked one by one, or the hook would see the inside of a scan.
    compute = Compute(scan=False, constrain=look)
    segments, positions = batch["segments"], batch["positions"]
    output = transformer.apply(cfg, variables, batch["tokens"], positions=positions, segments=segments, compute=compute)
    kind, tree = kinds(cfg)[-1], unstack(cfg, variables["params"])["layers"][-1]
    ropes = {"full": cfg.rope, "sliding": cfg.local_rope or cfg.rope}
    tables_ = {kind.layer_type: tables(ropes[kind.layer_type], cfg.K, cfg.max_length, positions)}
    context = Context(tables_ if cfg.positions == "rope" else {}, segments)
    block = Block(cfg, Compute(), kind.layer_type, kind.sparse)
    _, captured = block.apply(
        {"params": tree}, stream[-2], context, capture_intermediates=True, mutable=["intermediates"]
    )
    inside = captured["intermediates"]
    found = {
        "embedding": stream[0],
        "attention_out": _returned(inside["attn"])[0],
        "mlp_hidden": _mlp_hidden(cfg, inside["mlp"]),
        "mlp_out": _returned(inside["mlp"]),
        "final_residual": stream[-1],
        "attention_logits": _attention_logits(cfg, inside["attn"], context, kind.layer_type),
        "logits": transformer.head_logits(output.hidden, output.head),
    }
    return {name: value.astype(jnp.float32) for name, value in found.items()}


def _returned(captured: Tree) -> Array:
    """What a module returned: Linen keeps a tuple with an entry for each call."""
    return captured["__call__"][0]


def _mlp_hidden(cfg: ModelConfig, captured: Tree) -> Array:
    act, up = ACTIVATIONS[cfg.activation], _returned(captured["up"])
    return act(_returned(captured["gate"])) * up if cfg.gated else act(up)


def _attention_logits(cfg: ModelConfig, captured: Tree, context: Context, layer_type: str) -> Array:
    """Scores [B, H, L, L] of the queries and keys that a layer made, where a query may look, else 0."""
    q, k = _heads(cfg, captured, "q"), _heads(cfg, captured, "k")
    if context.rope:
        cos, sin = context.rope[layer_type]
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    k = jnp.repeat(k, cfg.H // cfg.G, axis=2)
    scale = (cfg.K**-0.5 if cfg.attention_scale is None else cfg.attention_scale) * cfg.attention_multiplier
    scores = jnp.einsum("blhk,bshk->bhls", q.astype(jnp.float32), k.astype(jnp.float32)) * scale
    if cfg.attention_softcap is not None:
        scores = cfg.attention_softcap * jnp.tanh(scores / cfg.attention_softcap)
    segments = context.segments
    assert segments is not None
    visible = jnp.tril(jnp.ones(scores.shape[-2:], bool))[None] & (segments[:, :, None] == segments[:, None, :])
    if layer_type == "sliding" and cfg.window is not None:
        visible &= ~jnp.tril(jnp.ones(scores.shape[-2:], bool), -cfg.window)[None]
    return jnp.where(visible[:, None], scores, 0.0)


def _heads(cfg: ModelConfig, captured: Tree, name: str) -> Array:
    """Queries or keys [B, L, heads, K] before rotation, as `Attention` makes them of its projections."""
    norm = f"{name}_norm"
    x = _returned(captured[norm if cfg.qk_norm == "projection" else name])
    if cfg.clip_qkv is not None:
        x = jnp.clip(x, -cfg.clip_qkv, cfg.clip_qkv)
    return _returned(captured[norm]) if cfg.qk_norm == "head" else x.reshape(*x.shape[:2], -1, cfg.K)
