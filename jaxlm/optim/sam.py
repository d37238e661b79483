"""Sharpness-aware minimisation as a transformation around a whole chain."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlm.optim.config import SamConfig
from jaxlm.params import axes
from jaxlm.types import Array, Tree

GradFn = Callable[[Tree], tuple[Array, Tree]]
"""params -> (loss, gradient) of the step's own batch, accumulated over its microbatches, with the step's own keys."""

TINY = 1e-12


class SamState(NamedTuple):
    """State of `sam`; holds no perturbed weights.

    Attributes:
      inner: state of the chain.
      sharpness: float32, L(w + e) - L(w) of the last perturbed step.
      steps: int32, steps done.
      direction: LookSAM's part of the second gradient that is orthogonal to the first; () where interval is 1.
    """

    inner: Any
    sharpness: Array
    steps: Array
    direction: Tree


def sam(chain: optax.GradientTransformation, config: SamConfig) -> optax.GradientTransformationExtraArgs:
    """Give `chain` the gradient at the worst point nearby instead of the gradient itself.

        e = rho g / ||g||                      (`sam`, 2010.01412, eq. 2)
        e = rho T^2 g / ||T g||, T = |w| + eta (`asam`, 2102.11600)
        w <- w + chain(grad L(w + e), w)

    `chain` sees w and the second gradient: clipping, moments, decay and schedule all belong inside. Norms are over all
    leaves that are passed, so over the trained ones. The second pass has the batch and the keys of the first. With
    `interval` k > 1 (LookSAM), steps in between use g + look_weight ||g|| / ||v|| v, where v is the part of the last
    second gradient orthogonal to its first. A second gradient that is not finite is replaced by the first.

    `update(g, state, params, grad_fn=..., value=...)`:
      grad_fn: see `GradFn`.
      value: L(params), as already computed with g. Without it the loss is computed once more.

    Args:
      chain: the optimizer, up to the final sign.
      config: see `SamConfig`; `granularity` is not read here.
    """
    chain = optax.with_extra_args_support(chain)

    def init(params: Tree) -> SamState:
        direction = optax.tree.zeros_like(params) if config.interval > 1 else ()
        return SamState(chain.init(params), jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32), direction)

    def update(
        grads: Tree,
        state: SamState,
        params: Tree | None = None,
        *,
        grad_fn: GradFn | None = None,
        value: Array | None = None,
        **extra: Any,
    ) -> tuple[Tree, SamState]:
        if params is None or grad_fn is None:
            raise ValueError("sam: update needs params and grad_fn, the gradient of the step's batch; pass both")
        loss = grad_fn(params)[0] if value is None else value

        def ascend() -> tuple[Tree, Array, Tree]:
            second, higher = _second_gradient(grads, params, grad_fn, config)
            direction = _orthogonal(second, grads) if config.interval > 1 else ()
            return second, jnp.asarray(higher - loss, jnp.float32), direction

        def reuse() -> tuple[Tree, Array, Tree]:
            length = optax.tree.norm(state.direction)
            scale = config.look_weight * optax.tree.norm(grads) / jnp.where(length > 0, length, 1.0)
            return optax.tree.add_scale(grads, scale, state.direction), state.sharpness, state.direction

        if config.interval > 1:
            second, sharpness, direction = jax.lax.cond(state.steps % config.interval == 0, ascend, reuse)
        else:
            second, sharpness, direction = ascend()
        updates, inner = chain.update(second, state.inner, params, **extra)
        return updates, SamState(inner, sharpness, state.steps + 1, direction)

    return optax.GradientTransformationExtraArgs(init, update)


def perturbation(grads: Tree, params: Tree, config: SamConfig) -> Tree:
    """The step e of length rho uphill, in the gradients' dtypes; 0 where all gradients are 0.

    Args:
      grads: gradient at `params`; of any scale, for e does not depend on it.
      params: the trained leaves.
      config: rho and variant.
    """
    if config.variant == "sam":
        scale = config.rho / (optax.tree.norm(grads) + TINY)
        return optax.tree.scale(scale, grads)
    sizes = _sizes(params, config)
    scaled = optax.tree.mul(sizes, grads)
    scale = config.rho / (optax.tree.norm(scaled) + TINY)
    return optax.tree.scale(scale, optax.tree.mul(sizes, scaled))


def per_microbatch(value_and_grad: Callable[..., Any], config: SamConfig) -> Callable[..., Any]:
    """The same function with each microbatch's gradient taken at its own perturbed point (m-sharpness).

    For `granularity: micro`, where the chain itself is not wrapped. Contributions of microbatches still add up.

    Args:
      value_and_grad: (params, ...) -> ((loss, metrics), gradient), metrics a dict.
      config: see `SamConfig`.

    Returns:
      A function of the same signature: loss and metrics of the first pass, the gradient of the second, and the
      metric `sam/sharpness`.
    """

    def perturbed(params: Tree, *args: Any) -> tuple[tuple[Array, dict[str, Array]], Tree]:
        (loss, metrics), grads = value_and_grad(params, *args)

        def grad_fn(at: Tree) -> tuple[Array, Tree]:
            (higher, _), second = value_and_grad(at, *args)
            return higher, second

        second, higher = _second_gradient(grads, params, grad_fn, config)
        return (loss, metrics | {"sam/sharpness": jnp.asarray(higher - loss, jnp.float32)}), second

    return perturbed


def metrics(state: Any) -> dict[str, Array]:
    """`sam/sharpness` where the optimizer state has one, else nothing."""
    found = [s for s in jax.tree.leaves(state, is_leaf=_is_state) if _is_state(s)]
    return {"sam/sharpness": found[0].sharpness} if found else {}


def _second_gradient(grads: Tree, params: Tree, grad_fn: GradFn, config: SamConfig) -> tuple[Tree, Array]:
    """The gradient at the perturbed point, and the loss there."""
    e = perturbation(grads, params, config)
    higher, second = grad_fn(jax.tree.map(lambda w, d: (w + d).astype(w.dtype), params, e))
    finite = jnp.isfinite(optax.tree.norm(second))
    return jax.tree.map(lambda a, b: jnp.where(finite, a, b), second, grads), higher


def _orthogonal(second: Tree, grads: Tree) -> Tree:
    along = optax.tree.vdot(second, grads) / (optax.tree.vdot(grads, grads) + TINY**2)
    return optax.tree.add_scale(second, -along, grads)


def _sizes(params: Tree, config: SamConfig) -> Tree:
    """T of ASAM."""
    if config.bias == "scaled":
        return jax.tree.map(lambda w: jnp.abs(w) + config.eta, params)
    return axes.map_roles(lambda path, w, role: jnp.ones_like(w) if role.rank == 1 else jnp.abs(w) + config.eta, params)


def _is_state(node: Any) -> bool:
    return isinstance(node, SamState)
