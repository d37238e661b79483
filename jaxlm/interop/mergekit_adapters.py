"""Merging adapters into an adapter: what they add to the model's weights is merged as if it were weights.

What linear methods make of low-rank matrices is one again, of all ranks together, and exact. What the others make is
approximated by the nearest matrix of that rank. Models with adapters on them (`model+adapter`) are merged exactly by
every method, into a model.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.interop import safetensors
from jaxlm.interop.directory import replacement, write_json
from jaxlm.interop.mergekit import Recipe
from jaxlm.interop.mergekit_models import (
    ADAPTER_CONFIG,
    ADAPTER_PREFIX,
    ADAPTER_WEIGHTS,
    BASE_WEIGHT,
    Parent,
    Stored,
    adapter_scale,
    check_plain,
    split,
)
from jaxlm.interop.mergekit_write import Distances, Input, Output, Progress, make, parameters
from jaxlm.interop.safetensors import Tensor
from jaxlm.params.merge import METHODS, SMALL_WEIGHT

EXACT = ("linear", "task_arithmetic")
"""Methods whose result is a sum of what goes in."""

_A = re.compile(r"(.*)\.(lora_A\.weight|lora_embedding_A)")


class Effect(NamedTuple):
    """What an adapter adds to a weight [out, in], `scale * b a`; without factors, nothing."""

    shape: tuple[int, ...]
    a: Stored | None = None
    b: Stored | None = None
    scale: float = 0.0

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float32)

    @property
    def rank(self) -> int:
        return 0 if self.a is None else self.a.shape[0]

    def view(self) -> np.ndarray:
        """The sum's matrix in float32."""
        if self.a is None or self.b is None:
            return np.zeros(self.shape, np.float32)
        return np.float32(self.scale) * (self.b.view().astype(np.float32) @ self.a.view().astype(np.float32))


class Module(NamedTuple):
    """A module that any of the adapters is on: the merge of what they add to it, and whether it is an embedding."""

    name: str
    output: Output
    embedding: bool

    @property
    def rank(self) -> int:
        """Ranks of all adapters together."""
        return sum(i.tensor.rank for i in self.output.inputs if isinstance(i.tensor, Effect))

    @property
    def names(self) -> tuple[str, str]:
        """What the two factors are called in PEFT's files."""
        ends = ("lora_embedding_A", "lora_embedding_B") if self.embedding else ("lora_A.weight", "lora_B.weight")
        return f"{ADAPTER_PREFIX}{self.name}.{ends[0]}", f"{ADAPTER_PREFIX}{self.name}.{ends[1]}"


def merge_adapters(
    recipe: Recipe, parents: Mapping[str, Parent], out: Path, seed: int, progress: Progress | None
) -> Distances:
    """Merge adapters of one base model; a base model that is not an adapter adds nothing.

    Raises:
      ValueError: settings that cannot be merged, or adapters of different models; named.
    """
    adapters = {name: parent for name, parent in parents.items() if parent.is_adapter}
    whole = sorted(parents.keys() - adapters.keys() - {recipe.base})
    if whole:
        raise ValueError(
            f"models: {whole[0]} is a model, {min(adapters)} an adapter; write the adapter as BASE+{min(adapters)}, "
            "the model with it on"
        )
    if recipe.tokens is not None or any(source.layers for part in recipe.slices for source in part.sources):
        raise ValueError("slices, tokenizer: adapters are merged whole; write models: and leave the tokenizer out")
    distances, key = Distances(recipe), jax.random.key(seed)
    factors: dict[str, np.ndarray] = {}
    modules = _plan(recipe, adapters)
    for i, module in enumerate(modules):
        if progress is not None:
            progress(i, len(modules), module.name)
        merged = make(recipe, key, distances, module.output)
        pair = _sum(recipe, module) if recipe.method in EXACT else _nearest(merged, module.rank)
        factors |= dict(zip(module.names, pair, strict=True))
    dtype = np.dtype(jnp.dtype(recipe.out_dtype or recipe.dtype or _common_dtype(adapters)))
    tensors = [Tensor(name, dtype, x.shape, functools.partial(x.astype, dtype)) for name, x in factors.items()]
    with replacement(out) as temporary:
        write_json(temporary / ADAPTER_CONFIG, _config(adapters, modules, factors))
        safetensors.write(temporary / ADAPTER_WEIGHTS, tensors)
    return distances


