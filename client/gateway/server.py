"""The gateway: one client of the cluster, its listeners, and what its connections share."""

import asyncio
import secrets
import sys
import time
import traceback
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Final

from client.api import Client
from client.gateway import connection_commands, keys, transactions
from client.gateway.connection import RespConnection
from client.gateway.session import Session
from client.gateway.table import TABLE
from replica.apps import kv

# The application whose operations Redis' commands become.
APPLICATION: Final = kv.APPLICATION
CURSORS_MAX: Final = 4096
SWEEP_S: Final = 2.0
BACKLOG: Final = 512

# The modules that fill the table.
COMMAND_MODULES: Final = (connection_commands, keys, transactions)


@dataclass(frozen=True, slots=True)
class GatewayLimits:
    """What all connections together may take."""

    connections_max: int = 1024
    buffered_bytes_max: int = 256 * 1024 * 1024
    command_s: float = 60.0  # within which a command that has begun must have come whole
    unread_s: float = 60.0  # within which answers that wait must be taken

    def __post_init__(self) -> None:
        if min(self.connections_max, self.buffered_bytes_max) < 1 or min(self.command_s, self.unread_s) <= 0:
            raise ValueError("a gateway's limits must be above 0")


class Cursors:
    """Where SCANs stand: a number for each key after which one goes on. The oldest of too many is forgotten."""

    def __init__(self) -> None:
        self._places: OrderedDict[int, bytes] = OrderedDict()
        # Not from 1: a cursor of another gateway, or of this one before a restart, must not lead anywhere.
        self._last = secrets.randbits(48)

    def add(self, after: bytes) -> int:
        """Return the cursor that goes on after a key."""
        self._last += 1
        self._places[self._last] = after
        if len(self._places) > CURSORS_MAX:
            self._places.popitem(last=False)
        return self._last

    def get(self, cursor: int) -> bytes | None:
        """Return the key after which a cursor goes on, nothing for 0; None if it is not known."""
        return b"" if cursor == 0 else self._places.get(cursor)


class Gateway:
    """Serves Redis' protocol for one open client."""

    def __init__(self, client: Client, password: bytes | None = None, limits: GatewayLimits | None = None) -> None:
        self.client = client
        self.password = password
        self.limits = limits or GatewayLimits()
        self.cursors = Cursors()
        self.commands: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.refusals: Counter[str] = Counter()
        self.version = _version()
        self.accepted = 0
        self.buffered = 0
        self._started = time.monotonic()
        self._connections: dict[RespConnection, None] = {}
        self._server: asyncio.Server | None = None
        self._sweeper: asyncio.Task[None] | None = None

    async def start(self, host: str, port: int) -> tuple[str, int]:
        """Listen for Redis' protocol; return the address. OSError if it cannot be had."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: RespConnection(self), host, port, backlog=BACKLOG)
        self._sweeper = loop.create_task(self._sweep())
        address = self._server.sockets[0].getsockname()
        return address[0], address[1]

    async def close(self) -> None:
        """Stop listening and end the connections, once what is under way has ended by its deadline."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        if self._server is not None:
            self._server.close()
        workers = [one.worker for one in self._connections if one.worker is not None]
        for connection in list(self._connections):
            connection.end()
        if workers:
            await asyncio.wait(workers, timeout=1.0)
        for worker in workers:
            worker.cancel()

    # Called by connections

    def admit(self, connection: RespConnection) -> int | None:
        """Return a number for a new connection; None if there is no place."""
        if len(self._connections) >= self.limits.connections_max:
            self.refusals["too-many-connections"] += 1
            return None
        self._connections[connection] = None
        self.accepted += 1
        return self.accepted

    def leave(self, connection: RespConnection) -> None:
        """Forget a connection."""
        self._connections.pop(connection, None)

    def count_buffered(self, change: int) -> bool:
        """Take in that more or less is buffered; say whether it is not too much."""
        self.buffered += change
        return change <= 0 or self.buffered <= self.limits.buffered_bytes_max

    def failed(self, error: BaseException | None) -> None:
        """Say on standard error what went wrong with a connection."""
        self.refusals["internal-error"] += 1
        traceback.print_exception(error, file=sys.stderr)

    # What is so

    def sessions(self) -> Iterator[Session]:
        """Yield the sessions of all connections."""
        return (connection.session for connection in self._connections if connection.session is not None)

    @property
    def connected(self) -> int:
        """How many connections there are."""
        return len(self._connections)

    @property
    def ready(self) -> bool:
        """Say whether f+1 replicas are connected, so that operations can be answered."""
        return len(self.client.driver.core.connected) >= self.client.cluster.genesis.quorum

    def uptime_s(self) -> float:
        """Return how long the gateway has been there."""
        return time.monotonic() - self._started

    def info(self) -> dict[str, dict[str, object]]:
        """Return what INFO shows, by sections."""
        cluster = self.client.cluster
        core = self.client.driver.core
        return {
            "server": {
                "redis_version": connection_commands.REDIS_VERSION,
                "redis_mode": "standalone",
                "trustlog_version": self.version,
                "uptime_in_seconds": int(self.uptime_s()),
            },
            "clients": {"connected_clients": self.connected, "maxclients": self.limits.connections_max},
            "stats": {
                "total_connections_received": self.accepted,
                "total_commands_processed": self.commands.total(),
                "undecided_commands": self.outcomes["undecided"],
                "not_executed_commands": self.outcomes["not-executed"],
                "refused": self.refusals.total(),
                "buffered_bytes": self.buffered,
            },
            "replication": {"role": "master", "connected_slaves": 0},
            "trustlog": {
                "cluster": cluster.genesis.name,
                "cluster_id": cluster.cluster_id.hex(),
                "replicas": cluster.genesis.n,
                "matching_replies_needed": cluster.genesis.quorum,
                "replicas_connected": len(core.connected),
                "ready": int(self.ready),
                "trust": "this gateway is a client: it checks matching replies itself; trust it as you trust its host",
            },
        }

    async def _sweep(self) -> None:
        """End connections whose command does not come to its end, or whose answers nobody takes."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(min(SWEEP_S, self.limits.command_s / 4, self.limits.unread_s / 4))
            now = loop.time()
            for connection in list(self._connections):
                began, stalled = connection.incomplete_since, connection.unread_since
                if began is not None and now - began > self.limits.command_s:
                    self.refusals["incomplete-command"] += 1
                    connection.end("ERR Protocol error: the command did not come to its end in time")
                elif stalled is not None and now - stalled > self.limits.unread_s:
                    self.refusals["answers-not-read"] += 1
                    connection.abort()


def _version() -> str:
    try:
        return version("trustlog")
    except PackageNotFoundError:
        return "unknown"


__all__ = ["APPLICATION", "TABLE", "Gateway", "GatewayLimits"]
