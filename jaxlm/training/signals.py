"""SIGTERM and SIGINT: the first asks for a stop at the next step boundary, a second SIGINT ends the process at once."""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}

Stop = Callable[[int], int | None]


@contextlib.contextmanager
def catch(report: Callable[[str], None]) -> Iterator[Stop]:
    """Turns the two signals into a question that the loop asks at every step boundary.

        with catch(report) as stop:
            ...
            if (code := stop(step)) is not None:  # save, then exit with `code`

    `stop(step) -> int | None` is the exit code (130 SIGINT, 143 SIGTERM) or None. With several processes it must be
    called by all of them at every step: the signal may reach only one, or each at another step, and JAX's preemption
    service then picks one step for all. Old handlers come back when the context closes. Outside the main thread
    Python allows no handlers; `stop` then only knows what the preemption service knows.

    Args:
      report: told, from inside the handler, what is about to happen.
    """
    several = jax.process_count() > 1
    received: list[int] = []

    def remember(number: int, _frame: Any) -> None:
        if not received:
            again = "; once more ends it at once, without saving" if number == signal.SIGINT else ""
            report(f"{signal.Signals(number).name}: saving at the end of this step{again}")
        received.append(number)
        if several:
            # the preemption service listens for SIGTERM alone, and its own handler must stay in place
            os.kill(os.getpid(), signal.SIGTERM)

    def stop(step: int) -> int | None:
        if several and not multihost_utils.reached_preemption_sync_point(step):
            return None
        if several and not received:
            return EXIT_CODES[signal.SIGTERM]
        return EXIT_CODES[signal.Signals(received[0])] if received else None

    numbers = [signal.SIGINT] if several else [signal.SIGINT, signal.SIGTERM]
    with _handlers(numbers, remember), _second_interrupt_exits():
        yield stop


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextlib.contextmanager
def _handlers(numbers: list[signal.Signals], handler: Callable[[int, Any], None]) -> Iterator[None]:
    old = {number: signal.signal(number, handler) for number in numbers} if _in_main_thread() else {}
    try:
        yield
    finally:
        for number, previous in old.items():
            # None: it was not installed from Python, and Python cannot put it back
            signal.signal(number, signal.SIG_DFL if previous is None else previous)


@contextlib.contextmanager
def _second_interrupt_exits() -> Iterator[None]:
    """Ends the process at the second SIGINT even while the main thread is inside XLA.

    Python runs handlers only between bytecodes, so a long compilation would swallow the second one. The interpreter
    writes the number of each signal to a descriptor as it arrives; a thread reads it there.
    """
    if not _in_main_thread():
        yield
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def watch() -> None:
        interrupts = 0
        while numbers := reader.recv(16):
            interrupts += numbers.count(signal.SIGINT)
            if interrupts >= 2:
                os._exit(EXIT_CODES[signal.SIGINT])

    thread = threading.Thread(target=watch, name="signals", daemon=True)
    thread.start()
    old = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(old)
        writer.close()
        thread.join()
        reader.close()
