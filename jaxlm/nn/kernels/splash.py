"""Attention on TPU by the splash kernel that comes with JAX (`jax.experimental.pallas.ops.tpu.splash_attention`)."""

import importlib.util
import math

import jax
import jax.numpy as jnp

from jaxlm.nn.kernels.masks import AttentionMask, complete
from jaxlm.types import Array

MODULE = "jax.experimental.pallas.ops.tpu.splash_attention"

LANES = 128
"""Sequence lengths must be a multiple of this, the width of a TPU register."""

BLOCK = 512
"""Longest tile side; the kernel's own default of 128 is known to be slow."""


def splash_attention(
    q_BxLxHxK: Array,
    k_BxSxGxK: Array,
    v_BxSxGxK: Array,
    *,
    mask: AttentionMask,
    scale: float,
    softcap: float | None = None,
) -> Array:
    """The function of `reference_attention` for what `obstacle` lets through; Args and Returns as there."""
    mask = complete(mask, q_BxLxHxK.shape, k_BxSxGxK.shape)
    q = (q_BxLxHxK * scale).astype(q_BxLxHxK.dtype)
    kernel = jax.vmap(_kernel(mask, q.shape[1:3], k_BxSxGxK.shape[1], softcap))
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k_BxSxGxK, v_BxSxGxK))
    if mask.segments_BxL is None:
        return jnp.swapaxes(kernel(q, k, v), 1, 2)
    o = jnp.swapaxes(kernel(q, k, v, _segment_ids(mask.segments_BxL, mask.segments_BxS)), 1, 2)
    # The kernel lets padding see padding.
    return jnp.where((mask.segments_BxL != 0)[:, :, None, None], o, jnp.zeros_like(o))


def _segment_ids(q_ids: Array, kv_ids: Array):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

    return splash_attention_kernel.SegmentIds(q=q_ids, kv=kv_ids)


def _kernel(mask: AttentionMask, q_shape: tuple[int, int], n_keys: int, softcap: float | None):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    shape = (q_shape[0], n_keys)
    one = splash_attention_mask.CausalMask(shape) if mask.causal else splash_attention_mask.FullMask(shape)
    if mask.window is not None:
        sides = (mask.window - 1, 0 if mask.causal else mask.window - 1)
        one = splash_attention_mask.LocalMask(shape, window_size=sides, offset=0)
    q, kv = math.gcd(BLOCK, shape[0]), math.gcd(BLOCK, shape[1])
    sizes = splash_attention_kernel.BlockSizes(
        block_q=q, block_kv=kv, block_q_dkv=q, block_kv_dkv=kv, block_q_dq=q, block_kv_dq=kv
    )
    return splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([one] * q_shape[1]),
        block_sizes=sizes,
        attn_logits_soft_cap=softcap,
        head_shards=1,
        q_seq_shards=1,
        interpret=jax.default_backend() != "tpu",
    )


def obstacle(q: Array, k: Array, mask: AttentionMask, softcap: float | None) -> str | None:
    """Why the kernel cannot compute this call, or null. `q` and `k` need only shapes and dtypes."""
    del softcap
    if importlib.util.find_spec(MODULE) is None:
        return f"this version of JAX has no {MODULE}"
    if q.shape[1] % LANES or k.shape[1] % LANES:
        return f"it needs lengths that are multiples of {LANES}, not {q.shape[1]} and {k.shape[1]}"
    if q.shape[-1] % 64:
        return f"it needs a head width that is a multiple of 64, not {q.shape[-1]}"
    if mask.segments_BxL is None and mask.segments_BxS is not None:
        return "it needs segments of the queries where the keys have some"
    if not (isinstance(mask.q_offset, int) and mask.q_offset == 0):
        return "it needs queries that start at position 0"
    return None
