"""Layer-wise learning rates on stacked trees."""

import jax
import numpy as np

from jaxlm.nn.config import ModelConfig
from jaxlm.optim.config import LayerLrConfig
from jaxlm.params import axes
from jaxlm.types import Tree


def multipliers(config: LayerLrConfig, model: ModelConfig, tree: Tree) -> Tree:
    """The factor of each leaf: a float, or one per layer for a stacked leaf.

    With ids 0 for embeddings, l + 1 for layer l, N + 1 for the final norm and heads (`axes.layer_ids`):

        decay_to_input    rate^(N + 1 - id)      ELECTRA (2003.10555), BEiT (2106.08254)
        decay_to_output   rate^id

        rate 0.5, {"embed": {"kernel": [V, D]}, "layers": {"attn": {"q": {"kernel": [2, D, F]}}}}, to the input
        ->  {"embed": {"kernel": 0.125}, "layers": {"attn": {"q": {"kernel": [[[0.25]], [[0.5]]]}}}}

    Args:
      config: mode and rate, or the list of factors by id.
      model: gives the number of layers and which stack holds which.
      tree: the trained leaves, arrays or ShapeDtypeStructs.

    Raises:
      ValueError: the list has another length than n_layers + 2.
    """
    table = np.array(_by_id(config, model.N))

    def factor(ids: int | np.ndarray, leaf: jax.Array) -> float | np.ndarray:
        if isinstance(ids, np.ndarray):
            return table[ids].reshape((-1,) + (1,) * (leaf.ndim - 1))
        return float(table[ids])

    return jax.tree.map(factor, axes.layer_ids(tree, model), tree)


def _by_id(config: LayerLrConfig, layers: int) -> list[float]:
    if config.mode == "decay_to_input":
        return [config.rate ** (layers + 1 - i) for i in range(layers + 2)]
    if config.mode == "decay_to_output":
        return [config.rate**i for i in range(layers + 2)]
    factors = list(config.factors or ())
    if len(factors) != layers + 2:
        raise ValueError(
            f"optimizer.layer_lr.factors: {len(factors)} numbers for {layers} layers; give {layers + 2}, from the "
            "embedding to the head"
        )
    return factors
