"""Merging of models: one tensor from the same tensor of several, or a whole tree from several trees.

Definitions, defaults and order of operations are those of mergekit 0.1.5, so that its recipes give its numbers. Every
operation rounds to the dtype of the inputs, as there, so these functions are made to be called outside of jit.
"""

import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm import tree
from jaxlm.params import axes
from jaxlm.types import Array, Tree

Values = Mapping[str, Any]

COLLINEAR = 0.9995
"""Cosine beyond which `slerp` interpolates linearly."""
SMALL_NORM = 1e-8
SMALL_WEIGHT = 1e-8
SMALL_SUM = 1e-7
"""Sums of magnitudes below this are not rescaled."""
REQUIRED: Any = object()
"""Stands for the default of a parameter that has none."""


class Parts(NamedTuple):
    """What a method merges, for one tensor.

    Attributes:
      base: the base model's tensor; None where the method has no use for one.
      others: those of the other models (of all models without a base), equal in shape and dtype.
      shared: parameters of the whole merge. each: parameters of each of `others`.
      key: randomness of this tensor.
    """

    base: Array | None
    others: Sequence[Array]
    shared: Values
    each: Sequence[Values]
    key: Array


class Method(NamedTuple):
    """A way of merging, and what it asks for.

    Attributes:
      merge: the tensor of the result.
      shared: names and defaults of the parameters of the whole merge; REQUIRED where there is no default.
      each: the same of the parameters of each model.
      base: whether it needs a base model, which then has no parameters of its own.
      least, most: number of models, the base included.
    """

    merge: Callable[[Parts], Array]
    shared: Values
    each: Values
    base: bool
    least: int = 1
    most: int | None = None


def linear(tensors: Sequence[Array], weights: Sequence[float], *, normalize: bool = True) -> Array:
    """`sum_m w_m x_m`, divided by `sum_m w_m` if normalised; summed in float32 (model soups, 2203.05482).

    Args:
      tensors: of equal shape and dtype. weights: one each.

    Raises:
      ValueError: normalised weights that add up to 0.
    """
    dtype = tensors[0].dtype
    wide = _wide(dtype)
    whole = sum(map(wide.type, weights), wide.type(0)) if normalize else wide.type(1)
    if not whole:
        raise ValueError("weight: adds up to 0 over the models; change one, or set normalize to false")
    total = jnp.zeros(tensors[0].shape, wide)
    for x, weight in zip(tensors, weights, strict=True):
        total = _add_scaled(total, x, wide.type(weight))
    return (total / whole).astype(dtype)


def slerp(base: Array, other: Array, t: float) -> Array:
    """`sin((1 - t) a) / sin(a) * base + sin(t a) / sin(a) * other`, a the angle between the flattened tensors.

    The angle is that of the directions, but it is the tensors themselves that are mixed. Where they are all but
    parallel (|cos a| > 0.9995), `(1 - t) * base + t * other`.
    """
    wide = _wide(base.dtype)
    v0, v1, t = base.astype(wide), other.astype(wide), wide.type(t)
    cosine = jnp.clip(_sum(_direction(v0) * _direction(v1)), -1, 1)
    straight = jnp.abs(cosine) > COLLINEAR
    angle = jnp.arccos(jnp.where(straight, 0, cosine))
    first = jnp.where(straight, 1 - t, jnp.sin((1 - t) * angle) / jnp.sin(angle))
    second = jnp.where(straight, t, jnp.sin(t * angle) / jnp.sin(angle))
    return (first * v0 + second * v1).astype(base.dtype)


