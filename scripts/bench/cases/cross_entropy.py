"""The head and its loss, forward and backward."""

from typing import Any

from scripts.bench.cases.train import shape_of
from scripts.bench.measure import jax_wait, repeat, torch_wait
from scripts.bench.shapes import torch_device

Options = dict[str, Any]


def jaxlm(options: Options) -> dict[str, Any]:
    """jaxlm's chunked cross-entropy."""
    import jax
    import jax.numpy as jnp

    from jaxlm.objectives.cross_entropy import cross_entropy
    from jaxlm.types import Head

    shape = shape_of(options)
    hidden = jax.random.normal(jax.random.key(0), (shape.rows, shape.length, shape.width), jnp.dtype(options["dtype"]))
    kernel = 0.02 * jax.random.normal(jax.random.key(1), (shape.vocabulary, shape.width))
    targets = jax.random.randint(jax.random.key(2), (shape.rows, shape.length), 0, shape.vocabulary)
    weights = jnp.ones((shape.rows, shape.length))

    def loss(hidden, kernel):
        return cross_entropy(hidden, Head(kernel, tied=True), targets, weights)[0]

    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(hidden, kernel).compile()
    found = repeat(lambda: compiled(hidden, kernel), jax_wait, options["seconds"])
    return found | {"temporary": compiled.memory_analysis().temp_size_in_bytes}


def torch(options: Options) -> dict[str, Any]:
    """A linear layer and torch's cross_entropy over all logits."""
    import torch
    from torch.nn import functional

    torch.set_num_threads(options["threads"])
    shape, device = shape_of(options), torch_device()
    hidden = torch.randn(shape.rows * shape.length, shape.width, device=device, requires_grad=True)
    kernel = (0.02 * torch.randn(shape.vocabulary, shape.width, device=device)).requires_grad_()
    targets = torch.randint(0, shape.vocabulary, (shape.rows * shape.length,), device=device)

    def call():
        hidden.grad = kernel.grad = None
        with torch.autocast(device, torch.bfloat16, enabled=options["dtype"] == "bfloat16"):
            logits = functional.linear(hidden, kernel)
        functional.cross_entropy(logits.float(), targets).backward()
        return kernel.grad

    return repeat(call, torch_wait, options["seconds"])


SIDES = {"jaxlm": jaxlm, "torch": torch}
