"""Optional writers to TensorBoard, Weights & Biases and MLflow. None of them can stop or slow a run.

Each tracker lives in a thread of its own, behind a bounded queue: a server that hangs, a full disk or an exception
costs one warning, and the run goes on without that tracker. Missing packages are found at the start.
"""

import functools
import importlib.util
import json
import os
import queue
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

Config = Mapping[str, Any]
Warn = Callable[[str], None]

QUEUE_LENGTH = 10_000
CLOSE_SECONDS = 30.0


class Tracker(Protocol):
    """Takes metrics and text of a run."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Note numbers by name at a step."""

    def text(self, step: int, name: str, text: str) -> None:
        """Note a text, such as a sample, under a name at a step."""

    def close(self) -> None:
        """Send what is left and end."""


class Kind(NamedTuple):
    """How a tracker is opened.

    Attributes:
      package: module that has to be installed.
      extra: the extra of jaxlm that installs it.
      open: `(run_dir, config) -> Tracker`.
    """

    package: str
    extra: str
    open: Callable[[Path, Config], Tracker]


def open_trackers(
    names: Sequence[str], run_dir: str | os.PathLike[str], config: Config, warn: Warn | None = None
) -> list[Tracker]:
    """Open trackers by name; all their methods return at once and never raise.

    Args:
      names: of `TRACKERS`. Addresses and keys come from the environment, as each tool documents (`WANDB_MODE`,
        `MLFLOW_TRACKING_URI`). A run that is continued continues its tracked run: ids are kept under `trackers/`.
      run_dir: the run directory; its name is the tracked run's.
      config: the resolved configuration as nested dicts.
      warn: takes the one warning of a tracker that fails; null is `warnings.warn`.

    Raises:
      ValueError: an unknown name, or a tracker whose package is not installed.
    """
    for name in names:
        if name not in TRACKERS:
            raise ValueError(f"train.trackers: {name!r} is unknown; the trackers are {', '.join(TRACKERS)}")
        kind = TRACKERS[name]
        if importlib.util.find_spec(kind.package) is None:
            raise ValueError(
                f"train.trackers: {name} needs the package {kind.package}; "
                f"install it with pip install 'jaxlm[{kind.extra}]' or leave {name} out"
            )
    warn = warn or (lambda text: warnings.warn(text, RuntimeWarning, stacklevel=2))
    return [Guarded(name, functools.partial(TRACKERS[name].open, Path(run_dir), config), warn) for name in names]


class Guarded:
    """A tracker in a thread of its own; whatever happens to it, its methods return at once.

    After a failure, or when the queue is full, the tracker is given up with one warning.
    """

    def __init__(self, name: str, open_tracker: Callable[[], Tracker], warn: Warn) -> None:
        self._name, self._open, self._warn = name, open_tracker, warn
        self._queue: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue(QUEUE_LENGTH)
        self._given_up = threading.Lock()
        # A daemon: a tracker that hangs must not keep the finished process alive.
        self._thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        kept = dict(values)
        self._put(lambda tracker: tracker.scalars(step, kept))

    def text(self, step: int, name: str, text: str) -> None:
        self._put(lambda tracker: tracker.text(step, name, text))

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Send what is left, for at most this many seconds; may be called twice."""
        self._put(None)
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._give_up(f"still busy after {seconds:g} s")

    def _put(self, call: Callable[[Tracker], None] | None) -> None:
        if self._given_up.locked() or not self._thread.is_alive():
            return
        try:
            self._queue.put_nowait(call)
        except queue.Full:
            self._give_up(f"{QUEUE_LENGTH} entries are waiting")

    def _work(self) -> None:
        try:
            tracker = self._open()
            while (call := self._queue.get()) is not None and not self._given_up.locked():
                call(tracker)
            tracker.close()
        except BaseException as error:  # SystemExit too: some trackers leave that way
            self._give_up(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")

    def _give_up(self, why: str) -> None:
        # Acquired once and never released: the warning comes once, from whichever thread is first.
        if self._given_up.acquire(blocking=False):
            self._warn(f"tracker {self._name}: {why}; the run goes on without it")


class TensorBoard:
    """Event files under `tensorboard/` in the run directory, by tensorboardX."""

    def __init__(self, run_dir: Path, config: Config) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / "tensorboard"))
        self._writer.add_text("config", f"```json\n{json.dumps(config, indent=1, default=str)}\n```", 0)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        self._writer.add_text(name, text, step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A Weights & Biases run in the project named by `WANDB_PROJECT`, else `jaxlm`."""

    def __init__(self, run_dir: Path, config: Config) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "jaxlm"),
            name=run_dir.name,
            dir=str(run_dir),
            config=dict(config),
            id=_known_id(run_dir, "wandb"),
            resume="allow",
            # Below CLOSE_SECONDS, so that the warning tells wandb's own reason.
            settings=wandb.Settings(init_timeout=20, finish_timeout=25),
        )
        _keep_id(run_dir, "wandb", self._run.id)
        # The step is a column of its own: wandb's own counter refuses the steps that a resumed run repeats.
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "step": step})

    def text(self, step: int, name: str, text: str) -> None:
        self._run.log({name: text, "step": step})

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """An MLflow run in the experiment named by `MLFLOW_EXPERIMENT_NAME`, else `jaxlm`.

    Without `MLFLOW_TRACKING_URI` it goes to files under `mlruns/` in the run directory.
    """

    def __init__(self, run_dir: Path, config: Config) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric

        self._metric = Metric
        address = os.environ.get("MLFLOW_TRACKING_URI")
        if not address:
            # Files, since MLflow's default database needs more than the small package brings; they must be asked for.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            address = (run_dir / "mlruns").resolve().as_uri()
        self._client = MlflowClient(address)
        self._id = _known_id(run_dir, "mlflow") or self._create(run_dir)
        _keep_id(run_dir, "mlflow", self._id)
        self._client.update_run(self._id, status="RUNNING")
        self._client.log_dict(self._id, dict(config), "config.json")

    def _create(self, run_dir: Path) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "jaxlm")
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(name)
        return self._client.create_run(experiment_id, run_name=run_dir.name).info.run_id

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(self._id, [self._metric(name, value, now, step) for name, value in values.items()])

    def text(self, step: int, name: str, text: str) -> None:
        self._client.log_text(self._id, text, f"{name}/{step:09}.txt")

    def close(self) -> None:
        self._client.set_terminated(self._id)


TRACKERS: dict[str, Kind] = {
    "tensorboard": Kind("tensorboardX", "tensorboard", TensorBoard),
    "wandb": Kind("wandb", "wandb", WandB),
    "mlflow": Kind("mlflow", "mlflow", MLflow),
}


def _known_id(run_dir: Path, name: str) -> str | None:
    path = run_dir / "trackers" / name
    return path.read_text().strip() or None if path.is_file() else None


def _keep_id(run_dir: Path, name: str, value: str) -> None:
    path = run_dir / "trackers" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(value + "\n")
