"""Which rows make up step s, on every host, and reading them ahead of time.

The order has no state: the rows of a step are a function of (seed, step, batch size, number of rows). Resuming needs
the step alone, on any number of hosts.
"""

import contextlib
import dataclasses
import functools
import importlib
import itertools
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np

from jaxlm.data.dataset import Dataset, NumpyBatch
from jaxlm.data.mixture import Mixture

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Loader:
    """The batches of a training run.

    Every epoch is a shuffle of all rows without replacement; a batch may reach over the end of an epoch. The two parts
    of a mixture are shuffled each by itself. The row list of a step is the same on all hosts, and host h of H reads
    rows[h::H].

    Attributes:
      dataset: the rows.
      batch_size: rows of a step over all hosts, at most the number of rows.
      seed: of the shuffles, in [0, 2^32).
      host, hosts: this process and the number of processes.

    Raises:
      ValueError: the data has fewer rows than one batch, or the hosts cannot share a batch evenly.
    """

    dataset: Dataset
    batch_size: int
    seed: int = 0
    host: int = 0
    hosts: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"train.batch_size: {self.batch_size} is not positive; use a whole number from 1 up")
        if len(self.dataset) < self.batch_size:
            raise ValueError(
                f"{self.dataset.name}: {len(self.dataset)} rows of data are fewer than one batch "
                f"(train.batch_size {self.batch_size}); give more text, or lower train.batch_size or "
                "data.sequence_length"
            )
        if self.batch_size % self.hosts:
            raise ValueError(
                f"train.batch_size: {self.batch_size} is not a multiple of the {self.hosts} processes; change one"
            )
        if not 0 <= self.seed < 1 << 32:
            raise ValueError(f"run.seed: {self.seed} is not in [0, 2^32); choose another")

    @functools.cached_property
    def _orders(self) -> list[Any]:
        """Endless shuffles of the rows, of each part of a mixture one."""
        grain = importlib.import_module("grain")
        rows = self.dataset.rows
        cuts = [0, len(rows.task), len(rows)] if isinstance(rows, Mixture) else [0, len(rows)]
        return [grain.MapDataset.range(*cut).seed(self.seed).shuffle().repeat() for cut in itertools.pairwise(cuts)]

    def _row(self, index: int) -> int:
        """The row that is drawn as number `index` since the start of the run."""
        rows = self.dataset.rows
        part, index = rows.draw(index) if isinstance(rows, Mixture) else (0, index)
        return self._orders[part][index]

    @property
    def identity(self) -> dict[str, Any]:
        """What the sequence of batches depends on, by field: the dataset's identity and the seed."""
        return self.dataset.identity | {"run.seed": self.seed}

    def rows(self, step: int) -> np.ndarray:
        """int64 [batch_size]: the rows of step `step` (from 0), over all hosts."""
        start = step * self.batch_size
        return np.array([self._row(index) for index in range(start, start + self.batch_size)], np.int64)

    def batch(self, step: int) -> NumpyBatch:
        """This host's rows of the step: arrays [batch_size / hosts, L], see `types.Batch`."""
        return self.dataset.batch(self.rows(step)[self.host :: self.hosts])


def evaluation_batches(dataset: Dataset, batch_size: int, host: int = 0, hosts: int = 1) -> Iterator[NumpyBatch]:
    """Every row once, in order, in batches of one shape; the last is filled up with rows of padding.

    Args:
      dataset: the rows.
      batch_size: rows of a batch over all hosts.
      host, hosts: this process and the number of processes; each gets rows[host::hosts] of every batch.

    Yields:
      Arrays [batch_size / hosts, L].
    """
    for start in range(0, len(dataset), batch_size):
        indices = np.arange(start, start + batch_size)
        yield dataset.batch(np.where(indices < len(dataset), indices, -1)[host::hosts])


@contextlib.contextmanager
def prefetch(
    make: Callable[[int], T], steps: Iterable[int], *, depth: int = 2, timeout: float = 300.0
) -> Iterator[Iterator[T]]:
    """Make the batches of `steps` in a background thread, a few ahead.

        with prefetch(loader.batch, range(start, stop)) as batches:
            for batch in batches: ...

    Args:
      make: step -> batch; it may also place the batch on devices.
      steps: the steps, in order.
      depth: batches made ahead.
      timeout: seconds to wait for one batch.

    Yields:
      An iterator of the batches. What `make` raises is raised from it; a thread that hangs or dies is a RuntimeError.
      On leaving the context the thread ends.
    """
    results: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(kind: str, value: Any) -> None:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                return results.put((kind, value), timeout=0.1)

    def work() -> None:
        try:
            for step in steps:
                if stop.is_set():
                    return
                put("batch", make(step))
            put("end", None)
        except BaseException as error:
            put("error", error)

    worker = threading.Thread(target=work, name="jaxlm-data", daemon=True)
    worker.start()
    try:
        yield _received(results, worker, timeout)
    finally:
        stop.set()
        worker.join(timeout=1.0)


def _received(results: "queue.Queue[tuple[str, Any]]", worker: threading.Thread, timeout: float) -> Iterator[Any]:
    while True:
        kind, value = _wait(results, worker, timeout)
        if kind == "end":
            return
        if kind == "error":
            raise value
        yield value


def _wait(results: "queue.Queue[tuple[str, Any]]", worker: threading.Thread, timeout: float) -> tuple[str, Any]:
    deadline = time.monotonic() + timeout
    while True:
        alive = worker.is_alive()  # asked before looking: a thread may end right after its last result
        with contextlib.suppress(queue.Empty):
            return results.get(timeout=max(min(deadline - time.monotonic(), 1.0), 0.0) if alive else 0.0)
        if not alive or time.monotonic() >= deadline:
            frame = sys._current_frames().get(worker.ident or 0) if alive else None
            where = traceback.format_stack(frame)[-1].strip().split("\n")[0] if frame else "the thread has died"
            raise RuntimeError(
                f"data: no batch within {timeout:g} s ({where}); check the disk that holds data.path, then start "
                "the same command again"
            )
