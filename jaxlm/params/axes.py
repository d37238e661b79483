"""What each leaf is: one table from leaf paths to axis roles.

muP factors, decay masks, Muon's dimension numbers, layer ids and fresh scales are all read from `ROLES`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from jaxlm import tree as trees
from jaxlm.nn.config import ModelConfig
from jaxlm.nn.walk import STACKS, layer_slots
from jaxlm.tree import Rules
from jaxlm.types import Tree

Kind = Literal["matrix", "input", "output", "router", "scalar", "lora_a", "lora_b"]
Dimension = Literal["D", "HK", "GK", "F", "expert", "shared", "q_norm", "k_norm"]

POSITION_STD = 0.02


@dataclasses.dataclass(frozen=True)
class Role:
    """The part that a leaf plays.

    Attributes:
      kind: `matrix` grows with the model's width on both sides, `input` on its output side alone (embeddings, biases,
        norms), `output` on its input side alone (heads, read after the logits factor of muP); `router` is an output
        without a factor behind it; `scalar` does not grow; `lora_a` [in, R] and `lora_b` [R, out] are adapters.
      fan_in, fan_out: the dimension on either side if it grows with width, see `size`. Vocabulary, positions, experts,
        ranks and layers never count as growing.
      decayed: whether weight decay applies. Every kernel decays, embeddings and heads too, as in GPT-2; gains, biases
        and adapters do not.
      residual: whether the leaf writes into the residual stream, and so is drawn smaller by sqrt(2N).
    """

    kind: Kind
    fan_in: Dimension | None = None
    fan_out: Dimension | None = None
    decayed: bool = False
    residual: bool = False

    @property
    def rank(self) -> int:
        """Number of trailing axes that are the leaf's own; those in front are batch axes (layers, experts)."""
        return 1 if self.kind in ("input", "scalar") and not self.decayed else 2


def _matrix(fan_in: Dimension, fan_out: Dimension, residual: bool = False) -> Role:
    return Role("matrix", fan_in, fan_out, decayed=True, residual=residual)


def _vector(fan_out: Dimension) -> Role:
    return Role("input", None, fan_out)


_EMBEDDING = Role("input", None, "D", decayed=True)
_HEAD = Role("output", "D", None, decayed=True)

ROLES: Rules[Role] = (
    ("(embed|position_embed)/kernel", _EMBEDDING),
    ("(unembed|score|value|projection/hidden)/kernel", _HEAD),
    ("(unembed|score|value)/bias", Role("scalar")),
    ("attn/q/kernel", _matrix("D", "HK")),
    ("attn/(k|v)/kernel", _matrix("D", "GK")),
    ("attn/o/kernel", _matrix("HK", "D", residual=True)),
    ("attn/q/bias", _vector("HK")),
    ("attn/(k|v)/bias", _vector("GK")),
    ("q_norm/(scale|bias)", _vector("q_norm")),
    ("k_norm/(scale|bias)", _vector("k_norm")),
    ("mlp/router/kernel", Role("router", "D", None, decayed=True)),
    ("mlp/router/bias", Role("scalar")),
    ("dense_layers/mlp/(gate|up)/kernel", _matrix("D", "F")),
    ("dense_layers/mlp/down/kernel", _matrix("F", "D", residual=True)),
    ("dense_layers/mlp/(gate|up)/bias", _vector("F")),
    ("mlp/(gate|up)/kernel", _matrix("D", "expert")),
    ("mlp/down/kernel", _matrix("expert", "D", residual=True)),
    ("mlp/(gate|up)/bias", _vector("expert")),
    ("shared/(gate|up)/kernel", _matrix("D", "shared")),
    ("shared/down/kernel", _matrix("shared", "D", residual=True)),
    ("shared/(gate|up)/bias", _vector("shared")),
    ("shared/down/bias", _vector("D")),
    ("(attn/o|mlp/down)/bias", _vector("D")),
    ("([a-z]+_)?norm/(scale|bias)", _vector("D")),
    ("(attn/(q|k|v|qkv)|mlp/(gate|up|gate_up|router)|unembed)/a", Role("lora_a", "D", None)),
    ("attn/o/a", Role("lora_a", "HK", None)),
    ("shared/(gate|up)/a", Role("lora_a", "D", None)),
    ("shared/down/a", Role("lora_a", "shared", None)),
    ("shared/(gate|up)/b", Role("lora_b", None, "shared")),
    ("shared/(gate|up)/magnitude", _vector("shared")),
    ("dense_layers/mlp/down/a", Role("lora_a", "F", None)),
    ("mlp/down/a", Role("lora_a", "expert", None)),
    ("embed/a", Role("lora_a", None, None)),
    ("attn/(q|qkv)/b", Role("lora_b", None, "HK")),
    ("attn/(k|v)/b", Role("lora_b", None, "GK")),
    ("dense_layers/mlp/(gate|up|gate_up)/b", Role("lora_b", None, "F")),
    ("mlp/(gate|up|gate_up)/b", Role("lora_b", None, "expert")),
    ("(attn/o|mlp/down|shared/down|embed)/b", Role("lora_b", None, "D")),
    ("(mlp/router|unembed)/b", Role("lora_b", None, None)),
    ("attn/(q|qkv)/magnitude", _vector("HK")),
    ("attn/(k|v)/magnitude", _vector("GK")),
    ("dense_layers/mlp/(gate|up|gate_up)/magnitude", _vector("F")),
    ("mlp/(gate|up|gate_up)/magnitude", _vector("expert")),
    ("(attn/o|mlp/down|shared/down|embed)/magnitude", _vector("D")),
    ("(mlp/router|unembed)/magnitude", Role("scalar")),
)
"""Ordered (pattern, role); the first match counts. `layers/mlp` is the mixture of experts where there is one."""


