"""The asyncio client.

    async with Client.from_dir("demo") as client:
        await client.put("greeting", "hello")
        print(await client.get("greeting"))

Operations are linearizable and run exactly once; calls made at the same time share one signed envelope. Every
call ends by its deadline: with a result that f+1 replicas gave, or with a `ClientError` that says what is
known about the operation. Texts are taken as UTF-8, results are bytes.
"""

import asyncio
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from client.connection import Timing, printable
from client.driver import Driver
from client.errors import ClientError, NotExecuted, OperationFailed, SessionExpired, Undecided
from client.events import Settings
from client.queries import ReplicaStatus, StaleAnswer
from replica.apps import kv
from replica.cluster.clusterfile import ClusterFile, load_cluster_file
from replica.cluster.keys import ClientKey, load_client_key
from replica.core.envelope import Result, Status
from replica.core.layout import LayoutError

DEADLINE_S = 10.0
DEADLINE_S_MAX = 24 * 3600.0
CLIENT_FOLDER = "client"
SCAN_PAGE = 100

Bytes = bytes | str
_Read = TypeVar("_Read")


def to_bytes(value: Bytes) -> bytes:
    """Return bytes as they are, a text as UTF-8; TypeError for anything else."""
    if isinstance(value, str):
        return value.encode()
    if not isinstance(value, bytes):
        raise TypeError(f"keys and values are bytes or str, not {type(value).__name__}")
    return value


def load_cluster(directory: Path | str) -> tuple[ClusterFile, ClientKey]:
    """Read cluster.toml in `directory` and the client key in its folder "client"."""
    place = Path(directory)
    return load_cluster_file(place), load_client_key(place / CLIENT_FOLDER)


