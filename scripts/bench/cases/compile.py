"""Time to the first step: tracing and compiling 24 layers cold and from the cache, and 4 layers cold."""

import os
import tempfile
import time
from typing import Any

from scripts.bench.cases.train import shape_of

Options = dict[str, Any]


def compile_step(options: Options, layers: int, cache: str | None) -> dict[str, Any]:
    """Seconds of tracing and of compiling a scanned step of so many layers."""
    import dataclasses
    import functools

    import jax

    from jaxlm.training.plan import abstract_batch
    from jaxlm.training.step import train_step
    from scripts.bench.cases.train import jaxlm_program

    if cache is not None:
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    shape = dataclasses.replace(shape_of(options), layers=layers)
    program, state, _ = jaxlm_program(shape, options | {"scan": True})
    from jaxlm import config as configs

    settings = configs.build({"data": {"sequence_length": shape.length}, "train": {"batch_size": shape.rows}})
    begin, cpu = time.perf_counter(), time.process_time()
    lowered = jax.jit(functools.partial(train_step, program.recipe), donate_argnums=0).lower(
        state, {}, abstract_batch(settings, program)
    )
    traced = time.perf_counter() - begin
    lowered.compile()
    return {"wall": time.perf_counter() - begin, "cpu": time.process_time() - cpu, "trace": traced}


def cold(options: Options) -> dict[str, Any]:
    """24 layers, nothing cached."""
    return compile_step(options, 24, None)


def warm(options: Options) -> dict[str, Any]:
    """24 layers, compiled before by another process."""
    folder = os.path.join(tempfile.gettempdir(), "jaxlm-bench-cache")
    child = os.fork()
    if child == 0:
        compile_step(options, 24, folder)
        os._exit(0)
    os.waitpid(child, 0)
    return compile_step(options, 24, folder)


def shallow(options: Options) -> dict[str, Any]:
    """4 layers, nothing cached."""
    return compile_step(options, 4, None)


SIDES = {"cold": cold, "warm": warm, "shallow": shallow}
