"""Saving and restoring a run's whole state: in the background, atomic, verified, onto any mesh.

A step is one directory, written by Orbax under a temporary name and renamed when complete:

    checkpoints/40/state/           the arrays, named as the leaves of the state
    checkpoints/40/meta/metadata    JSON: what the caller gave, and package versions
    checkpoints/40/integrity.json   checksums of leaves and files, and the metric; see `integrity`

Orbax writes and reads arrays. Which steps exist, are good, are kept or are the best is decided here: its manager takes
empty directories for steps and NaN for the best metric, and tells of a failed save only when the next one begins.
"""

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxlm.dist import multihost
from jaxlm.training import integrity, meta, step_directory, step_reading
from jaxlm.training.integrity import Damaged
from jaxlm.types import Tree

Report = Callable[[str], None]


class SaveFailed(RuntimeError):
    """A state could not be written; one line with the step, the cause and the last good step."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """A step read back.

    Attributes:
      step: its number.
      state: of the structure that was asked for.
      meta: what `save` was given, with `schema` and `versions`.
    """

    step: int
    state: Tree
    meta: dict[str, Any]


class Checkpoints:
    """The checkpoints of the run that this program trains; with several processes each opens it.

    Open, `restore` (None in a new run), then at every step `check`, now and then `save`, and at the end `close`,
    whatever happens (`contextlib.closing`): a program that ends during a save leaves that step unfinished.
    """

    def __init__(self, directory: str | Path, report: Report, *, keep: int = 2, mode: str = "min"):
        """Open or make the directory; what unfinished saves left behind is removed.

        Args:
          directory: `checkpoints/` of the run; with several processes, one on a POSIX file system that all of them see.
          report: told about what is ignored, passed over or moved, by process 0.
          keep: how many of the latest steps are kept, at least 2, beside the best one.
          mode: "min" or "max": which metric is the best.

        Raises:
          ValueError: the directory cannot be written, or an argument is out of range.
        """
        if keep < 2 or mode not in ("min", "max"):
            raise ValueError(
                f"keep {keep}, mode {mode!r}: keep at least 2 steps (one to fall back to), mode min or max"
            )
        self.directory = Path(directory).absolute()
        self._report, self._keep, self._sign = report, keep, 1 if mode == "min" else -1
        self._pending: int | None = None
        self._sealing: tuple[int, dict[str, Any], float | None] | None = None
        if multihost.is_main():
            step_directory.require_writable(self.directory)
            step_directory.remove_leftovers(self.directory)
            for path in step_directory.foreign(self.directory):
                report(f"{path}: not a checkpoint; ignored")
        multihost.barrier("checkpoints opened")
        self._metrics = {step: step_directory.metric(self.directory / str(step)) for step in self.steps()}
        self._quiet = contextlib.ExitStack()
        self._quiet.enter_context(step_reading.quiet())
        self._writer = ocp.AsyncCheckpointer(
            step_reading.handler(), async_options=ocp.options.AsyncOptions(post_finalization_callback=self._seal)
        )

    def steps(self) -> list[int]:
        """Finished steps, ascending, not yet verified."""
        return step_directory.steps(self.directory)

    def best(self) -> int | None:
        """The finished step with the best finite metric, the earliest of equals; None where there is none."""
        metrics = {step: self._metrics.get(step) for step in self.steps()}
        finite = {
            step: self._sign * value for step, value in metrics.items() if value is not None and math.isfinite(value)
        }
        return min(finite, key=lambda step: (finite[step], step), default=None)

    def save(self, step: int, state: Tree, description: dict[str, Any], metric: float | None = None) -> None:
        """Begin to save a state; it is copied before this returns, so the next step may take its buffers.

        An earlier save is waited for. A step that is already saved is left as it is.

        Args:
          step: steps taken.
          state: a pytree of arrays; None stands for nothing.
          description: JSON values; `meta.compare_meta` names those that a later start compares.
          metric: of the evaluation at this step, if there was one; NaN is never the best.

        Raises:
          SaveFailed: this save could not begin, or the one before did not finish.
        """
        self.wait()
        if step in self.steps():
            return
        final, leaves = self.directory / str(step), step_reading.stored(state)
        described = {**description, "schema": meta.SCHEMA, "versions": meta.versions()}
        items = {"state": ocp.args.PyTreeSave(step_reading.nest(leaves)), "meta": ocp.args.JsonSave(described)}
        self._sealing = (step, integrity.describe(leaves), metric)
        self._pending = step
        try:
            json.dumps(described)
            if multihost.is_main():
                step_directory.remove_leftovers(self.directory)
                step_directory.require_space(self.directory, leaves.values())
                if final.exists():
                    step_directory.set_aside(final)
            self._writer.save(final, args=ocp.args.Composite(**items))
        except Exception as error:
            raise self._failed(error) from None

    def check(self) -> None:
        """Raise SaveFailed if the save in the background has failed; microseconds, so ask at every step."""
        if self._pending is None:
            return
        try:
            self._writer.check_for_errors()
        except Exception as error:
            raise self._failed(error) from None
        if self._pending in self.steps():
            self._finished()

    def wait(self) -> None:
        """Wait until nothing is being saved; raises as `check` does."""
        if self._pending is None:
            return
        try:
            self._writer.wait_until_finished()
        except Exception as error:
            raise self._failed(error) from None
        self._finished()

    def restore(
        self, abstract: Tree, accept: Callable[[dict[str, Any]], None], step: int | None = None
    ) -> Restored | None:
        """The newest good step, each leaf on the sharding of `abstract`; None where nothing has been saved.

        Damaged steps are reported and passed over, and renamed to `<step>.damaged` so that the run can save them again.

        Args:
          abstract: the state's structure, with shape, dtype and sharding (arrays or jax.ShapeDtypeStruct).
          accept: given the description before any array is read; raises ValueError to refuse.
          step: this one instead of the newest.

        Raises:
          ValueError: no step is good, there is no such step, it is of a newer version of this program, the state is of
            another model, or `accept` refuses.
        """
        wanted = step_reading.stored(abstract)

        def load(root: Path) -> tuple[dict[str, jax.Array], dict[str, Any]]:
            manifest, description = step_reading.verified(root)
            accept(description)
            integrity.require_same_leaves(manifest.leaves, wanted)
            return step_reading.arrays(root, manifest, wanted), description

        self.wait()
        found, damaged = _newest_good(self.directory, step, load, self._report)
        for number in damaged:
            self._metrics.pop(number, None)
            if multihost.is_main():
                moved = step_directory.set_aside(self.directory / str(number))
                self._report(f"{self.directory / str(number)}: moved to {moved.name}")
        multihost.barrier("checkpoints restored")
        return found and dataclasses.replace(found, state=step_reading.like(abstract, found.state))

    def close(self) -> None:
        """Wait for the last save, then let go of the background threads; raises as `check` does."""
        try:
            self.wait()
        finally:
            self._writer.close()
            if multihost.is_main():
                # threads of a save that failed may have gone on writing after it was cleaned up
                step_directory.remove_leftovers(self.directory)
            self._quiet.close()

    def _seal(self) -> None:
        """Called by Orbax on process 0, in its thread, when all files are written and before the rename."""
        assert self._sealing is not None
        step, leaves, metric = self._sealing
        integrity.seal(step_directory.temporary(self.directory, step), leaves, metric)

    def _finished(self) -> None:
        assert self._sealing is not None
        step, _, self._metrics[step] = self._sealing
        self._pending = None
        found = self.steps()
        keep = {*found[-self._keep :], self.best()}
        for step in found:
            if step not in keep and multihost.is_main():
                step_directory.remove(self.directory / str(step))

    def _failed(self, error: Exception) -> SaveFailed:
        root, self._pending = self.directory / str(self._pending), None
        if multihost.is_main():
            step_directory.remove_leftovers(self.directory)
        last = max(self.steps(), default=None)
        intact = "no step has been saved" if last is None else f"step {last} is the last good one"
        return SaveFailed(
            f"{root}: could not be saved: {step_reading.reason(error)}; {intact}; "
            "mend the cause, then the same command again goes on from there"
        )


def read(directory: str | Path, report: Report, fields: Sequence[str] = ("params",)) -> Restored:
    """Parts of the newest good step, as nested dicts of arrays on the first device; changes nothing on disk.

        fields ("params", "ema")  ->  Restored.state = {"params": {"params": {"embed": {"kernel": a}}}, "ema": ...}

    Args:
      directory: `checkpoints/` of a run, which may be in progress.
      report: told about damaged steps that are passed over.
      fields: first components of leaf paths; those that the state does not have are left out.

    Raises:
      FileNotFoundError: nothing has been saved there.
      ValueError: no step is good.
    """
    directory = Path(directory).absolute()

    def load(root: Path) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        manifest, description = step_reading.verified(root)
        wanted = {
            path: jax.ShapeDtypeStruct(leaf["shape"], np.dtype(leaf["dtype"]))
            for path, leaf in manifest.leaves.items()
            if path.split("/")[0] in fields
        }
        return step_reading.arrays(root, manifest, wanted), description

    with step_reading.quiet():
        found, _ = _newest_good(directory, None, load, report)
    if found is None:
        raise FileNotFoundError(f"{directory}: no checkpoint; train first, or name another directory")
    return dataclasses.replace(found, state=step_reading.nest(found.state))


def _newest_good(
    directory: Path, step: int | None, load: Callable[[Path], tuple[Any, dict[str, Any]]], report: Report
) -> tuple[Restored | None, list[int]]:
    """The first step, from the newest, that `load` does not find damaged, and the damaged ones before it."""
    present = step_directory.steps(directory)
    if step is not None and step not in present:
        raise ValueError(f"{directory}: there is no step {step}; there are {present}")
    damaged: list[int] = []
    for number in reversed(present) if step is None else [step]:
        root = directory / str(number)
        try:
            state, description = load(root)
        except Damaged as error:
            damaged.append(number)
            if multihost.is_main():
                report(f"{root}: step {number} is damaged: {error}")
            continue
        if damaged and multihost.is_main():
            report(f"{root}: falling back to step {number}")
        return Restored(number, state, description), damaged
    if damaged:
        raise ValueError(
            f"{directory}: none of the steps {damaged} is good; put back a copy of one, or choose another run.dir"
        )
    return None, damaged