class Client:
    """A client of one cluster: an async context manager that connects on entering and disconnects on leaving.

    deadline_s is how long each call may take; every call can be given its own.
    """

    def __init__(
        self,
        cluster: ClusterFile,
        key: ClientKey,
        *,
        deadline_s: float = DEADLINE_S,
        settings: Settings | None = None,
        timing: Timing | None = None,
    ) -> None:
        _check_deadline(deadline_s)
        self.cluster = cluster
        self._key = key
        self._deadline_s = deadline_s
        self._settings, self._timing = settings, timing
        self._driver: Driver | None = None

    @classmethod
    def from_dir(cls, directory: Path | str, *, deadline_s: float = DEADLINE_S) -> Self:
        """Make a client from a cluster directory: cluster.toml and the private folder "client"."""
        cluster, key = load_cluster(directory)
        return cls(cluster, key, deadline_s=deadline_s)

    async def __aenter__(self) -> Self:
        if self._driver is not None:
            raise RuntimeError("this client is open already; make another one")
        self._driver = Driver(self.cluster, self._key, self._settings, self._timing)
        self._driver.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Disconnect. What still waits ends as undecided, or as not executed if it was never sent."""
        driver, self._driver = self._driver, None
        if driver is not None:
            await driver.close()

    @property
    def driver(self) -> Driver:
        """The shell beneath, for statistics; RuntimeError when the client is not open."""
        if self._driver is None:
            raise RuntimeError("this client is not open; use it in `async with`")
        return self._driver

    # Any application.

    def submit(self, operation: bytes, *, deadline_s: float | None = None) -> Awaitable[Result]:
        """Hand in an operation and return a future of its `Result`, whose status may be an error's.

        The cheapest way to have many at once: `execute` without a coroutine of its own.
        """
        return self.driver.submit(operation, self._deadline(deadline_s))

    async def execute(self, operation: bytes, *, deadline_s: float | None = None) -> bytes:
        """Run an operation of any application and return its result; OperationFailed if it refused."""
        loop = asyncio.get_running_loop()
        left = self._deadline(deadline_s)
        end = loop.time() + left
        result = await self.driver.submit(operation, left)
        while result.status is Status.TOO_LARGE:
            # Not executed: what shared its envelope by chance left no room for its result in the reply. The first
            # operation of an envelope always has room, so this ends.
            result = await self.driver.submit(operation, max(end - loop.time(), 0.0))
        if result.status is not Status.OK:
            raise error_of(result)
        return result.value

    async def stale(self, operation: bytes, *, deadline_s: float | None = None) -> StaleAnswer:
        """Run a reading operation outside the order, at f+1 replicas that must answer alike: perhaps old."""
        return await self.driver.stale(operation, self._deadline(deadline_s))

    async def status(self, *, deadline_s: float | None = None) -> list[ReplicaStatus]:
        """Ask every replica for its own report; unreachable ones are in the list and say why."""
        return await self.driver.status(self._deadline(deadline_s))

    # The key-value store.

    async def put(self, key: Bytes, value: Bytes, *, deadline_s: float | None = None) -> bool:
        """Set a key; say whether it had a value before."""
        operation = kv.put(to_bytes(key), to_bytes(value))
        return _read(kv.read_flag, await self.execute(operation, deadline_s=deadline_s))

    async def get(self, key: Bytes, *, deadline_s: float | None = None) -> bytes | None:
        """Return a key's value, None if it has none; linearizable."""
        return _read(kv.read_value, await self.execute(kv.get(to_bytes(key)), deadline_s=deadline_s))

    async def stale_get(self, key: Bytes, *, deadline_s: float | None = None) -> bytes | None:
        """Return a value that f+1 replicas hold; perhaps not the latest, because nothing was ordered."""
        answer = await self.stale(kv.get(to_bytes(key)), deadline_s=deadline_s)
        if answer.status is not Status.OK:
            raise OperationFailed(_refusal(answer.value))
        return _read(kv.read_value, answer.value)

    async def delete(self, key: Bytes, *, deadline_s: float | None = None) -> bool:
        """Remove a key; say whether it had a value."""
        operation = kv.delete(to_bytes(key))
        return _read(kv.read_flag, await self.execute(operation, deadline_s=deadline_s))

    async def cas(
        self, key: Bytes, expected: Bytes | None, new: Bytes, *, deadline_s: float | None = None
    ) -> kv.CasResult:
        """Set a key if its value is the expected one (None: if it has none); say whether, else what it is."""
        wanted = None if expected is None else to_bytes(expected)
        operation = kv.cas(to_bytes(key), wanted, to_bytes(new))
        return _read(kv.read_cas, await self.execute(operation, deadline_s=deadline_s))

    async def incr(self, key: Bytes, amount: int = 1, *, deadline_s: float | None = None) -> int:
        """Add to the decimal number at a key (absent: 0) and return the sum."""
        if not isinstance(amount, int):
            raise TypeError(f"the amount is an int, not {type(amount).__name__}")
        operation = kv.incr(to_bytes(key), amount)
        return _read(kv.read_number, await self.execute(operation, deadline_s=deadline_s))

    async def scan_page(
        self,
        prefix: Bytes = b"",
        *,
        limit: int = SCAN_PAGE,
        after: Bytes = b"",
        deadline_s: float | None = None,
    ) -> kv.ScanResult:
        """Return up to `limit` keys with a prefix and their values in byte order, from above `after` on."""
        operation = kv.scan(to_bytes(prefix), limit, to_bytes(after))
        return _read(kv.read_scan, await self.execute(operation, deadline_s=deadline_s))

    async def scan(
        self, prefix: Bytes = b"", *, page: int = SCAN_PAGE, deadline_s: float | None = None
    ) -> AsyncIterator[tuple[bytes, bytes]]:
        """Yield all keys with a prefix and their values, page by page; each page is one linearizable read."""
        after = b""
        while True:
            found = await self.scan_page(prefix, limit=page, after=after, deadline_s=deadline_s)
            for key, value in found.items:
                yield key, value
            if not found.more or not found.items:
                return
            after = found.items[-1][0]

    def _deadline(self, deadline_s: float | None) -> float:
        if deadline_s is None:
            return self._deadline_s
        _check_deadline(deadline_s)
        return deadline_s


def error_of(result: Result) -> ClientError:
    """Return the exception for a result that f+1 replicas gave and that is not OK."""
    if result.status is Status.ERROR:
        return OperationFailed(_refusal(result.value))
    if result.status is Status.EXPIRED:
        return SessionExpired(
            "session expired: outcome unknown. The cluster has dropped this client's session (it keeps a "
            "limited number); read what there is, then decide whether to repeat"
        )
    if result.status is Status.TOO_LARGE:
        return NotExecuted("not executed: no room for its result beside those of its envelope; submit it again")
    if result.status is Status.OUT_OF_WINDOW:
        return Undecided("outcome unknown: the number was too far ahead when it came, and may be executed later")
    return Undecided(
        "outcome unknown: the cluster no longer keeps the result of this operation; read what there is, then "
        "decide whether to repeat"
    )


def _refusal(value: bytes) -> str:
    return f"the application refused the operation: {printable(value.decode(errors='replace'))}"


def _read(reader: Callable[[bytes], _Read], value: bytes) -> _Read:
    try:
        return reader(value)
    except (LayoutError, struct.error) as error:
        raise OperationFailed(
            f"the result is not one of the key-value store ({error}); if this cluster runs another "
            "application, use execute"
        ) from error


def _check_deadline(deadline_s: float) -> None:
    if not 0 < deadline_s <= DEADLINE_S_MAX:
        raise ValueError(f"a deadline is above 0 and at most {DEADLINE_S_MAX:g} seconds, not {deadline_s}")
