"""Cutting the operands of attention into tiles: how large they are, where they lie, what of the mask they need."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.nn.kernels import masks
from jaxlm.nn.kernels.masks import AttentionMask, Side
from jaxlm.types import Array

BLOCKS = {"cpu": (128, 256), "gpu": (512, 512), "tpu": (512, 512)}
"""Longest tile sides per platform: for short ranges of keys, where narrow tiles waste less beyond the mask's edge, and
for long ones. CPU's are measured: 128 against 256 saves 15 % at 256 keys, 10 % at 512, nothing at 1024."""

SHORT = 512
"""Up to this many keys, or this wide a window, the range of keys is short."""

DECODE = (16, 128)
"""Up to so many queries, reading the keys is what costs; tile side of the keys then."""

TILE = 4 * 256 * 256
"""Most scores of a tile, all heads together, where one CPU device computes one tile after the other: 1 MiB in float32,
which stays in a core's cache. Tiles of 24 and 48 heads of 256 x 256 cost 20 and 45 % more time per score."""


class Form(NamedTuple):
    """Static settings of a call.

    Attributes:
      scale, softcap: of the scores.
      blocks: tile sides of queries and keys.
      slots: rows of the batch and key heads that a tile spans.
    """

    scale: float
    softcap: float | None
    blocks: tuple[int, int]
    slots: tuple[int, int]


