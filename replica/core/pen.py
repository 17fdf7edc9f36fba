"""What a replica owes to say, one entry after the other.

The pen holds the state of the own log *including* what is being appended, which decides what may be written next. It
counts others' entries as they were read, and of its own those that stand before in the same log: a group is attested as
a whole or not at all, so a COMMIT may follow the own vote that completes its quorum. What is decided and executed is
counted elsewhere, from entries that have come back durable and attested.

COMMITs that may wait go with whatever is said next, or soon by themselves: one that comes after q others decides
nothing any more, and only spares who has not read those yet; and a primary leaves them to its backups
(`replica.core.reliance`).

Order (design section 4.2): VIEW-CHANGE if q replicas want it; SUSPECT if patience ended or the primary disappoints;
CHECKPOINT; NEW-VIEW; COMMIT; PREPARE or PRE-PREPARE; RESULT. CHECKPOINT before votes means that no vote is at or below
the own checkpoint.
"""

from collections.abc import Iterator

from replica.core.batch import NULL_BATCH, make_batch
from replica.core.carry import Carry, carry
from replica.core.entries import (
    Checkpoint,
    Commit,
    Entry,
    NewView,
    Prepare,
    PrePrepare,
    Reference,
    SlotResult,
    Suspect,
    ViewChange,
)
from replica.core.envelope import Envelope
from replica.core.expectation import Expectation
from replica.core.genesis import Ordering
from replica.core.knowledge import Knowledge
from replica.core.logstate import LogState, Opening
from replica.core.patience import Patience
from replica.core.quorum import primary
from replica.core.reliance import Reliance
from replica.core.rules import apply_entry, apply_opening, next_commit, next_vote, results_max

# Ticks after which what is held back is said: at least the time between two.
HELD_TICKS = 2


