"""One run at a time in a run directory, by a lock that the kernel releases however the process ends."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from jaxlm.dist import multihost

FILE = ".lock"


@contextlib.contextmanager
def hold(directory: str | Path, report: Callable[[str], None]) -> Iterator[None]:
    """Keeps other runs out of `directory` while the context is open; only process 0 of a run takes the lock.

    An advisory `flock` on `directory/.lock`: it ends with the process, after SIGKILL too, so no stale lock needs
    removing. The file stays (removing it would race with the next run) and names its last holder.

    Args:
      directory: the run directory; made if missing.
      report: told when the file system has no locks; the run then goes on without one.

    Raises:
      ValueError: another run holds the lock, or the directory cannot be written.
    """
    if not multihost.is_main():
        yield
        return
    path = Path(directory) / FILE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ValueError(f"{directory}: cannot be written ({error.strerror}); choose another run.dir") from None
    try:
        _acquire(descriptor, path, report)
        yield
    finally:
        os.close(descriptor)


def _acquire(descriptor: int, path: Path, report: Callable[[str], None]) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "an unknown process"
        raise ValueError(
            f"{path.parent}: another run ({holder}) is using this directory; wait for it or choose another run.dir"
        ) from None
    except OSError as error:
        report(f"{path.parent}: cannot be locked ({error.strerror}); make sure that no second run uses it")
        return
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
