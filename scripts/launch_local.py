"""Start one command as N processes of one job on this machine, for tests and for trying things out.

    python scripts/launch_local.py -n 2 --devices 2 -- jaxlm train configs/quickstart.yaml

Each process gets JAXLM_COORDINATOR, JAXLM_NUM_PROCESSES and JAXLM_PROCESS_ID; its lines are printed behind its number.
When one process fails, the others are stopped, and its exit code is the launcher's. Signals are passed on.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import IO


def free_port() -> int:
    """A TCP port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(index: int, count: int, port: int, devices: int | None) -> dict[str, str]:
    """The environment of process `index`; `devices` simulated CPU devices each, or as it is."""
    env = os.environ | {
        "JAXLM_COORDINATOR": f"127.0.0.1:{port}",
        "JAXLM_NUM_PROCESSES": str(count),
        "JAXLM_PROCESS_ID": str(index),
        "PYTHONUNBUFFERED": "1",
    }
    if devices is not None:
        # The last of repeated flags counts.
        env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}".strip()
    return env


def relay(source: IO[str], sink: IO[str], prefix: str) -> threading.Thread:
    """Copy lines with a prefix until the source ends, in a thread."""

    def copy() -> None:
        for line in source:
            sink.write(f"{prefix}{line if line.endswith(chr(10)) else line + chr(10)}")
            sink.flush()

    thread = threading.Thread(target=copy, daemon=True)
    thread.start()
    return thread


def stop(processes: list[subprocess.Popen], grace: float) -> None:
    """Ask the running ones to end, and end those that have not after `grace` seconds."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + grace
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def watch(processes: list[subprocess.Popen], grace: float) -> int:
    """Wait for all; at the first failure stop the rest. Returns the first failure's exit code, or 0."""
    while any(process.poll() is None for process in processes):
        failed = [code for code in (process.poll() for process in processes) if code]
        if failed:
            stop(processes, grace)
            return exit_code(failed[0])
        time.sleep(0.05)
    return next((exit_code(process.returncode) for process in processes if process.returncode), 0)


def exit_code(code: int) -> int:
    """A shell's number for it: 128 + signal where the process was ended by one."""
    return 128 - code if code < 0 else code


def launch(command: list[str], count: int, devices: int | None = None, grace: float = 10.0) -> int:
    """Run `command` as `count` processes; returns the exit code."""
    port = free_port()
    processes = [
        subprocess.Popen(
            command,
            env=environment(index, count, port, devices),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]

    def forward(number: int, _frame: object) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    threads = []
    for index, process in enumerate(processes):
        assert process.stdout is not None and process.stderr is not None
        threads += [relay(process.stdout, sys.stdout, f"[{index}] "), relay(process.stderr, sys.stderr, f"[{index}] ")]
    code = watch(processes, grace)
    for thread in threads:
        thread.join(timeout=5)
    return code


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", "--processes", type=int, default=2)
    parser.add_argument("--devices", type=int, help="simulated CPU devices of each process")
    parser.add_argument("--grace", type=float, default=10.0, help="seconds between asking and killing")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="after --")
    arguments = parser.parse_args()
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if not command:
        parser.error("no command; give it after --")
    return launch(command, arguments.processes, arguments.devices, arguments.grace)


if __name__ == "__main__":
    sys.exit(main())
