"""Which trees make up the models that an objective runs, and the one forward pass that training differentiates."""

import jax
import jax.numpy as jnp

from jaxlm.types import Apply, Array, Batch, Output, Variables

COLLECTIONS = ("params", "lora", "moe_state")
"""Trees that belong to a model; other trained trees are an objective's own, other frozen ones whole other models."""


def policy(params: Variables, frozen: Variables) -> Variables:
    """The trained model: its frozen collections with the trained ones in their place."""
    known = {**frozen, **params}
    return {name: known[name] for name in COLLECTIONS if name in known}


def reference(params: Variables, frozen: Variables) -> Variables:
    """What a policy is compared with: the frozen copy where there is one, else the base without its adapters."""
    if "reference" in frozen:
        return frozen["reference"]
    return {name: tree for name, tree in policy(params, frozen).items() if name != "lora"}


def input_weights(batch: Batch) -> dict[str, Array]:
    """`inputs`, the tokens of the step that are no padding: what auxiliary losses of a microbatch are weighed by."""
    return {"inputs": jnp.maximum(jnp.count_nonzero(batch["segments"]), 1).astype(jnp.float32)}


def forward(
    apply: Apply, params: Variables, frozen: Variables, rows: Batch, weights: dict[str, Array], key: Array | None
) -> tuple[Output, Array, dict[str, Array]]:
    """The trained model on rows [B, L], with what its layers add to the loss.

    Args:
      apply, params, frozen, key: as the objective was given them.
      rows: `tokens`, `positions`, `segments`, each [B, L].
      weights: with `inputs`, see `input_weights`.

    Returns:
      The output; the mean of the layers' auxiliary losses, with these rows' share of the step, to be added to the loss;
      and what is known of the routing, by layer: `training.balance` makes metrics of the sums over the step.
    """
    output = apply(
        policy(params, frozen), rows["tokens"], positions=rows["positions"], segments=rows["segments"], key=key
    )
    share = jnp.count_nonzero(rows["segments"]) / weights["inputs"]
    if "moe/loss" not in output.aux:
        return output, jnp.zeros((), jnp.float32), {}
    # Counts add up over microbatches; the entropy is a mean over tokens.
    routing = {name: output.aux[name] for name in ("moe/counts", "moe/dropped")}
    routing["moe/router_entropy"] = share * output.aux["moe/router_entropy"]
    return output, share * jnp.mean(output.aux["moe/loss"]), jax.lax.stop_gradient(routing)
