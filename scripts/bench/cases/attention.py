"""Causal attention, forward and backward: one row, four heads of 64 (on a GPU 32 heads of 128)."""

from typing import Any

from scripts.bench.measure import jax_wait, repeat, torch_wait
from scripts.bench.shapes import torch_device

Options = dict[str, Any]


def heads(gpu: bool) -> tuple[int, int]:
    """Number and width of heads."""
    return (32, 128) if gpu else (4, 64)


def jaxlm(options: Options) -> dict[str, Any]:
    """jaxlm's attention, by the backend it chooses."""
    import jax
    import jax.numpy as jnp

    from jaxlm.nn.kernels.attention import AttentionMask, attention

    count, width = heads(jax.devices()[0].platform != "cpu")
    keys = jax.random.split(jax.random.key(0), 4)
    shape = (1, options["length"], count, width)
    q, k, v, dy = (jax.random.normal(key, shape, jnp.dtype(options["dtype"])) for key in keys)

    def loss(q, k, v):
        y = attention(q, k, v, mask=AttentionMask(), scale=width**-0.5, backend=options.get("attention"))
        return jnp.sum(y.astype(jnp.float32) * dy.astype(jnp.float32))

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, v).compile()
    found = repeat(lambda: compiled(q, k, v), jax_wait, options["seconds"])
    return found | {"temporary": compiled.memory_analysis().temp_size_in_bytes}


def torch(options: Options) -> dict[str, Any]:
    """torch's scaled_dot_product_attention."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    torch.set_num_threads(options["threads"])
    count, width = heads(torch.cuda.is_available())
    make = lambda: torch.randn(  # noqa: E731
        1, count, options["length"], width, device=torch_device(), dtype=getattr(torch, options["dtype"])
    )
    q, k, v = (make().requires_grad_() for _ in range(3))
    dy = make()

    def call():
        q.grad = k.grad = v.grad = None
        scaled_dot_product_attention(q, k, v, is_causal=True).backward(dy)
        return q.grad

    return repeat(call, torch_wait, options["seconds"])


SIDES = {"jaxlm": jaxlm, "torch": torch}
