"""Signals: the first asks to stop at the step boundary, the second interrupt ends at once, handlers come back."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from jaxlm.training import signals

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_seen_at_the_next_step_boundary_and_handlers_come_back(number, code):
    before = {each: signal.getsignal(each) for each in signals.EXIT_CODES}
    threads = threading.active_count()
    messages = []
    with signals.catch(messages.append) as stop:
        assert stop(0) is None
        signal.raise_signal(number)
        assert stop(1) == code and stop(2) == code
    assert {each: signal.getsignal(each) for each in signals.EXIT_CODES} == before
    assert threading.active_count() == threads
    assert len(messages) == 1 and messages[0].startswith(f"{signal.Signals(number).name}: saving")


def test_the_first_signal_decides_the_exit_code():
    with signals.catch(lambda _: None) as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert stop(1) == 143


def test_handlers_come_back_after_an_error():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyError), signals.catch(print):
        raise KeyError
    assert signal.getsignal(signal.SIGTERM) is before


def test_outside_the_main_thread_nothing_is_installed():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work():
        with signals.catch(print) as stop:
            seen.extend([stop(1), signal.getsignal(signal.SIGTERM)])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [None, before]


LOOP = """
import sys, time
import jax.numpy as jnp
from jaxlm.training import signals
from jaxlm.training.checkpoint import Checkpoints
checkpoints = Checkpoints(sys.argv[1], print)
with signals.catch(lambda text: print(text, file=sys.stderr, flush=True)) as stop:
    print("ready", flush=True)
    for step in range(1, 100_000):
        checkpoints.check()
        checkpoints.save(step, {"step": jnp.int32(step)}, {"position": step})
        if (code := stop(step)) is not None:
            break
checkpoints.close()
print(step, flush=True)
sys.exit(code)
"""

BUSY = """
import jax
from jaxlm.training import signals
endless = jax.jit(lambda i: jax.lax.while_loop(lambda i: i >= 0, lambda i: (i + 1) % 7, i))
with signals.catch(lambda _: None):
    print("ready", flush=True)
    endless(0).block_until_ready()
"""


def start(source, *arguments):
    env = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    process = subprocess.Popen(
        [sys.executable, "-c", source, *map(str, arguments)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_loop_that_saves_in_the_background_ends_with_its_step_saved(tmp_path, number, code):
    process = start(LOOP, tmp_path)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert (tmp_path / out.strip()).is_dir()
    assert err.startswith(signal.Signals(number).name) and len(err.splitlines()) == 1


def test_a_second_interrupt_ends_at_once_though_the_main_thread_is_inside_xla():
    process = start(BUSY)
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1.0)
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130
    process.communicate()
