"""Requests that wait to be ordered: bounded, one queue per client, served in turn by what they cost.

A replica keeps what clients sent it until it is executed: the primary to propose it, a backup to hand it to the
primary. Serving clients in turn keeps one client's flood from another's way.

A turn is worth the same to everybody: deficit round robin (Shreedhar and Varghese, SIGCOMM 1995) with a quantum of one
unit, which is one operation or one KiB, whichever an envelope has more of. An envelope that costs c is served in the
c-th round after its client's turn came; one whose client has nothing waiting saves nothing up. Rounds that serve nobody
are not walked through: a heap holds the round in which each client's first envelope is due, so that an envelope taken
costs O(log clients), whatever others wait for. One client's requests keep their order.
"""

import heapq
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from replica.core.batch import BATCH_OVERHEAD_MAX
from replica.core.envelope import Envelope, Operations
from replica.core.genesis import KIB, MIB, Limits
from replica.core.quotas import NO_QUOTA, Buckets, Quota

REQUESTS_MAX = 8192
# Digests of executed requests that are remembered.
EXECUTED_MAX = 8192
EXECUTED_PAUSE_MS = 500
REQUEST_BYTES_MAX = 64 * MIB
REQUESTS_PER_CLIENT_MAX = 256
REQUEST_BYTES_PER_CLIENT_MAX = 16 * MIB
# An own batch holds no more operations than this, or one envelope: a batch is executed whole, and whoever comes next
# waits for that. The agreed limits alone would allow hundreds of thousands of small operations, seconds of work.
BATCH_OPERATIONS_MAX = 2048
# While what was proposed and is not executed comes to so many units or more, nothing more is taken: whoever comes next
# waits for all of that, whatever its turn. It takes a few hundred operations under way to keep a cluster busy; 4,096
# KiB is one full batch at the usual limits.
UNDER_WAY_MAX = 4096
# Entries of the heap that stand for nothing any more, beyond as many as stand for something, before it is made anew.
STALE_MAX = 64
# How long a backup waits before it hands a request to the primary for the second time.
RELAY_PAUSE_MS = 300


@dataclass(slots=True)
class Waiting:
    """A request that is not executed yet. Times in milliseconds.

    In the present view: relayed_ms: when it was handed to the primary first. overtaken: batches of which that is said
    (`replica.core.expectation`). work_before: the queue's `work` when the view began, or when this came later.

    answered: its first operations of which it is known that they need no execution any more.
    """

    envelope: Envelope
    digest: bytes
    since_ms: int
    work_before: int
    relay_at_ms: int = 0
    relay_pause_ms: int = RELAY_PAUSE_MS
    relayed_ms: int | None = None
    overtaken: int = 0
    proposed: bool = False
    charged: bool = False  # its operations were taken out of its client's bucket
    answered: int = 0


@dataclass(slots=True)
class Turn:
    """A client's place in the line: its first request is due `since_round` + its cost, after whoever came before."""

    since_round: int
    due_round: int
    place: int


def operations_of(envelope: Envelope) -> int:
    """Return how many operations an envelope asks for; opening a session is one."""
    content = envelope.content
    return len(content.operations) if isinstance(content, Operations) else 1


