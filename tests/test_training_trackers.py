"""Trackers: they get every number, and whatever befalls them the run goes on."""

import importlib.machinery
import struct
import sys
import threading
import time
import types

import pytest

from jaxlm.training import trackers
from jaxlm.training.trackers import Guarded, open_trackers

CONFIG = {"train": {"steps": 3}}


class Kept:
    """A tracker that keeps what it gets, and fails where it is told to."""

    def __init__(self, failing=()):
        self.got, self.failing, self.closed = [], failing, False
        if "open" in failing:
            raise ConnectionError("no\nserver")

    def scalars(self, step, values):
        self.got.append((step, values))
        if step in self.failing:
            raise SystemExit(f"step {step}")

    def text(self, step, name, text):
        self.got.append((step, name, text))

    def close(self):
        self.closed = True
        if "close" in self.failing:
            raise OSError("disk full")


def test_a_tracker_gets_everything_in_order():
    kept, warned = Kept(), []
    guarded = Guarded("kept", lambda: kept, warned.append)
    values = {"loss": 1.0}
    guarded.scalars(1, values)
    values["loss"] = 9.0  # the loop may use its dict again
    guarded.text(1, "sample", "abc")
    guarded.scalars(2, {"loss": 0.5})
    guarded.close()
    guarded.close()
    guarded.scalars(3, {"loss": 0.1})
    assert kept.got == [(1, {"loss": 1.0}), (1, "sample", "abc"), (2, {"loss": 0.5})]
    assert kept.closed and warned == []


@pytest.mark.parametrize(
    ("failing", "reason"),
    [(("open",), "ConnectionError: no server"), ((2,), "SystemExit: step 2"), (("close",), "OSError: disk full")],
)
def test_a_tracker_that_fails_warns_once_and_never_raises(failing, reason):
    warned = []
    guarded = Guarded("kept", lambda: Kept(failing), warned.append)
    for step in range(1, 50):
        guarded.scalars(step, {"loss": 1.0})
        guarded.text(step, "sample", "abc")
    guarded.close()
    guarded.close()
    assert warned == [f"tracker kept: {reason}; the run goes on without it"]


def test_a_tracker_that_hangs_costs_the_run_no_time(monkeypatch):
    monkeypatch.setattr(trackers, "QUEUE_LENGTH", 20)
    warned, release = [], threading.Event()
    guarded = Guarded("slow", lambda: release.wait() and Kept(), warned.append)
    start = time.monotonic()
    for step in range(100):
        guarded.scalars(step, {"loss": 1.0})
    guarded.close(seconds=0.05)
    assert time.monotonic() - start < 1.0
    assert warned == ["tracker slow: 20 entries are waiting; the run goes on without it"]
    release.set()


def test_closing_waits_for_a_slow_tracker_only_so_long():
    warned, release = [], threading.Event()
    guarded = Guarded("slow", lambda: release.wait() and Kept(), warned.append)
    guarded.close(seconds=0.05)
    assert warned == ["tracker slow: still busy after 0.05 s; the run goes on without it"]
    release.set()


def test_without_a_place_for_warnings_python_shows_them(tmp_path):
    with pytest.warns(RuntimeWarning, match="tracker tensorboard: "):
        # The parent of the event directory is a file.
        (tmp_path / "run").write_text("")
        (tracker,) = open_trackers(["tensorboard"], tmp_path / "run", CONFIG)
        tracker.close()


def test_unknown_and_missing_trackers_are_refused_before_any_is_opened(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "mlflow" else object())
    with pytest.raises(ValueError, match=r"mlflow.*pip install 'jaxlm\[mlflow\]'"):
        open_trackers(["tensorboard", "mlflow"], tmp_path, CONFIG)
    with pytest.raises(ValueError, match=r"'comet' is unknown.*tensorboard, wandb, mlflow"):
        open_trackers(["comet"], tmp_path, CONFIG)
    assert list(tmp_path.iterdir()) == []
    assert open_trackers([], tmp_path, CONFIG) == []