def add_task_vectors(
    base: Array, deltas: Sequence[Array], weights: Sequence[float], *, elect: bool, normalize: bool, factor: float
) -> Array:
    """`base + factor * sum_m w_m d_m` (task arithmetic, 2212.04089), or the TIES merge of the d_m (2306.01708).

    Args:
      base: the base model's tensor. deltas: differences of the others from it. weights: w_m.
      elect: whether each entry takes only the `w_m d_m` whose sign is that of their sum, 0 counting as positive.
      normalize: whether the sum is divided by that of the weights that went into it, where this is not 0.
      factor: mergekit's lambda.
    """
    dtype = base.dtype
    shape = (len(deltas),) + (1,) * base.ndim
    w = jnp.asarray(weights, dtype).reshape(shape)
    weighted = jnp.stack(deltas) * w
    if elect:
        elected = jnp.where(jnp.sum(weighted, axis=0) >= 0, 1, -1).astype(dtype)
        agrees = (jnp.sign(weighted) == elected[None]).astype(dtype)
        weighted = weighted * agrees
        divisor = jnp.sum(w * agrees, axis=0)
        divisor = jnp.where(divisor == 0, 1, divisor)
    else:
        divisor = jnp.sum(w, axis=0)
        divisor = jnp.broadcast_to(jnp.where(jnp.abs(divisor) < SMALL_WEIGHT, 1, divisor), base.shape)
    mixed = jnp.sum(weighted, axis=0)
    if normalize:
        mixed = mixed / divisor
    if factor != 1:
        mixed = scaled(mixed, factor)
    return base + mixed


def keep_largest(delta: Array, density: float, *, rescale: bool = False) -> Array:
    """`delta` with all but the `max(1, int(density * size))` entries of largest magnitude set to 0.

    Among equal magnitudes the first in row-major order stay. `rescale` multiplies what is left to the former sum of
    magnitudes.
    """
    if density >= 1:
        return delta
    if density <= 0 or not delta.size:
        return jnp.zeros_like(delta)
    return _masked(delta, largest(delta, max(1, int(density * delta.size))), rescale)


def keep_random(delta: Array, density: float, key: Array, *, rescale: bool = True) -> Array:
    """DARE (2311.03099): each entry of `delta` stays with probability `density`, independently.

    `rescale` multiplies what is left to the former sum of magnitudes, as mergekit does, so by about `1 / density`, the
    paper's factor, in large tensors, and by another in small ones.
    """
    if density >= 1:
        return delta
    return _masked(delta, jax.random.bernoulli(key, max(density, 0.0), delta.shape), rescale)


def keep_middle(delta: Array, density: float, gamma: float, *, rescale: bool = False) -> Array:
    """Model breadcrumbs (2312.06795): without the `gamma` largest, `density` of the entries from there on downwards.

    Fewer of the largest are taken away where `density + gamma` exceeds 1.
    """
    if density >= 1:
        return delta
    count, top = int(density * delta.size), int(gamma * delta.size)
    lowest = max(0, delta.size - count - top)
    above = largest(delta, delta.size - lowest - count, last=True)
    return _masked(delta, largest(delta, delta.size - lowest, last=True) & ~above, rescale)


def scaled(x: Array, factor: float) -> Array:
    """`factor * x` in x's dtype, the factor not rounded to it."""
    wide = _wide(x.dtype)
    return (x.astype(wide) * wide.type(factor)).astype(x.dtype)


@functools.partial(jax.jit, static_argnames="last")
def largest(x: Array, count: int | Array, *, last: bool = False) -> Array:
    """Where the `count` largest magnitudes of x are; among equals the first (`last`: the last) in row-major order.

    Non-negative floats are ordered as their bits are, so the smallest magnitude that stays is found bit by bit, by
    counting: exact, without a sort, and `x` may be spread over devices.
    """
    bits = jax.lax.bitcast_convert_type(jnp.abs(x).astype(jnp.float32), jnp.uint32).reshape(-1)
    least = _bisect(lambda value: jnp.sum(bits >= value) >= count, 31)
    equal = bits == least
    missing = count - jnp.sum(bits > least)

    def first(_: None) -> Array:
        places = jax.lax.iota(jnp.uint32, bits.size)
        places = bits.size - 1 - places if last else places
        return places < _bisect(lambda place: jnp.sum(equal & (places < place)) <= missing, 32)

    chosen = jax.lax.cond(jnp.sum(equal) > missing, first, lambda _: jnp.ones_like(equal), None)
    return ((bits > least) | (equal & chosen)).reshape(x.shape)


