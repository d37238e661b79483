"""Checksums of a checkpoint: of every leaf's contents and of every file, kept beside them in `integrity.json`.

Orbax and tensorstore restore flipped weight bits without a word, and a damaged JSON file may still parse. So a step
directory carries two tables: one of files, which catches any change on disk, and one of leaves, which is end to end
(from the array that was saved to the array that was restored) and lets a message name the leaf.
"""

import concurrent.futures
import functools
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.dist import multihost

FILE = "integrity.json"

UNSEALED = frozenset({"_CHECKPOINT_METADATA", "commit_success.txt"})
"""Files that Orbax rewrites or adds at the top of a step after it is sealed; nothing is restored from them."""

GOLDEN, FIRST, SECOND = 0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35
"""2^32 / golden ratio, and the multipliers of MurmurHash3's finaliser (Appleby): odd, so that multiplying is
a bijection of uint32."""

CHUNK = 1 << 16
"""Elements hashed at a time on the host: their buffers stay in the cache."""

Leaves = Mapping[str, Any]


class Damaged(ValueError):
    """What a step directory holds is not what was saved; the text says which part."""


class Manifest(NamedTuple):
    """The contents of `integrity.json`.

    Attributes:
      leaves: path -> {"dtype": name, "shape": list, "checksum": uint32}.
      files: path within the step directory -> [bytes, crc32].
      metric: of the evaluation that belongs to the step, or None.
    """

    leaves: dict[str, dict[str, Any]]
    files: dict[str, list[int]]
    metric: float | None


def checksums(leaves: Leaves) -> list[int]:
    """One uint32 a leaf: sum over i of mix(bits_i ^ (i * GOLDEN)), modulo 2^32; i is the row-major position.

    `mix` is a bijection, so a change of one element always shows, and others with probability 1 - 2^-32. Being a sum,
    it does not depend on how a leaf is cut into shards: each is hashed where it lies (in numpy on CPU, on the device
    otherwise), and a checkpoint can be verified on any mesh.

    Args:
      leaves: path -> jax.Array or numpy array; with several processes all of them must call.
    """
    with _threads() as pool:
        local = list(pool.map(lambda leaf: _host_sum(leaf) if _on_cpu(leaf) else None, leaves.values()))
    partial = np.array([value or 0 for value in local], np.uint32)
    partial = multihost.all_hosts(partial).sum(0, dtype=np.uint32)
    return [
        int(total) if value is not None else int(_device_sum(leaf))
        for value, total, leaf in zip(local, partial, leaves.values(), strict=True)
    ]


def describe(leaves: Leaves) -> dict[str, dict[str, Any]]:
    """The leaf table of a manifest."""
    return {
        path: {"dtype": np.dtype(leaf.dtype).name, "shape": list(leaf.shape), "checksum": checksum}
        for (path, leaf), checksum in zip(leaves.items(), checksums(leaves), strict=True)
    }


def differing(saved: Mapping[str, dict[str, Any]], leaves: Leaves) -> list[str]:
    """Paths of leaves whose contents are not those that were saved."""
    found = zip(leaves, checksums(leaves), strict=True)
    return [path for path, checksum in found if checksum != saved[path]["checksum"]]


def require_same_leaves(saved: Mapping[str, dict[str, Any]], abstract: Leaves) -> None:
    """Raise ValueError naming the first leaf of another shape or dtype, or one that only one side has."""
    for path, leaf in abstract.items():
        if path not in saved:
            raise ValueError(
                f"{path}: not in the checkpoint; it is of another model or optimizer, choose another run.dir"
            )
        before = f"{saved[path]['dtype']}{saved[path]['shape']}"
        now = f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
        if before != now:
            raise ValueError(
                f"{path}: {before} in the checkpoint, {now} now; it is of another model, choose another run.dir"
            )
    for path in saved:
        if path not in abstract:
            raise ValueError(
                f"{path}: in the checkpoint but not in this run; it is of another model or optimizer, "
                "choose another run.dir"
            )


