"""Inside one process: run something again and again, and say how long it took."""

import resource
import statistics
import time
from collections.abc import Callable
from typing import Any


def repeat(call: Callable[[], Any], wait: Callable[[Any], Any], seconds: float, least: int = 3) -> dict[str, Any]:
    """Time `call` for about `seconds`, after one call that is reported apart (compilation).

    Args:
      call: one unit of work; may return before it is done.
      wait: blocks until what `call` returned is there.
      seconds: how long to go on.
      least: calls at least.

    Returns:
      first (seconds of the first call), wall and cpu (median seconds a call), calls, faults (minor page faults a
      call), peak_rss (bytes).
    """
    begin = time.perf_counter()
    wait(call())
    first = time.perf_counter() - begin
    wall, cpu = [], []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    deadline = time.perf_counter() + seconds
    while len(wall) < least or time.perf_counter() < deadline:
        w, c = time.perf_counter(), time.process_time()
        wait(call())
        wall.append(time.perf_counter() - w)
        cpu.append(time.process_time() - c)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "first": first,
        "wall": statistics.median(wall),
        "cpu": statistics.median(cpu),
        "calls": len(wall),
        "faults": (usage.ru_minflt - before) / len(wall),
        "peak_rss": usage.ru_maxrss * 1024,
    }


def jax_wait(result: Any) -> Any:
    """Block until JAX arrays are computed."""
    import jax

    return jax.block_until_ready(result)


def torch_wait(result: Any) -> Any:
    """Block until the GPU is done; on CPU everything is done already."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result


def gemm_rate(size: int, dtype: str) -> float:
    """FLOP/s of a square matrix product through JAX, random data: the ceiling that MFU is quoted against."""
    import jax
    import jax.numpy as jnp

    a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.dtype(dtype)) for i in (0, 1))
    product = jax.jit(lambda a, b: jax.lax.dot(a, b, preferred_element_type=jnp.float32))
    return 2 * size**3 / repeat(lambda: product(a, b), jax_wait, 1.0)["wall"]
