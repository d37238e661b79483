"""A small model out of a large one: a choice of its layers, residual channels, heads and feed-forward units.

What a student starts from when it is to learn from a teacher. Nothing is learnt here; chosen whole, the result is the
model itself.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.nn.config import ModelConfig
from jaxlm.params.axes import Role, map_roles
from jaxlm.types import Array, Tree

SIZES = {"d_model": "D", "n_layers": "N", "n_heads": "H", "n_kv_heads": "G", "head_dim": "K", "d_ff": "F"}
"""Fields in which the student may be smaller, with the properties that hold their values."""

FREE = {"vocab_size", "max_length", "dropout", "lora", "embed_std"}
FREE |= {"bos_token_id", "eos_token_id", "pad_token_id", "family"}
"""Fields in which the student may differ from its teacher: paddings, training, names."""

MULTIPLIERS = {"logits_multiplier", "attention_multiplier", "residual_multiplier"}
"""Those of muP are other at every width; they do not belong to the weights."""


def select(teacher: ModelConfig, student: ModelConfig, params: Tree) -> Tree:
    """The student's parameters as a part of the teacher's.

    - layers: evenly spaced, the first and the last among them;
    - residual channels: those with the most weight in the embedding and in what writes to the stream, the same ones in
      every layer;
    - heads: in each layer the key/value heads with the most weight in the output projection, and of the query heads
      of each the ones with the most;
    - head channels: evenly spaced rotary pairs, so that wavelengths stay those of the position embedding;
    - feed-forward units: in each layer those with the most weight in the down projection.

    What is chosen keeps its order. Kernels that read fewer channels than before are scaled by the square root of the
    ratio, which keeps the scale of what they give.

        {"embed": {"kernel": [V, 128]}, "layers": {"attn": {"q": {"kernel": [6, 128, 128]}, ...}, ...}, ...}
        ->  {"embed": {"kernel": [V, 64]}, "layers": {"attn": {"q": {"kernel": [3, 64, 64]}, ...}, ...}, ...}

    Args:
      teacher, student: architectures that differ in sizes alone, none of the student's larger.
      params: of the teacher, float arrays; layers stacked.

    Raises:
      ValueError: naming the fields, if the student is no part of the teacher.
    """
    check(teacher, student)
    layers = jnp.array(layer_choice(teacher.N, student.N))
    params = params | {"layers": jax.tree.map(lambda x: x[layers], params["layers"])}
    chosen = _choices(teacher, student, params)
    fitted = {"embed": (0, student.V), "unembed": (-1, student.V), "position_embed": (0, student.max_length)}

    def pick(path: str, leaf: Array, role: Role) -> Array:
        for axis, dimension in ((-1, role.fan_out), (-2, role.fan_in)):
            if dimension is not None:
                leaf = _take(leaf, chosen["F" if dimension == "expert" else dimension], axis)
        name = path.partition("/")[0]
        if name in fitted:
            leaf = _fit(leaf, *fitted[name])
        return leaf * _gain(teacher, student, role)

    return map_roles(pick, params)


def layer_choice(teacher: int, student: int) -> list[int]:
    """Evenly spaced layers, the first and the last among them: 6 and 3 give [0, 3, 5]."""
    return np.round(np.linspace(0, teacher - 1, student) + 1e-9).astype(int).tolist()


def check(teacher: ModelConfig, student: ModelConfig) -> None:
    """Raise ValueError, naming the fields, if the student is no part of the teacher."""
    for who, model in (("teacher", teacher), ("model", student)):
        if model.moe is not None:
            raise ValueError(
                f"objective.init: teacher, but the {who} is a mixture of experts; leave objective.init random"
            )
    for field in dataclasses.fields(ModelConfig):
        ours, theirs = getattr(student, field.name), getattr(teacher, field.name)
        if field.name not in SIZES.keys() | FREE | MULTIPLIERS and ours != theirs:
            raise ValueError(
                f"model.{field.name}: {ours}, but the teacher's is {theirs}, and objective.init teacher makes the "
                "student a part of it; use the teacher's or leave objective.init random"
            )
    for name, letter in SIZES.items():
        ours, theirs = getattr(student, letter), getattr(teacher, letter)
        if ours > theirs:
            raise ValueError(
                f"model.{name}: {ours} is more than the teacher's {theirs}, and objective.init teacher makes the "
                "student a part of it; lower it"
            )
    if student.H // student.G > teacher.H // teacher.G:
        raise ValueError(
            f"model.n_kv_heads: {student.H // student.G} query heads share a key head, with objective.init teacher at "
            f"most the teacher's {teacher.H // teacher.G} can; raise it"
        )
    if student.K != teacher.K and student.rope.partial != 1.0:
        raise ValueError(
            f"model.head_dim: {student.K}, but rotary positions cover a part of the teacher's {teacher.K} channels; "
            "use that"
        )


def _choices(teacher: ModelConfig, student: ModelConfig, params: Tree) -> dict[str, Array]:
    """Indices by dimension: [size], or [N, size] where each layer has its own."""
    n, k = student.N, _head_channels(teacher, student)
    attn, mlp = params["layers"]["attn"], params["layers"]["mlp"]
    o_NxHxKxD = attn["o"]["kernel"].reshape(n, teacher.H, teacher.K, teacher.D)
    energy_NxGxR = jnp.sum(jnp.square(o_NxHxKxD), axis=(2, 3)).reshape(n, teacher.G, -1)
    groups_NxG = _largest(jnp.sum(energy_NxGxR, axis=2), student.G)
    ratio = student.H // student.G
    inner_NxGxR = _largest(jnp.take_along_axis(energy_NxGxR, groups_NxG[..., None], axis=1), ratio)
    heads_NxH = (groups_NxG[..., None] * (teacher.H // teacher.G) + inner_NxGxR).reshape(n, -1)
    whole = student.qk_norm == "projection"
    spread = {"HK": _channels(heads_NxH, k, teacher.K), "GK": _channels(groups_NxG, k, teacher.K)}
    writers = [params["embed"]["kernel"], attn["o"]["kernel"], mlp["down"]["kernel"]]
    energy_D = sum(_share(jnp.sum(jnp.square(w.reshape(-1, teacher.D)), axis=0)) for w in writers)
    return spread | {
        "D": _largest(jnp.asarray(energy_D), student.D),
        "F": _largest(jnp.sum(jnp.square(mlp["down"]["kernel"]), axis=2), student.F),
        "q_norm": spread["HK"] if whole else k,
        "k_norm": spread["GK"] if whole else k,
    }


def _head_channels(teacher: ModelConfig, student: ModelConfig) -> Array:
    """Channels of a head, [K]; with rotary positions channel j goes with j + K/2."""
    rotary = student.positions == "rope"
    theirs, ours = (x // 2 if rotary else x for x in (teacher.K, student.K))
    pairs = jnp.arange(ours) * theirs // ours
    return jnp.concatenate([pairs, pairs + theirs]) if rotary else pairs


def _channels(heads_NxH: Array, k: Array, width: int) -> Array:
    """The columns of whole heads: [N, H * K]."""
    columns = heads_NxH[..., None] * width + jnp.broadcast_to(k, (*heads_NxH.shape, k.size))
    return columns.reshape(heads_NxH.shape[0], -1)


def _largest(values: Array, count: int) -> Array:
    """Indices of the largest values along the last axis, ascending."""
    return jnp.sort(jax.lax.top_k(values, count)[1], axis=-1)


def _share(values: Array) -> Array:
    return values / jnp.sum(values)


def _take(leaf: Array, index: Array, axis: int) -> Array:
    """`leaf` at `index` along an axis; with [N, size] indices, layer by layer."""
    if index.ndim == 1:
        return jnp.take(leaf, index, axis=axis)
    return jax.vmap(lambda x, i: jnp.take(x, i, axis=axis))(leaf, index)


def _fit(leaf: Array, axis: int, size: int) -> Array:
    """`leaf` cut, or padded by zeros, to a size along an axis: of the vocabulary, of learned positions."""
    cut = jax.lax.slice_in_dim(leaf, 0, min(size, leaf.shape[axis]), axis=axis)
    missing = [(0, 0)] * leaf.ndim
    missing[axis] = (0, size - cut.shape[axis])
    return jnp.pad(cut, missing)


def _gain(teacher: ModelConfig, student: ModelConfig, role: Role) -> float:
    sizes: dict[str | None, Sequence[int]] = {
        "D": (teacher.D, student.D),
        "HK": (teacher.H * teacher.K, student.H * student.K),
        "expert": (teacher.F, student.F),
    }
    before, after = sizes.get(role.fan_in, (1, 1))
    return float((before / after) ** 0.5)
