"""The lock of a run directory: one run at a time, free again however the holder ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxlm.training import lock

ROOT = Path(__file__).parent.parent

HOLD = """
import sys, time
from jaxlm.training import lock
with lock.hold(sys.argv[1], print):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_refused_while_the_first_holds_the_lock(tmp_path):
    with lock.hold(tmp_path / "run", print):
        with (
            pytest.raises(ValueError, match=rf"run: another run \(process {os.getpid()} on .*\) is using") as error,
            lock.hold(tmp_path / "run", print),
        ):
            pass
        assert "\n" not in str(error.value)
    with lock.hold(tmp_path / "run", print):
        pass


def test_a_killed_run_leaves_no_lock(tmp_path):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], env=env, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match=f"process {holder.pid} on"), lock.hold(tmp_path, print):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with lock.hold(tmp_path, print):
        pass


def test_an_error_in_the_run_frees_the_lock(tmp_path):
    with pytest.raises(KeyError), lock.hold(tmp_path, print):
        raise KeyError
    with lock.hold(tmp_path, print):
        pass


def test_a_child_started_by_the_run_does_not_keep_the_lock(tmp_path):
    with lock.hold(tmp_path, print):
        child = subprocess.Popen(["sleep", "30"], close_fds=False)
    try:
        deadline = time.monotonic() + 5
        with lock.hold(tmp_path, print):
            assert time.monotonic() < deadline and child.poll() is None
    finally:
        child.kill()
        child.wait()


def test_only_the_first_process_of_a_run_locks(tmp_path, monkeypatch):
    with lock.hold(tmp_path, print):
        monkeypatch.setattr(lock.multihost, "is_main", lambda: False)
        with lock.hold(tmp_path, print):
            pass


def test_a_file_system_without_locks_is_reported_and_used(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(38, "Function not implemented")

    messages = []
    monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    with lock.hold(tmp_path, messages.append):
        pass
    assert len(messages) == 1 and "cannot be locked (Function not implemented)" in messages[0]


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ValueError, match=r"file/run: cannot be written \(Not a directory\)"),
        lock.hold(tmp_path / "file" / "run", print),
    ):
        pass