class Pen:
    """The writing side of replica `number`."""

    def __init__(self, number: int, knowledge: Knowledge, patience: Patience) -> None:
        self.state: LogState = knowledge.states[number].copy()
        self.holds_back = False
        self._ticks = 0  # while something is held back
        self._reliance = Reliance()
        self._watched = 0  # the highest slot of this view whose COMMITs by others were enough, or will not be looked at
        self._number = number
        self._known = knowledge
        self._patience = patience
        self.expectation = Expectation(patience, knowledge.genesis.f)

    @property
    def view(self) -> int:
        """The view in which this replica writes."""
        return self.state.view

    def resume(self) -> None:
        """Begin where the own log, as it was read, ends."""
        self.state = self._known.states[self._number].copy()
        proposer = primary(self.view, self._known.genesis.n)
        if proposer != self.expectation.primary:
            self.expectation.enter_view(proposer, self._known.now_ms)

    def write(self, *, tick: bool) -> tuple[bytes, ...]:
        """Return the payloads of everything that is owed now, within a group's limits; () if nothing is.

        COMMITs that may wait are held back until something else is owed, or until the second tick.
        """
        if self._holds_back(tick=tick):
            return ()
        limits = self._known.genesis.limits
        payloads: list[bytes] = []
        size = 0
        while len(payloads) < limits.group_entries_max and (entry := self._next(size)) is not None:
            self._apply(entry)
            payloads.append(entry.encode())
            size += len(payloads[-1])
        return tuple(payloads)

    def _apply(self, entry: Entry) -> None:
        carried = carry(entry, self._states(), self._known.stable) if isinstance(entry, NewView) else None
        apply_entry(self.state, entry)
        if isinstance(entry, SlotResult):
            del self._known.results.due[entry.slot]
        elif isinstance(entry, ViewChange):
            # At once, not when it comes back: the next entry of this very group is judged in the new view.
            self._patience.enter_view(self._known.now_ms)
            self._reliance = Reliance()
            self.expectation.enter_view(primary(self.view, self._known.genesis.n), self._known.now_ms)
            self._known.requests.begin_view(())
            self._known.cut_lags = False
        elif carried is not None:
            apply_opening(self.state, self.view, carried)
            self._known.requests.begin_view(self._carried_envelopes(carried))

    def _carried_envelopes(self, carried: Carry) -> Iterator[Envelope]:
        for slot, digest in carried.votes:
            # What a slot executed before brings nothing to a request that came, or came again, since then.
            if slot > self._known.executed and digest != NULL_BATCH.digest:
                yield from self._known.slots.batch(slot, digest).envelopes

    def _states(self) -> list[LogState]:
        """Return every log's state as the next own entry's author knows it."""
        states = list(self._known.states)
        states[self._number] = self.state
        return states

    def _next(self, size: int) -> Entry | None:
        """Return the next entry that is owed, given `size` bytes already in the group."""
        ends = self._known.ends
        if ends is not None and self.state.last_checkpoint >= ends:
            return None  # with this CHECKPOINT the log has left the list of members
        if not self.state.joined:
            return self._owed_checkpoint()
        change = self._owed_view_change() or self._owed_suspicion() or self._owed_checkpoint()
        return change or self._owed_ordering(size) or self._owed_result()

    def _owed_ordering(self, size: int) -> Entry | None:
        """Return what the present view wants next."""
        proposer = primary(self.view, self._known.genesis.n)
        opening = self._states()[proposer].opened.get(self.view)
        if opening is None:
            return self._owed_new_view() if proposer == self._number else None
        if self._known.genesis.ordering is Ordering.THREE_PHASE:
            commit = self._owed_commit(next_commit(self.state, opening.base))
            if commit is not None:
                return commit
        if proposer == self._number:
            return self._owed_proposal(opening, size)
        return self._owed_vote(next_vote(self.state, opening.base))

    def _owed_view_change(self) -> ViewChange | None:
        # The highest view that q replicas want is the q-th highest wish.
        wishes = sorted((state.wants for state in self._states()), reverse=True)
        wanted = wishes[self._known.genesis.quorum - 1]
        return ViewChange(wanted) if wanted > self.view else None

    def _owed_suspicion(self) -> Suspect | None:
        if self.state.suspected:
            return None
        # A primary whose log stopped at a violation can do nothing more here, requests or not; one that leaves the cut
        # behind keeps logs from being truncated.
        known, proposer = self._known, primary(self.view, self._known.genesis.n)
        oldest = known.requests.claims.oldest()
        since = None if oldest is None else oldest.claimed_ms
        if proposer in known.blind or known.cut_lags or self._patience.has_ended(since, known.now_ms):
            return Suspect(self.view)
        # What a primary is to itself, it would take for slowness when it has much to do.
        if proposer != self._number and self.expectation.is_disappointed(known.requests, known.now_ms):
            return Suspect(self.view)
        return None

    def _owed_checkpoint(self) -> Checkpoint | None:
        for slot in sorted(self._known.own_digests):
            if slot > self.state.last_checkpoint or not self.state.joined:
                return Checkpoint(slot, self._known.own_digests[slot])
        return None

    def _owed_result(self) -> SlotResult | None:
        limits = self._known.genesis.limits
        if self.state.results >= results_max(self._known.genesis):
            return None
        end = self.state.last_checkpoint + limits.window
        return next((due for due in self._known.results.due.values() if due.slot <= end), None)

    def _owed_new_view(self) -> NewView | None:
        departed = [
            Reference(state.author, state.view_change_at[self.view].index)
            for state in self._states()
            if self.view in state.view_change_at
        ]
        quorum = self._known.genesis.quorum
        return NewView(self.view, tuple(departed[:quorum])) if len(departed) >= quorum else None

    def _owed_commit(self, slot: int) -> Commit | None:
        own = self.state.votes.get(slot, {}).get(self.view)
        if own is None:
            return None
        digest = self._known.slots.certified(self.view, slot, also=1 << self._number)
        return Commit(self.view, slot, digest) if digest == own else None

    def _holds_back(self, *, tick: bool) -> bool:
        """Say whether all that is owed may wait, and has not waited long enough."""
        opening = self._states()[primary(self.view, self._known.genesis.n)].opened.get(self.view)
        waiting = range(0) if opening is None or not self.state.joined else self._waiting_commits(opening)
        if opening is None or not waiting or self._owes_more(opening):
            self.holds_back = False
            return False
        self._ticks = self._ticks + tick if self.holds_back else 0
        self.holds_back = self._ticks < HELD_TICKS
        if not self.holds_back and not self._known.slots.is_committed(self.view, waiting[-1], but=self._number):
            self._reliance.disappointed()
        return self.holds_back

    def _waiting_commits(self, opening: Opening) -> range:
        """Return the slots whose COMMITs are owed; none of them if one is in a hurry."""
        known, view = self._known, self.view
        if known.genesis.ordering is not Ordering.THREE_PHASE:
            return range(0)
        mine = primary(view, known.genesis.n) == self._number
        first = slot = next_commit(self.state, opening.base)
        if mine:
            self._watch_backups(opening.top, first)
        relies = mine and self._reliance.is_given and known.genesis.n - 1 - len(known.blind) >= known.genesis.quorum
        while self._owed_commit(slot) is not None:
            if not relies and not known.slots.is_committed(view, slot, but=self._number):
                return range(0)
            slot += 1
        return range(first, slot)

    def _watch_backups(self, top: int, next_own: int) -> None:
        """Count the slots that were committed here and that others' COMMITs were, or became, enough for."""
        self._watched = max(self._watched, top, self._known.stable)
        while self._watched + 1 < next_own:
            if not self._known.slots.is_committed(self.view, self._watched + 1, but=self._number):
                return
            self._watched += 1
            self._reliance.satisfied()

    def _owes_more(self, opening: Opening) -> bool:
        """Say whether something else than COMMITs is owed."""
        if self._owed_view_change() or self._owed_suspicion() or self._owed_checkpoint() or self._owed_result():
            return True
        if primary(self.view, self._known.genesis.n) == self._number:
            return self._known.requests.may_be_taken and self._has_room(next_vote(self.state, opening.top))
        return self._owed_vote(next_vote(self.state, opening.base)) is not None

    def _has_room(self, slot: int) -> bool:
        """Say whether `slot` lies in the window.

        The agreed window counts from the own last checkpoint. Beyond that, nothing is said more than two windows above
        the stable one: replicas that lie in their checkpoints could otherwise have the rest run on and on while nothing
        becomes stable and nothing can be forgotten. That only delays: the correct replicas execute what was decided
        so far, say their checkpoints, and are a quorum.
        """
        window = self._known.genesis.limits.window
        if self._known.ends is not None and slot > self._known.ends:
            return False
        return slot <= min(self.state.last_checkpoint, self._known.stable + window) + window

    def _owed_vote(self, slot: int) -> Prepare | None:
        if not self._has_room(slot):
            return None
        digest = self._known.slots.proposed(self.view, slot)
        return None if digest is None else Prepare(self.view, slot, digest)

    def _owed_proposal(self, opening: Opening, size: int) -> PrePrepare | None:
        limits = self._known.genesis.limits
        slot = next_vote(self.state, opening.top)
        fits = size + limits.batch_bytes_max <= limits.group_bytes_max
        envelopes = self._known.requests.take_batch() if fits and self._has_room(slot) else []
        if not envelopes:
            return None
        at_cut = slot % limits.checkpoint_interval == 0
        cut = self._known.cut_offered() if at_cut else ()
        return PrePrepare(self.view, slot, make_batch(self._known.wall_ms, cut, envelopes))
