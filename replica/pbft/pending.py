"""What waits to be ordered, as the machine sees it: one request for each slot, or batches of them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from replica.core.batch import Batch, make_batch
from replica.core.envelope import Envelope
from replica.core.genesis import Limits
from replica.core.requests import RequestQueue, Waiting
from replica.pbft.messages import Proposal, Request


class Pending(Protocol):
    """Requests that wait. Times in milliseconds, of the machine's clock."""

    def add(self, request: Any, now_ms: int) -> None:  # noqa: ANN401 - the host's own kind
        """Take a request, unless it waits already or was executed."""
        ...

    def next(self) -> Proposal | None:
        """Return what to propose next; None if there is nothing that this view has not proposed."""
        ...

    def executed(self, proposal: Proposal, slot: int, now_ms: int) -> None:
        """Forget what was executed in `slot`."""
        ...

    def begin_view(self, carried: Iterable[Proposal]) -> None:
        """Propose everything anew that is not executed, except what the new view carries."""
        ...

    def oldest(self) -> int | None:
        """Return since when the oldest request waits; None if none waits."""
        ...


class OneByOne:
    """A slot for each request, and every outcome is remembered: for the simulator."""

    def __init__(self) -> None:
        self._waiting: dict[tuple[str, int], tuple[Request, int]] = {}
        self._done: dict[tuple[str, int], int] = {}
        self._proposed: set[tuple[str, int]] = set()

    def add(self, request: Request, now_ms: int) -> None:
        """See Pending."""
        key = (request.client, request.number)
        if key not in self._done:
            self._waiting.setdefault(key, (request, now_ms))

    def next(self) -> Proposal | None:
        """See Pending."""
        for key, (request, _) in self._waiting.items():
            if key not in self._proposed:
                self._proposed.add(key)
                return request
        return None

    def executed(self, proposal: Proposal, slot: int, now_ms: int) -> None:  # noqa: ARG002 - part of the interface
        """See Pending."""
        if isinstance(proposal, Request):
            key = (proposal.client, proposal.number)
            self._waiting.pop(key, None)
            self._done.setdefault(key, slot)

    def begin_view(self, carried: Iterable[Proposal]) -> None:
        """See Pending."""
        self._proposed = {(one.client, one.number) for one in carried if isinstance(one, Request)}

    def oldest(self) -> int | None:
        """See Pending."""
        return min((since for _, since in self._waiting.values()), default=None)

    def executed_slot(self, request: Request) -> int | None:
        """Return where a request was executed, or None."""
        return self._done.get((request.client, request.number))


@dataclass(frozen=True, slots=True)
class BatchProposal:
    """A batch of clients' envelopes, in the product's layout (`replica.core.batch`)."""

    batch: Batch

    def digest(self) -> bytes:
        """Return d, 32 bytes."""
        return self.batch.digest


class Batches:
    """The product's queue: bounded, one client after another; what waits becomes one batch.

    wall_ms: the time that a batch claims, in milliseconds since 1970.
    """

    def __init__(self, limits: Limits, wall_ms: Callable[[], int]) -> None:
        self.queue = RequestQueue(limits)
        self._wall_ms = wall_ms

    def add(self, request: Envelope, now_ms: int) -> None:
        """See Pending. QueueFullError, changing nothing, if there is no room."""
        self.queue.add(request, now_ms)

    def next(self) -> Proposal | None:
        """See Pending."""
        envelopes = self.queue.take_batch() if self.queue.unproposed else []
        return BatchProposal(make_batch(self._wall_ms(), (), envelopes)) if envelopes else None

    def executed(self, proposal: Proposal, slot: int, now_ms: int) -> None:  # noqa: ARG002 - part of the interface
        """See Pending."""
        if isinstance(proposal, BatchProposal):
            for envelope in proposal.batch.envelopes:
                self.queue.executed(envelope, now_ms)

    def begin_view(self, carried: Iterable[Proposal]) -> None:
        """See Pending."""
        self.queue.begin_view(
            envelope for one in carried if isinstance(one, BatchProposal) for envelope in one.batch.envelopes
        )

    def oldest(self) -> int | None:
        """See Pending."""
        waiting: Waiting | None = self.queue.oldest()
        return None if waiting is None else waiting.since_ms
