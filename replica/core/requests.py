"""Requests that wait to be ordered: bounded, one queue per client, served in turn.

A replica keeps what clients sent it until it is executed: the primary to propose it, a backup to hand it to the
primary. Serving clients in turn keeps one client's flood from another's way.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from replica.core.batch import BATCH_OVERHEAD_MAX
from replica.core.envelope import Envelope
from replica.core.genesis import MIB, Limits

REQUESTS_MAX = 8192
# Digests of executed requests that are remembered.
EXECUTED_MAX = 8192
EXECUTED_PAUSE_MS = 500
REQUEST_BYTES_MAX = 64 * MIB
REQUESTS_PER_CLIENT_MAX = 256
REQUEST_BYTES_PER_CLIENT_MAX = 16 * MIB
# How long a backup waits before it hands a request to the primary for the second time.
RELAY_PAUSE_MS = 300


@dataclass(slots=True)
class Waiting:
    """A request that is not executed yet. Times in milliseconds."""

    envelope: Envelope
    digest: bytes
    since_ms: int
    relay_at_ms: int = 0
    relay_pause_ms: int = RELAY_PAUSE_MS
    proposed: bool = False


class RequestQueue:
    """Requests by digest, and per client in order of arrival."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._waiting: dict[bytes, Waiting] = {}
        self._unproposed: dict[bytes, dict[bytes, Waiting]] = {}  # client -> digest -> request
        self._by_client: dict[bytes, dict[bytes, Waiting]] = {}  # as above, those proposed included
        self._client_bytes: dict[bytes, int] = {}
        self._bytes = 0
        self._executed: dict[bytes, tuple[int, int]] = {}  # digest -> how often, when last; the latest last

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Waiting]:
        return iter(self._waiting.values())

    @property
    def unproposed(self) -> bool:
        """Say whether anything waits to be proposed."""
        return bool(self._unproposed)

    def add(self, envelope: Envelope, now_ms: int) -> Waiting | None:
        """Take a request; return None if it waits already. QueueFullError, changing nothing, if there is no room."""
        digest = envelope.digest()
        if digest in self._waiting:
            return None
        size = len(envelope.raw)
        count, taken = len(self.of(envelope.client)), self._client_bytes.get(envelope.client, 0)
        if len(self._waiting) >= REQUESTS_MAX or self._bytes + size > REQUEST_BYTES_MAX:
            raise QueueFullError("this replica has too many requests waiting; send again later")
        if count >= REQUESTS_PER_CLIENT_MAX or taken + size > REQUEST_BYTES_PER_CLIENT_MAX:
            raise QueueFullError("this client has too many requests waiting; wait for replies before sending more")
        waiting = Waiting(envelope, digest, now_ms)
        self._waiting[digest] = waiting
        self._by_client.setdefault(envelope.client, {})[digest] = waiting
        self._client_bytes[envelope.client] = taken + size
        self._bytes += size
        self._unproposed.setdefault(envelope.client, {})[digest] = waiting
        return waiting

    def find(self, envelope: Envelope) -> Waiting | None:
        """Return the waiting request with these bytes."""
        return self._waiting.get(envelope.digest())

    def of(self, client: bytes) -> Collection[Waiting]:
        """Return what waits for this client, oldest first."""
        return self._by_client.get(client, {}).values()

    def take_batch(self) -> list[Envelope]:
        """Take requests for one batch, one client's after another's, within the agreed limits of a batch."""
        taken: list[Envelope] = []
        room = self._limits.batch_bytes_max - BATCH_OVERHEAD_MAX
        while self._unproposed and len(taken) < self._limits.batch_envelopes_max:
            client, queue = next(iter(self._unproposed.items()))
            waiting = next(iter(queue.values()))
            size = len(waiting.envelope.raw) + 4
            if size > room:
                break
            room -= size
            waiting.proposed = True
            taken.append(waiting.envelope)
            self._withdraw(waiting)
            # To the end of the line, so that the next place goes to the next client.
            if client in self._unproposed:
                self._unproposed[client] = self._unproposed.pop(client)
        return taken

    def executed(self, envelope: Envelope, now_ms: int = 0) -> int | None:
        """Forget a request that was executed; return since when it waited here, or None if it did not."""
        digest = envelope.digest()
        times, _ = self._executed.pop(digest, (0, 0))
        self._executed[digest] = (times + 1, now_ms)
        if len(self._executed) > EXECUTED_MAX:
            del self._executed[next(iter(self._executed))]
        return self._forget(digest)

    def was_executed(self, envelope: Envelope, now_ms: int) -> bool:
        """Say whether this envelope, with or without effect, was executed lately: for each time twice as long ago."""
        times, at_ms = self._executed.get(envelope.digest(), (0, 0))
        return times > 0 and now_ms - at_ms < EXECUTED_PAUSE_MS << min(times, 16)

    def drop(self, waiting: Waiting) -> None:
        """Forget a request that needs no execution any more."""
        self._forget(waiting.digest)

    def oldest(self) -> Waiting | None:
        """Return the request that has waited longest."""
        return next(iter(self._waiting.values()), None)

    def begin_view(self, carried: Iterable[Envelope]) -> None:
        """Let everything that is not executed be proposed or relayed anew, except what the new view carries."""
        self._unproposed.clear()
        for waiting in self._waiting.values():
            waiting.proposed = False
            waiting.relay_at_ms = 0
            waiting.relay_pause_ms = RELAY_PAUSE_MS
        for envelope in carried:
            waiting_too = self._waiting.get(envelope.digest())
            if waiting_too is not None:
                waiting_too.proposed = True
        for waiting in self._waiting.values():
            if not waiting.proposed:
                self._unproposed.setdefault(waiting.envelope.client, {})[waiting.digest] = waiting

    def _forget(self, digest: bytes) -> int | None:
        waiting = self._waiting.pop(digest, None)
        if waiting is None:
            return None
        self._withdraw(waiting)
        size = len(waiting.envelope.raw)
        self._bytes -= size
        client = waiting.envelope.client
        mine = self._by_client[client]
        del mine[digest]
        self._client_bytes[client] -= size
        if not mine:
            del self._by_client[client], self._client_bytes[client]
        return waiting.since_ms

    def _withdraw(self, waiting: Waiting) -> None:
        """Take a request out of those to be proposed."""
        queue = self._unproposed.get(waiting.envelope.client)
        if queue is not None and queue.pop(waiting.digest, None) is not None and not queue:
            del self._unproposed[waiting.envelope.client]


class QueueFullError(Exception):
    """No room for a request; the text says what the client can do."""
