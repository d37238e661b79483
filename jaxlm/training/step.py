"""The one training step: gradient of any objective, accumulated in float32, guarded, applied."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlm.dist.place import microbatches
from jaxlm.optim import sam as sharpness
from jaxlm.optim.config import SamConfig
from jaxlm.types import Apply, Array, Batch, Objective, Tree, Variables

Metrics = dict[str, Array]


class State(NamedTuple):
    """Everything that a step changes; a plain pytree.

    Attributes:
      step: int32, steps taken, skipped ones included; with the seed it determines data order and randomness.
      applied: int32, updates applied; the position on the learning-rate schedule.
      params: the trained trees by collection, float32.
      opt_state: of the optimiser chain.
      ema: exponential moving average of params, or None.
      extra: collections that a step changes without a gradient (`moe_state`).
    """

    step: Array
    applied: Array
    params: Variables
    opt_state: Tree
    ema: Variables | None
    extra: Variables


class Extra(NamedTuple):
    """What a step changes without a gradient.

    Attributes:
      start: the collections before the first step.
      adjust: `(collections, metrics of the whole batch) -> (new collections, metrics to be kept)`.
    """

    start: Callable[[], Variables]
    adjust: Callable[[Variables, Metrics], tuple[Variables, Metrics]]


class Recipe(NamedTuple):
    """What a step is made of, all static.

    Attributes:
      objective: what is minimised.
      apply: the model.
      optimizer: an Optax chain; it may take `grad_fn` (SAM).
      schedule: applied updates -> learning rate, for the metrics.
      accumulation: microbatches a step.
      ema: decay of the moving average, or None.
      seed: of all randomness.
      sam: for perturbations of single microbatches, which are made here; those of the batch are in the chain.
      passes: updates on the same batch within a step; metrics are means over them.
      extra: of `State.extra`, or None.
    """

    objective: Objective
    apply: Apply
    optimizer: optax.GradientTransformationExtraArgs
    schedule: Callable[[Array], Array]
    accumulation: int = 1
    ema: float | None = None
    seed: int = 0
    sam: SamConfig | None = None
    passes: int = 1
    extra: Extra | None = None


def init_state(recipe: Recipe, params: Variables) -> State:
    """The state before the first step; pure, so it can be built under `jit(out_shardings=...)`."""
    zero = jnp.zeros((), jnp.int32)
    ema = None if recipe.ema is None else jax.tree.map(jnp.copy, params)
    extra = {} if recipe.extra is None else recipe.extra.start()
    return State(zero, zero, params, recipe.optimizer.init(params), ema, extra)


def train_step(recipe: Recipe, state: State, frozen: Variables, batch: Batch) -> tuple[State, Metrics]:
    """One optimiser step on one global batch.

    The weights of the whole batch are found first; every microbatch then contributes its share, and shares add up to
    the gradient of the one batch. A step whose loss or gradient is not finite changes nothing but the step count.

    Args:
      recipe: static parts; close over it before `jax.jit`.
      state: see `State`; donate it.
      frozen: trees that are used but not trained.
      batch: arrays [B, ...]; B is a multiple of `recipe.accumulation`.

    Returns:
      The new state, and scalars: loss, grad_norm (before clipping), learning_rate, skipped (0 or 1), step_tokens, and
      those of the objective. They belong to the parameters before the update.
    """
    key = jax.random.fold_in(jax.random.key(recipe.seed), state.step)
    known = {**frozen, **state.extra}
    batch = jax.lax.stop_gradient(recipe.objective.prepare(recipe.apply, state.params, known, batch, key))
    if recipe.passes == 1:
        state, metrics = update(recipe, state, frozen, batch, key)
    else:

        def one(state: State, index: Array) -> tuple[State, Metrics]:
            return update(recipe, state, frozen, batch, jax.random.fold_in(key, index))

        state, stacked = jax.lax.scan(one, state, jnp.arange(recipe.passes))
        metrics = jax.tree.map(lambda x: jnp.mean(x, axis=0), stacked)
    return state._replace(step=state.step + 1), metrics | {"step_tokens": input_tokens(batch)}


def update(recipe: Recipe, state: State, frozen: Variables, batch: Batch, key: Array) -> tuple[State, Metrics]:
    """One update on a prepared batch; the state's `step` stays. Arguments and metrics as in `train_step`."""
    gradient = accumulated(recipe, {**frozen, **state.extra}, batch, key)
    loss, metrics, grads = gradient(state.params)
    norm = optax.tree.norm(grads)

    def grad_fn(params: Variables) -> tuple[Array, Variables]:
        value, _, grads = gradient(params)
        return value, grads

    updates, opt_state = recipe.optimizer.update(grads, state.opt_state, state.params, grad_fn=grad_fn, value=loss)
    new = state._replace(
        applied=state.applied + 1, params=optax.apply_updates(state.params, updates), opt_state=opt_state
    )
    if recipe.ema is not None:
        new = new._replace(ema=optax.incremental_update(new.params, state.ema, 1.0 - recipe.ema))
    if recipe.extra is not None:
        extra, metrics = recipe.extra.adjust(state.extra, metrics)
        new = new._replace(extra=extra)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
    metrics |= sharpness.metrics(opt_state)
    metrics |= {
        "loss": loss,
        "grad_norm": norm,
        "learning_rate": recipe.schedule(state.applied),
        "skipped": 1.0 - finite.astype(jnp.float32),
    }
    return new, metrics


