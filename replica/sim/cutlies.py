"""Cuts that no correct primary proposes: strategies about the positions in the batch at every K-th slot."""

import struct
from typing import TYPE_CHECKING

from replica.core.entries import PRE_PREPARE
from replica.core.quorum import primary
from replica.sim.lies import cut_of, view_and_slot
from replica.sim.strategies import Strategy

if TYPE_CHECKING:
    from replica.sim.faulty import FaultyReplica

CUT_AT = 27
# Draws of a kind never give this one: it takes a view that was hidden.
UNCLOSED = "unclosed"
CUT_KINDS = ("zeros", "first", "agreed", "ahead", "own-ahead", "open", "mixed", "inside-group", "back")


class FalseCuts(Strategy):
    """As primary, proposes cuts of one kind, chosen for the run or given.

    zeros, first, agreed: stale ones, which never move anything. ahead, own-ahead: beyond what it has read itself, or
    said. open: everything but the log of the view before, where the proposals stand. mixed: each log new or old, as it
    falls. inside-group: where no group ends. back: one log moves back. unclosed: like open, but only when others voted
    there for slots to come, so that the cut is not causally closed.
    """

    name = "false-cut"

    def __init__(self, argument: str = "") -> None:
        self._kind = argument
        self._first: list[int] = []

    def join(self, host: "FaultyReplica") -> None:
        """See `Strategy`."""
        super().join(host)
        self._kind = self._kind or self.chance.choice(CUT_KINDS)

    def entries(self, payloads: list[bytes]) -> list[bytes]:
        """See `Strategy`."""
        return [self._lie(p) if p[0] == PRE_PREPARE and cut_of(p) else p for p in payloads]

    def _lie(self, payload: bytes) -> bytes:
        right = cut_of(payload)
        if self._kind == UNCLOSED and not self._is_in_flight(*view_and_slot(payload)):
            return payload
        self._first = self._first or right
        false = [max(0, position) for position in self._false(right)]
        if false == right:
            return payload
        self.did()
        self.host.count(f"{self.name}-{self._kind}")
        return with_cut(payload, false)

    def _false(self, right: list[int]) -> list[int]:
        agreed, chance = list(self.host.core.cut), self.chance
        own, hit = self.host.number, chance.randrange(len(right))
        if self._kind == "zeros":
            return [0] * len(right)
        if self._kind == "first":
            return list(self._first)
        if self._kind == "agreed":
            return agreed
        if self._kind == "mixed":
            return [chance.choice(pair) for pair in zip(agreed, right, strict=True)]
        false = list(right)
        if self._kind == "ahead":
            others = [log for log in range(len(right)) if log != own]
            false[chance.choice(others)] += chance.choice((1, 2, 20))
        elif self._kind == "own-ahead":
            false[own] = self.host.puppet.own.position + chance.choice((1, 2, 50))
        elif self._kind in {"open", UNCLOSED}:
            before = primary(max(0, self.host.puppet.own.view - 1), len(right))
            false[before] = agreed[before]
        elif self._kind == "inside-group":
            false = [position - chance.randrange(2) for position in right]
        else:
            false[hit] = agreed[hit] - chance.choice((1, 1, 5))
        return false

    def _is_in_flight(self, view: int, slot: int) -> bool:
        """Say whether anybody but its proposer voted in the view before for a slot above this one."""
        states = self.host.puppet.knowledge.states
        before = max(0, view - 1)
        others = [state for state in states if state.author != primary(before, len(states))]
        return any(voted > slot and before in by_view for s in others for voted, by_view in s.votes.items())


def with_cut(payload: bytes, cut: list[int]) -> bytes:
    """Return a PRE-PREPARE with another cut of the same length."""
    return payload[:CUT_AT] + struct.pack(f">{len(cut)}Q", *cut) + payload[CUT_AT + 8 * len(cut) :]