def merge(method: str, tensors: Sequence[Array], base: int | None, shared: Values, each: Sequence[Values]) -> Array:
    """One tensor from several, by a method of METHODS.

    Args:
      method: its name.
      tensors: the same tensor of each model; different float dtypes are promoted.
      base: index of the base model's, for methods that need one.
      shared: parameters of the merge, and `key`, a JAX key, for random methods.
      each: parameters of each model, those of the base unread. What is absent has the method's default.

    Returns:
      The merged tensor, in the promoted dtype of the inputs.

    Raises:
      ValueError: an unknown method, a parameter without value, inputs that do not fit.
    """
    if method not in METHODS:
        raise ValueError(f"merge_method: {method!r} is unknown; the known ones are {', '.join(METHODS)}")
    chosen = METHODS[method]
    if len({x.shape for x in tensors}) > 1:
        raise ValueError(
            f"{method}: shapes {', '.join(str(list(x.shape)) for x in tensors)} differ; they must be equal"
        )
    if chosen.base and base is None:
        raise ValueError(f"base: {method} needs a base model; say which one it is")
    dtype = functools.reduce(jnp.promote_types, [x.dtype for x in tensors])
    arrays = [jnp.asarray(x, dtype) for x in tensors]
    apart = base if chosen.base else None
    others = [i for i in range(len(arrays)) if i != apart]
    return chosen.merge(
        Parts(
            None if apart is None else arrays[apart],
            [arrays[i] for i in others],
            _filled(method, chosen.shared, shared),
            [_filled(method, chosen.each, each[i]) for i in others],
            shared["key"] if "key" in shared else jax.random.key(0),
        )
    )


def merge_trees(method: str, trees: Sequence[Tree], base: int | None, shared: Values, each: Sequence[Values]) -> Tree:
    """`merge` of every leaf of trees with the same paths.

    Stacked layers and their experts are merged each by itself, as if they were separate tensors.

    [{"norm": {"scale": a}}, {"norm": {"scale": b}}]  ->  {"norm": {"scale": merged}}
    """
    leaves = [tree.leaves(one) for one in trees]
    for i, one in enumerate(leaves):
        if wrong := sorted(one.keys() ^ leaves[0].keys()):
            raise ValueError(f"trees[{i}]: {', '.join(wrong)} is not in all trees; they must have the same leaves")
    key = shared.get("key", jax.random.key(0))

    def leaf(path: str, first: Array, *rest: Array) -> Array:
        tensors = [jnp.asarray(x) for x in (first, *rest)]
        mine = jax.random.fold_in(key, zlib.crc32(path.encode()))
        front = first.ndim - roles[path].rank
        return _in_parts(method, tensors, base, dict(shared) | {"key": mine}, each, front)

    roles = axes.roles(trees[0])
    return tree.map_with_path(leaf, trees[0], *trees[1:])


def _in_parts(
    method: str, tensors: Sequence[Array], base: int | None, shared: Values, each: Sequence[Values], front: int
) -> Array:
    if front <= 0:
        return merge(method, tensors, base, shared, each)
    rows = []
    for i in range(tensors[0].shape[0]):
        mine = dict(shared) | {"key": jax.random.fold_in(shared["key"], i)}
        rows.append(_in_parts(method, [x[i] for x in tensors], base, mine, each, front - 1))
    return jnp.stack(rows)


def _filled(method: str, known: Values, given: Values) -> dict[str, Any]:
    values = {name: given.get(name, default) for name, default in known.items()}
    missing = [name for name, value in values.items() if value is REQUIRED]
    if missing:
        raise ValueError(f"{method}: {missing[0]} is missing; give it a value")
    return values


def _wide(dtype: Any) -> Any:
    """The dtype that sums are taken in."""
    return jnp.promote_types(dtype, jnp.float32)


@jax.jit
def _add_scaled(total: Array, x: Array, weight: Array) -> Array:
    """`total + weight * x`; compiled as one, so that CPUs add the product before it is rounded, as torch does."""
    return total + x.astype(total.dtype) * weight


def _sum(x: Array) -> Array:
    """The sum of all entries, rows first: one long chain of float32 additions loses digits."""
    return jnp.sum(jnp.sum(x, axis=-1)) if x.ndim else x


