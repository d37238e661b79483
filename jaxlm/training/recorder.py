"""What a run leaves for people to look at, written as it goes: metrics, timing, progress, trackers, samples."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from jaxlm.dist import multihost
from jaxlm.training import progress as shown
from jaxlm.training import samples, throughput
from jaxlm.training.balance import Alarm
from jaxlm.training.metrics import METRICS_FILE, TIMING_FILE, MetricsFile
from jaxlm.training.progress import Progress
from jaxlm.training.samples import Sample
from jaxlm.training.setup import Setup
from jaxlm.training.trackers import Tracker, open_trackers


class Recorder:
    """Writes the records of a run; in all processes but the first it only counts.

    Attributes:
      tokens: input tokens since the start of the run, padding left out.
      skips: steps in a row that were skipped, up to the last one recorded.
      first: whether no step has been recorded yet in this sitting.
    """

    def __init__(self, setup: Setup, directory: Path, progress: Progress, tokens: int) -> None:
        self.tokens, self.skips, self.first = tokens, 0, True
        self._alarm = Alarm()
        self._directory, self._progress, self._total = directory, progress, setup.config.train.steps
        program = setup.program
        devices = list(program.mesh.devices.flat)
        peak = throughput.peak_flops(devices[0].device_kind, program.compute.dtype)
        self.flops_per_token = throughput.flops_per_token(program.cfg, setup.config.data.sequence_length)
        self.peak = None if peak is None else peak * len(devices)
        self._meter = throughput.Meter(self._total, self.flops_per_token, self.peak)
        self._device = devices[0] if devices[0].process_index == jax.process_index() else None
        self._files: list[MetricsFile] = []
        self._trackers: list[Tracker] = []
        if multihost.is_main():
            self._files = [MetricsFile(directory / name) for name in (METRICS_FILE, TIMING_FILE)]
            self._trackers = list(
                open_trackers(setup.config.train.trackers, directory, setup.identity["config"], progress.message)
            )

    def step(self, step: int, metrics: dict[str, Any]) -> float:
        """Record a finished step; waits for its values. Returns the loss."""
        self.first = False
        values = {name: value.item() for name, value in jax.device_get(metrics).items()}
        self.tokens += int(values.pop("step_tokens", 0))
        self.skips = self.skips + 1 if values.pop("skipped") else 0
        row = {"step": step, "loss": values.pop("loss"), **values, "tokens": self.tokens}
        timing = self._meter.tick(step, self.tokens)
        memory = throughput.memory_bytes(self._device)
        if memory is not None:
            timing["memory"] = memory
        self._write(row, {"step": step, **timing})
        if self.skips:
            self._progress.message(
                f"step {step}: loss {row['loss']}, grad_norm {row['grad_norm']}: not finite; the update is skipped"
            )
        for text in self._alarm.look(step, row):
            self._progress.message(text)
        self._progress.step(step, {**row, **timing})
        return row["loss"]

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        """Record an evaluation after `step` updates; names without `eval/`."""
        row = {f"eval/{name}": value for name, value in values.items()}
        self._write({"step": step, **row})
        self._progress.message(shown.evaluation_line(step, self._total, row))

    def samples(self, step: int, taken: list[Sample]) -> None:
        """Record sample texts taken after `step` updates."""
        if not multihost.is_main():
            return
        samples.append(self._directory / samples.SAMPLES_FILE, step, taken)
        for prompt, completion in taken:
            self._progress.message(shown.sample_line(step, self._total, prompt, completion))
            for tracker in self._trackers:
                tracker.text(step, f"sample/{prompt}", prompt + completion)

    @contextlib.contextmanager
    def pause(self, status: str) -> Iterator[None]:
        """Time inside does not count as training."""
        self._progress.status(status)
        with self._meter.paused():
            yield

    def close(self) -> None:
        """Close files and trackers."""
        parts: tuple[Any, ...] = (*self._files, *self._trackers)
        for part in parts:
            part.close()

    def _write(self, row: dict[str, Any], timing: dict[str, Any] | None = None) -> None:
        for file, content in zip(self._files, (row, timing), strict=False):
            if content is not None:
                file.write(content)
        finite = {n: v for n, v in {**row, **(timing or {})}.items() if n != "step" and math.isfinite(v)}
        for tracker in self._trackers:
            tracker.scalars(row["step"], finite)