def seal(root: Path, leaves: dict[str, dict[str, Any]], metric: float | None) -> None:
    """Write `integrity.json` into a step directory whose other files are complete."""
    found = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    names = [name for name in found if name not in UNSEALED]
    files = dict(zip(names, _digests(root, names), strict=True))
    body = {"leaves": leaves, "files": files, "metric": metric}
    with open(root / FILE, "w", encoding="utf-8") as file:
        json.dump({**body, "crc32": _own_checksum(body)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read(root: Path) -> Manifest:
    """The manifest of a step directory.

    Raises:
      Damaged: it is missing, or is not what was written.
    """
    try:
        body = json.loads((root / FILE).read_bytes())
        expected = body.pop("crc32")
        if expected != _own_checksum(body):
            raise Damaged(f"{FILE}: contents changed")
        return Manifest(**body)
    except FileNotFoundError:
        raise Damaged(f"{FILE}: missing") from None
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise error if isinstance(error, Damaged) else Damaged(f"{FILE}: contents changed") from None


def damaged_files(root: Path, files: Mapping[str, list[int]]) -> dict[str, str]:
    """Files that are not as they were sealed: path -> "missing" | "truncated" | "contents changed".

    With several processes each reads its share, and each returns what any of them found.
    """
    count = jax.process_count()
    share = list(files)[jax.process_index() :: count]
    states = np.zeros(len(files), np.uint8)
    for position, (name, digest) in enumerate(zip(share, _digests(root, share), strict=True)):
        if digest is None or digest[0] != files[name][0]:
            state = 1 if digest is None else 2
        else:
            state = 3 if digest[1] != files[name][1] else 0
        states[jax.process_index() + position * count] = state
    states = multihost.all_hosts(states).max(0)
    words = ("", "missing", "truncated", "contents changed")
    return {name: words[state] for name, state in zip(files, states, strict=True) if state}


def _threads() -> concurrent.futures.ThreadPoolExecutor:
    """For numpy and zlib, which both let go of the interpreter lock."""
    return concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1))


def _own_checksum(body: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def _digests(root: Path, names: list[str]) -> list[list[int] | None]:
    """[bytes, crc32] of each file, None where it cannot be read."""
    with _threads() as pool:
        return list(pool.map(lambda name: _digest(root / name), names))


def _digest(path: Path) -> list[int] | None:
    crc, size = 0, 0
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                crc, size = zlib.crc32(block, crc), size + len(block)
    except OSError:
        return None
    return [size, crc]


def _on_cpu(leaf: Any) -> bool:
    if not isinstance(leaf, jax.Array):
        return True
    devices: set[Any] = leaf.sharding.device_set
    return all(device.platform == "cpu" for device in devices)


def _host_sum(leaf: Any) -> int:
    """This process's part of a leaf's checksum."""
    if not isinstance(leaf, jax.Array):
        return _block_sum(np.asarray(leaf), (0,) * np.ndim(leaf), np.shape(leaf)) if multihost.is_main() else 0
    if leaf.is_fully_addressable and not multihost.is_main():
        return 0  # every process holds all of it; it counts once
    total = 0
    for shard in leaf.addressable_shards:
        if shard.replica_id == 0:
            start = tuple(axis.start or 0 for axis in shard.index)
            total += _block_sum(np.asarray(shard.data), start, leaf.shape)
    return total % 2**32


def _block_sum(block: np.ndarray, start: tuple[int, ...], shape: tuple[int, ...]) -> int:
    """The terms of one block, which lies at `start` within a leaf of `shape`."""
    block = np.ascontiguousarray(np.atleast_1d(block))
    start, shape = start or (0,), shape or (1,)
    words = max(1, block.dtype.itemsize // 4)
    bits = block.view({1: np.uint8, 2: np.uint16}.get(block.dtype.itemsize, np.uint32))
    rows = np.zeros((1,), np.uint32)
    for axis, size in enumerate(bits.shape[:-1]):
        along = np.arange(start[axis], start[axis] + size, dtype=np.uint32)
        rows = (rows[:, None] * np.uint32(shape[axis]) + along).ravel()
    rows = rows * np.uint32(shape[-1] * words % 2**32) * np.uint32(GOLDEN)
    first, width = start[-1] * words, bits.shape[-1]
    columns = np.arange(first, first + width, dtype=np.uint32) * np.uint32(GOLDEN)
    bits = bits.reshape(rows.size, width)
    step = max(1, CHUNK // max(1, width))
    total = 0
    for row in range(0, rows.size, step):
        for column in range(0, width, CHUNK):
            here = np.s_[row : row + step, column : column + CHUNK]
            x = rows[here[0], None] + columns[here[1]]
            x ^= bits[here]
            x *= np.uint32(FIRST)
            x ^= x >> 15
            x *= np.uint32(SECOND)
            x ^= x >> 13
            total += int(x.sum(dtype=np.uint64))
    return total % 2**32


def _device_sum(leaf: jax.Array) -> jax.Array:
    sharding = leaf.sharding
    everywhere = NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else None
    return _device_program(everywhere)(leaf)


@functools.cache
def _device_program(out: NamedSharding | None) -> Any:
    return jax.jit(_traced_sum, out_shardings=out)


def _traced_sum(leaf: jax.Array) -> jax.Array:
    size = leaf.dtype.itemsize
    leaf = leaf.astype(jnp.uint8) if leaf.dtype == jnp.bool_ else leaf
    bits = lax.bitcast_convert_type(leaf, {1: jnp.uint8, 2: jnp.uint16}.get(size, jnp.uint32)).astype(jnp.uint32)
    position, stride = jnp.zeros(bits.shape, jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):
        position += lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * np.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    x = bits ^ (position * np.uint32(GOLDEN))
    x = x * np.uint32(FIRST)
    x = x ^ (x >> 15)
    x = x * np.uint32(SECOND)
    x = x ^ (x >> 13)
    return jnp.sum(x, dtype=jnp.uint32)
