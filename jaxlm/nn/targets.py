"""Which projections an adapter changes, at which rank and scale: PEFT's names and patterns, matched to our leaves."""

import difflib
import functools
import math
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from jaxlm.nn.config import LoraConfig, ModelConfig
from jaxlm.nn.walk import kinds, layer_slots

ATTENTION = (("self_attn.q_proj", "q"), ("self_attn.k_proj", "k"), ("self_attn.v_proj", "v"), ("self_attn.o_proj", "o"))
MLP = (("mlp.gate_proj", "gate"), ("mlp.up_proj", "up"), ("mlp.down_proj", "down"))
EXPERTS = tuple((name.replace("mlp.", "mlp.experts.{e}."), ours) for name, ours in MLP)
SHARED = tuple((name.replace("mlp.", "mlp.shared_experts."), ours) for name, ours in MLP)
ROUTER = (("mlp.gate", "router"),)

NAMES: dict[str, dict[str, tuple[tuple[str, str], ...]]] = {
    "gpt2": {
        "top": (("transformer.wte", "embed"), ("lm_head", "unembed")),
        "prefix": (("transformer.h.{i}.", ""),),
        "attn": (("attn.c_attn", "qkv"), ("attn.c_proj", "o")),
        "mlp": (("mlp.c_fc", "up"), ("mlp.c_proj", "down")),
    },
    "phi3": {
        "attn": (("self_attn.qkv_proj", "qkv"), ("self_attn.o_proj", "o")),
        "mlp": (("mlp.gate_up_proj", "gate_up"), ("mlp.down_proj", "down")),
    },
    "mixtral": {
        "experts": tuple(
            (f"block_sparse_moe.experts.{{e}}.{name}", ours)
            for name, ours in (("w1", "gate"), ("w3", "up"), ("w2", "down"))
        ),
        "router": (("block_sparse_moe.gate", "router"),),
    },
}
"""Where a family's module names differ from Llama's."""

STACKED = (("mlp.experts.gate_up_proj", "gate_up"), ("mlp.experts.down_proj", "down"))
"""Newer transformers keep the experts of a layer in two parameters, whatever the family; PEFT adapts these by name."""

LLAMA: dict[str, tuple[tuple[str, str], ...]] = {
    "top": (("model.embed_tokens", "embed"), ("lm_head", "unembed")),
    "prefix": (("model.layers.{i}.", ""),),
    "attn": ATTENTION,
    "mlp": MLP,
    "experts": EXPERTS,
    "router": ROUTER,
}

FUSED = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}
"""One module of a family, several projections of ours: they share A, and B has their outputs side by side."""


class Module(NamedTuple):
    """A matrix that can be adapted.

    Attributes:
      name: Hugging Face's path of the module, `model.layers.0.self_attn.q_proj`.
      path: ours, `layers/attn/q`; of a fused one `layers/attn/qkv`.
      index: place in our stacked leaves: (layer,), (layer, expert), or () outside the layers.
    """

    name: str
    path: str
    index: tuple[int, ...]  # type: ignore[assignment]

    @property
    def short(self) -> str:
        """Our name of it: `q`, `gate_up`, `router`."""
        return self.path.rsplit("/", 1)[-1]


class Slot(NamedTuple):
    """An adapted path: one rank and one scale for each matrix of its leaves; both 0 where there is no adapter.

    Attributes:
      ranks: int [N], [N, E], or [] outside the layers.
      scales: float32, `alpha / r` or `alpha / sqrt(r)` of that matrix.
    """

    ranks: np.ndarray
    scales: np.ndarray

    @property
    def rank(self) -> int:
        """Of the leaves: the largest. Smaller adapters fill the first columns of A and rows of B; the rest is 0, and
        stays 0, since each side's gradient there is a product with the other's zeros."""
        return int(self.ranks.max())


@functools.cache
def modules(cfg: ModelConfig) -> tuple[Module, ...]:
    """Every matrix of the model that can be adapted, by the names of its family (`cfg.family`, else Llama's)."""
    table = LLAMA | NAMES.get(
        cfg.family or ("gpt2" if cfg.norm == "layernorm" and cfg.positions == "learned" else ""), {}
    )
    found = [Module(name, path, ()) for name, path in table["top"]]
    for i, ((stack, place), kind) in enumerate(zip(layer_slots(cfg), kinds(cfg), strict=True)):
        prefix = table["prefix"][0][0].format(i=i)
        rows: list[tuple[str, str, int | None]] = [(name, f"{stack}/attn/{o}", None) for name, o in table["attn"]]
        if kind.sparse and cfg.moe is not None:
            rows += [(name, f"{stack}/mlp/{ours}", None) for name, ours in table["router"]]
            experts = [(name, f"{stack}/mlp/{ours}") for name, ours in table["experts"]]
            rows += [(name.format(e=e), path, e) for e in range(cfg.moe.experts) for name, path in experts]
            shared = SHARED if cfg.moe.n_shared_experts else ()
            rows += [(name, f"{stack}/mlp/shared/{ours}", None) for name, ours in shared]
        else:
            rows += [(name, f"{stack}/mlp/{ours}", None) for name, ours in table["mlp"]]
        for name, path, e in rows:
            if cfg.gated or not path.endswith("/gate"):
                found.append(Module(prefix + name, path, (place,) if e is None else (place, e)))
    return tuple(found)


