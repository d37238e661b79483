"""Strict JAX for every test: silent broadcasting between ranks is an error."""

import gc
import importlib.metadata
import os
import pathlib

FAST_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # The emitters of before compile in half the time. Later releases have no others, and end on a flag they lack.
    FAST_COMPILE += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count=8 {FAST_COMPILE}")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

MAPS = 15_000
"""Mapped regions of memory after which compiled programs are dropped. Each program maps several, Linux allows a process
65,530, and the compiler ends in a segmentation fault when it gets no more."""


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Compiled programs are shared within a file, and let go behind it when there are many."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory):
    """Prepared data and compiled programs of a file's tests are kept apart from those of others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
