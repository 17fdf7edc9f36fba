"""Ports for servers that start later, and start again.

A port that the system hands out (bind to port 0) is one that it also gives to outgoing connections; while the server
that was promised it is down, anybody's connection may take it, and the server cannot come back. So ports are searched
for below that range (Linux: ip(7), ip_local_port_range), from a place by chance, so that two searches at the same time
do not meet.
"""

import errno
import random
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

RANGE_FILE: Final = Path("/proc/sys/net/ipv4/ip_local_port_range")
# What IANA reserves for outgoing connections (RFC 6335, section 6), where the system does not say what it uses.
OUTGOING_FIRST: Final = 49152
FIRST_PORT: Final = 20000
FEWEST: Final = 1000
# The port is somebody's, or may not be had: the next one may.
_TAKEN: Final = (errno.EADDRINUSE, errno.EACCES)


class NoPortError(OSError):
    """No port can be had; the text says of which host, and why."""


def servers_ports() -> range:
    """Return the ports that no outgoing connection takes; empty if the system leaves too few."""
    try:
        last = int(RANGE_FILE.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        last = OUTGOING_FIRST
    return range(FIRST_PORT, last) if last - FIRST_PORT >= FEWEST else range(0)


def free_ports(hosts: Sequence[str]) -> list[int]:
    """Return a port for each of these hosts of this machine: nobody listens there now, and no two of a host are equal.

    NoPortError: a host is not here, or every port of it is taken.
    """
    ports = servers_ports()
    start = random.randrange(len(ports)) if ports else 0  # noqa: S311 - no secret
    # Better one that may be lost while its server is down than none.
    candidates = [*ports[start:], *ports[:start], 0]
    # All sockets stay open until every port is chosen, or one might be found twice.
    with ExitStack() as stack:
        return [_hold(stack, host, candidates) for host in hosts]


def _hold(stack: ExitStack, host: str, candidates: Sequence[int]) -> int:
    try:
        family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
        for port in candidates:
            holder = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            try:
                holder.bind((host, port))
            except OSError as error:
                if error.errno not in _TAKEN:
                    raise
                holder.close()
            else:
                return int(holder.getsockname()[1])
    except OSError as error:
        raise NoPortError(f"no free port of {host} can be found from here ({error.strerror})") from error
    raise NoPortError(f"no free port of {host} can be found from here (all are taken)")