def input_tokens(batch: Batch) -> Array:
    """Tokens of the batch that are no padding: entries other than 0 in its columns of segment ids; int32."""
    columns = [jnp.count_nonzero(x) for name, x in batch.items() if name.endswith("segments")]
    return sum(columns, jnp.zeros((), jnp.int32))


def accumulated(
    recipe: Recipe, frozen: Variables, batch: Batch, key: Array
) -> Callable[[Variables], tuple[Array, Metrics, Variables]]:
    """params -> (loss, metrics, gradient) of the whole batch, made of `recipe.accumulation` microbatches in turn."""
    weights = recipe.objective.weights(batch)

    def one(params: Variables, rows: Batch, key: Array) -> tuple[Array, Metrics, Variables]:
        def loss(params: Variables) -> tuple[Array, Metrics]:
            return recipe.objective.loss(recipe.apply, params, frozen, rows, weights, key)

        value_and_grad = jax.value_and_grad(loss, has_aux=True)
        if recipe.sam is not None and recipe.sam.granularity == "micro":
            value_and_grad = sharpness.per_microbatch(value_and_grad, recipe.sam)
        (value, metrics), grads = value_and_grad(params)
        return value, metrics, grads

    if recipe.accumulation == 1:
        return lambda params: one(params, batch, key)
    parts = microbatches(batch, recipe.accumulation)

    def every(params: Variables) -> tuple[Array, Metrics, Variables]:
        def body(total: Tree, part: tuple[Batch, Array]) -> tuple[Tree, None]:
            rows, index = part
            return _added(total, one(params, rows, jax.random.fold_in(key, index))), None

        first = jax.tree.map(lambda x: x[0], parts)
        nothing = _nothing(jax.eval_shape(one, params, first, key))
        return jax.lax.scan(body, nothing, (parts, jnp.arange(recipe.accumulation)))[0]

    return every


Parts = tuple[Array, Metrics, Variables]


def _extreme(name: str) -> str:
    """`min_` or `max_` where a metric is no sum."""
    last = name.rpartition("/")[2]
    return last[:4] if last[:4] in ("min_", "max_") else ""


def _nothing(like: Parts) -> Parts:
    """What microbatches are added to: loss, metrics and gradient of no rows."""
    loss, metrics, grads = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    start = {"": 0.0, "min_": jnp.inf, "max_": -jnp.inf}
    return loss, {name: value + start[_extreme(name)] for name, value in metrics.items()}, grads


def combine(name: str, total: Any, part: Any) -> Any:
    """A metric of rows and of further rows together: their sum, or the extreme of them."""
    return {"": jnp.add, "min_": jnp.minimum, "max_": jnp.maximum}[_extreme(name)](total, part)


def _added(total: Parts, part: Parts) -> Parts:
    metrics = {name: combine(name, value, part[1][name]) for name, value in total[1].items()}
    return total[0] + part[0], metrics, jax.tree.map(jnp.add, total[2], part[2])
