"""Requests that wait to be ordered: bounded, and served in turn by what they cost (`replica.core.line`).

A replica keeps what clients sent it until it is executed: the primary to propose it, a backup to hand it to the
primary. Serving clients in turn keeps one client's flood from another's way.

One client's requests keep their order, except that what a backup relayed is a lane of its own, with its own turns and
its own room: what a client hands over itself cannot keep out what a backup is patient for (`replica.core.claims`).
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from replica.core.batch import BATCH_OVERHEAD_MAX
from replica.core.claims import Claims
from replica.core.envelope import Envelope
from replica.core.genesis import Limits
from replica.core.line import Line, cost_of, operations_of
from replica.core.quotas import NO_QUOTA, Buckets, Quota
from replica.core.rooms import DIRECT, GIVE_WAY_MAX, Lane, Rooms

# Digests of executed requests that are remembered; and for how long one that was executed is left alone, which doubles
# so often. Not oftener: whoever relays it and has forgotten that it was executed, by a restart, is patient for it.
EXECUTED_MAX = 8192
EXECUTED_PAUSE_MS = 500
EXECUTED_DOUBLES_MAX = 2
# An own batch holds no more operations than this, or one envelope: a batch is executed whole, and whoever comes next
# waits for that. The agreed limits alone would allow hundreds of thousands of small operations, seconds of work.
BATCH_OPERATIONS_MAX = 2048
# While what was proposed and is not executed comes to so many units or more, nothing more is taken: whoever comes next
# waits for all of that, whatever its turn. It takes a few hundred operations under way to keep a cluster busy; 4,096
# KiB is one full batch at the usual limits.
UNDER_WAY_MAX = 4096
# How long a backup waits before it hands a request to the primary for the second time.
RELAY_PAUSE_MS = 300


@dataclass(slots=True)
class Waiting:
    """A request that is not executed yet. Times in milliseconds.

    peer: the replica that relayed it, DIRECT if its client handed it over. source: where it came from, opaque here.
    claimed_ms: when it was given a claim, if it
    was (`replica.core.claims`).

    In the present view: relayed_ms: when it was handed to the primary first. overtaken: batches of which that is said
    (`replica.core.expectation`). work_before: the queue's `work` when the view began, or when this was given its claim
    later.

    charged: its operations were taken out of its client's bucket. answered: its first operations of which it is known
    that they need no execution any more.
    """

    envelope: Envelope
    digest: bytes
    since_ms: int
    work_before: int
    peer: int = DIRECT
    source: object = None
    claimed_ms: int | None = None
    relay_at_ms: int = 0
    relay_pause_ms: int = RELAY_PAUSE_MS
    relayed_ms: int | None = None
    overtaken: int = 0
    proposed: bool = False
    charged: bool = False
    answered: int = 0

    @property
    def lane(self) -> Lane:
        """Its client, and who handed it over."""
        return self.envelope.client, self.peer


class RequestQueue:
    """Requests by digest, and per client in order of arrival.

    claims: which of them are handed to the primary. work: what all requests executed so far cost, in units, as far as
    they were not executed before; it never falls.
    """

    def __init__(self, limits: Limits, operators: Collection[bytes] = ()) -> None:
        self.work = 0
        self.claims = Claims()
        self._limits = limits
        self._waiting: dict[bytes, Waiting] = {}
        self._line = Line()  # of those to be proposed
        self._under_way = 0  # what is proposed costs so much
        self._by_client: dict[bytes, dict[bytes, Waiting]] = {}  # client -> digest -> request, proposed or not
        self._rooms = Rooms(operators)
        self._buckets = Buckets()
        self._gone: list[Waiting] = []
        self._now_ms = 0
        self._executed: dict[bytes, tuple[int, int]] = {}  # digest -> how often, when last; the latest last

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Waiting]:
        return iter(self._waiting.values())

    @property
    def unproposed(self) -> bool:
        """Say whether anything waits to be proposed."""
        return bool(self._line.lanes)

    def add(
        self,
        envelope: Envelope,
        now_ms: int,
        quota: Quota = NO_QUOTA,
        *,
        peer: int = DIRECT,
        source: object = None,
    ) -> Waiting | None:
        """Take a request; return None if it waits already. QueueFullError if there is no room.

        Requests of others may give way to it; `take_gone` returns those whose source is known.
        quota: its client's, if this replica has it from the client itself. peer: the replica that relayed it. source:
        where it came from, opaque here.
        """
        digest = envelope.digest()
        known = self._waiting.get(digest)
        if known is not None:
            self._hand_over(known, peer)
            return None
        waiting = Waiting(envelope, digest, now_ms, self.work, peer, source)
        if quota is not NO_QUOTA:
            self._check_quota(quota, waiting)
        problem = self._rooms.problem(waiting.lane, len(envelope.raw))
        if problem is not None and peer == DIRECT:
            problem = self._make_room(envelope, problem)
        if problem is not None:
            raise QueueFullError(problem)
        self._now_ms = max(self._now_ms, now_ms)
        if quota.operations_per_s:
            self._buckets.charge(envelope.client, operations_of(envelope), quota.operations_per_s, now_ms)
            waiting.charged = True
        self._waiting[digest] = waiting
        self._by_client.setdefault(envelope.client, {})[digest] = waiting
        self._rooms.add(waiting.lane, len(envelope.raw))
        self._line.add(waiting)
        self.claims.add(waiting, self._now_ms, self.work)
        return waiting

    def has_room_for(self, client: bytes) -> bool:
        """Say whether a client may hand over one more request, as far as their number goes."""
        return self._rooms.has_place(client)

    def _check_quota(self, quota: Quota, waiting: Waiting) -> None:
        """Raise OverQuotaError if a request is over its client's quota with what waits already."""
        count, taken = self._rooms.count[waiting.lane], self._rooms.bytes[waiting.lane]
        envelope, now_ms, rate = waiting.envelope, waiting.since_ms, quota.operations_per_s
        if quota.envelopes and count >= quota.envelopes:
            raise OverQuotaError(f"{quota.envelopes} requests waiting at a time")
        if quota.octets and count and taken + len(envelope.raw) > quota.octets:
            raise OverQuotaError(f"{quota.octets} bytes of requests waiting at a time")
        if rate and not self._buckets.has(envelope.client, operations_of(envelope), rate, now_ms):
            raise OverQuotaError(f"{rate} operations per second")

    def charge(self, envelope: Envelope, operations: int, quota: Quota, now_ms: int) -> None:
        """Charge a client for operations of this envelope that were executed, unless it was charged when it came."""
        if not operations or not quota.operations_per_s:
            return
        waiting = self.find(envelope)
        if waiting is None or not waiting.charged:
            self._buckets.charge(envelope.client, operations, quota.operations_per_s, now_ms)

    def _make_room(self, envelope: Envelope, problem: str) -> str | None:
        """Let requests of whoever takes more give way; return what the problem still is."""
        client, size = envelope.client, len(envelope.raw)
        for _ in range(GIVE_WAY_MAX):
            other = self._rooms.gives_way(client, size)
            mine = self._by_client[other] if other is not None else {}
            newest = next(filter(_may_give_way, reversed(mine.values())), None)
            if newest is None:
                return problem
            self.drop(newest)
            if newest.source is not None:
                self._gone.append(newest)
            if self._rooms.problem((client, DIRECT), size) is None:
                return None
        return problem

    def take_gone(self) -> list[Waiting]:
        """Return the requests that gave way since the last call."""
        gone, self._gone = self._gone, []
        return gone

    def _hand_over(self, waiting: Waiting, peer: int) -> None:
        """Move what its client handed over, perhaps behind much else, to the places of who is patient for it."""
        size = len(waiting.envelope.raw)
        if waiting.peer != DIRECT or peer == DIRECT or waiting.proposed:
            return
        if self._rooms.problem((waiting.envelope.client, peer), size) is None:
            self._line.withdraw(waiting)
            self._rooms.remove(waiting.lane, size)
            waiting.peer = peer
            self._rooms.add(waiting.lane, size)
            self._line.add(waiting)

    def find(self, envelope: Envelope) -> Waiting | None:
        """Return the waiting request with these bytes."""
        return self._waiting.get(envelope.digest())

    def source_of(self, envelope: Envelope) -> object:
        """Return where this replica has a waiting request from; None if it does not wait, or came from a replica."""
        waiting = self.find(envelope)
        return None if waiting is None or waiting.peer != DIRECT else waiting.source

    def of(self, client: bytes) -> Collection[Waiting]:
        """Return what waits for this client, oldest first."""
        return self._by_client.get(client, {}).values()

    @property
    def may_be_taken(self) -> bool:
        """Say whether something waits to be proposed, and not too much is under way for that."""
        return self.unproposed and self._under_way < UNDER_WAY_MAX

    def take_batch(self) -> list[Envelope]:
        """Take requests for one batch, one client's after another's, within the limits; none if enough is under way."""
        taken: list[Envelope] = []
        if not self.may_be_taken:
            return taken
        room = self._limits.batch_bytes_max - BATCH_OVERHEAD_MAX
        operations = 0
        while len(taken) < self._limits.batch_envelopes_max and (waiting := self._line.first()) is not None:
            envelope = waiting.envelope
            size = len(envelope.raw) + 4
            operations += operations_of(envelope)
            if size > room or (taken and operations > BATCH_OPERATIONS_MAX):
                break
            room -= size
            waiting.proposed = True
            self._under_way += cost_of(envelope)
            taken.append(envelope)
            self._line.take(waiting)
        return taken

    def work_of(self, envelope: Envelope, again: int) -> int:
        """Return what executing this costs, in units: nothing for what was executed before.

        again: so many of its operations were. Of what had no effect only a digest is remembered.
        """
        if envelope.digest() in self._executed:
            return 0
        operations = operations_of(envelope)
        return -(-cost_of(envelope) * (operations - again) // operations)

    def executed(self, envelope: Envelope, now_ms: int = 0, again: int = 0) -> int | None:
        """Forget a request that was executed; return since when it waited here, or None if it did not."""
        self.work += self.work_of(envelope, again)
        self._now_ms = max(self._now_ms, now_ms)
        digest = envelope.digest()
        times, _ = self._executed.pop(digest, (0, 0))
        self._executed[digest] = (times + 1, now_ms)
        if len(self._executed) > EXECUTED_MAX:
            del self._executed[next(iter(self._executed))]
        return self._forget(digest)

    def was_executed(self, envelope: Envelope, now_ms: int, *, pauses: int = 1) -> bool:
        """Say whether this envelope, with or without effect, was executed lately; for longer after the second time.

        pauses: how many times as long counts as lately. A backup waits for twice as long as the primary, so that it
        is patient for nothing that a primary which executed it a little later does not take yet.
        """
        times, at_ms = self._executed.get(envelope.digest(), (0, 0))
        return times > 0 and now_ms - at_ms < pauses * EXECUTED_PAUSE_MS << min(times, EXECUTED_DOUBLES_MAX)

    def drop(self, waiting: Waiting) -> None:
        """Forget a request that needs no execution any more."""
        self._forget(waiting.digest)

    def oldest(self) -> Waiting | None:
        """Return the request that has waited longest."""
        return next(iter(self._waiting.values()), None)

    def begin_view(self, carried: Iterable[Envelope]) -> None:
        """Let everything that is not executed be proposed or relayed anew, except what the new view carries."""
        self._under_way = 0
        proposed = [waiting for waiting in self._waiting.values() if waiting.proposed]
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
        self._line.begin_view(
            (waiting for waiting in self._waiting.values() if not waiting.proposed),
            (waiting.lane for waiting in proposed if not waiting.proposed),
        )

    def _forget(self, digest: bytes) -> int | None:
        waiting = self._waiting.pop(digest, None)
        if waiting is None:
            return None
        self._line.withdraw(waiting)
        if waiting.proposed:
            self._under_way -= cost_of(waiting.envelope)
        self._rooms.remove(waiting.lane, len(waiting.envelope.raw))
        mine = self._by_client[waiting.envelope.client]
        del mine[digest]
        if not mine:
            del self._by_client[waiting.envelope.client]
        self.claims.remove(waiting, self._now_ms, self.work)
        return waiting.since_ms


def _may_give_way(waiting: Waiting) -> bool:
    """Say whether a request may make room: not what is proposed, nor what somebody is patient for."""
    return waiting.peer == DIRECT and not waiting.proposed and waiting.claimed_ms is None


class QueueFullError(Exception):
    """No room for a request; the text says what the client can do. reason: under which it is counted."""

    reason = "request-queue-full"


class OverQuotaError(QueueFullError):
    """A request is over its client's quota, which the argument names."""

    reason = "request-over-quota"

    def __str__(self) -> str:
        """Return the text for the client."""
        return f"this client is over its quota of {self.args[0]}, which an operator set; send again later"
