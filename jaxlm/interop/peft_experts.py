"""Adapters of all experts of a layer in one matrix, as PEFT keeps them for parameters of newer transformers.

    <layer>.mlp.experts.base_layer.lora_A.weight   [R * E, D], of gate and up side by side where both are adapted
    <layer>.mlp.experts.lora_A.weight              [R * E, F], of down, or of gate and up alone

A holds the ranks of one expert after the other, B [out, R * E] the experts of one rank after the other.
"""

from collections.abc import Container, Mapping

import numpy as np

from jaxlm.interop.safetensors import Entry
from jaxlm.nn.targets import Module

EXPERTS, INNER = ".mlp.experts", ".mlp.experts.base_layer"
GATE_UP, DOWN = ".gate_up_proj", ".down_proj"


def module_name(owner: str, entries: Mapping[str, Entry], outputs: int) -> str:
    """The parameter that a module's adapter is for: `layers.0.mlp.experts` -> `layers.0.mlp.experts.down_proj`.

    Args:
      owner: the module's path in the file. entries: its tensors by name. outputs: D, which tells down from gate and up.
    """
    if owner.endswith(INNER):
        return owner.removesuffix(INNER) + EXPERTS + GATE_UP
    if not owner.endswith(EXPERTS):
        return owner.replace(".mlp.gate", ".block_sparse_moe.gate") if owner.endswith(".mlp.gate") else owner
    b = next((entry for name, entry in entries.items() if name.endswith(f"{owner}.lora_B.weight")), None)
    return owner + (DOWN if b is None or b.shape[0] == outputs else GATE_UP)


def file_name(module: Module, adapted: Container[str]) -> str:
    """The inverse: where the adapter of a stacked module stands in a file that adapts the named modules."""
    layer = module.name.removesuffix(GATE_UP).removesuffix(DOWN)
    both = layer + GATE_UP in adapted and layer + DOWN in adapted
    return f"{layer}.base_layer" if both and module.name.endswith(GATE_UP) else layer


def shapes(kind: str, experts: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a stacked tensor, from that of one expert."""
    return (shape[0] * experts, shape[1]) if kind == "a" else (shape[0], shape[1] * experts)


def unstacked(kind: str, tensor: np.ndarray, experts: int) -> np.ndarray:
    """Tensor of a file -> our leaf of one layer: `a` [E, in, R], `b` [E, R, out]."""
    if kind == "a":
        return np.swapaxes(tensor.reshape(experts, -1, tensor.shape[1]), 1, 2)
    return np.transpose(tensor.reshape(tensor.shape[0], -1, experts), (2, 1, 0))


def stacked(kind: str, leaf: np.ndarray) -> np.ndarray:
    """The inverse."""
    if kind == "a":
        return np.swapaxes(leaf, 1, 2).reshape(-1, leaf.shape[1])
    return np.transpose(leaf, (2, 1, 0)).reshape(leaf.shape[2], -1)
