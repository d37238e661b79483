"""Device memory of a run by formula: what is held between steps, and the peak inside one."""

import math
from typing import NamedTuple

import jax

from jaxlm.nn.compute import Compute
from jaxlm.nn.config import ModelConfig
from jaxlm.nn.qtensor import is_qtensor
from jaxlm.objectives.chunks import chunk_rows
from jaxlm.types import Tree

GB = 1e9


class Memory(NamedTuple):
    """Bytes on one device.

    Attributes:
      parameters: trained and frozen. moments: of the optimiser. average: moving average of parameters.
      gradients: float32, one copy, and a second while microbatches are added up.
      activations: what the backward pass keeps of all layers under the remat policy, and one layer at work, with one
        kernel of it dequantised.
      logits: one chunk of them with its gradient, and the gradient of the head.
    """

    parameters: int
    moments: int
    average: int
    gradients: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return sum(self)


class Load(NamedTuple):
    """What one device works on at a time: rows of a microbatch and positions of a row, after cutting over the mesh."""

    rows: int
    positions: int

    @property
    def tokens(self) -> int:
        return self.rows * self.positions


def device_bytes(tree: Tree) -> int:
    """Bytes of a tree on one device; leaves have shape, dtype and, if they are cut, a sharding."""

    def size(leaf: jax.ShapeDtypeStruct) -> int:
        sharding = getattr(leaf, "sharding", None)
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(size(leaf) for leaf in jax.tree.leaves(tree))


def dequantised_bytes(frozen: Tree, compute: Compute, tensor: int = 1) -> int:
    """Bytes of the largest quantised kernel as a product reads it; one is dequantised at a time."""
    kernels = [q.matrix for q in jax.tree.leaves(frozen, is_leaf=is_qtensor) if is_qtensor(q)]
    width = 2 if compute.dtype == "bfloat16" else 4
    return max((width * math.prod(matrix) // tensor for matrix in kernels), default=0)


def activation_bytes(cfg: ModelConfig, compute: Compute, load: Load, tensor: int = 1) -> int:
    """Bytes kept for the backward pass over all layers, and those of one layer being computed.

    Per token and layer, in elements of the compute dtype, with H, G and F cut over `tensor`:

        everything   8 D + 3 H K + 2 G K + 6 F     layer input and the sum after attention, three products in each of
                                                   two norms; q, mixed values twice, k and v; gate, up, three products
                                                   of the activation and its product with up (4 F without a gate)
        dots         3 D + H K + 2 G K + 2 F       layer input and the result of every matrix product
        block        3 D                           layer input and both branch outputs
        full         D                             layer input

    One layer at a time is made again whole, or worked on backwards, which takes about as much as everything that it
    keeps: the compiler's figures for float32 lie within a quarter of the sum. Of unrolled layers XLA on CPU keeps
    everything whatever the policy, because it merges equal computations.
    """
    width = 2 if compute.dtype == "bfloat16" else 4
    heads, groups = cfg.H * cfg.K / tensor, cfg.G * cfg.K / tensor
    inner = (cfg.moe.top_k * (cfg.moe.d_ff or cfg.F) if cfg.moe is not None else cfg.F) / tensor
    everything = 8 * cfg.D + 3 * heads + 2 * groups + (6 if cfg.gated else 4) * inner
    on_cpu = compute.mesh is not None and compute.mesh.devices.flat[0].platform == "cpu"
    kept = {
        "none": everything,
        "dots": 3 * cfg.D + heads + 2 * groups + (2 if cfg.gated else 1) * inner,
        "block": 3 * cfg.D,
        "full": cfg.D,
        "offload": cfg.D,
    }["none" if on_cpu and not compute.scan else compute.remat]
    return int((cfg.N * kept + everything) * load.tokens * width)


def logits_bytes(cfg: ModelConfig, load: Load, tensor: int = 1) -> int:
    """Bytes of one chunk of float32 logits and of its gradient."""
    rows = load.rows * max(1, min(load.positions, chunk_rows() // load.rows))
    return 2 * 4 * rows * cfg.V // tensor
