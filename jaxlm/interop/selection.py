"""The selection bias of a mixture's routers in files: one more tensor beside each router, as DeepSeek-V3 names it.

Other families know no such bias. transformers passes over the tensors with a warning and chooses experts by the
probabilities alone; what jaxlm reads chooses as it did in training.
"""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxlm.dist import place
from jaxlm.interop.names import Table
from jaxlm.interop.safetensors import Tensor
from jaxlm.nn.config import ModelConfig
from jaxlm.nn.walk import layer_slots
from jaxlm.types import Array, Variables

SUFFIX = ".e_score_correction_bias"


def split(variables: Variables) -> tuple[Variables, Array | None]:
    """The variables without `moe_state`, and the bias [N, E] where it has one."""
    rest = {name: tree for name, tree in variables.items() if name != "moe_state"}
    router = variables.get("moe_state", {}).get("layers", {}).get("mlp", {}).get("router", {})
    return rest, router.get("bias")


def tensors(cfg: ModelConfig, table: Table, bias_NxE: Array | None) -> list[Tensor]:
    """The bias as tensors of a file, one a layer."""
    if bias_NxE is None:
        return []
    values = np.asarray(place.gather(bias_NxE), np.float32)
    named = _names(cfg, table).items()
    return [Tensor(name, values.dtype, values.shape[1:], functools.partial(values.__getitem__, i)) for name, i in named]


def take(cfg: ModelConfig, table: Table, entries: dict[str, Any]) -> Variables:
    """{"moe_state": ...} of a file's tensors, which are taken out of `entries`; {} where there are none.

    Raises:
      ValueError: only some layers have one, or of another size.
    """
    found = {name: entries.pop(name) for name in list(entries) if name.endswith(SUFFIX)}
    if not found:
        return {}
    wanted = _names(cfg, table)
    experts = 0 if cfg.moe is None else cfg.moe.experts
    if found.keys() != wanted.keys() or any(entry.shape != (experts,) for entry in found.values()):
        wrong = ", ".join(sorted(found.keys() ^ wanted.keys())[:5]) or f"sizes other than {experts}"
        file = next(iter(found.values())).file
        raise ValueError(f"{file}: {SUFFIX[1:]}: {wrong}; the weights do not fit config.json")
    values = np.stack([np.asarray(found[name].view(), np.float32) for name in wanted])
    return {"moe_state": {"layers": {"mlp": {"router": {"bias": jnp.asarray(values)}}}}}


def _names(cfg: ModelConfig, table: Table) -> dict[str, int]:
    """Tensor -> its place among the layers that are mixtures."""
    router = next((row.theirs for row in table.sparse if row.ours == ("mlp/router/kernel",)), "")
    stem = router.rpartition(".")[0]
    slots = [(i, at) for i, (stack, at) in enumerate(layer_slots(cfg)) if stack == "layers"]
    return {table.layer.format(i=i) + stem + SUFFIX: at for i, at in slots}
