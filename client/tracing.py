"""The client's part of a request's trace: one span, from when its envelope is first sent to f+1 equal replies.

See `replica.wire.spans` for the ids, and for what turns tracing on. An envelope that is never answered has a span with
`trustlog.answered` false, recorded when the client is closed.
"""

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from replica.core.envelope import Operations, SessionId, decode_envelope
from replica.core.genesis import Limits
from replica.wire.spans import CLIENT, Spans, open_spans

# Envelopes that wait; the oldest is forgotten beyond.
WAITING_MAX: Final = 1024


class Tracing:
    """Traces nothing: what there is without an endpoint."""

    def sent(self, raw: bytes) -> None:
        """Take in an envelope that is sent, perhaps again."""

    def completed(self, session: SessionId, numbers: Sequence[int]) -> None:
        """Take in that operations of one envelope, by their numbers in the session, were answered."""

    def close(self) -> None:
        """Export what waits, for a limited time."""


@dataclass(frozen=True, slots=True)
class _Sent:
    digest: bytes
    begun_ns: int
    count: int


class RequestTracing(Tracing):
    """Traces the sampled envelopes of one client. now_ns: the wall clock, in nanoseconds since 1970."""

    def __init__(
        self, cluster_id: bytes, limits: Limits, spans: Spans, now_ns: Callable[[], int] = time.time_ns
    ) -> None:
        self._cluster_id, self._limits, self._spans, self._now_ns = cluster_id, limits, spans, now_ns
        self._waiting: OrderedDict[tuple[SessionId, int], _Sent] = OrderedDict()  # by its first number
        self._first: dict[tuple[SessionId, int], int] = {}  # of each waiting operation: its envelope's first number

    def sent(self, raw: bytes) -> None:
        """See Tracing."""
        digest = hashlib.sha256(raw).digest()
        if not self._spans.is_sampled(digest):
            return
        content = decode_envelope(raw, self._cluster_id, self._limits).content
        if not isinstance(content, Operations) or (content.session, content.first) in self._waiting:
            return
        self._waiting[content.session, content.first] = _Sent(digest, self._now_ns(), len(content.operations))
        for number in range(content.first, content.first + len(content.operations)):
            self._first[content.session, number] = content.first
        if len(self._waiting) > WAITING_MAX:
            self._forget(*next(iter(self._waiting)))

    def completed(self, session: SessionId, numbers: Sequence[int]) -> None:
        """See Tracing."""
        # Operations that were given up are not among the numbers; the first of an envelope may be one of them.
        first = self._first.get((session, numbers[0])) if numbers else None
        if first is not None:
            self._record(self._forget(session, first), answered=True)

    def close(self) -> None:
        """See Tracing."""
        for sent in self._waiting.values():
            self._record(sent, answered=False)
        self._spans.close()

    def _forget(self, session: SessionId, first: int) -> _Sent:
        sent = self._waiting.pop((session, first))
        for number in range(first, first + sent.count):
            del self._first[session, number]
        return sent

    def _record(self, sent: _Sent, *, answered: bool) -> None:
        attributes = {"trustlog.operations": sent.count, "trustlog.answered": answered}
        self._spans.record(sent.digest, "request", CLIENT, sent.begun_ns, self._now_ns(), None, attributes)


def open_tracing(client: bytes, cluster_id: bytes, limits: Limits) -> Tracing:
    """Return a client's tracing as the environment says. client: its public key."""
    spans = open_spans("trustlog-client", client.hex()[:16])
    return Tracing() if spans is None else RequestTracing(cluster_id, limits, spans)