def form_of(q: Array, k: Array, mask: AttentionMask, scale: float, softcap: float | None) -> Form:
    """The settings for operands of these shapes.

    Raises:
      ValueError: a scale or cap that is not positive.
    """
    for name, value in (("scale", scale), ("softcap", softcap)):
        if value is not None and not value > 0.0:
            raise ValueError(f"attention: {name} {value} is not positive; use e.g. head_dim ** -0.5; no cap is null")
    (batch, n_queries, heads, width), (_, n_keys, groups, _) = q.shape, k.shape
    short, long = BLOCKS.get(jax.default_backend(), BLOCKS["gpu"])
    reach = min(n_keys, mask.window or n_keys)
    side = short if reach <= SHORT and (mask.causal or mask.window) else long
    blocks = (_block(n_queries, side), _block(n_keys, DECODE[1] if n_queries <= DECODE[0] else side))
    slots = (batch, groups)
    if one_cpu_device() and n_queries > DECODE[0]:
        room = max(1, TILE // (max(blocks[0] * (heads // groups), width) * blocks[1]))
        fit = _largest_divisor(groups, room)
        slots = (_largest_divisor(batch, room // groups) if fit == groups else 1, fit)
    return Form(float(scale), softcap, blocks, slots)


def _block(length: int, most: int) -> int:
    """The tile side that splits `length` evenly into the fewest tiles of at most `most`, a multiple of 8 if it can."""
    tiles = -(-length // most)
    return min(length, -(-math.ceil(length / tiles) // 8) * 8)


def _largest_divisor(number: int, most: int) -> int:
    return max(d for d in range(1, number + 1) if number % d == 0 and d <= max(1, most))


def one_cpu_device() -> bool:
    """Whether the program is for a single CPU device, where cutting and laying out anew moves nothing elsewhere."""
    mesh = jax.sharding.get_abstract_mesh()
    devices = jax.device_count() if mesh.empty else mesh.size
    return devices == 1 and jax.default_backend() == "cpu"


class Spot(NamedTuple):
    """Where a tile's slots begin: row of the batch, key head."""

    b: Array | int
    g: Array | int


class Operands(NamedTuple):
    """Operands and mask, cut into tiles on demand.

    The last tile of an axis that is no multiple of the block begins earlier, so that it ends with the axis;
    `Side.fresh` tells what it repeats.

    Attributes:
      form: static settings.
      q: [B, L, H, K]. k, v: [B, S, G, K]; as `stored`.
      k_T: [B, G, K, S], as `stored`, transposed once rather than in each visit; null if each tile is visited once.
      dtype: of `q`, and of every tile.
      mask: complete, with offsets [B].
      start, stop: int32 [B / rows, I]: the range of tiles of keys that the rows of a slot need.
    """

    form: Form
    q: Array
    k: Array
    v: Array
    k_T: Array | None
    mask: AttentionMask
    start: Array
    stop: Array
    dtype: jnp.dtype

    @classmethod
    def of(cls, form: Form, q: Array, k: Array, v: Array, mask: AttentionMask) -> "Operands":
        needed = masks.needed_BxIxJ(mask, (q.shape[0], q.shape[1], k.shape[1]), form.blocks)
        needed = jnp.any(needed.reshape(-1, form.slots[0], *needed.shape[1:]), axis=1)
        start, stop = masks.bounds(needed)
        offset = masks.offset_B(mask, q.shape[0])
        mask = AttentionMask(mask.causal, mask.window, mask.segments_BxL, mask.segments_BxS, offset)
        dtype = q.dtype
        q, k, v = (stored(x.astype(dtype)) for x in (q, k, v))
        k_T = jnp.transpose(k, (0, 2, 3, 1)) if start.shape[1] > 1 else None
        return cls(form, q, k, v, k_T, mask, start, stop, dtype)

    @property
    def repeats(self) -> int:
        """R, query heads for each key head."""
        return self.q.shape[2] // self.k.shape[2]

    @property
    def rows_of_tiles(self) -> int:
        """How many tiles of queries there are, over all slots."""
        return self.start.size * (self.k.shape[2] // self.form.slots[1])

    def row_of_tiles(self, index: Array) -> tuple[Spot, Array, tuple[Array, Array]]:
        """The slots and tile of queries of that index, and the range of tiles of keys that it needs."""
        rows, groups = self.form.slots
        index, i = _divide(index, self.start.shape[1])
        b, g = _divide(index, self.k.shape[2] // groups)
        start, stop = (cut(x, (b, i), (1, 1))[0, 0] for x in (self.start, self.stop))
        spot = Spot(0 if rows == self.k.shape[0] else b * rows, 0 if groups == self.k.shape[2] else g * groups)
        return spot, i, (start, stop)

    def queries(self, x: Array, spot: Spot, i: Array) -> Array:
        """A tile of [B, L, H, K], as [b, g, R, l, K]."""
        return restored(_tile(x, self.form, spot, (i, self.form.blocks[0]), self.repeats), self.dtype)

    def keys(self, x: Array, spot: Spot, j: Array) -> Array:
        """A tile of [B, S, G, K], as [b, g, s, K]."""
        return restored(_tile(x, self.form, spot, (j, self.form.blocks[1]), 1)[:, :, 0], self.dtype)

    def keys_T(self, spot: Spot, j: Array) -> Array:
        """A tile of keys, transposed: [b, g, K, s]."""
        if self.k_T is None:
            return jnp.swapaxes(self.keys(self.k, spot, j), 2, 3)
        block = self.form.blocks[1]
        tile = cut(self.k_T, (spot.b, spot.g, 0, j * block), (*self.form.slots, self.k.shape[3], block))
        return restored(tile, self.dtype)

    def put_queries(self, whole: Array, tile: Array, spot: Spot, i: Array) -> Array:
        """The inverse of `queries`."""
        return _put(whole, stored(tile.astype(self.dtype)), spot, i * self.form.blocks[0])

    def add_to_queries(self, whole: Array, tile: Array, spot: Spot, i: Array) -> Array:
        """As `put_queries`, where a tile that has 0 in the rows that it repeats leaves them as they are."""
        if self.q.shape[1] % self.form.blocks[0]:
            tile = tile + self.queries(whole, spot, i)
        return self.put_queries(whole, tile, spot, i)

    def add_to_keys(self, whole: Array, tile: Array, spot: Spot, j: Array) -> Array:
        """Adds [b, g, s, K] to its place in [B, S, G, K], float32."""
        block = self.form.blocks[1]
        old = _tile(whole, self.form, spot, (j, block), 1)
        return _put(whole, old + tile[:, :, None], spot, j * block)

    def query_side(self, spot: Spot, i: Array) -> Side:
        """What the mask needs of a tile of queries; rank 2, [b, l]."""
        rows, block = self.form.slots[0], self.form.blocks[0]
        side = _side(self.mask.segments_BxL, (spot, rows), (i, block), self.q.shape[1])
        offset = cut(self.mask.q_offset, (spot.b,), (rows,))[:, None]
        return side._replace(position=side.position + offset)

    def key_side(self, spot: Spot, j: Array) -> Side:
        """What the mask needs of a tile of keys; rank 2, [b, s]."""
        return _side(self.mask.segments_BxS, (spot, self.form.slots[0]), (j, self.form.blocks[1]), self.k.shape[1])


def stored(x: Array) -> Array:
    """How arrays are kept between visits: on CPU, 16-bit floats as their bits.

    XLA's CPU compiler computes slices, updates and sends of 16-bit floats in float32, and converts whole arrays for it.
    """
    if jax.default_backend() == "cpu" and x.dtype.itemsize == 2:
        return jax.lax.bitcast_convert_type(x, jnp.uint16)
    return x


def restored(x: Array, dtype: jnp.dtype) -> Array:
    """The inverse of `stored`."""
    return jax.lax.bitcast_convert_type(x, dtype) if x.dtype == jnp.uint16 else x


def _divide(index: Array, by: int) -> tuple[Array, Array]:
    by = jnp.asarray(by, jnp.int32)
    return jax.lax.div(index, by), jax.lax.rem(index, by)


def cut(x: Array, start: tuple[Array | int, ...], sizes: tuple[int, ...]) -> Array:
    """`dynamic_slice`, which moves a slice that would reach beyond the end back to the end."""
    return jax.lax.dynamic_slice(x, tuple(jnp.asarray(s, jnp.int32) for s in start), sizes)


def _tile(x: Array, form: Form, spot: Spot, at: tuple[Array, int], repeats: int) -> Array:
    (rows, groups), (index, block) = form.slots, at
    x = cut(x, (spot.b, index * block, spot.g * repeats, 0), (rows, block, groups * repeats, x.shape[3]))
    return jnp.transpose(x, (0, 2, 1, 3)).reshape(rows, groups, repeats, block, -1)


def _put(whole: Array, tile: Array, spot: Spot, start: Array) -> Array:
    rows, groups, repeats, block, width = tile.shape
    tile = jnp.transpose(tile.reshape(rows, groups * repeats, block, width), (0, 2, 1, 3))
    at = tuple(jnp.asarray(s, jnp.int32) for s in (spot.b, start, spot.g * repeats, 0))
    return jax.lax.dynamic_update_slice(whole, tile, at)


def _side(ids: Array | None, rows: tuple[Spot, int], at: tuple[Array, int], length: int) -> Side:
    (spot, count), (index, block) = rows, at
    start = jnp.minimum(index * block, length - block) if length % block else index * block
    position = (start + jnp.arange(block, dtype=jnp.int32))[None, :]
    fresh = position >= index * block if length % block else None
    return Side(position, None if ids is None else cut(ids, (spot.b, start), (count, block)), fresh)