def cost_of(envelope: Envelope) -> int:
    """Return what an envelope costs, in units: its operations or its KiB (rounded up), whichever is more."""
    return max(operations_of(envelope), -(-len(envelope.raw) // KIB))


class RequestQueue:
    """Requests by digest, and per client in order of arrival.

    work: what all requests executed so far cost, in units; it never falls.
    """

    def __init__(self, limits: Limits) -> None:
        self.work = 0
        self._limits = limits
        self._waiting: dict[bytes, Waiting] = {}
        self._unproposed: dict[bytes, dict[bytes, Waiting]] = {}  # client -> digest -> request
        self._turns: dict[bytes, Turn] = {}  # of the clients in _unproposed
        self._line: list[tuple[int, int, bytes]] = []  # heap: due round, place, client; stale unless as in _turns
        self._under_way = 0  # what is proposed costs so much
        self._round = 0
        self._places = 0
        self._by_client: dict[bytes, dict[bytes, Waiting]] = {}  # as above, those proposed included
        self._client_bytes: dict[bytes, int] = {}
        self._bytes = 0
        self._buckets = Buckets()
        self._executed: dict[bytes, tuple[int, int]] = {}  # digest -> how often, when last; the latest last

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Waiting]:
        return iter(self._waiting.values())

    @property
    def unproposed(self) -> bool:
        """Say whether anything waits to be proposed."""
        return bool(self._unproposed)

    def add(self, envelope: Envelope, now_ms: int, quota: Quota = NO_QUOTA) -> Waiting | None:
        """Take a request; return None if it waits already. QueueFullError, changing nothing, if there is no room.

        quota: its client's, if this replica has it from the client itself.
        """
        digest = envelope.digest()
        if digest in self._waiting:
            return None
        size = len(envelope.raw)
        count, taken = len(self.of(envelope.client)), self._client_bytes.get(envelope.client, 0)
        if len(self._waiting) >= REQUESTS_MAX or self._bytes + size > REQUEST_BYTES_MAX:
            raise QueueFullError("this replica has too many requests waiting; send again later")
        if count >= REQUESTS_PER_CLIENT_MAX or taken + size > REQUEST_BYTES_PER_CLIENT_MAX:
            raise QueueFullError("this client has too many requests waiting; wait for replies before sending more")
        waiting = Waiting(envelope, digest, now_ms, self.work)
        if quota is not NO_QUOTA:
            self._keep_to(quota, waiting, count, taken)
        self._waiting[digest] = waiting
        self._by_client.setdefault(envelope.client, {})[digest] = waiting
        self._client_bytes[envelope.client] = taken + size
        self._bytes += size
        self._line_up(waiting)
        return waiting

    def _keep_to(self, quota: Quota, waiting: Waiting, count: int, taken: int) -> None:
        """Charge a request to its client; OverQuotaError if it is over quota with what waits already."""
        envelope, now_ms, rate = waiting.envelope, waiting.since_ms, quota.operations_per_s
        if quota.envelopes and count >= quota.envelopes:
            raise OverQuotaError(f"{quota.envelopes} requests waiting at a time")
        if quota.octets and count and taken + len(envelope.raw) > quota.octets:
            raise OverQuotaError(f"{quota.octets} bytes of requests waiting at a time")
        if rate:
            operations = operations_of(envelope)
            if not self._buckets.has(envelope.client, operations, rate, now_ms):
                raise OverQuotaError(f"{rate} operations per second")
            self._buckets.charge(envelope.client, operations, rate, now_ms)
            waiting.charged = True

    def charge(self, envelope: Envelope, operations: int, quota: Quota, now_ms: int) -> None:
        """Charge a client for operations of this envelope that were executed, unless it was charged when it came."""
        if not operations or not quota.operations_per_s:
            return
        waiting = self.find(envelope)
        if waiting is None or not waiting.charged:
            self._buckets.charge(envelope.client, operations, quota.operations_per_s, now_ms)

    def find(self, envelope: Envelope) -> Waiting | None:
        """Return the waiting request with these bytes."""
        return self._waiting.get(envelope.digest())

    def of(self, client: bytes) -> Collection[Waiting]:
        """Return what waits for this client, oldest first."""
        return self._by_client.get(client, {}).values()

    def take_batch(self) -> list[Envelope]:
        """Take requests for one batch, one client's after another's, within the limits; none if enough is under way."""
        taken: list[Envelope] = []
        if self._under_way >= UNDER_WAY_MAX:
            return taken
        room = self._limits.batch_bytes_max - BATCH_OVERHEAD_MAX
        operations = 0
        while len(taken) < self._limits.batch_envelopes_max and (waiting := self._next_due()) is not None:
            envelope = waiting.envelope
            size = len(envelope.raw) + 4
            operations += operations_of(envelope)
            if size > room or (taken and operations > BATCH_OPERATIONS_MAX):
                break
            room -= size
            waiting.proposed = True
            self._under_way += cost_of(envelope)
            taken.append(envelope)
            self._round = self._turns[envelope.client].due_round
            heapq.heappop(self._line)
            self._withdraw(waiting)
            if envelope.client in self._unproposed:
                self._take_place(envelope.client)
        return taken

    def _next_due(self) -> Waiting | None:
        """Return the request at the front of the line, which stays there."""
        while self._line:
            due, place, client = self._line[0]
            turn = self._turns.get(client)
            if turn is None or (turn.due_round, turn.place) != (due, place):
                heapq.heappop(self._line)
                continue
            first = next(iter(self._unproposed[client].values()))
            if turn.since_round + cost_of(first.envelope) > due:
                # What was first is executed already, and what comes next costs more.
                heapq.heappop(self._line)
                self._take_place(client, turn.since_round)
                continue
            return first
        return None

    def _line_up(self, waiting: Waiting) -> None:
        """Add a request to those to be proposed."""
        client = waiting.envelope.client
        queue = self._unproposed.get(client)
        if queue is not None:
            queue[waiting.digest] = waiting
        else:
            self._unproposed[client] = {waiting.digest: waiting}
            self._take_place(client)

    def _take_place(self, client: bytes, since_round: int | None = None) -> None:
        """Put a client into the line, to pay for its first request from this round on; from now on if None."""
        first = next(iter(self._unproposed[client].values()))
        since = self._round if since_round is None else since_round
        self._places += 1
        turn = self._turns[client] = Turn(since, since + cost_of(first.envelope), self._places)
        heapq.heappush(self._line, (turn.due_round, turn.place, client))
        if len(self._line) > 2 * len(self._turns) + STALE_MAX:
            self._line = [(turn.due_round, turn.place, client) for client, turn in self._turns.items()]
            heapq.heapify(self._line)

    def executed(self, envelope: Envelope, now_ms: int = 0) -> int | None:
        """Forget a request that was executed; return since when it waited here, or None if it did not."""
        self.work += cost_of(envelope)
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
        self._turns.clear()
        self._line.clear()
        self._under_way = 0
        for waiting in self._waiting.values():
            waiting.proposed = False
            waiting.relay_at_ms = 0
            waiting.relay_pause_ms = RELAY_PAUSE_MS
            waiting.relayed_ms = None
            waiting.overtaken = 0
            waiting.work_before = self.work
        for envelope in carried:
            waiting_too = self._waiting.get(envelope.digest())
            if waiting_too is not None and not waiting_too.proposed:
                waiting_too.proposed = True
                self._under_way += cost_of(envelope)
        for waiting in self._waiting.values():
            if not waiting.proposed:
                self._line_up(waiting)

    def _forget(self, digest: bytes) -> int | None:
        waiting = self._waiting.pop(digest, None)
        if waiting is None:
            return None
        self._withdraw(waiting)
        if waiting.proposed:
            self._under_way -= cost_of(waiting.envelope)
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
            del self._unproposed[waiting.envelope.client], self._turns[waiting.envelope.client]


class QueueFullError(Exception):
    """No room for a request; the text says what the client can do. reason: under which it is counted."""

    reason = "request-queue-full"


class OverQuotaError(QueueFullError):
    """A request is over its client's quota, which the argument names."""

    reason = "request-over-quota"

    def __str__(self) -> str:
        """Return the text for the client."""
        return f"this client is over its quota of {self.args[0]}, which an operator set; send again later"
