"""Reading a step back through Orbax, verified, with errors of one line."""

import contextlib
import gc
import json
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jaxlm import tree
from jaxlm.dist import multihost
from jaxlm.training import integrity, meta
from jaxlm.training.integrity import Damaged, Manifest
from jaxlm.types import Tree

CAUSES = (
    "no space left on device", "file too large", "read-only file system", "permission denied", "not a directory",
    "disk quota exceeded", "input/output error",
)  # fmt: skip
"""What the operating system says, somewhere within pages of tensorstore's own words."""


def handler() -> ocp.CompositeCheckpointHandler:
    """How the items of a step are written and read: uncompressed, because the bits of floats do not compress."""
    return ocp.CompositeCheckpointHandler(
        state=ocp.PyTreeCheckpointHandler(use_compression=False), meta=ocp.JsonCheckpointHandler()
    )


def stored(state: Tree) -> dict[str, Any]:
    """The leaves that a step holds, by path; those without elements are left out, as Orbax cannot write them."""
    found = {path: leaf if hasattr(leaf, "dtype") else np.asarray(leaf) for path, leaf in tree.leaves(state).items()}
    return {path: leaf for path, leaf in found.items() if leaf.size}


def nest(leaves: Mapping[str, Any]) -> Tree:
    """Nested dicts from paths: {"params/norm/scale": a} -> {"params": {"norm": {"scale": a}}}."""
    root: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = root
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return root


def like(abstract: Tree, leaves: Mapping[str, Any]) -> Tree:
    """The structure of `abstract` with the leaves that were read; those without elements are made."""

    def leaf_at(path: str, leaf: Any) -> jax.Array:
        return (
            leaves[path]
            if path in leaves
            else jnp.zeros(leaf.shape, leaf.dtype, device=getattr(leaf, "sharding", None))
        )

    return tree.map_with_path(leaf_at, abstract)


def verified(root: Path) -> tuple[Manifest, dict[str, Any]]:
    """The manifest and the description of a step all of whose files are as they were written.

    Raises:
      Damaged: naming files, and the leaves that can no longer be read from them.
      ValueError: the layout is of a newer version of this program.
    """
    manifest = integrity.read(root)
    files = integrity.damaged_files(root, manifest.files)
    if files:
        what = ", ".join(f"{name} ({state})" for name, state in files.items())
        leaves = _unreadable(root, manifest) if any(name.startswith("state/") for name in files) else []
        named = f"; leaves {_listed(leaves)}" if leaves else ""
        raise Damaged(f"{what}{named}")
    description = json.loads((root / "meta" / "metadata").read_text(encoding="utf-8"))
    if description["schema"] > meta.SCHEMA:
        raise ValueError(
            f"{root}: written by a newer version (layout {description['schema']}, this one knows {meta.SCHEMA}); "
            "update the program"
        )
    return manifest, description


def arrays(root: Path, manifest: Manifest, wanted: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Leaves of a step, on the shardings of `wanted`, their contents compared with the manifest.

    Args:
      root: the step directory.
      manifest: of `verified`.
      wanted: path -> abstract or real array, all of them in the step; a sharding of None is the first device.

    Raises:
      Damaged: naming leaves whose contents differ, or what Orbax said in one line.
    """
    problem, leaves = "", {}
    try:
        leaves = _restore(root, wanted)
    except Exception as error:  # whatever Orbax and tensorstore raise for files they cannot use
        problem = reason(error)
    if multihost.anywhere(bool(problem)):
        raise Damaged(problem or "another process could not read its part")
    changed = integrity.differing(manifest.leaves, leaves)
    if changed:
        raise Damaged(f"leaves {_listed(changed)} (contents changed)")
    return leaves


def reason(error: BaseException) -> str:
    """One line for an exception: the operating system's words where they are in it, else its first line."""
    text = str(error)
    for cause in CAUSES:
        if cause in text.lower():
            detail = re.search(re.escape(cause) + r" \([^)]*\)", text, re.IGNORECASE)
            return detail.group() if detail else cause
    first = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    return first if len(first) <= 160 else first[:157] + "..."


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps Orbax's log and the tracebacks of its abandoned futures off the terminal; errors are still raised."""
    logger, old = logging.getLogger("absl"), sys.unraisablehook

    def from_elsewhere(record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname

    def hook(unraisable: Any) -> None:
        # When one read fails, Orbax closes the event loop and abandons the others, which tensorstore then reports to.
        about = f"{getattr(unraisable.object, 'cr_code', unraisable.object)} {unraisable.exc_value}"
        if not any(word in about for word in ("orbax", "tensorstore", "Event loop is closed")):
            old(unraisable)

    logger.addFilter(from_elsewhere)
    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = old
        logger.removeFilter(from_elsewhere)


def _restore(root: Path, wanted: Mapping[str, Any]) -> dict[str, jax.Array]:
    first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = nest(
        {
            path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or first)
            for path, leaf in wanted.items()
        }
    )
    how = ocp.args.PyTreeRestore(
        item=abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract), partial_restore=True
    )
    with ocp.Checkpointer(handler()) as checkpointer:
        return tree.leaves(checkpointer.restore(root, args=ocp.args.Composite(state=how))["state"])


def _unreadable(root: Path, manifest: Manifest) -> list[str]:
    """Leaves that damage has reached, found by reading each alone; only where no other process waits."""
    if jax.process_count() > 1:
        return []
    found = []
    for path, leaf in manifest.leaves.items():
        try:
            read = _restore(root, {path: jax.ShapeDtypeStruct(leaf["shape"], np.dtype(leaf["dtype"]))})
        except Exception:
            found.append(path)
        else:
            found += integrity.differing(manifest.leaves, read)
    gc.collect()  # abandoned reads complain when they are collected: here, where that is kept quiet
    return found


def _listed(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
