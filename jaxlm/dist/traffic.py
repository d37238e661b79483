"""What a training step must send between devices, by formula, to hold the compiled program to."""

import math
from typing import NamedTuple

from jax.sharding import Mesh, PartitionSpec

from jaxlm import tree as trees
from jaxlm.dist import rules
from jaxlm.dist.mesh import ROWS
from jaxlm.nn.config import ModelConfig
from jaxlm.types import Tree


class Shape(NamedTuple):
    """What decides the traffic besides mesh and model.

    Attributes:
      batch_size: rows of a microbatch over all devices.
      length: positions of a row.
      width: bytes of an activation.
      segments: whether segment ids are given.
    """

    batch_size: int
    length: int
    width: int = 4
    segments: bool = True


def step_bytes(cfg: ModelConfig, params: Tree, mesh: Mesh, shape: Shape) -> dict[str, int]:
    """Bytes by kind of collective, as `collectives.totals` counts them, of one step of a dense, scanned model.

    Weights cut over `fsdp` are gathered where they are used: in layers forward and backward, tables and head once.
    Gradients are summed once: scattered over `fsdp`, those of layers then reduced in parts over the other axes of the
    batch; or reduced where a leaf is not cut by it. Tensor parallelism sums the residual stream twice a layer forward
    and twice backward, and at the embedding and the head; the softmax over a cut vocabulary adds three numbers a token.
    Context parallelism gathers keys and values, and scatters their gradients. Scalars (loss, norms) are left out.

    Args:
      cfg: the model, without experts.
      params: {"params": tree}, arrays or ShapeDtypeStructs, float32.
      mesh: the mesh.
      shape: of the batch.

    Returns:
      {kind: bytes}; kinds without any are left out.
    """
    sizes = mesh.shape
    rows = math.prod(sizes[axis] for axis in ROWS)
    gathered = scattered = reduced = 0
    for path, (leaf, sharding) in _pairs(params, mesh).items():
        whole = leaf.size * leaf.dtype.itemsize // _parts(sharding.spec, sizes, ("tensor", "expert"))
        if _parts(sharding.spec, sizes, ("fsdp",)) > 1:
            gathered += whole * (2 if rules.stacked(path) else 1)
            scattered += whole
            if rules.stacked(path) and rows * sizes["context"] > sizes["fsdp"]:
                reduced += whole // sizes["fsdp"]
        elif rows * sizes["context"] > 1:
            reduced += whole
    tokens = shape.batch_size // rows * shape.length // sizes["context"]
    if sizes["tensor"] > 1:
        stream = tokens * cfg.D
        # The lookup and the head work in float32 whatever the activations are.
        reduced += 4 * cfg.N * stream * shape.width + 2 * stream * 4 + 3 * tokens * 4
    if sizes["context"] > 1:
        positions = shape.batch_size // rows * shape.length
        keys_and_values = 2 * cfg.N * positions * cfg.G // sizes["tensor"] * cfg.K * shape.width
        gathered += keys_and_values + (positions * 4 if shape.segments else 0)
        scattered += keys_and_values
    found = {"all-gather": gathered, "all-reduce": reduced, "reduce-scatter": scattered}
    return {kind: size for kind, size in found.items() if size}


def exchange_bytes(cfg: ModelConfig, mesh: Mesh, shape: Shape) -> int:
    """Bytes of all-to-all in one step of a mixture of experts that is not computed again backward.

    In each layer rows go to their experts and come back, and so do their gradients: four buffers with room for the most
    that can be sent, `min(k, E / parts)` rows of each token to each of the parts. With them go the counts by expert.
    """
    moe, parts = cfg.moe, mesh.shape["expert"]
    if moe is None or parts == 1:
        return 0
    rows = math.prod(mesh.shape[axis] for axis in ROWS)
    tokens = shape.batch_size // rows * shape.length // mesh.shape["context"]
    own = moe.experts // parts
    buffer = parts * tokens * min(moe.top_k, own) * cfg.D * shape.width
    layers = len(set(range(cfg.N)) - set(moe.dense_layers))
    return layers * (4 * buffer + moe.experts * 4)


def _pairs(params: Tree, mesh: Mesh) -> dict[str, tuple]:
    placed = trees.leaves(rules.shardings(params, mesh))
    return {path: (leaf, placed[path]) for path, leaf in trees.leaves(params).items()}


def _parts(spec: PartitionSpec, sizes, axes: tuple[str, ...]) -> int:
    """Into how many parts the given axes cut a leaf."""
    entries = [entry if isinstance(entry, tuple) else (entry,) for entry in spec]
    return math.prod(sizes[name] for entry in entries for name in entry if name in axes)
