"""The asyncio client.

    async with Client.from_dir("demo") as client:
        await client.put("greeting", "hello")
        print(await client.get("greeting"))

Operations are linearizable and run exactly once; calls made at the same time share one signed envelope. Every
call ends by its deadline: with a result that f+1 replicas gave, or with a `ClientError` that says what is
known about the operation. Texts are taken as UTF-8, results are bytes.
"""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from client.connection import Timing
from client.driver import Driver
from client.errors import (
    ClientError,
    NoLongerAllowed,
    NoReceipt,
    NotExecuted,
    NotOffered,
    SessionExpired,
    Undecided,
    Unreachable,
)
from client.events import Settings
from client.queries import ReplicaStatus, StaleAnswer, number_in
from client.store import SCAN_PAGE, Bytes, KeyValueCalls, not_permitted, refusal, to_bytes
from client.watch import Position, Watch
from replica.apps import kv
from replica.cluster.clusterfile import ClusterFile
from replica.cluster.keys import ClientKey
from replica.cluster.memberlists import load_any_present_cluster
from replica.cluster.passphrase import PassphraseSource, unlocked_client_key
from replica.cluster.pbft import NO_LOGS
from replica.core.envelope import Result, Status
from trustlog.receipts import Outcome, Receipt

__all__ = ["DEADLINE_S", "DEADLINE_S_MAX", "SCAN_PAGE", "Bytes", "Client", "error_of", "load_cluster", "to_bytes"]

DEADLINE_S = 10.0
DEADLINE_S_MAX = 24 * 3600.0
CLIENT_FOLDER = "client"

_Value = TypeVar("_Value")


def load_cluster(directory: Path | str, passphrase: PassphraseSource | None = None) -> tuple[ClusterFile, ClientKey]:
    """Read cluster.toml in `directory` and the client key in its folder "client".

    passphrase: where it comes from, if that key is encrypted; without one, from what TRUSTLOG_PASSPHRASE_FILE names.
    """
    place = Path(directory)
    return load_any_present_cluster(place), unlocked_client_key(place / CLIENT_FOLDER, passphrase)


class Client(KeyValueCalls):
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
        self._cluster = cluster
        self._key = key
        self._deadline_s = deadline_s
        self._settings, self._timing = settings, timing
        self._driver: Driver | None = None

    @classmethod
    def from_dir(
        cls, directory: Path | str, *, deadline_s: float = DEADLINE_S, passphrase: PassphraseSource | None = None
    ) -> Self:
        """Make a client from a cluster directory: cluster.toml and the private folder "client".

        passphrase: see `load_cluster`. ConfigError says what is wrong with a file, or that there is no passphrase.
        """
        cluster, key = load_cluster(directory, passphrase)
        return cls(cluster, key, deadline_s=deadline_s)

    async def __aenter__(self) -> Self:
        if self._driver is not None:
            raise RuntimeError("this client is open already; make another one")
        self._driver = Driver(self._cluster, self._key, self._settings, self._timing)
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
            self._cluster = driver.cluster
            await driver.close()

    @property
    def cluster(self) -> ClusterFile:
        """The cluster under the last list of members that this client knows; it learns of later ones by itself."""
        return self._cluster if self._driver is None else self._driver.cluster

    @property
    def public_key(self) -> bytes:
        """The key by which replicas know this client, 65 bytes."""
        return self._key.public_key

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

    async def with_receipt(
        self, call: Callable[[KeyValueCalls], Awaitable[_Value]], *, deadline_s: float | None = None
    ) -> tuple[_Value, Receipt]:
        """Make one call, and get what it returns with a receipt of its operation (`client.receipts`).

            replaced, receipt = await client.with_receipt(lambda calls: calls.put("greeting", "hello"))

        NoReceipt if it was executed and f+1 replicas do not show it in time. ValueError unless it is one operation,
        NotOffered if the cluster has no trusted logs.
        """
        self._check_logs()
        loop = asyncio.get_running_loop()
        ends = loop.time() + self._deadline(deadline_s)
        calls = OneOperation(self, ends)
        value = await call(calls)
        if calls.outcome is None:
            raise ValueError("a receipt is of one ordered operation, and there was none")
        try:
            return value, await self.driver.receipt(calls.outcome, max(ends - loop.time(), 0.001))
        except Undecided as error:
            raise NoReceipt(f"the operation was executed; {error}", value) from error

    async def stale(self, operation: bytes, *, deadline_s: float | None = None) -> StaleAnswer:
        """Run a reading operation outside the order, at f+1 replicas that must answer alike: perhaps old."""
        return await self.driver.stale(operation, self._deadline(deadline_s))

    async def status(self, *, deadline_s: float | None = None) -> list[ReplicaStatus]:
        """Ask every replica for its own report; unreachable ones are in the list and say why."""
        return await self.driver.status(self._deadline(deadline_s))

    def watch(
        self, prefix: Bytes = b"", *, after: Position | None = None, deadline_s: float | None = None
    ) -> "Watching":
        """Watch the keys with a prefix: `async with client.watch("user/") as changes`, then `async for`.

        after: where to resume; without it, what changes from now on. deadline_s is for the beginning. See client.watch.
        """
        self._check_logs()
        return Watching(self, to_bytes(prefix), after, self._deadline(deadline_s))

    async def slot(self, *, deadline_s: float | None = None) -> int:
        """Return a slot that is executed now, for a watch that begins after it: it sees all that is done from now on.

        With the key-value store it is the slot of an operation ordered for it, so what was done before is not seen.
        With another application f+1 replicas have reached it, as they say; what was done just now may be seen.
        """
        genesis = self.cluster.genesis
        if genesis.application != kv.APPLICATION:
            found = [one.report for one in await self.status(deadline_s=deadline_s) if one.report]
            slots = sorted((number_in(report, "executed") for report in found), reverse=True)
            if len(slots) < genesis.quorum:
                raise Unreachable(f"{len(slots)} replicas say what they executed, {genesis.quorum} are needed")
            return slots[genesis.f]
        result = await self.submit(kv.get(b"slot"), deadline_s=deadline_s)
        if result.status not in {Status.OK, Status.TOO_LARGE, Status.NOT_PERMITTED}:
            raise error_of(result)
        return result.slot

    def _check_logs(self) -> None:
        """Raise NotOffered in a PBFT cluster, whose replicas have nothing to show and keep no history."""
        if not self.cluster.has_logs:
            raise NotOffered(NO_LOGS)

    def _deadline(self, deadline_s: float | None) -> float:
        if deadline_s is None:
            return self._deadline_s
        _check_deadline(deadline_s)
        return deadline_s