def roles(tree: Tree) -> dict[str, Role]:
    """The role of each leaf, by path, in tree order; ValueError names leaves that the table does not know."""
    named = trees.apply_rules(ROLES, tree, name="axis roles")
    return trees.leaves(named, is_leaf=lambda x: isinstance(x, Role))


def map_roles(function: Callable[[str, Any, Role], Any], tree: Tree) -> Tree:
    """A tree of `function(path, leaf, role)`: {"norm": {"scale": [D]}} -> {"norm": {"scale": value}}."""
    known = roles(tree)
    return trees.map_with_path(lambda path, leaf: function(path, leaf, known[path]), tree)


def size(cfg: ModelConfig, dimension: Dimension) -> int:
    """The size of a dimension that grows with width; `expert` is the width of one expert, or F without experts."""
    whole = cfg.qk_norm == "projection"
    sizes = {
        "D": cfg.D,
        "HK": cfg.H * cfg.K,
        "GK": cfg.G * cfg.K,
        "F": cfg.F,
        "expert": cfg.F if cfg.moe is None or cfg.moe.d_ff is None else cfg.moe.d_ff,
        "shared": 0 if cfg.moe is None else cfg.moe.n_shared_experts * (cfg.moe.d_ff or cfg.F),
        "q_norm": cfg.H * cfg.K if whole else cfg.K,
        "k_norm": cfg.G * cfg.K if whole else cfg.K,
    }
    return sizes[dimension]


def stack_name(path: str) -> str | None:
    """The stacked tree that a leaf lies in (`layers`, `dense_layers`), or None outside the layers."""
    return next((name for name in STACKS if trees.matches(rf"{name}/.*", path)), None)


def decay_mask(tree: Tree) -> Tree:
    """Whether each leaf decays, by name (stacked gains and biases have two axes, so their rank would mislead).

    {"norm": {"scale": [D]}, "embed": {"kernel": [V, D]}}  ->  {"norm": {"scale": False}, "embed": {"kernel": True}}
    """
    return map_roles(lambda path, leaf, role: role.decayed, tree)


def layer_ids(tree: Tree, cfg: ModelConfig) -> Tree:
    """The distance of each leaf from the input: embeddings 0, layer l (from 0) l + 1, final norm and heads N + 1.

        {"embed": {"kernel": [V, D]}, "layers": {"w": [N, D]}, "norm": {"scale": [D]}}
        ->  {"embed": {"kernel": 0}, "layers": {"w": int [N]}, "norm": {"scale": N + 1}}

    A tied embedding counts by its name, as an embedding. Adapters have the ids of their layers.
    """
    ids: dict[str, list[int]] = {name: [] for name in STACKS}
    for layer, (name, _) in enumerate(layer_slots(cfg)):
        ids[name].append(layer + 1)

    def number(path: str, leaf: Any, role: Role) -> int | np.ndarray:
        stack = stack_name(path)
        if stack is not None:
            return np.array(ids[stack])
        return 0 if trees.matches("(position_)?embed/.*", path) else cfg.N + 1

    return map_roles(number, tree)


def standard_std(cfg: ModelConfig, path: str, role: Role) -> float:
    """Standard deviation of a fresh leaf under the standard parametrisation (0 for biases, gains and LoRA's B)."""
    if role.kind == "lora_a" and role.fan_in is not None:
        return (3 * size(cfg, role.fan_in)) ** -0.5  # uniform in +- fan_in^-0.5, as in PEFT
    if trees.matches("embed/b", path):
        return 1.0
    if not role.decayed:
        return 0.0
    if role.fan_in is not None:
        depth = (2 * cfg.N) ** -0.5 if role.residual else 1.0
        return size(cfg, role.fan_in) ** -0.5 * depth
    if trees.matches("position_embed/kernel", path):
        return POSITION_STD
    return cfg.embed_std or (0.02 if cfg.tie_embeddings else 1.0)
