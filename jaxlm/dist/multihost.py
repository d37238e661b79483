"""Several processes as one: joining them, agreeing, waiting, and who writes."""

import hashlib
import math
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxlm.dist import rendezvous

COORDINATOR, COUNT, INDEX = "JAXLM_COORDINATOR", "JAXLM_NUM_PROCESSES", "JAXLM_PROCESS_ID"
"""Environment variables that say how to join where no cluster manager that JAX knows does."""

TIMEOUT = 300
"""Seconds to wait for the other processes; nodes of one job may start minutes apart."""


class Join(NamedTuple):
    """How this process joins the others; fields that are None are found by JAX in the cluster's own variables.

    Attributes:
      source: what asked for it, for messages.
      coordinator: host:port of process 0.
      processes: number of them.
      process: number of this one, from 0.
    """

    source: str
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None


def find_join(environ: Mapping[str, str]) -> Join | None:
    """What the environment says about other processes; None: this process is alone.

    `JAXLM_COORDINATOR`, `JAXLM_NUM_PROCESSES` and `JAXLM_PROCESS_ID` come first, then SLURM steps and Open MPI
    with several tasks, Cloud TPU with several hosts, indexed Kubernetes jobs (needs the `kubernetes` package).

    Raises:
      ValueError: naming the variable that is missing or wrong.
    """
    names = (COORDINATOR, COUNT, INDEX)
    missing = [name for name in names if not environ.get(name)]
    if len(missing) < len(names):
        if missing:
            raise ValueError(f"{missing[0]}: not set, but other JAXLM_ variables are; set all of {', '.join(names)}")
        return _named(environ)
    if "SLURM_JOB_ID" in environ and "SLURM_PROCID" in environ:
        return _slurm(environ)
    if int(environ.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return Join("Open MPI")
    hosts = [host for host in environ.get("TPU_WORKER_HOSTNAMES", "").split(",") if host]
    if len(hosts) > 1 or int(environ.get("MEGASCALE_NUM_SLICES", "1")) > 1:
        return Join(f"Cloud TPU (hosts {','.join(hosts)})")
    if "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ:
        return Join("Kubernetes")
    return None


def _named(environ: Mapping[str, str]) -> Join:
    numbers = {}
    for name in (COUNT, INDEX):
        try:
            numbers[name] = int(environ[name])
        except ValueError:
            raise ValueError(f"{name}: {environ[name]!r} is not a whole number; give one") from None
    if not 0 <= numbers[INDEX] < numbers[COUNT]:
        raise ValueError(f"{INDEX}: {numbers[INDEX]} is not in 0..{numbers[COUNT] - 1} ({COUNT} {numbers[COUNT]})")
    host, _, port = environ[COORDINATOR].rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"{COORDINATOR}: {environ[COORDINATOR]!r} is not host:port; use e.g. 10.0.0.1:8476")
    return Join(COORDINATOR, environ[COORDINATOR], numbers[COUNT], numbers[INDEX])


def _slurm(environ: Mapping[str, str]) -> Join | None:
    """Process 0 stands on the first node of the step; its port follows from the job, as in JAX's own detection."""
    # A batch script without srun is a step of one task, however many the job has.
    count = int(environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS", "1"))
    if count == 1:
        return None
    nodes = environ.get("SLURM_STEP_NODELIST", "localhost")
    first = re.sub(r"^([^,\[]*)(?:\[([^,\-\]]*)[^\]]*\])?.*$", r"\1\2", nodes)
    port = 61440 + int(environ["SLURM_JOB_ID"]) % 4096
    return Join(f"SLURM nodes {nodes}", f"{first}:{port}", count, int(environ["SLURM_PROCID"]))


def initialize(environ: Mapping[str, str] | None = None, timeout: float = TIMEOUT) -> bool:
    """Join the other processes of this job, if there are any; must come before any use of devices.

    Args:
      environ: environment variables; null: of this process. See `find_join`.
      timeout: seconds to wait for the others.

    Returns:
      Whether there are others.

    Raises:
      ValueError: naming a variable that is missing or wrong.
      RuntimeError: if the others do not come up in time, naming the coordinator's address.
    """
    if jax.distributed.is_initialized():
        return jax.process_count() > 1
    join = find_join(os.environ if environ is None else environ)
    if join is None:
        return False
    try:
        if join.coordinator is not None and join.processes is not None and join.process is not None:
            rendezvous.meet(join.coordinator, join.processes, join.process, timeout)
        jax.distributed.initialize(
            join.coordinator, join.processes, join.process, initialization_timeout=math.ceil(timeout)
        )
    except (OSError, RuntimeError) as error:
        raise RuntimeError(
            f"{join.source}: could not join the other processes within {timeout} s: {error}; check that all of them "
            "were started and that the address of process 0 can be reached"
        ) from error
    return jax.process_count() > 1


def is_main() -> bool:
    """Whether this process is the one that writes files and talks to the user."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait until every process has come here; `name` must be the same in all."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def agree(name: str, data: bytes) -> None:
    """Make sure that every process holds the same bytes: a configuration, a data fingerprint.

    All processes must call it, in the same order; all of them raise if one differs.

    Args:
      name: what is compared, for the message.
      data: the bytes of this process; only a hash travels.

    Raises:
      ValueError: naming the processes that differ from process 0.
    """
    digest = np.frombuffer(hashlib.sha256(data).digest(), np.uint8)
    digests = all_hosts(digest)
    different = [str(index) for index, other in enumerate(digests) if not np.array_equal(other, digests[0])]
    if different:
        raise ValueError(
            f"{name}: process {', '.join(different)} differs from process 0; start every process with the same one"
        )


def anywhere(flag: bool) -> bool:
    """Whether the flag is set in any process, so that all can act on it at the same step; all must call it."""
    return bool(all_hosts(np.asarray(flag)).any())


def all_hosts(values: Any) -> np.ndarray:
    """The NumPy arrays (of equal shape) of all processes, stacked in their order: [...] -> [processes, ...]."""
    values = np.asarray(values)
    if jax.process_count() == 1:
        return values[None]
    return np.asarray(multihost_utils.process_allgather(values))
