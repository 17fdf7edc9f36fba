"""What one reader knows, to judge single entries against: fresh in view 0, or in a later view that carries votes over.

In the later view (4, primary 1) everything up to slot 4 is checkpointed, the view opened with base 4 and top 6, so
slots 5 and 6 are carried and the primary proposes from 7 on.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from replica.core.entries import Commit, Entry, Prepare, PrePrepare
from replica.core.genesis import Genesis
from replica.core.logstate import Departure, LogState, Opening, initial_states
from replica.core.rules import Reading, Verdict, apply_entry, judge
from tests.replica.core.harness import make_genesis
from tests.replica.core.support import junk_batch

D = b"d" * 32
LATER = 4


@dataclass
class World:
    view: int
    genesis: Genesis = field(default_factory=make_genesis)
    states: list[LogState] = field(default_factory=lambda: initial_states(3))
    executed: int = 0
    stable: int = 0
    ends: int | None = None

    def __post_init__(self) -> None:
        if self.view == LATER:
            self.executed = 4
            for state in self.states:
                state.position, state.view, state.last_checkpoint, state.top = 20, LATER, 4, 6
                state.view_change_at[LATER] = Departure(15, 4, 6)
            primary = self.states[self.primary]
            primary.opened[LATER] = Opening(base=4, top=6)
            for slot in (5, 6):
                primary.vote(LATER, slot, D)

    @property
    def primary(self) -> int:
        return self.view % 3

    @property
    def backup(self) -> int:
        return (self.view + 1) % 3

    @property
    def due(self) -> int:
        """The slot that the primary proposes next in the fresh world."""
        return 1 if self.view == 0 else 7

    @property
    def base(self) -> int:
        return 0 if self.view == 0 else 4

    def reading(self) -> Reading:
        return Reading(self.genesis, self.states, self.executed, self.stable, self.ends)

    def judge(self, author: int, entry: Entry) -> Verdict:
        before = [state.copy() for state in self.states]
        verdict = judge(self.states[author], entry, self.reading())
        assert self.states == before, "judging changes nothing"
        return verdict

    def say(self, author: int, *entries: Entry) -> World:
        """Write good entries."""
        for entry in entries:
            assert self.judge(author, entry) is None, entry
            apply_entry(self.states[author], entry)
            self.states[author].check()
        return self

    def proposal(self, slot: int, view: int | None = None, cut: tuple[int, ...] | None = None) -> PrePrepare:
        if cut is None:
            cut = (0, 0, 0) if slot % 4 == 0 else ()
        return PrePrepare(self.view if view is None else view, slot, junk_batch(slot, cut))

    def proposed(self, count: int) -> World:
        """Have the primary propose `count` slots."""
        return self.say(self.primary, *(self.proposal(self.due + i) for i in range(count)))

    def prepare(self, slot: int) -> Prepare:
        return Prepare(self.view, slot, D)

    def commit(self, slot: int) -> Commit:
        return Commit(self.view, slot, D)

    def voted(self, count: int) -> World:
        """Have the backup vote for everything from the base on, `count` slots."""
        return self.say(self.backup, *(self.prepare(self.base + 1 + i) for i in range(count)))
