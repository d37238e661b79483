"""One side of a case in this process: prints one line of JSON."""

import importlib
import json
import os
import sys


def pin(threads: int) -> None:
    """Keep this process on so many cores; torch's thread pool follows, XLA's and Eigen's see the affinity."""
    if hasattr(os, "sched_setaffinity"):
        available = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, available[:threads])


def main() -> None:
    """`python -m scripts.bench.worker CASE SIDE OPTIONS`."""
    case, side, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    pin(options["threads"])
    sides = importlib.import_module(f"scripts.bench.cases.{case}").SIDES
    print(json.dumps(sides[side](options)))


if __name__ == "__main__":
    main()
