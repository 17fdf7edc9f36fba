"""One trace follows a request through client, primary, votes, execution and reply; this is a replica's part of it.

    replica   from the request's arrival, or else its PRE-PREPARE's, to the reply; child of the client's span
    propose   to the release of the own PRE-PREPARE (at the primary)
    prepare   to the release of the own PREPARE
    commit    to the release of the own COMMIT
    execute   to the execution
    reply     to the reply

Each stage begins where the one before it ended here. A COMMIT may be released after the execution, which needs others'
only. What is remembered of requests under way is bounded; beyond, traces are incomplete. See `replica.wire.spans`.
"""

import struct
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeVar

from replica.core.batch import Batch
from replica.core.entries import COMMIT, PRE_PREPARE, PREPARE
from replica.core.envelope import Envelope, Operations
from replica.shell.measures import reply_beginning, reply_begins_with
from replica.wire.spans import CLIENT, Spans, open_spans

REQUESTS_MAX: Final = 8192
SLOTS_MAX: Final = 4096

_HEADER: Final = struct.Struct(">BQQ")  # kind, view and slot of a proposal or a vote
_STAGES: Final = {PRE_PREPARE: "propose", PREPARE: "prepare", COMMIT: "commit"}

_Key = TypeVar("_Key", bound=Hashable)
_Value = TypeVar("_Value")


class Tracing:
    """Traces nothing: what there is without an endpoint. The methods are called where a request passes."""

    def received(self, envelope: Envelope) -> None:
        """Take in a request that came from a client or a replica."""

    def heard(self, payloads: Sequence[bytes]) -> None:
        """Take in entries of another log."""

    def said(self, payloads: Sequence[bytes]) -> None:
        """Take in entries of the own log that were released."""

    def executed(self, slot: int, batch: Batch) -> None:
        """Take in a batch that was executed."""

    def replied(self, client: bytes, reply: bytes) -> None:
        """Take in a reply."""

    def close(self) -> None:
        """Export what waits, for a limited time."""


@dataclass(slots=True)
class _Traced:
    """A sampled request that was executed. begun_ns: when it was first known here; last_ns: the last stage's end."""

    digest: bytes
    begun_ns: int
    last_ns: int


@dataclass(slots=True)
class _Slot:
    """What happened at a slot. said: stage, view and time of own entries that are not yet recorded."""

    proposed_ns: int | None = None
    said: list[tuple[str, int, int]] = field(default_factory=list)
    traced: list[_Traced] | None = None


class RequestTracing(Tracing):
    """Traces the sampled requests of one replica. now_ns: the wall clock, in nanoseconds since 1970."""

    def __init__(self, number: int, spans: Spans, now_ns: Callable[[], int] = time.time_ns) -> None:
        self._number, self._spans, self._now_ns = number, spans, now_ns
        self._received: OrderedDict[bytes, int] = OrderedDict()
        self._slots: OrderedDict[int, _Slot] = OrderedDict()
        self._unanswered: OrderedDict[tuple[bytes, bytes], _Traced] = OrderedDict()

    def received(self, envelope: Envelope) -> None:
        """See Tracing."""
        digest = envelope.digest()
        if isinstance(envelope.content, Operations) and self._spans.is_sampled(digest):
            _keep(self._received, digest, self._received.get(digest, self._now_ns()), REQUESTS_MAX)

    def heard(self, payloads: Sequence[bytes]) -> None:
        """See Tracing."""
        for payload in payloads:
            if payload[:1] == bytes([PRE_PREPARE]) and len(payload) >= _HEADER.size:
                slot = self._slot(_HEADER.unpack_from(payload)[2])
                slot.proposed_ns = slot.proposed_ns or self._now_ns()

    def said(self, payloads: Sequence[bytes]) -> None:
        """See Tracing."""
        for payload in payloads:
            stage = _STAGES.get(payload[0])
            if stage is None:
                continue
            _, view, number = _HEADER.unpack_from(payload)
            slot = self._slot(number)
            if slot.traced is None:
                slot.said.append((stage, view, self._now_ns()))
                continue
            for traced in slot.traced:  # executed with the votes of others
                self._record(traced, f"{stage}/{view}", traced.last_ns, self._now_ns(), number, view)

    def executed(self, slot: int, batch: Batch) -> None:
        """See Tracing."""
        now, at = self._now_ns(), self._slot(slot)
        at.traced = []
        for envelope in batch.envelopes:
            digest = envelope.digest()
            if not isinstance(envelope.content, Operations) or not self._spans.is_sampled(digest):
                continue
            times = [time_ns for time_ns in (at.proposed_ns, *(one[2] for one in at.said)) if time_ns is not None]
            begun = self._received.pop(digest, None) or min(times, default=now)
            traced = _Traced(digest, begun, begun)
            for stage, view, ended in at.said:
                # A vote answers a proposal: what was before it is the primary's part.
                started = max(traced.last_ns, at.proposed_ns or 0)
                self._record(traced, f"{stage}/{view}", min(started, ended), ended, slot, view)
                traced.last_ns = ended
            self._record(traced, "execute", traced.last_ns, now, slot)
            traced.last_ns = now
            at.traced.append(traced)
            _keep(self._unanswered, (envelope.client, reply_beginning(envelope)), traced, REQUESTS_MAX)
        at.said.clear()

    def replied(self, client: bytes, reply: bytes) -> None:
        """See Tracing."""
        traced = self._unanswered.pop((client, reply_begins_with(reply)), None)
        if traced is not None:
            now = self._now_ns()
            self._record(traced, "reply", traced.last_ns, now)
            place, attributes = self._number, {"trustlog.replica": self._number}
            self._spans.record(traced.digest, "replica", place, traced.begun_ns, now, ("request", CLIENT), attributes)

    def close(self) -> None:
        """See Tracing."""
        self._spans.close()

    def _record(
        self,
        traced: _Traced,
        stage: str,
        begun_ns: int,
        ended_ns: int,
        slot: int | None = None,
        view: int | None = None,
    ) -> None:
        attributes = {"trustlog.replica": self._number}
        if slot is not None:
            attributes["trustlog.slot"] = slot
        if view is not None:
            attributes["trustlog.view"] = view
        place = self._number
        self._spans.record(traced.digest, stage, place, begun_ns, ended_ns, ("replica", place), attributes)

    def _slot(self, number: int) -> _Slot:
        found = self._slots.get(number)
        if found is None:
            found = _Slot()
            _keep(self._slots, number, found, SLOTS_MAX)
        return found


def open_tracing(number: int, trouble: Callable[[str], None]) -> Tracing:
    """Return a replica's tracing as the environment says; trouble: told why there is none although it was asked for."""
    spans = open_spans("trustlog-replica", f"replica-{number}", trouble)
    return Tracing() if spans is None else RequestTracing(number, spans)


def _keep(entries: "OrderedDict[_Key, _Value]", key: _Key, value: _Value, size_max: int) -> None:
    entries[key] = value
    if len(entries) > size_max:
        entries.popitem(last=False)
