"""The agreed cut: from where on in every log a replica that was away must read (design section 4.3).

Logs are truncated, and whoever was away skips what is gone. A vote or a VIEW-CHANGE could hide in the skipped part, so
where to skip to is agreed, and so is what the skipped part said: the batch at every K-th slot carries its proposer's
position in every log, and executing it moves the cut there if

  1. no position moves back,
  2. each is the end of a group, so that reading goes on with a whole group, and
  3. it is causally closed: every vote for a slot above the executed one that lies inside has its proposal inside.

Otherwise it does nothing. All three are judged from the same log prefixes everywhere, alike. The reduced state of
every log *at the cut* is part of the checkpoint digest.

Why 3: whoever starts at the cut reads on in each log from there. A vote's reader waits for its proposal; were the vote
inside and its proposal outside, then the vote would be known and what it is for would not.
"""

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

from replica.core.carry import Carry
from replica.core.entries import Entry, Prepare, PrePrepare
from replica.core.logstate import LogState
from replica.core.quorum import primary
from replica.core.rules import apply_entry, apply_opening


@dataclass(frozen=True, slots=True)
class _Step:
    """An entry that was read beyond the cut. head: the chain's head if a group ends here, else None."""

    entry: Entry
    carried: Carry | None
    head: bytes | None


class _Journal:
    """One log from the agreed cut to where it was read."""

    def __init__(self, state: LogState, head: bytes) -> None:
        self.state = state
        self.head = head
        self.steps: deque[_Step] = deque()
        self.end_of_group = state.position

    def read(self, step: _Step) -> None:
        self.steps.append(step)
        if step.head is not None:
            self.end_of_group = self.state.position + len(self.steps)

    def at(self, position: int) -> tuple[LogState, bytes] | None:
        """Return the reduced state and the head at `position`; None if no group that was read ends there."""
        count = position - self.state.position
        if count == 0:
            return self.state, self.head
        if not 0 < count <= len(self.steps):
            return None
        head = self.steps[count - 1].head
        if head is None:
            return None
        state = self.state.copy()
        for place, step in enumerate(self.steps):
            if place == count:
                break
            apply_entry(state, step.entry)
            if step.carried is not None:
                apply_opening(state, state.view, step.carried)
        return state, head

    def move(self, state: LogState, head: bytes) -> None:
        for _ in range(state.position - self.state.position):
            self.steps.popleft()
        self.state, self.head = state, head


class AgreedCut:
    """Where the cut stands, what every log said up to there, and what was read beyond it.

    states: every log's reduced state at the cut; heads: the chains' heads there, 32 bytes each.
    verdicts: how often a cut moved it, or why not: "moved", "back", "no-end" of a group, "open" (not closed), "stands"
    (it is where the cut stands), "none" (a null batch).
    """

    def __init__(self, states: Sequence[LogState], heads: Sequence[bytes]) -> None:
        self._journals = [_Journal(state.copy(), head) for state, head in zip(states, heads, strict=True)]
        self.verdicts = Counter[str]()

    def __len__(self) -> int:
        """Return how many entries were read beyond the cut."""
        return sum(len(journal.steps) for journal in self._journals)

    @property
    def positions(self) -> tuple[int, ...]:
        """Every log's index at the cut."""
        return tuple(journal.state.position for journal in self._journals)

    @property
    def heads(self) -> tuple[bytes, ...]:
        """Every log's head at the cut."""
        return tuple(journal.head for journal in self._journals)

    @property
    def states(self) -> tuple[LogState, ...]:
        """Every log's reduced state at the cut; not to be changed."""
        return tuple(journal.state for journal in self._journals)

    @property
    def lowest_view(self) -> int:
        """The lowest view that any log is in at the cut."""
        return min(journal.state.view for journal in self._journals)

    def read(self, log: int, entry: Entry, carried: Carry | None, head: bytes | None) -> None:
        """Note the next entry of `log`, which the rules found good; `head` if its group ends with it."""
        if isinstance(entry, PrePrepare):
            # For a log's reduced state a proposal is its author's vote; the batch itself is kept elsewhere.
            entry = Prepare(entry.view, entry.slot, entry.batch.digest)
        self._journals[log].read(_Step(entry, carried, head))

    def ends_of_groups(self) -> tuple[int, ...]:
        """Return the cut that a proposer offers now: the end of the last group that was wholly read, in every log."""
        return tuple(journal.end_of_group for journal in self._journals)

    def execute(self, slot: int, cut: Sequence[int]) -> bool:
        """Execute the cut of the batch at `slot` (() for a null batch's): move if it is good; say whether it moved.

        Afterwards votes up to `slot`, and views that nobody can name any more, are forgotten at the cut.
        """
        verdict = self._move(slot, cut)
        self.verdicts[verdict] += 1
        lowest = self.lowest_view
        for journal in self._journals:
            journal.state.prune(slot)
            journal.state.drop_views(lowest)
        return verdict == "moved"

    def _move(self, slot: int, cut: Sequence[int]) -> str:
        if len(cut) != len(self._journals):
            return "none"
        if tuple(cut) == self.positions:
            return "stands"
        if any(position < at for position, at in zip(cut, self.positions, strict=True)):
            return "back"
        places = [journal.at(position) for journal, position in zip(self._journals, cut, strict=True)]
        found = [place for place in places if place is not None]
        if len(found) < len(places):
            return "no-end"
        if not is_closed([state for state, _ in found], slot):
            return "open"
        for journal, (state, head) in zip(self._journals, found, strict=True):
            journal.move(state, head)
        return "moved"


def is_closed(states: Sequence[LogState], slot: int) -> bool:
    """Say whether every vote above `slot` in these prefixes has its proposal in them."""
    for state in states:
        for voted, by_view in state.votes.items():
            if voted > slot and any(view not in _proposals(states, view, voted) for view in by_view):
                return False
    return True


def _proposals(states: Sequence[LogState], view: int, slot: int) -> dict[int, bytes]:
    return states[primary(view, len(states))].votes.get(slot, {})
