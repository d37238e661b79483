"""Decoding by all processes together, with parameters spread over a mesh: one program, results whole everywhere."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm.decode import batch, loop, sampling
from jaxlm.decode.generation import GREEDY, Samples, ends_of
from jaxlm.decode.sampling import Choice
from jaxlm.dist import place
from jaxlm.dist.mesh import ROWS
from jaxlm.nn.compute import Compute
from jaxlm.nn.config import ModelConfig
from jaxlm.types import Array, Variables

SHORT = 256


def sample_on(
    mesh: Mesh,
    cfg: ModelConfig,
    variables: Variables,
    prompts: Sequence[Sequence[int]] | batch.Prompts,
    max_new_tokens: int,
    choice: Choice = GREEDY,
) -> Samples:
    """`generation.sample` with variables spread over a mesh; they need not be prepared.

    All processes call it together with the same arguments. It computes in bfloat16 on accelerators, in float32 on CPU.
    Who calls it often pads the prompts himself, always to the same width, and one program serves all calls.

    Raises:
      ValueError: as `generation.sample`.
    """
    if choice.stop:
        raise ValueError("choice.stop: cannot be used over a mesh; cut the ids where they are read")
    padded = prompts if isinstance(prompts, batch.Prompts) else batch.pad(batch.check(cfg, prompts, max_new_tokens))
    rows = len(padded.lengths)
    settings = sampling.settings([choice] * rows, range(rows), [ends_of(cfg)] * rows)
    dtype = "float32" if mesh.devices.flat[0].platform == "cpu" else "bfloat16"
    # Of a few short prompts all scores fit; loops over tiles would only take longer to compile.
    compute = Compute(dtype=dtype, attention="reference" if padded.tokens.shape[1] <= SHORT else None)
    # Without processors the program needs no branches for them, which is most of what would be compiled.
    fixed = GREEDY if choice == GREEDY else None
    inputs = jax.tree.map(np.asarray, (padded.tokens, padded.segments, settings))
    if rows % math.prod(mesh.shape[axis] for axis in ROWS) == 0:
        inputs = place.put(inputs, place.batch_sharding(mesh, 1))  # else every device does all rows
    tokens, log_probs, lengths = jax.device_get(_run(mesh, cfg, compute, max_new_tokens, fixed, variables, inputs))
    first, count = padded.tokens.shape[1], padded.count
    lengths = (lengths - padded.lengths)[:count]
    behind = np.arange(max_new_tokens)[None, :] >= lengths[:, None]
    new = slice(first, first + max_new_tokens)
    return Samples(np.where(behind, 0, tokens[:count, new]), lengths, np.where(behind, 0.0, log_probs[:count, new]))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _run(
    mesh: Mesh,
    cfg: ModelConfig,
    compute: Compute,
    steps: int,
    fixed: Choice | None,
    *arrays: Any,
) -> tuple[Array, Array, Array]:
    variables, (tokens, segments, settings) = arrays
    if fixed is not None:
        values = {name: value for name, value in fixed._asdict().items() if name not in ("seed", "stop")}
        constant = {name: jnp.full(tokens.shape[:1], value) for name, value in values.items()}
        settings = settings._replace(**constant)
    variables = loop.unstack(cfg, variables)
    state = loop.prefill(cfg, compute, variables, tokens, segments)
    last = tokens.shape[1] + steps
    state = loop.extend(cfg, compute, variables, loop.grow(state, last - 1), settings, jnp.int32(last))
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.lax.with_sharding_constraint((state.tokens, state.log_probs, state.lengths), whole)
