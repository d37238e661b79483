"""PEFT directories: an adapter's tensors to our tree and back, under the names of the base's family."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlm import tree as trees
from jaxlm.dist import place, rules
from jaxlm.interop import hf, names, peft_config, peft_experts, safetensors
from jaxlm.interop.directory import write_json
from jaxlm.interop.names import Part, Target
from jaxlm.interop.peft_config import CONFIG, WEIGHTS
from jaxlm.interop.safetensors import Entry, Tensor
from jaxlm.nn.config import ModelConfig
from jaxlm.nn.qtensor import is_qtensor
from jaxlm.nn.targets import FUSED, Module, chosen_modules, covers, modules, resolve, saves, stacked_modules
from jaxlm.params.lora import init, merge, merged_config, residual
from jaxlm.types import Tree, Variables

PREFIX = "base_model.model."
"""Of every tensor, before the name that it has in the base model."""

BASE_LAYER = ".base_layer"
"""Stands in the name of a parameter that an adapted module has itself."""

MAGNITUDE = ".lora_magnitude_vector"
LINEAR = {"a": ".lora_A.weight", "b": ".lora_B.weight", "magnitude": MAGNITUDE}
EMBEDDING = {"a": ".lora_embedding_A", "b": ".lora_embedding_B", "magnitude": MAGNITUDE}
ENDINGS = {ending: kind for table in (LINEAR, EMBEDDING) for kind, ending in table.items()}
ENDINGS[f"{MAGNITUDE}.weight"] = "magnitude"


class Base(NamedTuple):
    """The model that an adapter is for.

    Attributes:
      cfg: with `family` and `lora`.
      shapes: of its leaves, by path; of a tied model's head too.
      targets: its tensors by name, as pieces of leaves.
      file: what errors name.
    """

    cfg: ModelConfig
    shapes: dict[str, tuple[int, ...]]
    targets: dict[str, Target]
    file: Path

    def sides(self, path: str) -> tuple[int, int]:
        """Inputs and outputs of the matrix at a path, all outputs of a fused one."""
        parent, _, name = path.rpartition("/")
        parts = [f"{parent}/{part}" if parent else part for part in FUSED.get(name, (name,))]
        kernels = [self.shapes[f"{part}/kernel"] for part in parts]
        return kernels[0][-2], sum(shape[-1] for shape in kernels)


def locate(path: str | Path, adapter: str | Path | None) -> tuple[str | Path, Path | None]:
    """Directories of the base and of the adapter, if there is one.

    Args:
      path: a model directory; or an adapter's, or that of a run that ended in one: then the base is what it names.
      adapter: an adapter for the model at `path`: a PEFT directory, or a run that ended in one.

    Raises:
      FileNotFoundError: `adapter` is none, or the base that the adapter at `path` names is not here.
    """
    if adapter is not None:
        found = peft_config.find(adapter)
        if found is None:
            raise FileNotFoundError(f"{Path(adapter) / CONFIG}: no such file; is this an adapter's directory?")
        return path, found
    found = peft_config.find(path)
    if found is None:
        return path, None
    name = peft_config.read(found).base
    if name is None or not Path(name).is_dir():
        raise FileNotFoundError(
            f"{found / CONFIG}: base_model_name_or_path: {name!r} is no directory here; load the base model, with this "
            "directory as its adapter"
        )
    return name, found


def configure(cfg: ModelConfig, directory: Path) -> ModelConfig:
    """The base's configuration with the adapter's settings; errors as in `attach`."""
    settings = peft_config.read(directory)
    cfg = dataclasses.replace(_with_family(cfg), lora=None)
    factors, whole = _read(cfg, directory / WEIGHTS)
    peft_config.check_targets(directory, (module.name for module in factors))
    rest = _owners(whole) - {module.name for module in factors}
    saved = tuple(sorted(given for given in settings.modules_to_save if any(saves(given, name) for name in rest)))
    copies = {"model.embed_tokens", "transformer.wte", "lm_head"}
    saved += tuple(sorted(name for name in rest - copies if not any(saves(given, name) for given in saved)))
    used: dict[str, Any] = {
        name: _matching(getattr(settings, name), factors) for name in ("rank_pattern", "alpha_pattern")
    }
    targets = _short_targets(cfg, factors)
    return dataclasses.replace(cfg, lora=dataclasses.replace(settings, targets=targets, modules_to_save=saved, **used))


def attach(
    cfg: ModelConfig, variables: Variables, directory: Path, mesh: jax.sharding.Mesh | None = None
) -> tuple[ModelConfig, Variables]:
    """Reads an adapter and puts it beside its base.

    Args:
      cfg, variables: the base, as loaded; an adapter of its own is merged first.
      directory: with adapter_config.json and adapter_model.safetensors.
      mesh: where the adapter is spread by the sharding rules; null: the default device.

    Returns:
      `cfg` with `lora`, and {"params": base, "lora": adapter}; adapters are float32. An adapter that started from
      PiSSA goes with the base less that start, computed again here, as PEFT does it.

    Raises:
      FileNotFoundError, ValueError: naming the file, and the field or tensor that is missing, unknown, or of a shape
        that does not fit the base.
    """
    params = variables["params"]
    if "lora" in variables:
        params = merge(cfg, params, variables["lora"])
        cfg = merged_config(cfg, params)
    cfg = configure(cfg, directory)
    base = _base(cfg, directory / WEIGHTS)
    factors, whole = _read(cfg, base.file)
    leaves = _factors(base, factors) | _replacements(base, params, whole)
    if not leaves:
        raise ValueError(f"{base.file}: holds no adapter; is this the right directory?")
    if cfg.lora is not None and cfg.lora.init == "pissa":
        params = residual(cfg, params, init(cfg, jax.random.key(0), params))
    return cfg, {"params": params, "lora": _placed(names.nest(leaves), mesh)}


def save(directory: Path, cfg: ModelConfig, lora: Tree) -> None:
    """Writes adapter_config.json and adapter_model.safetensors into a directory, which exists.

    Args:
      cfg: the base, with `lora`. lora: the adapter, whole on this process.

    Raises:
      ValueError: without `cfg.lora`; with muP's forward factors, which the base's file does not know; a replaced part
        of what the family keeps in one tensor.
    """
    if cfg.lora is None:
        raise ValueError("lora: the configuration has no settings of the adapter; set its field lora")
    if (cfg.logits_multiplier, cfg.attention_multiplier, cfg.residual_multiplier) != (1.0, 1.0, 1.0):
        raise ValueError("mup: its forward factors fit in no adapter; save the adapter merged, with its base")
    base = _base(_with_family(cfg), directory / WEIGHTS)
    leaves = {path: np.asarray(leaf) for path, leaf in trees.leaves(lora).items()}
    adapted = chosen_modules(base.cfg)
    tensors = _written_factors(base, adapted, leaves)
    replaced = _written_replacements(base, leaves)
    owners = {module.name for module in adapted}
    for name, value in replaced.items():
        owner, _, leaf = name.rpartition(".")
        tensors[f"{PREFIX}{owner}{BASE_LAYER if owner in owners else ''}.{leaf}"] = value
    biases = {name.rpartition(".")[0] for name in replaced} - _owners(replaced)
    written = peft_config.written(
        cfg.lora,
        _short_targets(base.cfg, [m for m in adapted if m not in _stacked(base.cfg)]),
        _owners(replaced) - owners,
        bias="all" if biases - owners else "lora_only" if biases else "none",
        fan_in_fan_out=base.cfg.family == "gpt2",
        task="SEQ_CLS" if "score" in lora else "CAUSAL_LM",
    )
    parameters = _short_targets(base.cfg, [m for m in adapted if m in _stacked(base.cfg)])
    write_json(directory / CONFIG, written | ({"target_parameters": parameters} if parameters else {}))
    safetensors.write(
        directory / WEIGHTS,
        [Tensor(name, x.dtype, x.shape, functools.partial(np.asarray, x)) for name, x in tensors.items()],
    )


def _matching(pattern: Iterable[tuple[str, Any]], adapted: Iterable[Module]) -> tuple[tuple[str, Any], ...]:
    """The entries of a pattern that match something; what does not has no effect, and PEFT keeps it."""
    names_ = [module.name for module in adapted]
    return tuple(pair for pair in pattern if any(covers(pair[0], name) for name in names_))


def short_names(known: Iterable[Module], chosen: Iterable[Module]) -> tuple[str, ...]:
    """The shortest endings that name exactly the chosen modules: `q_proj` where all of them are, else paths in full."""
    wanted = {module.name for module in chosen}
    owners: dict[str, set[str]] = {}
    for module in known:
        for ending in _endings(module.name):
            owners.setdefault(ending, set()).add(module.name)
    found = {next(ending for ending in _endings(name) if owners[ending] <= wanted) for name in wanted}
    return tuple(sorted(found))


def _owners(tensors: Iterable[str]) -> set[str]:
    """Modules of which more than the bias is there; PEFT trains biases by a setting of their own."""
    return {owner for owner, _, leaf in (name.rpartition(".") for name in tensors) if leaf != "bias"}


def _short_targets(cfg: ModelConfig, chosen: Iterable[Module]) -> tuple[str, ...]:
    """`short_names`, stacked experts by names that fit no single expert."""
    stacked = _stacked(cfg)
    own, other = [m for m in chosen if m not in stacked], [m for m in chosen if m in stacked]
    return short_names(modules(cfg), own) + short_names((*modules(cfg), *stacked), other)


def _endings(name: str) -> list[str]:
    """`a.0.b.c` -> [`c`, `b.c`, `a.0.b.c`]: none begins with a number, which says nothing to a reader."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in reversed(range(len(parts))) if not parts[start].isdigit()]


