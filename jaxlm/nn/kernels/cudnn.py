"""Attention by cuDNN, through JAX; what it can do is checked before, because its own limits are partly silent."""

import jax

from jaxlm.nn.kernels.masks import AttentionMask
from jaxlm.types import Array


def cudnn_attention(
    q_BxLxHxK: Array,
    k_BxSxGxK: Array,
    v_BxSxGxK: Array,
    *,
    mask: AttentionMask,
    scale: float,
    softcap: float | None = None,
) -> Array:
    """The function of `reference_attention` for what `obstacle` lets through; Args and Returns as there."""
    assert softcap is None
    # JAX counts a window's left side without the token itself. Without is_causal a left window lets the future in
    # (jax-ml/jax#39576), so both are always given together.
    window = None if mask.window is None else (mask.window - 1, 0)
    return jax.nn.dot_product_attention(
        q_BxLxHxK,
        k_BxSxGxK,
        v_BxSxGxK,
        scale=scale,
        is_causal=mask.causal,
        local_window_size=window,
        implementation="cudnn",
    )


def obstacle(q: Array, k: Array, mask: AttentionMask, softcap: float | None) -> str | None:
    """Why cuDNN cannot compute this call, or null. `q` and `k` need only shapes and dtypes."""
    if softcap is not None:
        return "it has no soft cap"
    if q.dtype != k.dtype or q.dtype.itemsize != 2:
        return f"it needs bfloat16 or float16, not {q.dtype} queries and {k.dtype} keys"
    limit = head_limit()
    if q.shape[-1] % 8 or q.shape[-1] > limit:
        return f"it needs a head width that is a multiple of 8 up to {limit}, not {q.shape[-1]}"
    if mask.segments_BxL is not None or mask.segments_BxS is not None:
        return "it has no segments"
    if mask.window is not None and not mask.causal:
        return "it has a window only together with causal"
    if mask.causal and not (isinstance(mask.q_offset, int) and mask.q_offset == 0):
        return "it has causal only for queries that start at position 0"
    return None


def head_limit() -> int:
    """Widest head: 256 from compute capability 9.0 (Hopper) on and where no GPU can be asked, else 128."""
    if jax.default_backend() != "gpu":
        return 256
    capability = getattr(jax.local_devices()[0], "compute_capability", "9.0")
    return 256 if float(capability) >= 9.0 else 128
