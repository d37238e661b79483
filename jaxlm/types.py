"""The shapes of things that pass between rooms, and the glossary of dimension letters; no logic.

Dimension letters, used in names (`x_BxLxD`), einsum strings and docstrings:

    B batch            L sequence length      S key/value length     D model width
    H query heads      G key/value heads      K head width           F feed-forward width
    V vocabulary       E experts              C expert capacity      R LoRA rank
    N layers           A adapters             T rows of a flattened [B, L]
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

Array = jax.Array
Tree = Any
"""A pytree of arrays: nested dicts, with layers stacked on a leading axis N."""

Variables = dict[str, Tree]
"""Named trees: {"params": base} or {"params": base, "lora": adapters}."""

Batch = dict[str, Array]
"""Arrays with a leading axis of rows. Running text and instruction data have

    tokens     int32   [B, L]   inputs
    targets    int32   [B, L]   the token after each input
    mask       float32 [B, L]   1 where the target is a label, else 0
    segments   int32   [B, L]   0 = padding; equal ids may attend to each other
    positions  int32   [B, L]   restart at 0 in each segment

Objectives with other needs name their own columns in their docstrings.
"""


class Head(NamedTuple):
    """How hidden states become logits: `hidden @ kernel (+ bias)`, then `cap * tanh(logits / cap)`.

    Attributes:
      kernel: [V, D] when `tied` (the embedding itself), else [D, V].
      bias: [V] or None.
      softcap: the cap, or None.
      tied: which of the two layouts `kernel` has.
      copies: [groups, V, D] of a tied kernel, one for each group of rows of the mesh, or None. What uses them instead
        of `kernel` has its gradient added to that of the lookup before it crosses devices.
    """

    kernel: Array
    bias: Array | None = None
    softcap: float | None = None
    tied: bool = False
    copies: Array | None = None


class Output(NamedTuple):
    """What a model returns.

    Attributes:
      hidden: [B, L, D] after the final norm, scaled by the muP logits factor, in the compute dtype.
      head: turns hidden states into logits; objectives apply it in chunks so that [B, L, V] never exists.
      aux: auxiliary losses and statistics by name (mixture-of-experts balance); scalars or arrays [N, ...].
      cache: the key/value cache after this call, or None.
      states: what the call was asked to collect of every layer, by name: arrays [N, B, ...].
    """

    hidden: Array
    head: Head
    aux: dict[str, Array]
    cache: Any = None
    states: dict[str, Array] = {}  # noqa: RUF012 - never changed, and a pytree, which a read-only mapping is not


Apply = Callable[..., Output]
"""`apply(variables, tokens, *, model="policy", positions=None, segments=None, key=None) -> Output`; without a key,
without dropout. `model` names whose architecture it is: the trained one's, or another that the objective asked for."""


def no_trees(models: Any, key: Array) -> Variables:
    """The `init` of objectives that train nothing but the model."""
    return {}


class Objective(NamedTuple):
    """Pure functions; together they define what a step minimises.

    Attributes:
      prepare: `(apply, params, frozen, batch, key) -> batch`. Once a step, without gradient: adds what needs the
        whole batch (reference log-probabilities, teacher scores).
      weights: `(batch) -> {term: scalar}`. The normalisers of the whole step's batch, from masks alone.
      loss: `(apply, params, frozen, batch, weights, key) -> (scalar, metrics)`. What one microbatch contributes:
        sums over its rows divided by the step's weights, so that contributions of microbatches and devices add up.
        Metrics add up likewise; of those whose last word begins with `min_` or `max_` the least or largest is taken.
      init: `(models, key) -> {collection: tree}`. Fresh trees of its own (a value head), trained along; `models` maps
        names (`policy`, `teacher`) to architectures.
    """

    prepare: Callable[..., Batch]
    weights: Callable[[Batch], dict[str, Array]]
    loss: Callable[..., tuple[Array, dict[str, Array]]]
    init: Callable[..., Variables] = no_trees