@functools.cache
def stacked_modules(cfg: ModelConfig) -> tuple[Module, ...]:
    """The matrices of all experts of a layer as one module, gate and up side by side: another way to name them."""
    prefix = LLAMA["prefix"][0][0]
    return tuple(
        Module(prefix.format(i=i) + name, f"{stack}/mlp/{ours}", (place,))
        for i, ((stack, place), kind) in enumerate(zip(layer_slots(cfg), kinds(cfg), strict=True))
        for name, ours in (STACKED if kind.sparse and cfg.gated else ())
    )


@functools.cache
def resolve(cfg: ModelConfig) -> dict[str, Slot]:
    """What `cfg.lora` adapts, by path.

    {"layers/attn/q": Slot(ranks [16, 16], scales [1.0, 1.0])}

    Raises:
      ValueError: a target, or a key of a pattern, that matches nothing, with the nearest names; nothing adapted at
        all.
    """
    lora = cfg.lora
    if lora is None:
        return {}
    used: set[str] = set()
    shapes: dict[str, tuple[int, ...]] = {}
    for m in modules(cfg):
        shapes[m.path] = tuple(
            max(n, i + 1) for n, i in zip(shapes.get(m.path, (0,) * len(m.index)), m.index, strict=True)
        )
    shapes |= {m.path: shapes[m.path.replace("gate_up", "up")] for m in stacked_modules(cfg)}
    slots: dict[str, Slot] = {}
    for m in chosen_modules(cfg):
        shape = shapes[m.path]
        slot = slots.setdefault(m.path, Slot(np.zeros(shape, int), np.zeros(shape, np.float32)))
        r = _patterned(lora.rank_pattern, m.name, lora.r, used)
        alpha = _patterned(lora.alpha_pattern, m.name, lora.alpha, used)
        slot.ranks[m.index] = r
        slot.scales[m.index] = alpha / (math.sqrt(r) if lora.rslora else r)
    _check(cfg, lora, slots, used)
    return slots


def names(target: str, module: str) -> bool:
    """Whether a target names a module: it in full, or its last components."""
    return module == target or module.endswith(f".{target}")


def covers(key: str, name: str) -> bool:
    """Whether a key of a pattern matches a module's name or its last components, as in PEFT."""
    return re.match(rf"(.*\.)?({key})$", name) is not None


def saves(name: str, module: str) -> bool:
    """Whether an entry of `modules_to_save` covers a module: it, or one that it lies in, ends in that name."""
    return re.match(rf"(^|.*\.){re.escape(name)}($|\..*)", module) is not None


@functools.cache
def chosen_modules(cfg: ModelConfig) -> tuple[Module, ...]:
    """The modules that `cfg.lora` adapts: those that its targets name, less those that are kept whole."""
    lora, known, stacked = cfg.lora, modules(cfg), stacked_modules(cfg)
    if lora is None:
        return ()
    chosen: dict[Module, None] = {}
    if lora.targets == "all-linear":
        chosen = dict.fromkeys(m for m in known if m.index)
    else:
        for target in lora.targets:
            # Hugging Face's name first: in a mixture of experts its `gate` is the router.
            matched = [m for m in known if names(target, m.name)] or [m for m in known if target in (m.short, m.path)]
            matched = matched or [m for m in stacked if names(target, m.name)]
            if not matched:
                raise ValueError(f"lora.targets: {target!r} is no module of this model; {nearest(target, known)}")
            chosen |= dict.fromkeys(matched)
    return tuple(m for m in chosen if not any(saves(name, m.name) for name in lora.modules_to_save))


def _patterned(pattern: Any, name: str, default: Any, used: set[str]) -> Any:
    """The value of the first (key, value) whose key covers the name, as PEFT does it."""
    for key, value in pattern:
        if covers(key, name):
            used.add(key)
            return value
    return default


def _check(cfg: ModelConfig, lora: LoraConfig, slots: dict[str, Slot], used: set[str]) -> None:
    for field in ("rank_pattern", "alpha_pattern"):
        for key, _ in getattr(lora, field):
            if key not in used:
                raise ValueError(
                    f"lora.{field}: {key!r} matches no adapted module, so it changes nothing; adapted are "
                    f"{', '.join(sorted({path.rsplit('/', 1)[-1] for path in slots}))}"
                )
    if not slots and not lora.modules_to_save:
        raise ValueError("lora.targets: no module is adapted, so the adapter changes nothing; name one, or all-linear")


def nearest(name: str, known: Iterable[Module]) -> str:
    """`did you mean ...? known are ...`, for a name that is no module."""
    names = sorted({m.name.rsplit(".", 1)[-1] for m in known} | {m.short for m in known})
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return f"{hint}known are {', '.join(names)}, or all-linear"
