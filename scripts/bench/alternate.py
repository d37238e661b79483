"""Outside: run the sides of a case in alternation, each in a fresh process, and compare them."""

import ctypes.util
import datetime
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import statistics
import subprocess
import sys
from typing import Any

KEEPING = {
    "tcmalloc": {"TCMALLOC_RELEASE_RATE": "0", "TCMALLOC_LARGE_ALLOC_REPORT_THRESHOLD": str(1 << 40)},
    "jemalloc": {"MALLOC_CONF": "dirty_decay_ms:-1,muzzy_decay_ms:-1"},
}
"""Settings with which allocators keep large blocks for good. The system's gives them back, and has them zeroed anew in
every step."""

HUGE = {"glibc-huge-pages": {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}}
"""glibc as it is, but with large blocks in pages of 2 MB: zeroed anew just so, but 200 times as few."""

LARGEST_SPREAD = 0.10
PACKAGES = ("jax", "jaxlib", "flax", "torch", "transformers")


def run_side(case: str, side: str, options: dict[str, Any]) -> dict[str, Any]:
    """One side in a process of its own; what it printed last, as JSON."""
    command = [sys.executable, "-m", "scripts.bench.worker", case, side, json.dumps(options)]
    done = subprocess.run(command, env=environment(options), capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "Error" in line]
        raise RuntimeError(f"{case} {side}: {errors[-1] if errors else 'failed'}; run it alone: {shlex.join(command)}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def environment(options: dict[str, Any]) -> dict[str, str]:
    """The same threads and the same allocator for both sides."""
    count = str(options["threads"])
    cores = {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "BENCH_CORES": count}
    return {**os.environ, **cores, **allocators()[options["allocator"]], "PYTHONWARNINGS": "ignore"}


@functools.cache
def allocators() -> dict[str, dict[str, str]]:
    """The allocators that are here, best first, and what the sides' environments have for them."""
    libraries = {
        name: ctypes.util.find_library(f"{name}_minimal") or ctypes.util.find_library(name) for name in KEEPING
    }
    found = {name: KEEPING[name] | {"LD_PRELOAD": file} for name, file in libraries.items() if file}
    return found | (HUGE if huge_pages() else {}) | {"system": {}}


def huge_pages() -> bool:
    """Whether glibc can be asked for pages of 2 MB (since 2.35) and the kernel has them."""
    library, version = platform.libc_ver()
    switch = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
    new = library == "glibc" and tuple(map(int, version.split(".")[:2])) >= (2, 35)
    return new and switch.exists() and "[never]" not in switch.read_text()


def compare(case: str, sides: list[str], options: dict[str, Any], pairs: int) -> dict[str, Any]:
    """Run `pairs` rounds of all sides, every other round in reverse order, and summarise.

    Returns:
      Per side the median of each measured number over rounds and the spread (interquartile range over median) of the
      clock that is compared; per peer the median over rounds of peer / jaxlm: above 1, jaxlm is faster.
    """
    rounds: list[dict[str, dict[str, Any]]] = []
    for index in range(pairs):
        order = sides if index % 2 == 0 else sides[::-1]
        rounds.append({side: run_side(case, side, options) for side in order})
    clock = options["clock"]
    own = sides[0]
    found = {
        side: {
            **{name: median([r[side][name] for r in rounds]) for name in rounds[0][side]},
            "spread": spread([r[side][clock] for r in rounds]),
        }
        for side in sides
    }
    ratios = {side: median([r[side][clock] / r[own][clock] for r in rounds]) for side in sides[1:]}
    return {"case": case, "options": options, "sides": found, "ratios": ratios, "environment": surroundings()}


def median(values: list[Any]) -> Any:
    """The median of numbers; of anything else the first."""
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    return statistics.median(values) if numbers else values[0]


def spread(values: list[float]) -> float:
    """Interquartile range over median; the range where there are fewer than four values."""
    if len(values) < 4:
        return (max(values) - min(values)) / statistics.median(values)
    quarters = statistics.quantiles(values, n=4, method="inclusive")
    return (quarters[2] - quarters[0]) / quarters[1]


def surroundings() -> dict[str, Any]:
    """Versions, processor, load, allocator, flags: what a figure depends on."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "LD_PRELOAD": os.path.basename(os.environ.get("LD_PRELOAD", "")),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        "versions": versions,
    }


def processor() -> str:
    """The processor's name."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def table(result: dict[str, Any], force: bool = False) -> str:
    """A result as text; without `force` a ratio whose sides are too unsteady is withheld."""
    clock = result["options"]["clock"]
    lines = [f"{result['case']}  {json.dumps(result['options'])}"]
    for side, numbers in result["sides"].items():
        extra = "  ".join(f"{n} {v:.4g}" for n, v in numbers.items() if n in SHOWN and isinstance(v, int | float))
        lines.append(f"  {side:16} {clock} {numbers[clock]:.4g} s  spread {numbers['spread']:.1%}  {extra}")
    own = next(iter(result["sides"]))
    for side, ratio in result["ratios"].items():
        unsteady = max(result["sides"][side]["spread"], result["sides"][own]["spread"])
        steady = unsteady <= LARGEST_SPREAD or force
        shown = f"{ratio:.3f}" if steady else f"withheld: spread {unsteady:.0%} is over {LARGEST_SPREAD:.0%} (--force)"
        lines.append(f"  {side} / {own}: {shown}")
    return "\n".join(lines)


SHOWN = ("tokens_per_second", "mfu_gemm", "mfu_peak", "first", "cpu", "faults", "temporary", "peak_rss", "bandwidth")
