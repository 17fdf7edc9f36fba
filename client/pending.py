"""What is on its way: an envelope or an opening, who was asked, and who has answered what.

Layout of the part of a reply that says which envelope it answers (`replica.core.envelope`):

    u8 1, u64 u32 session, u64 first           the address, 21 bytes
    u16 count                                  must be the envelope's
    u8 2, 16 nonce                             an opening's address, 17 bytes
"""

import hashlib
import struct

from client.events import Ticket
from replica.core.envelope import EnvelopeKind, SessionId

ADDRESS_SIZE = 21
OPEN_ADDRESS_SIZE = 17
OPEN_REPLY_SIZE = 30
COUNT_END = 23
# A longer reply is remembered by its digest, so that f liars cannot fill the client's memory.
REPLY_BYTES_KEPT = 4096

_ADDRESS = struct.Struct(">BQIQ")
_COUNT = struct.Struct(">H")


class Tally:
    """The latest reply of each replica to one envelope; says when q distinct ones are equal byte for byte.

    Invariant: one entry per replica, each at most REPLY_BYTES_KEPT bytes, whatever that replica sends.
    """

    __slots__ = ("_latest", "_quorum")

    def __init__(self, quorum: int) -> None:
        self._latest: dict[int, bytes] = {}
        self._quorum = quorum

    def add(self, replica: int, raw: bytes) -> bool:
        """Take a reply in place of the replica's earlier one; say whether q replicas now sent these bytes."""
        # Replies begin with 1 or 2, so a digest behind a 0 is never taken for one.
        kept = raw if len(raw) <= REPLY_BYTES_KEPT else b"\0" + hashlib.sha256(raw).digest()
        latest = self._latest
        latest[replica] = kept
        if len(latest) < self._quorum:
            return False
        return sum([reply == kept for reply in latest.values()]) >= self._quorum

    def __len__(self) -> int:
        return len(self._latest)


class Attempt:
    """Common to envelopes and openings: the bytes, whether everybody was asked, and when to ask again."""

    __slots__ = ("broadcast", "patience_ms", "raw", "send_again_at", "sent_at", "tally")

    def __init__(self, raw: bytes, quorum: int, now_ms: int, patience_ms: int) -> None:
        self.raw = raw
        self.tally = Tally(quorum)
        self.broadcast = False
        self.patience_ms = patience_ms
        self.sent_at = now_ms
        self.send_again_at = now_ms + patience_ms

    def postpone(self, now_ms: int, patience_ms_max: int) -> None:
        """Everybody was asked now; double the patience and count it from here."""
        self.broadcast = True
        self.patience_ms = min(2 * self.patience_ms, patience_ms_max)
        self.send_again_at = now_ms + self.patience_ms


class PendingEnvelope(Attempt):
    """Operations with consecutive numbers in one signed envelope, until f+1 agree or all have given up."""

    __slots__ = ("address", "count", "deadline_next", "deadlines", "failed", "first", "session", "tickets")

    def __init__(
        self,
        raw: bytes,
        quorum: int,
        now_ms: int,
        patience_ms: int,
        *,
        session: SessionId,
        first: int,
        tickets: list[Ticket],
        deadlines: list[int],
    ) -> None:
        super().__init__(raw, quorum, now_ms, patience_ms)
        self.session = session
        self.first = first
        self.tickets = tickets
        self.deadlines = deadlines
        self.deadline_next = min(deadlines)
        self.failed: set[int] = set()
        self.address = _ADDRESS.pack(EnvelopeKind.OPERATIONS, session.slot, session.place, first)
        self.count = _COUNT.pack(len(tickets))

    def give_up(self, now_ms: int) -> list[Ticket]:
        """Return the tickets whose deadline is over and that were not returned before."""
        if now_ms < self.deadline_next:
            return []
        late = [
            index for index, deadline in enumerate(self.deadlines) if deadline <= now_ms and index not in self.failed
        ]
        self.failed.update(late)
        waiting = (deadline for index, deadline in enumerate(self.deadlines) if index not in self.failed)
        self.deadline_next = min(waiting, default=0)
        return [self.tickets[index] for index in late]

    @property
    def is_given_up(self) -> bool:
        """Say whether nobody waits for any of its operations."""
        return len(self.failed) == len(self.tickets)

    def waiting(self) -> list[Ticket]:
        """Return the tickets that somebody still waits for."""
        if not self.failed:
            return self.tickets
        return [ticket for index, ticket in enumerate(self.tickets) if index not in self.failed]


class PendingOpening(Attempt):
    """A session's opening, until f+1 replicas say what became of it."""

    __slots__ = ("nonce",)

    def __init__(self, raw: bytes, quorum: int, now_ms: int, patience_ms: int, *, nonce: bytes) -> None:
        super().__init__(raw, quorum, now_ms, patience_ms)
        self.nonce = nonce
