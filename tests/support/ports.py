"""Ports for servers that a test starts later, or again.

Tests run side by side in several processes. Between the choice of a port and the server that listens there, and while
that server is down, nobody holds it; so each process chooses among ports of its own, below those that commands which
tests start choose among (replica/cluster/ports.py).
"""

import os

from replica.cluster import ports

HOST = "127.0.0.1"
FIRST_PORT = 10_000
PORTS_EACH = 1_000
WORKERS_MAX = (ports.FIRST_PORT - FIRST_PORT) // PORTS_EACH


def own_ports() -> range:
    """Return the ports of this process among those that run tests."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % WORKERS_MAX
    first = FIRST_PORT + worker * PORTS_EACH
    return range(first, first + PORTS_EACH)


def free_ports(count: int) -> list[int]:
    return ports.free_ports([HOST] * count)


def free_port() -> int:
    return free_ports(1)[0]


def consecutive_ports(count: int) -> int:
    """Return a port from which on so many are free."""
    for _ in range(100):
        held = sorted(free_ports(count))
        if held[-1] - held[0] == count - 1:
            return held[0]
    raise AssertionError("no free ports")
