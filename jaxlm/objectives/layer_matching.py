"""Matching a student's layers with a teacher's: hidden states through learned projections, and attention.

Student layer i of n is matched with the teacher layer at the same share of the depth, so the last with the last.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.types import Array, Batch, Output, Variables

FLOOR = 1e-9
"""Added to attention before its logarithm: what a query does not see has none."""


class Matching(NamedTuple):
    """What is matched: the weights of both terms; 0 leaves a term out.

    `sums` gives, for the labels of the batch, the sum over positions of the mean over the student's layers of

        hidden      mean over channels of (h_s P - h_t / rms(h_t))^2, P [D, Dt] a learned projection of the layer
                    (FitNets, 1412.6550); the teacher's state is brought to unit size, as it grows with depth
        attention   KL(teacher || student) between who attends to whom, mean over heads (MiniLM, 2002.10957), so that
                    the numbers of heads may differ
    """

    hidden: float = 0.0
    attention: float = 0.0

    @property
    def weights(self) -> dict[str, float]:
        """The terms in use, by name."""
        return {name: weight for name, weight in self._asdict().items() if weight}

    @property
    def collect(self) -> tuple[str, ...]:
        """What both models are to collect of every layer."""
        return tuple(self.weights)

    def init(self, models: Mapping[str, Any], key: Array) -> Variables:
        """Fresh projections, {"projection": {"hidden": {"kernel": [N, D, Dt]}}}, from N(0, 1/D)."""
        if not self.hidden:
            return {}
        student, teacher = models["policy"], models["teacher"]
        kernel = jax.random.normal(key, (student.N, student.D, teacher.D)) / math.sqrt(student.D)
        return {"projection": {"hidden": {"kernel": kernel}}}

    def columns(self, output: Output) -> Batch:
        """The teacher's side as columns of the batch, `teacher_<name>_states` [B, N, ...], all layers."""
        return {f"teacher_{name}_states": jnp.moveaxis(output.states[name], 0, 1) for name in self.collect}

    def sums(self, projection: Variables, output: Output, batch: Batch) -> dict[str, Array]:
        """The sums of the terms by name; see the class. `output` is the student's."""
        found = {}
        for name in self.collect:
            ours, theirs = output.states[name], jnp.moveaxis(batch[f"teacher_{name}_states"], 1, 0)
            theirs = theirs[jnp.array(pairs(len(ours), len(theirs)))]
            if name == "hidden":
                kernels = projection["hidden"]["kernel"]
                values = jax.lax.map(jax.checkpoint(_hidden), (ours, theirs, kernels))
            else:
                values = jax.lax.map(jax.checkpoint(_attention), (ours, theirs))
            found[name] = jnp.sum(batch["mask"] * jnp.mean(values, axis=0))
        return found


def pairs(student: int, teacher: int) -> list[int]:
    """For each of the student's layers the teacher's, from 0: 2 and 6 layers give [2, 5]."""
    return [-(-(i + 1) * teacher // student) - 1 for i in range(student)]


def _hidden(layer: tuple[Array, Array, Array]) -> Array:
    ours, theirs, kernel = layer
    theirs = theirs.astype(jnp.float32)
    theirs *= jax.lax.rsqrt(jnp.mean(jnp.square(theirs), axis=-1, keepdims=True) + FLOOR)
    projected = jnp.einsum("bld,dt->blt", ours, kernel.astype(ours.dtype), preferred_element_type=jnp.float32)
    return jnp.mean(jnp.square(projected - theirs), axis=-1)


def _attention(layer: tuple[Array, Array]) -> Array:
    ours, theirs = layer
    return jnp.sum(theirs * (jnp.log(theirs + FLOOR) - jnp.log(ours + FLOOR)), axis=-1)
