"""What a step does about the load of experts: selection bias, metrics, and a word when something stays wrong."""

import functools
from collections.abc import Mapping

import jax.numpy as jnp

from jaxlm.nn.config import ModelConfig, MoEConfig
from jaxlm.nn.walk import kinds
from jaxlm.training.step import Extra, Metrics
from jaxlm.types import Array, Variables

DEAD_AFTER = 50
"""Steps without a token after which an expert counts as dead."""

OVERLOADED, PATIENCE = 2.0, 50
"""Largest over mean load that is too much when it lasts this many steps."""


def extra(cfg: ModelConfig, bias_NxE: Array | None = None) -> Extra | None:
    """What a mixture keeps besides its parameters, and how a step changes it; None for a dense model.

    Args:
      cfg: the model.
      bias_NxE: the selection bias that it comes with, or None.
    """
    layers = [i for i, kind in enumerate(kinds(cfg)) if kind.sparse]
    if cfg.moe is None or not layers:
        return None
    biased = cfg.moe.balance == "bias" and cfg.lora is None
    return Extra(
        start=functools.partial(_start, cfg.moe, len(layers), bias_NxE),
        adjust=functools.partial(_adjust, cfg.moe, layers, cfg.moe.bias_rate if biased else 0.0),
    )


def _start(moe: MoEConfig, layers: int, bias: Array | None) -> Variables:
    """`idle` int32 [N, E], updates since an expert's last token, and `bias` float32 [N, E] where it is used."""
    state: dict[str, Array] = {"idle": jnp.full((layers, moe.experts), DEAD_AFTER, jnp.int32)}
    if bias is not None:
        state["bias"] = jnp.copy(bias)
    elif moe.balance == "bias":
        state["bias"] = jnp.zeros((layers, moe.experts), jnp.float32)
    return {"moe_state": {"layers": {"mlp": {"router": state}}}}


def _adjust(
    moe: MoEConfig, layers: list[int], rate: float, extra: Variables, metrics: Metrics
) -> tuple[Variables, Metrics]:
    """The next state, and the metrics with scalars in place of counts by layer and expert.

    The bias moves by `rate` up where an expert had less than the mean load of the whole batch, down where it had more
    (2408.15664); no gradient, momentum or decay comes near it.
    """
    if "moe/counts" not in metrics:
        return extra, metrics
    counts_NxE = metrics["moe/counts"]
    state = extra["moe_state"]["layers"]["mlp"]["router"]
    idle_NxE = jnp.where(counts_NxE > 0, 0, jnp.minimum(state["idle"] + 1, DEAD_AFTER))
    new = {"idle": idle_NxE}
    if "bias" in state:
        mean_N = jnp.mean(counts_NxE, axis=1)
        new["bias"] = state["bias"] + rate * jnp.sign(mean_N[:, None] - counts_NxE)
    return {**extra, "moe_state": {"layers": {"mlp": {"router": new}}}}, scalars(moe, layers, metrics) | {
        "moe/dead_experts": jnp.mean(jnp.sum(idle_NxE >= DEAD_AFTER, axis=1).astype(jnp.float32))
    }


def scalars(moe: MoEConfig, layers: list[int], metrics: Metrics) -> Metrics:
    """Load and routing in numbers: means over layers, the largest load by layer too; other metrics as they are.

    Args:
      moe: the mixture. layers: indices of the layers that are mixtures.
      metrics: with those of `forward`, sums over the whole batch.
    """
    counts_NxE = metrics["moe/counts"]
    total_N = jnp.maximum(jnp.sum(counts_NxE, axis=1), 1.0)
    share_NxE = counts_NxE / total_N[:, None]
    largest_N = moe.experts * jnp.max(share_NxE, axis=1)
    entropy_N = -jnp.sum(share_NxE * jnp.log(jnp.where(share_NxE > 0, share_NxE, 1.0)), axis=1)
    # A single expert is always in balance.
    even = jnp.log(float(moe.experts)) if moe.experts > 1 else 1.0
    rest = {name: value for name, value in metrics.items() if name not in ("moe/counts", "moe/dropped")}
    return rest | {
        "moe/load_max": jnp.mean(largest_N),
        "moe/load_entropy": jnp.mean(entropy_N) / even if moe.experts > 1 else jnp.ones(()),
        "moe/dropped_fraction": jnp.mean(metrics["moe/dropped"] / total_N),
        "moe/router_entropy": jnp.mean(metrics["moe/router_entropy"]),
        **{f"moe/load_max/{layer}": largest_N[i] for i, layer in enumerate(layers)},
    }


class Alarm:
    """Says once when experts are dead, or the load has been uneven for long, and again after it was well in between."""

    def __init__(self) -> None:
        self._dead, self._told, self._steps = False, False, 0

    def look(self, step: int, row: Mapping[str, float]) -> list[str]:
        """Messages about a finished step, of its metrics."""
        if "moe/load_max" not in row:
            return []
        dead, load = row["moe/dead_experts"], row["moe/load_max"]
        found = []
        if dead > 0 and step >= DEAD_AFTER and not self._dead:
            found.append(f"step {step}: {dead:g} experts a layer had no token in {DEAD_AFTER} steps")
        self._steps = self._steps + 1 if load > OVERLOADED else 0
        if self._steps >= PATIENCE and not self._told:
            found.append(f"step {step}: the fullest experts have had over {OVERLOADED:g} times the mean load for "
                         f"{PATIENCE} steps, now {load:.2f}")  # fmt: skip
        self._told = self._steps >= PATIENCE
        self._dead = dead > 0 and step >= DEAD_AFTER
        return [f"{text}; raise model.moe.aux_weight or use balance: bias" for text in found]