def _with_family(cfg: ModelConfig) -> ModelConfig:
    """The configuration with the family by whose names its modules go."""
    if cfg.family is not None:
        return cfg
    family, _ = hf.choose(dataclasses.replace(cfg, lora=None), own_form=True)
    return dataclasses.replace(cfg, family=family.model_type)


def _base(cfg: ModelConfig, file: Path) -> Base:
    plain = dataclasses.replace(cfg, lora=None)
    leaves = names.abstract(plain)
    targets = names.targets(plain, hf.READABLE[str(cfg.family)].table(plain), leaves)
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    # The head of a tied model has no place of its own in the base, nor has that of a reward model in a language model.
    for path, name, out in (("unembed/kernel", "lm_head.weight", cfg.V), ("score/kernel", "score.weight", 1)):
        if path not in shapes:
            shapes[path] = (cfg.D, out)
            targets[name] = Target((Part(path, (), shapes[path]),), True)
    return Base(cfg, shapes, targets, file)


def _rank(base: Base, module: Module) -> int:
    slot = resolve(base.cfg).get(module.path)
    return 0 if slot is None else int(slot.ranks[module.index].max())


def _experts(base: Base, module: Module) -> int | None:
    """Number of experts that a module has in one matrix, or None for a matrix of its own."""
    return base.shapes[module.path.replace("gate_up", "up") + "/kernel"][1] if module in _stacked(base.cfg) else None


