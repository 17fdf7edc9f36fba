"""Questions to single replicas, outside the order: status reports, and reads that no quorum has ordered.

A stale read is believed when f+1 replicas gave equal answers, so at least one correct replica had that value.
It may be old, and two stale reads may go back in time; whoever minds uses an ordered read.
"""

import asyncio
from dataclasses import dataclass, field
from typing import Any

from client.errors import Overloaded
from client.receipts import ReceiptRound
from replica.core.envelope import Status
from replica.wire import reports
from replica.wire.messages import ReceiptShown, StaleResult, StatusReport

ROUNDS_MAX = 1024
REPORT_BYTES_MAX = 64 * 1024
REPORT_TEXT_MAX = 300
_ANSWERS = frozenset({Status.OK, Status.ERROR, Status.NOT_ALLOWED, Status.NOT_PERMITTED})


@dataclass(frozen=True, slots=True)
class StaleAnswer:
    """What f+1 replicas answered alike; `executed` is the lowest slot at which one of them says it stood."""

    status: Status
    value: bytes
    executed: int
    replicas: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """A replica's own word on itself (`report`), or why there is none (`problem`)."""

    number: int
    address: str
    reachable: bool
    problem: str = ""
    report: dict[str, Any] = field(default_factory=dict)


class StaleRound:
    """One question to all connected replicas; its future gets the first answer that f+1 gave."""

    def __init__(self, quorum: int) -> None:
        self.future: asyncio.Future[StaleAnswer] = asyncio.get_running_loop().create_future()
        self._quorum = quorum
        self._answers: dict[int, StaleResult] = {}

    def begin_anew(self, quorum: int) -> None:
        """Forget what came: among other replicas, two lists' liars could make up an answer together."""
        self._quorum = quorum
        self._answers.clear()

    def on_result(self, replica: int, result: StaleResult) -> None:
        """Take a replica's answer; a second one replaces the first."""
        self._answers[replica] = result
        same = {
            number: answer.executed
            for number, answer in self._answers.items()
            if (answer.status, answer.value) == (result.status, result.value)
        }
        if len(same) < self._quorum or self.future.done() or result.status not in _ANSWERS:
            return
        numbers = tuple(sorted(same))
        self.future.set_result(StaleAnswer(Status(result.status), result.value, min(same.values()), numbers))


class Queries:
    """Questions that wait for an answer, by number; at most ROUNDS_MAX."""

    def __init__(self) -> None:
        self._last = 0
        self.stale: dict[int, StaleRound] = {}
        self.reports: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.receipts: dict[int, ReceiptRound] = {}

    def next(self) -> int:
        """Return a number for a new question; Overloaded if too many wait."""
        if len(self.stale) + len(self.reports) + len(self.receipts) >= ROUNDS_MAX:
            raise Overloaded(f"{ROUNDS_MAX} stale reads, status questions and receipts wait; ask for less at once")
        self._last += 1
        return self._last

    def on_stale(self, replica: int, result: StaleResult) -> None:
        """Take the answer to a stale read; one that nobody waits for is dropped."""
        waiting = self.stale.get(result.query)
        if waiting is not None:
            waiting.on_result(replica, result)

    def on_report(self, message: StatusReport, report: dict[str, Any]) -> None:
        """Take a status report; one that nobody waits for is dropped."""
        waiting = self.reports.get(message.query)
        if waiting is not None and not waiting.done():
            waiting.set_result(report)

    def on_receipt(self, replica: int, message: ReceiptShown) -> None:
        """Take what a replica shows for a receipt; one that nobody waits for is dropped."""
        waiting = self.receipts.get(message.query)
        if waiting is not None:
            waiting.on_shown(replica, message, asyncio.get_running_loop().time())


def read_report(raw: bytes) -> dict[str, Any]:
    """Return a status report's content; an empty one if it is not a JSON object of moderate size."""
    return reports.read_report(raw, bytes_max=REPORT_BYTES_MAX, text_max=REPORT_TEXT_MAX)


def number_in(report: dict[str, Any], name: str) -> int:
    """Return a natural number of a report, 0 if it has none under this name."""
    return reports.number(report, name) or 0
