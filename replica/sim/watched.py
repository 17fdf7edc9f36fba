"""The real core and the real application, seen into: what the simulator checks and draws of them."""

from collections import Counter
from collections.abc import Callable

from replica.application import Context
from replica.core.batch import NULL_BATCH, Batch
from replica.core.carry import Carry
from replica.core.entries import Entry, Suspect
from replica.core.group import VerifiedGroup
from replica.core.logstate import LogState
from replica.core.machine import ReplicaCore
from replica.sim.audience import Audience, Vote
from replica.sim.releaser import VersionedKeyValue


class WatchedKeyValue(VersionedKeyValue):
    """The application; the witness hears of every operation that it carries out."""

    def __init__(self, heard: Callable[[int, bytes, bytes], None]) -> None:
        self._heard = heard

    def apply(self, operation: bytes, context: Context) -> bytes:
        """See `VersionedKeyValue`."""
        self._heard(context.slot, context.client, operation)
        return super().apply(operation, context)


class WatchedCore(ReplicaCore):
    """The real core; it lets the simulator see how large its collections are and what new views carried."""

    carries: Counter[str]
    audience: Audience
    is_puppet = False
    decoded: dict[bytes, Entry]

    def _decode(self, payload: bytes) -> Entry:
        # A function of the payload alone, and every replica reads every payload.
        entry = self.decoded.get(payload)
        if entry is None:
            entry = self.decoded[payload] = super()._decode(payload)
        return entry

    def _open_view(self, log: int, view: int, carried: Carry) -> None:
        super()._open_view(log, view, carried)
        if not carried.votes:
            self.carries["carried-none"] += 1
        for _, digest in carried.votes:
            self.carries["carried-null" if digest == NULL_BATCH.digest else "carried-vote"] += 1
        batches = {slot: self._known.slots.batch(slot, digest) for slot, digest in carried.votes}
        votes = {slot: self._votes_before(view, slot) for slot in batches}
        self.audience.opened(self.number, view, carried.opening, batches, votes)

    def _votes_before(self, view: int, slot: int) -> list[Vote]:
        by_author = [(state.author, state.votes.get(slot, {})) for state in self._known.states]
        return [
            Vote(at, author, digest) for author, by_view in by_author for at, digest in by_view.items() if at < view
        ]

    def _execute(self, slot: int, batch: Batch) -> None:
        before = dict(self._cut.verdicts)
        super()._execute(slot, batch)
        for verdict, count in self._cut.verdicts.items():
            if count > before.get(verdict, 0):
                self.carries[f"cuts-{verdict}"] += 1

    def _count(self, log: int, index: int, entry: Entry, group: VerifiedGroup) -> None:
        if isinstance(entry, Suspect) and log == self.number and self._known.cut_lags and not self.is_puppet:
            self.carries["primaries-suspected-for-the-cut"] += 1
        super()._count(log, index, entry, group)

    def log_states(self) -> list[LogState]:
        """Return every log's reduced state."""
        return self._known.states

    def all_refusals(self) -> Counter[str]:
        """Return what it did not take, by reason."""
        return self.refusals + self._catch_up.refusals

    def sizes(self) -> dict[str, int]:
        """Return the size of everything that grows."""
        return {
            "slots": len(self._known.slots),
            "requests": len(self._known.requests),
            "unread": max(len(inbox.unread) for inbox in self._inboxes),
            "beyond-cut": len(self._cut),
            "votes": max(len(state.votes) for state in self._known.states),
            "commits": max(len(state.commits) for state in self._known.states),
            "checkpoints": len(self._checkpoints),
            "own-digests": len(self._known.own_digests),
            "views": max(len(state.view_change_at) for state in self._known.states),
        }

    def tallies(self) -> list[tuple[int, list[tuple[int, bytes, int, int]]]]:
        """Return what is counted: per slot, per view its digest and the masks of voters and committers."""
        return [
            (slot, [(view, tally.digest, tally.voters, tally.committers) for view, tally in found.views.items()])
            for slot, found in self._known.slots._slots.items()  # noqa: SLF001 - nobody else looks at it
        ]

    def head_at(self, log: int, index: int) -> bytes | None:
        """Return the head of a log as it arrived here, where a group ends at `index`, if that is remembered."""
        return self._inboxes[log].head_at(index)

    def waiting_requests(self) -> list[bytes]:
        """Return the digests of the requests that wait."""
        return [waiting.digest for waiting in self._known.requests]

    def check(self) -> None:
        """Raise RuntimeError if an invariant of a log's reduced state is broken."""
        for state in self._known.states:
            state.check()

    def contents(self) -> dict[bytes, bytes]:
        """Return the application's whole state."""
        return dict(self.executor.state.scan())