def _stacked(cfg: ModelConfig) -> frozenset[Module]:
    return frozenset(stacked_modules(dataclasses.replace(cfg, lora=None)))


def _tensor_name(module: Module, kind: str, adapted: Iterable[Module]) -> str:
    if module.name.endswith((".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")):
        return PREFIX + peft_experts.file_name(module, {other.name for other in adapted}) + LINEAR[kind]
    return PREFIX + module.name + (EMBEDDING if module.path == "embed" else LINEAR)[kind]


def _read(cfg: ModelConfig, file: Path) -> tuple[dict[Module, dict[str, Entry]], dict[str, Entry]]:
    """An adapter's tensors by module and kind, and what is kept whole by its name in the base."""
    known = {module.name: module for module in (*modules(cfg), *stacked_modules(cfg))}
    header = safetensors.read_header(file)
    factors: dict[Module, dict[str, Entry]] = {}
    whole: dict[str, Entry] = {}
    for full, entry in header.items():
        name = full.removeprefix(PREFIX)
        if name == full:
            raise ValueError(f"{file}: {full}: does not begin with {PREFIX}, as an adapter's tensors do")
        ending = next((ending for ending in ENDINGS if name.endswith(ending)), None)
        if ending is None:
            if ".lora_" in name:
                raise ValueError(f"{file}: {full}: is not supported; train the adapter without it")
            whole[name.replace(f"{BASE_LAYER}.", ".")] = entry
            continue
        owner, kind = name.removesuffix(ending), ENDINGS[ending]
        spellings = (owner, f"model.{owner}", peft_experts.module_name(owner, header, cfg.D))
        module = next((known[spelling] for spelling in spellings if spelling in known), None)
        table = EMBEDDING if module is not None and module.path == "embed" else LINEAR
        if module is None or not ending.startswith(table[kind]):
            raise ValueError(f"{file}: {full}: the base has no such module; this adapter is for another base")
        factors.setdefault(module, {})[kind] = entry
    return factors, whole