def _plan(recipe: Recipe, adapters: Mapping[str, Parent]) -> list[Module]:
    part = recipe.slices[0]
    tables = {name: _effects(parent) for name, parent in adapters.items()}
    layers = max(parent.layers for parent in adapters.values())
    modules = []
    for module in dict.fromkeys(module for table in tables.values() for module in table):
        here = {name: table[module] for name, table in tables.items() if module in table}
        shapes = {effect.shape for effect, _ in here.values()}
        if len(shapes) > 1:
            named = ", ".join(f"{name}: {list(effect.shape)}" for name, (effect, _) in here.items())
            raise ValueError(f"{module}: shapes differ ({named}); the adapters are of different models")
        nothing, embedding = Effect(shapes.pop()), next(embedding for _, embedding in here.values())
        layer, weight = split(module)[1], f"{module}.weight"
        t = 0.0 if layer is None else layer / (layers - 1) if layers > 1 else 1.0
        inputs = [
            Input(i, weight, here[source.model][0] if source.model in here else nothing)
            for i, source in enumerate(part.sources)
        ]
        modules.append(Module(module, Output(weight, layer, part, tuple(inputs), t), embedding))
    return modules


def _effects(parent: Parent) -> dict[str, tuple[Effect, bool]]:
    """By module what an adapter adds to it, and whether it is an embedding."""
    check_plain(parent)
    file = parent.directory / ADAPTER_WEIGHTS
    found = {}
    for name, a in parent.tensors.items():
        match = _A.fullmatch(name.removeprefix(ADAPTER_PREFIX))
        if match is None:
            if "lora_" not in name and not name.endswith(BASE_WEIGHT):
                raise ValueError(f"{file}: {name}: a whole weight; write model+adapter for each, to merge models")
            continue
        b = parent.tensors.get(name.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B"))
        if b is None or b.shape[-1] != a.shape[0]:
            raise ValueError(f"{file}: {name}: has no B of its rank; the adapter is not whole")
        scale = adapter_scale(parent.config, match[1], a.shape[0])
        found[match[1]] = (Effect((b.shape[0], a.shape[-1]), a, b, scale), "embedding" in match[2])
    return found


def _sum(recipe: Recipe, module: Module) -> tuple[np.ndarray, np.ndarray]:
    """The factors of `sum_m c_m b_m a_m`, side by side: A [R, in] and B [out, R]."""
    one = module.output
    shared, each = parameters(recipe, one, METHODS[recipe.method])
    weights = [values.get("weight", 0.0) for values in each]
    factor, total = shared.get("lambda", 1.0), sum(weights)
    if shared["normalize"] and (recipe.method == "linear" or abs(total) >= SMALL_WEIGHT):
        factor /= total
    rows, columns = [], []
    for i, values, weight in zip(one.inputs, each, weights, strict=True):
        # The base, which alone has no weight, keeps what the differences from it do not take away.
        part = factor * weight if "weight" in values else 1.0 - factor * total
        if isinstance(i.tensor, Effect) and i.tensor.a is not None and i.tensor.b is not None:
            rows.append(i.tensor.a.view().astype(np.float32))
            columns.append(np.float32(part * i.tensor.scale) * i.tensor.b.view().astype(np.float32))
    return np.concatenate(rows), np.concatenate(columns, axis=1)


def _nearest(merged: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The factors of the nearest matrix of a rank: A [R, in] and B [out, R], as large as each other."""
    u, s, v = np.linalg.svd(merged.astype(np.float32), full_matrices=False)
    root = np.sqrt(s[:rank])
    return root[:, None] * v[:rank], u[:, :rank] * root[None, :]


def _common_dtype(adapters: Mapping[str, Parent]) -> Any:
    dtypes = {x.dtype for parent in adapters.values() for x in parent.tensors.values()}
    return functools.reduce(jnp.promote_types, dtypes)


def _config(
    adapters: Mapping[str, Parent], modules: Sequence[Module], factors: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """The first adapter's settings, with ranks and targets of the result; alpha equal to r, so the scale is 1."""
    ranks = {module.name: factors[module.names[0]].shape[0] for module in modules}
    r = max(ranks.values(), default=1)
    pattern = {re.escape(name): rank for name, rank in ranks.items() if rank != r}
    first = next(iter(adapters.values()))
    return first.config | {
        "r": r,
        "lora_alpha": r,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "use_rslora": False,
        "target_modules": _targets(adapters, ranks),
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def _targets(adapters: Mapping[str, Parent], ranks: Mapping[str, int]) -> list[str]:
    """Names of modules, short where every adapter is on the same ones in all layers."""
    configs = [parent.config for parent in adapters.values()]
    given = [one.get("target_modules") for one in configs]
    lists = [sorted(one) for one in given if isinstance(one, list)]
    same = len(lists) == len(given) and lists.count(lists[0]) == len(lists)
    return lists[0] if same and not any(one.get("layers_to_transform") for one in configs) else sorted(ranks)
