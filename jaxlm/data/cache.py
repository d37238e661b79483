"""A folder outside any project for what is costly to make and can be made again."""

import atexit
import contextlib
import errno
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

LEFT_OVER_SECONDS = 24 * 3600


def cache_root() -> Path:
    """`$JAXLM_CACHE`, else `$XDG_CACHE_HOME/jaxlm`, else `~/.cache/jaxlm`. Deleting it is always safe."""
    if given := os.environ.get("JAXLM_CACHE"):
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "jaxlm"


def cached(key: str, write: Callable[[Path], None], read: Callable[[Path], T]) -> T:
    """What `read` makes of the cache's folder `key`, which `write` fills when it is missing or damaged.

    Processes may race: each writes a folder of its own, which is renamed into place, and the first one stays. Where the
    cache cannot be written, a temporary folder serves this process alone.

    Args:
      key: name of the folder; it must change with everything that the content depends on.
      write: fills an empty folder.
      read: opens a filled folder; ValueError or OSError means that the folder is damaged.

    Returns:
      What `read` returned.
    """
    target = cache_root() / key
    if target.is_dir():
        try:
            return read(target)
        except (ValueError, OSError):
            shutil.rmtree(target, ignore_errors=True)
    staging = _staging(target)
    try:
        write(staging)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            remedy = "free some space or set JAXLM_CACHE to a folder elsewhere"
            raise OSError(error.errno, f"{staging.parent}: {os.strerror(error.errno)}; {remedy}") from None
        raise
    return read(_publish(staging, target))


def _staging(target: Path) -> Path:
    for left_over in target.parent.glob(f".{target.name}.*"):  # of a process that was killed
        with contextlib.suppress(OSError):
            if left_over.stat().st_mtime < time.time() - LEFT_OVER_SECONDS:
                shutil.rmtree(left_over, ignore_errors=True)
    staging = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        staging.mkdir(parents=True)
    except OSError:
        staging = Path(tempfile.mkdtemp(prefix="jaxlm-"))
    return staging


def _publish(staging: Path, target: Path) -> Path:
    """Rename the folder into place; where that fails another process was first, or the cache cannot be written."""
    try:
        os.rename(staging, target)
    except OSError:
        if target.is_dir():
            shutil.rmtree(staging, ignore_errors=True)
            return target
        atexit.register(shutil.rmtree, staging, ignore_errors=True)
        return staging
    return target