def _factors(base: Base, factors: Mapping[Module, Mapping[str, Entry]]) -> dict[str, np.ndarray]:
    """Stacked leaves by path."""
    lora, slots = base.cfg.lora, resolve(base.cfg) if factors else {}
    assert lora is not None
    kinds = ("a", "b", "magnitude") if lora.dora else ("a", "b")
    leaves: dict[str, np.ndarray] = {}
    for module, entries in factors.items():
        slot, rank, (width, out) = slots[module.path], _rank(base, module), base.sides(module.path)
        shapes: dict[str, tuple[int, ...]] = {"a": (rank, width), "b": (out, rank), "magnitude": (out,)}
        experts = _experts(base, module)
        full = {"a": (width, slot.rank), "b": (slot.rank, out), "magnitude": (out,)}
        for kind in sorted({*kinds, *entries}):
            name = _tensor_name(module, kind, factors)
            if kind not in entries:
                raise ValueError(f"{base.file}: {name}: missing; the file is not whole, or {CONFIG} is of another")
            if kind not in kinds:
                raise ValueError(f"{base.file}: {name}: unexpected, as {CONFIG} has no use_dora; mend that file")
            shape = shapes[kind] if experts is None else peft_experts.shapes(kind, experts, shapes[kind])
            _check_shape(base, name, entries[kind], shape)
            value = entries[kind].view().astype(np.float32)
            value = value.T if experts is None else peft_experts.unstacked(kind, value, experts)
            leaf = leaves.setdefault(f"{module.path}/{kind}", np.zeros((*slot.ranks.shape, *full[kind]), np.float32))
            where: tuple[Any, ...] = (*module.index, *(slice(n) for n in value.shape))
            leaf[where] = value
    return leaves


def _check_shape(base: Base, name: str, entry: Entry, shape: tuple[int, ...]) -> None:
    if entry.shape != shape:
        raise ValueError(
            f"{base.file}: {name}: shape {list(entry.shape)}, but the base with {CONFIG} asks for {list(shape)}; this "
            "adapter is for another base"
        )


def _replacements(base: Base, params: Tree, whole: Mapping[str, Entry]) -> dict[str, np.ndarray]:
    """Replaced leaves by path. What a file has for some layers only is filled up from the base; copies of the base's
    embedding and head, which PEFT adds where they are adapted, are passed over."""
    held, lora = trees.leaves(params, is_leaf=is_qtensor), base.cfg.lora
    assert lora is not None
    leaves: dict[str, np.ndarray] = {}
    for name, entry in whole.items():
        if name not in base.targets:
            raise ValueError(f"{base.file}: {PREFIX}{name}: the base has no such parameter; this is for another base")
        target = base.targets[name]
        _check_shape(base, PREFIX + name, entry, target.shape)
        value = entry.view().astype(np.float32)
        value = np.swapaxes(value, -1, -2) if target.transpose else value
        asked = any(saves(given, name.rpartition(".")[0]) for given in lora.modules_to_save)
        start = 0
        for part in target.parts:
            width = part.shape[-1]
            piece, start = value[..., start : start + width], start + width
            old = held.get(part.path)
            if not asked and old is not None and np.array_equal(_host(old)[part.index], piece):
                continue
            if part.path not in leaves:
                leaves[part.path] = np.zeros(base.shapes[part.path], np.float32) if old is None else _host(old)
            leaves[part.path][part.index] = piece
    return leaves


def _host(leaf: Any) -> np.ndarray:
    return np.array(place.gather(leaf.astype(np.float32)))


def _placed(lora: Tree, mesh: jax.sharding.Mesh | None) -> Tree:
    if mesh is None:
        return jax.device_put(lora)
    spread = rules.shardings(lora, mesh)
    return jax.tree.map(lambda x, s: jax.make_array_from_callback(x.shape, s, lambda index: x[index]), lora, spread)


def _written_factors(base: Base, adapted: Iterable[Module], leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for module in adapted:
        rank, experts = _rank(base, module), _experts(base, module)
        a, b = (leaves[f"{module.path}/{kind}"][module.index] for kind in "ab")
        for kind, leaf in (("a", a[..., :rank]), ("b", b[..., :rank, :])):
            value = leaf.T if experts is None else peft_experts.stacked(kind, leaf)
            tensors[_tensor_name(module, kind, adapted)] = value
        if f"{module.path}/magnitude" in leaves:
            if experts is not None:
                raise ValueError("lora.dora: PEFT has none for experts in one matrix; name each expert's modules")
            name = _tensor_name(module, "magnitude", adapted)
            tensors[name] = leaves[f"{module.path}/magnitude"][module.index]
    return tensors


def _written_replacements(base: Base, leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Replaced parameters by their name in the base."""
    replaced = {path for path in leaves if path.rpartition("/")[2] not in ("a", "b", "magnitude")}
    tensors: dict[str, np.ndarray] = {}
    for name, target in base.targets.items():
        there = [part.path in replaced for part in target.parts]
        if any(there) and not all(there):
            raise ValueError(f"{name}: only parts of it are replaced ({', '.join(sorted(replaced))}); save it merged")
        if all(there):
            whole = np.concatenate([leaves[part.path][part.index] for part in target.parts], axis=-1)
            tensors[name] = np.swapaxes(whole, -1, -2) if target.transpose else whole
    known = {part.path for target in base.targets.values() for part in target.parts}
    if unknown := sorted(replaced - known):
        raise ValueError(f"lora: {', '.join(unknown)}: no parameters of the base; the tree does not fit it")
    return tensors