class Watching:
    """The way into a watch: finds where it begins, then enters it."""

    def __init__(self, client: Client, prefix: bytes, after: Position | None, deadline_s: float) -> None:
        self._client, self._prefix, self._after, self._deadline_s = client, prefix, after, deadline_s
        self._watch: Watch | None = None

    async def __aenter__(self) -> Watch:
        """Return the watch when f+1 replicas tell what changes; ClientError if they do not within the deadline."""
        after = self._after
        if after is None:
            after = Position(await self._client.slot(deadline_s=self._deadline_s))
        self._watch = Watch(self._client.driver, self._prefix, after, self._deadline_s)
        return await self._watch.__aenter__()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._watch is not None:
            await self._watch.close()


class OneOperation(KeyValueCalls):
    """The calls for one operation of which a receipt is wanted; `outcome` says how it ended. ends: the loop's time."""

    def __init__(self, client: Client, ends: float) -> None:
        self.outcome: Outcome | None = None
        self._client, self._ends = client, ends
        self._is_used = False

    async def execute(self, operation: bytes, *, deadline_s: float | None = None) -> bytes:
        """Run the operation; ValueError for a second one."""
        if self._is_used:
            raise ValueError("a receipt is of one operation, and this call makes another one")
        self._is_used = True
        while True:
            done = await self._client.driver.execute(operation, self._deadline(deadline_s))
            if done.result.status is not Status.TOO_LARGE:  # see Client.execute
                break
        if done.result.status is not Status.OK:
            raise error_of(done.result)
        self.outcome = done.outcome(self._client.public_key, operation)
        return done.result.value

    async def stale(self, operation: bytes, *, deadline_s: float | None = None) -> StaleAnswer:  # noqa: ARG002
        """Refuse: what nobody ordered has no receipt."""
        raise ValueError("there is no receipt of what was not ordered")

    def _deadline(self, deadline_s: float | None) -> float:
        left = max(self._ends - asyncio.get_running_loop().time(), 0.0)
        return left if deadline_s is None else min(left, deadline_s)


def error_of(result: Result) -> ClientError:
    """Return the exception for a result that f+1 replicas gave and that is not OK."""
    if result.status is Status.ERROR:
        return refusal(result.value)
    if result.status is Status.NOT_PERMITTED:
        return not_permitted(result.value)
    if result.status is Status.NOT_ALLOWED:
        return NoLongerAllowed(
            "outcome unknown: this client's key was revoked, or is not allowed. What was on its way before may have "
            "been executed; nothing more is"
        )
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


def _check_deadline(deadline_s: float) -> None:
    if not 0 < deadline_s <= DEADLINE_S_MAX:
        raise ValueError(f"a deadline is above 0 and at most {DEADLINE_S_MAX:g} seconds, not {deadline_s}")
