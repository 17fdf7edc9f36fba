"""What a running replica measures of itself: how long what it does takes, how large it is, how often it happens.

Kept in plain counts, so that a replica without HTTP needs no library for metrics: `replica.shell.metrics` shows them to
Prometheus, and the status report shows the recent ones. Each distribution is added to by one thread; whoever reads it
from another may see a count that is one ahead of its sum. Nothing that replicas agree on rests on any of this.
"""

import time
from bisect import bisect_left
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from replica.core.batch import Batch
from replica.core.envelope import (
    OPEN_NONCE_SIZE,
    Administer,
    AdministerReply,
    Envelope,
    EnvelopeKind,
    OpenReply,
    Operations,
    SessionId,
    Status,
    encode_administer_reply,
    encode_open_reply,
    encode_operations_reply,
)

# Upper bounds. Seconds: from one signature that is verified to a disk that hangs.
SECONDS: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
SIZES: Final = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0)
# The latest values of a distribution that the status report speaks of.
RECENT_MAX: Final = 128
# Requests of connected clients whose answers are waited for; as many as may wait to be ordered.
WAITING_MAX: Final = 8192

_COUNT_BYTES: Final = 2  # at the end of a reply to operations that holds no results


class Distribution:
    """How often a value was at most each of `bounds`, the sum of all, and the latest."""

    def __init__(self, bounds: Sequence[float] = SECONDS) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)  # the last one: above all bounds
        self.sum = 0.0
        self._recent: deque[float] = deque(maxlen=RECENT_MAX)

    def add(self, value: float) -> None:
        """Take in a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value
        self._recent.append(value)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Take in how many seconds the body took, also if it raises."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.add(time.perf_counter() - begun)

    def recent_ms(self) -> dict[str, float] | None:
        """Return median and maximum of the latest values in milliseconds, None if there are none yet."""
        values = sorted(self._recent.copy())
        if not values:
            return None
        return {"median": round(values[len(values) // 2] * 1000, 3), "max": round(values[-1] * 1000, 3)}


class Measures:
    """One replica's measurements.

    fsync_s, attest_s: per own group, in the outbox's thread: the transaction before it, and the trusted log's answer.
    verify_s: per signature that was verified, of a "group" or a client's "envelope". group_entries: of the own log.
    batch_operations: per executed batch. client_s: from a request's arrival on a client's own connection to its reply.
    """

    def __init__(self) -> None:
        self.fsync_s = Distribution()
        self.attest_s = Distribution()
        self.verify_s = {"group": Distribution(), "envelope": Distribution()}
        self.group_entries = Distribution(SIZES)
        self.batch_operations = Distribution(SIZES)
        self.client_s = Distribution()
        self.client_operations = 0
        self.view_changes = 0
        self.suspicions: Counter[int] = Counter()
        self.exposures: Counter[int] = Counter()
        # By client and what its reply will begin with: when the request came, and how many operations it holds.
        self._waiting: OrderedDict[tuple[bytes, bytes], tuple[float, int]] = OrderedDict()

    def executed(self, batch: Batch) -> None:
        """Note a batch that was executed."""
        contents = (envelope.content for envelope in batch.envelopes)
        self.batch_operations.add(sum(len(one.operations) for one in contents if isinstance(one, Operations)))

    def requested(self, envelope: Envelope) -> None:
        """Note a request of a connected client; one that is repeated waits since it came first."""
        content = envelope.content
        count = len(content.operations) if isinstance(content, Operations) else 0
        self._waiting.setdefault((envelope.client, reply_beginning(envelope)), (time.perf_counter(), count))
        if len(self._waiting) > WAITING_MAX:
            self._waiting.popitem(last=False)

    def replied(self, client: bytes, reply: bytes) -> None:
        """Note a reply; only the first one to a request of a connected client counts."""
        waiting = self._waiting.pop((client, reply_begins_with(reply)), None)
        if waiting is not None:
            self.client_s.add(time.perf_counter() - waiting[0])
            self.client_operations += waiting[1]


def reply_begins_with(reply: bytes) -> bytes:
    """Return the beginning of a reply, which says whose it is: `reply_beginning` of its envelope."""
    return reply[: _OPERATIONS_BYTES if reply[:1] == bytes([EnvelopeKind.OPERATIONS]) else _OPENING_BYTES]


def reply_beginning(envelope: Envelope) -> bytes:
    """Return the part of the reply to an envelope that is known before it is executed."""
    content = envelope.content
    if isinstance(content, Operations):
        return encode_operations_reply(content.session, content.first, ())[:-_COUNT_BYTES]
    if isinstance(content, Administer):
        return encode_administer_reply(AdministerReply.to(content, Status.OK, 0, ""))[:_OPENING_BYTES]
    return encode_open_reply(OpenReply(content.nonce, Status.OK, SessionId(0, 0)))[:_OPENING_BYTES]


_OPERATIONS_BYTES: Final = len(encode_operations_reply(SessionId(0, 0), 1, ())) - _COUNT_BYTES
_OPENING_BYTES: Final = 1 + OPEN_NONCE_SIZE  # kind and nonce
