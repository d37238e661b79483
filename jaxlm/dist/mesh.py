"""The device mesh: five named axes, their sizes from the configuration, and what model and batch must divide.

JAX is imported only when a mesh is made, so that reading a configuration stays quick.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jax
    import numpy as np

    from jaxlm.nn.config import ModelConfig

AXES = ("data", "fsdp", "tensor", "expert", "context")
"""Names of the mesh axes, outermost first: the outer ones cross slow links, the inner ones stay in a node."""

ROWS = ("data", "fsdp", "expert")
"""The axes that rows of a batch are spread over."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices each kind of parallelism gets; -1 is the rest, for one axis at most.

    Attributes:
      data: copies of the model, each with its own rows.
      fsdp: parameters, moments and rows are cut into this many parts; weights are gathered when used (ZeRO-3).
      tensor: each layer's heads, feed-forward width and the vocabulary are cut into this many parts (Megatron).
      expert: experts are spread over this many parts; rows too.
      context: sequences are cut into this many parts.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    expert: int = 1
    context: int = 1

    def validate(self) -> None:
        """Raise ValueError, naming the field, for sizes that no number of devices can satisfy."""
        for axis in AXES:
            size = getattr(self, axis)
            if size < 1 and size != -1:
                raise ValueError(f"mesh.{axis}: {size} is not a size; use a number from 1 up, or -1 for the rest")
        rest = [axis for axis in AXES if getattr(self, axis) == -1]
        if len(rest) > 1:
            raise ValueError(f"mesh.{rest[1]}: -1, but mesh.{rest[0]} is -1 too; only one axis can take the rest")

    def sizes(self, devices: int) -> dict[str, int]:
        """The size of every axis on this many devices, in the order of `AXES`.

        Raises:
          ValueError: naming the fields, if the sizes do not fill the devices exactly.
        """
        self.validate()
        sizes = {axis: getattr(self, axis) for axis in AXES}
        given = {axis: size for axis, size in sizes.items() if size != -1}
        for axis, size in given.items():
            if devices % size:
                raise ValueError(f"mesh.{axis}: {size} does not divide {devices} devices; use a divisor, or -1")
        product = math.prod(given.values())
        named = {axis: size for axis, size in given.items() if size > 1} or given
        shown = " x ".join(f"mesh.{axis} {size}" for axis, size in named.items())
        if len(given) == len(sizes) and product != devices:
            raise ValueError(f"{shown}: {product} in all, but there are {devices} devices; set one axis to -1")
        if devices % product:
            raise ValueError(f"{shown}: {product} in all, which does not divide {devices} devices; lower one of them")
        return {axis: devices // product if size == -1 else size for axis, size in sizes.items()}


def make(config: MeshConfig, devices: Sequence[Any] | None = None) -> "jax.sharding.Mesh":
    """The mesh with axes `AXES`, all of type Auto: the partitioner derives what is not said.

    Devices in several slices (their `slice_index` differs) are laid out so that only `data` crosses slices.

    Args:
      config: sizes of the axes.
      devices: which devices; null is all of them, over all processes.

    Raises:
      ValueError: if the sizes do not fit the devices, or `data` does not fit the slices.
    """
    import jax

    devices = jax.devices() if devices is None else list(devices)
    sizes = config.sizes(len(devices))
    # jax.make_mesh defaults to Explicit axes, under which a product over a sharded dimension is an error.
    types = (jax.sharding.AxisType.Auto,) * len(AXES)
    if slices(devices) > 1:
        return jax.sharding.Mesh(sliced_grid(sizes, devices), AXES, axis_types=types)
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=types, devices=devices)


def slices(devices: Sequence[Any]) -> int:
    """Number of slices (groups of devices with fast links between them) that the devices stand in."""
    return len({getattr(device, "slice_index", 0) for device in devices})


def sliced_grid(sizes: Mapping[str, int], devices: Sequence[Any]) -> "np.ndarray":
    """Devices in an array of the mesh's shape in which only the first axis crosses slices.

    Raises:
      ValueError: if `data` is not a multiple of the number of slices.
    """
    from jax.experimental import mesh_utils

    count = slices(devices)
    if sizes["data"] % count:
        raise ValueError(
            f"mesh.data: {sizes['data']} is not a multiple of the {count} slices, and no other axis may cross slices; "
            f"make it a multiple of {count}"
        )
    inner = (sizes["data"] // count, *(sizes[axis] for axis in AXES[1:]))
    outer = (count, *(1 for _ in AXES[1:]))
    return mesh_utils.create_hybrid_device_mesh(inner, outer, devices)


def check_model(sizes: Mapping[str, int], model: "ModelConfig") -> None:
    """Raise ValueError, naming field and axis, where a dimension of the model cannot be cut evenly.

    Args:
      sizes: of the mesh axes; `MeshConfig.sizes(...)` or `mesh.shape`.
      model: the resolved model configuration (its vocabulary size is known).
    """
    experts = model.moe
    cut = [
        ("model.n_heads", model.H, "tensor"),
        ("model.n_kv_heads", model.G, "tensor"),
        ("model.vocab_size", model.V, "tensor"),
        ("model.d_model", model.D, "fsdp"),
    ]
    if experts is None or experts.dense_layers:
        cut += [("model.d_ff", model.F, "tensor")]
    if experts is not None:
        cut += [("model.moe.experts", experts.experts, "expert")]
        cut += [("model.moe.d_ff", experts.d_ff or model.F, "tensor")]
    for field, size, axis in cut:
        if size % sizes[axis]:
            raise ValueError(f"{field}: {size} is not a multiple of mesh.{axis} {sizes[axis]}; change one of them")
    if experts is None and sizes["expert"] > 1:
        raise ValueError(f"mesh.expert: {sizes['expert']}, but model.moe is null; use mesh.fsdp or mesh.data instead")


def check_batch(sizes: Mapping[str, int], batch_size: int, sequence_length: int, accumulation: int = 1) -> None:
    """Raise ValueError, naming the fields, where rows or positions cannot be spread evenly.

    Args:
      sizes: of the mesh axes.
      batch_size: rows of an optimizer step over all devices.
      sequence_length: positions of a row.
      accumulation: microbatches that a step is cut into.
    """
    if batch_size % accumulation:
        raise ValueError(
            f"train.batch_size: {batch_size} is not a multiple of train.accumulation {accumulation}; change one"
        )
    check_rows(sizes, batch_size, accumulation)
    if sequence_length % sizes["context"]:
        raise ValueError(
            f"data.sequence_length: {sequence_length} is not a multiple of mesh.context {sizes['context']}; change one"
        )


def check_rows(sizes: Mapping[str, int], batch_size: int, accumulation: int = 1) -> None:
    """Raise ValueError, naming the axes, where the rows of a (micro)batch cannot be spread evenly."""
    groups = math.prod(sizes[axis] for axis in ROWS)
    if batch_size % (groups * accumulation):
        named = " x ".join(f"mesh.{axis} {sizes[axis]}" for axis in ROWS if sizes[axis] > 1) or "one group"
        split = f" / train.accumulation {accumulation}" if accumulation > 1 else ""
        raise ValueError(
            f"train.batch_size: {batch_size}{split} rows cannot be spread evenly over {groups} groups of devices "
            f"({named}); use a multiple of {groups * accumulation}"
        )