def _direction(x: Array) -> Array:
    norm = jnp.sqrt(_sum(jnp.square(x)))
    return x / jnp.where(norm > SMALL_NORM, norm, 1)


def _masked(delta: Array, mask: Array, rescale: bool) -> Array:
    kept = jnp.where(mask, delta, 0)
    if not rescale:
        return kept
    wide = _wide(delta.dtype)
    before = _sum(jnp.abs(delta).astype(wide)).astype(delta.dtype)
    after = _sum(jnp.abs(kept).astype(wide)).astype(delta.dtype)
    if before < SMALL_SUM or after < SMALL_SUM:
        return kept
    return kept * (before / after)


def _bisect(holds: Callable[[Array], Array], bits: int) -> Array:
    """The largest number of so many bits for which `holds`, which is true up to some number and false beyond."""

    def step(i: int, found: Array) -> Array:
        candidate = found | (jnp.uint32(1) << (bits - 1 - jnp.uint32(i)))
        return jnp.where(holds(candidate), candidate, found)

    return jax.lax.fori_loop(0, bits, step, jnp.uint32(0))


def _linear(parts: Parts) -> Array:
    return linear(parts.others, [one["weight"] for one in parts.each], normalize=parts.shared["normalize"])


def _slerp(parts: Parts) -> Array:
    assert parts.base is not None
    return slerp(parts.base, parts.others[0], parts.shared["t"])


def _passthrough(parts: Parts) -> Array:
    scale = parts.each[0]["scale"]
    return parts.others[0] if scale is None else scaled(parts.others[0], scale)


def _task_vectors(parts: Parts, thin: Callable[..., Array], elect: bool) -> Array:
    if parts.base is None or not parts.others:
        assert parts.base is not None
        return parts.base
    deltas = [
        thin(x - parts.base, one, jax.random.fold_in(parts.key, i), parts.shared["rescale"])
        for i, (x, one) in enumerate(zip(parts.others, parts.each, strict=True))
    ]
    weights = [one["weight"] for one in parts.each]
    normalize, factor = parts.shared["normalize"], parts.shared["lambda"]
    return add_task_vectors(parts.base, deltas, weights, elect=elect, normalize=normalize, factor=factor)


def _all(delta: Array, _one: Values, _key: Array, _rescale: bool) -> Array:
    return delta


def _largest(delta: Array, one: Values, _key: Array, rescale: bool) -> Array:
    return keep_largest(delta, one["density"], rescale=rescale)


def _random(delta: Array, one: Values, key: Array, rescale: bool) -> Array:
    return keep_random(delta, one["density"], key, rescale=rescale)


def _middle(delta: Array, one: Values, _key: Array, rescale: bool) -> Array:
    return keep_middle(delta, one["density"], one["gamma"], rescale=rescale)


def _by_task_vectors(
    thin: Callable[..., Array], *, elect: bool, normalize: bool = False, rescale: bool = False, **each: float
) -> Method:
    return Method(
        functools.partial(_task_vectors, thin=thin, elect=elect),
        shared={"normalize": normalize, "rescale": rescale, "lambda": 1.0, "int8_mask": False},
        each={"weight": REQUIRED, "density": 1.0, **each},
        base=True,
    )


METHODS: dict[str, Method] = {
    "linear": Method(_linear, {"normalize": True}, {"weight": REQUIRED}, base=False),
    "slerp": Method(_slerp, {"t": REQUIRED}, {}, base=True, least=2, most=2),
    "task_arithmetic": _by_task_vectors(_all, elect=False),
    "ties": _by_task_vectors(_largest, elect=True, normalize=True),
    "dare_linear": _by_task_vectors(_random, elect=False, rescale=True),
    "dare_ties": _by_task_vectors(_random, elect=True, rescale=True),
    "breadcrumbs": _by_task_vectors(_middle, elect=False, gamma=0.01),
    "breadcrumbs_ties": _by_task_vectors(_middle, elect=True, gamma=0.01),
    "passthrough": Method(_passthrough, {}, {"scale": None}, base=False, most=1),
}
"""Methods by mergekit's names."""
