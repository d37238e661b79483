"""A first meeting of the processes over plain sockets, before JAX's own.

JAX's client ends the whole process (SIGABRT) when the others do not come, with no chance to say what is missing.
Here the wait ends in an exception with the address in it.
"""

import contextlib
import re
import socket
import time

RETRY = 0.2
"""Seconds between two attempts to reach process 0."""

PATIENCE = 2.0
"""Seconds that process 0 listens to one who has connected."""


def meet(address: str, count: int, index: int, timeout: float) -> None:
    """Return when all `count` processes have called this with the same address (host:port of process 0).

    Raises:
      TimeoutError: if they have not within `timeout` seconds, naming the address and who is missing.
      OSError: if process 0 cannot listen there.
    """
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + timeout
    if index == 0:
        _host(address, int(port), count, deadline)
    else:
        _join(address, host.strip("[]"), int(port), index, deadline)


def _host(address: str, port: int, count: int, deadline: float) -> None:
    guests: dict[int, socket.socket] = {}
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    with socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=count) as server:
        while len(guests) < count - 1:
            left = deadline - time.monotonic()
            if left <= 0:
                missing = ", ".join(str(i) for i in range(1, count) if i not in guests)
                raise TimeoutError(f"{address}: process {missing} of {count} did not come")
            server.settimeout(left)
            # A stranger may hang up, or say nothing; both end here.
            with contextlib.suppress(OSError):
                guest, _ = server.accept()
                guest.settimeout(PATIENCE)
                hello = re.fullmatch(rb"jaxlm (\d+)\n", _line(guest))
                if hello and 0 < int(hello.group(1)) < count:
                    guests[int(hello.group(1))] = guest
                else:
                    guest.close()
        for guest in guests.values():
            guest.sendall(b"go\n")
        # Whoever closes first keeps the port busy for a while, and JAX listens on it next: let the guests be first.
        for guest in guests.values():
            with guest, contextlib.suppress(OSError):
                guest.recv(1)


def _join(address: str, host: str, port: int, index: int, deadline: float) -> None:
    last: Exception | None = None
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=left) as link:
                link.sendall(b"jaxlm %d\n" % index)
                if _line(link) == b"go\n":
                    return
        except OSError as error:
            last = error
        time.sleep(RETRY)
    raise TimeoutError(f"{address}: process 0 did not answer ({last})")


def _line(link: socket.socket) -> bytes:
    """What is sent up to a line's end, 64 bytes at most."""
    text = b""
    while not text.endswith(b"\n") and len(text) < 64:
        part = link.recv(1)
        if not part:
            break
        text += part
    return text
