"""Counting votes: which batch a slot decides.

For every slot above the stable checkpoint: what each view's primary proposed, who voted for exactly that, and who
committed it. Three-phase: a slot decides d at v when q replicas hold COMMIT(v, s, d) and their own vote for it;
two-phase: when q replicas voted. See `replica.core.quorum` for why q = f + 1 is enough.

A vote or a commit for something else than what was proposed is a lie about another log: it is not counted, and
reported, but it does not stop the log (design section 4.1, third principle).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from replica.core.batch import NULL_BATCH, Batch
from replica.core.genesis import Ordering
from replica.core.logstate import LogState
from replica.core.quorum import is_quorum, primary


@dataclass(slots=True)
class ViewTally:
    """One view's proposal for a slot, and bit masks of the replicas that voted for it and committed it."""

    digest: bytes
    voters: int = 0
    committers: int = 0


@dataclass(slots=True)
class Slot:
    """What is known of one slot."""

    views: dict[int, ViewTally] = field(default_factory=dict)
    batches: dict[bytes, Batch] = field(default_factory=dict)
    decided: bytes | None = None


class SlotBook:
    """All slots above the stable checkpoint; at most three windows of them, see `Pen`."""

    def __init__(self, ordering: Ordering, f: int) -> None:
        self._ordering = ordering
        self._f = f
        self._slots: dict[int, Slot] = {}

    def __len__(self) -> int:
        return len(self._slots)

    def resume(self, states: Sequence[LogState], batches: Iterable[Batch]) -> None:
        """Count what the prefixes that these states reduce hold; `batches` are those that their proposals name."""
        by_digest = {batch.digest: batch for batch in (NULL_BATCH, *batches)}
        for slot, view, digest, author in _votes(states, proposals=True):
            self.propose(author, view, slot, by_digest[digest])
        for slot, view, digest, author in _votes(states, proposals=False):
            self.vote(author, view, slot, digest)
        for state in states:
            for slot, by_view in state.commits.items():
                for view, digest in by_view.items():
                    self.commit(state.author, view, slot, digest)

    def propose(self, author: int, view: int, slot: int, batch: Batch) -> None:
        """Note what the primary `author` of `view` proposed; this is its vote."""
        entry = self._slots.setdefault(slot, Slot())
        entry.views[view] = ViewTally(batch.digest)
        entry.batches.setdefault(batch.digest, batch)
        self.vote(author, view, slot, batch.digest)

    def vote(self, author: int, view: int, slot: int, digest: bytes) -> bool:
        """Count a vote; return False if it is not for what was proposed. A slot that is stable here counts nothing."""
        entry = self._slots.get(slot)
        if entry is None:
            return True
        tally = entry.views.get(view)
        if tally is None or tally.digest != digest:
            return False
        tally.voters |= 1 << author
        self._decide(entry, tally)
        return True

    def commit(self, author: int, view: int, slot: int, digest: bytes) -> bool:
        """Count a commit; return False if it is not for what was proposed, or its author did not vote for that."""
        entry = self._slots.get(slot)
        if entry is None:
            return True
        tally = entry.views.get(view)
        if tally is None or tally.digest != digest or not tally.voters >> author & 1:
            return False
        tally.committers |= 1 << author
        self._decide(entry, tally)
        return True

    def proposed(self, view: int, slot: int) -> bytes | None:
        """Return the digest proposed at (`view`, `slot`), or None."""
        entry = self._slots.get(slot)
        tally = None if entry is None else entry.views.get(view)
        return None if tally is None else tally.digest

    def certified(self, view: int, slot: int, also: int) -> bytes | None:
        """Return the digest for which q replicas voted at (`view`, `slot`), the replicas in mask `also` included."""
        entry = self._slots.get(slot)
        tally = None if entry is None else entry.views.get(view)
        if tally is None or not is_quorum(tally.voters | also, self._f):
            return None
        return tally.digest

    def is_committed(self, view: int, slot: int, but: int) -> bool:
        """Say whether q replicas, replica `but` aside, committed what was proposed at (`view`, `slot`)."""
        entry = self._slots.get(slot)
        tally = None if entry is None else entry.views.get(view)
        return tally is not None and is_quorum(tally.committers & tally.voters & ~(1 << but), self._f)

    def batch(self, slot: int, digest: bytes) -> Batch:
        """Return the batch with this digest that was proposed for `slot`; KeyError if none was."""
        return self._slots[slot].batches[digest]

    def decided(self, slot: int) -> Batch | None:
        """Return the batch decided for `slot`, or None."""
        entry = self._slots.get(slot)
        if entry is None or entry.decided is None:
            return None
        return entry.batches.get(entry.decided)

    def prune(self, stable: int) -> None:
        """Forget slots up to `stable`."""
        for slot in [s for s in self._slots if s <= stable]:
            del self._slots[slot]

    def _decide(self, entry: Slot, tally: ViewTally) -> None:
        if self._ordering is Ordering.TWO_PHASE:
            deciding = tally.voters
        else:
            # A commit counts with its author's own vote, which its log order guarantees to come first.
            deciding = tally.committers & tally.voters
        if is_quorum(deciding, self._f):
            entry.decided = tally.digest


def _votes(states: Sequence[LogState], *, proposals: bool) -> Iterator[tuple[int, int, bytes, int]]:
    """Yield (slot, view, digest, author) of what primaries proposed, or of what the others voted for."""
    for state in states:
        for slot, by_view in state.votes.items():
            for view, digest in by_view.items():
                if (primary(view, len(states)) == state.author) is proposals:
                    yield slot, view, digest, state.author