def events(directory):
    """All values of TensorBoard event files: records of length, checksum, data, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in directory.glob("events.out.tfevents.*"):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            for value in event.summary.value:
                found[event.step, value.tag] = value
    return found


def test_tensorboard_files_hold_the_numbers_and_texts(tmp_path):
    (tracker,) = open_trackers(["tensorboard"], tmp_path, CONFIG, warn=pytest.fail)
    for step in (1, 2):
        tracker.scalars(step, {"loss": 0.5 / step, "eval/bits_per_byte": 2.0})
    tracker.text(2, "samples", "once upon")
    tracker.close()
    found = events(tmp_path / "tensorboard")
    assert found[1, "loss"].simple_value == 0.5 and found[2, "loss"].simple_value == 0.25
    assert found[2, "eval/bits_per_byte"].simple_value == 2.0
    text = next(value for (step, tag), value in found.items() if step == 2 and tag.startswith("samples"))
    assert text.tensor.string_val == [b"once upon"]
    assert any(tag.startswith("config") for _, tag in found)


def stand_in(monkeypatch, name, **content):
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__dict__.update(content)
    monkeypatch.setitem(sys.modules, name, module)


def test_wandb_gets_the_step_as_a_column_and_a_continued_run_its_id(tmp_path, monkeypatch):
    calls = []

    class Run:
        id = "abc"

        def define_metric(self, name, step_metric):
            calls.append(("define", name, step_metric))

        def log(self, values):
            calls.append(("log", values))

        def finish(self):
            calls.append(("finish",))

    def init(**arguments):
        calls.append(("init", arguments["id"], arguments["resume"], arguments["config"], arguments["name"]))
        return Run()

    stand_in(monkeypatch, "wandb", init=init, Settings=dict)
    run_dir = tmp_path / "first"
    run_dir.mkdir()
    for step in (1, 2):
        (tracker,) = open_trackers(["wandb"], run_dir, CONFIG, warn=pytest.fail)
        tracker.scalars(step, {"loss": 1.0})
        tracker.close()
    assert [call[1] for call in calls if call[0] == "init"] == [None, "abc"]
    assert calls[0][2:] == ("allow", CONFIG, "first")
    assert [call[1] for call in calls if call[0] == "log"] == [{"loss": 1.0, "step": step} for step in (1, 2)]
    assert calls.count(("define", "*", "step")) == calls.count(("finish",)) == 2


def test_mlflow_gets_batches_in_files_beside_the_run_or_at_the_given_address(tmp_path, monkeypatch):
    calls, addresses = [], []

    class Client:
        def __init__(self, address):
            addresses.append(address)

        def get_experiment_by_name(self, name):
            return None

        def create_experiment(self, name):
            return f"id of {name}"

        def create_run(self, experiment, run_name):
            calls.append(("create", experiment, run_name))
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id="r1"))

        def __getattr__(self, name):
            return lambda *arguments, **named: calls.append((name, *arguments))

    stand_in(monkeypatch, "mlflow", MlflowClient=Client)
    stand_in(monkeypatch, "mlflow.entities", Metric=lambda name, value, when, step: (name, value, step))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    for address in (None, "http://127.0.0.1:1"):
        if address:
            monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        (tracker,) = open_trackers(["mlflow"], tmp_path, CONFIG, warn=pytest.fail)
        tracker.scalars(1, {"loss": 1.0, "grad_norm": 2.0})
        tracker.text(1, "sample", "abc")
        tracker.close()
    assert addresses == [(tmp_path / "mlruns").as_uri(), "http://127.0.0.1:1"]
    assert [call for call in calls if call[0] == "create"] == [("create", "id of jaxlm", tmp_path.name)]
    assert calls.count(("log_batch", "r1", [("loss", 1.0, 1), ("grad_norm", 2.0, 1)])) == 2
    assert calls.count(("set_terminated", "r1")) == 2
    assert ("log_text", "r1", "abc", "sample/000000001.txt") in calls
