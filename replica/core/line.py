"""The line in which waiting requests are served: in turn, by what they cost, and nobody waits for long.

A turn is worth the same to everybody: deficit round robin (Shreedhar and Varghese, SIGCOMM 1995) with a quantum of one
unit, which is one operation or one KiB, whichever an envelope has more of. An envelope that costs c is served in the
c-th round after its turn came; one whose lane has nothing waiting saves nothing up. Rounds that serve nobody are not
walked through: a heap holds the round in which each lane's first envelope is due, so that an envelope taken costs
O(log lanes), whatever others wait for.

Two things differ from that. Beyond TURN_MAX units an envelope is paid for afterwards: it is served in the TURN_MAX-th
round, and its lane owes the rest, also while it has nothing waiting. So whoever owes nothing waits for TURN_MAX rounds
at most, and nobody gets more than his share. And what a lane has waited for stays when the view changes: otherwise what
takes longer than a view lasts would begin anew in each.
"""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from replica.core.envelope import Envelope, Operations
from replica.core.genesis import KIB
from replica.core.rooms import Lane

if TYPE_CHECKING:
    from replica.core.requests import Waiting

# Rounds for which an envelope waits at most, unless its lane owes some.
TURN_MAX = 64
# Lanes of which it is remembered that they owe rounds, while nothing of theirs waits.
DEBTS_MAX = 8192
# Entries of the heap that stand for nothing any more, beyond as many as stand for something, before it is made anew.
STALE_MAX = 64


def operations_of(envelope: Envelope) -> int:
    """Return how many operations an envelope asks for; opening a session is one."""
    content = envelope.content
    return len(content.operations) if isinstance(content, Operations) else 1


def cost_of(envelope: Envelope) -> int:
    """Return what an envelope costs, in units: its operations or its KiB (rounded up), whichever is more."""
    return max(operations_of(envelope), -(-len(envelope.raw) // KIB))


@dataclass(slots=True)
class Turn:
    """A lane's place in the line: its first request is due some rounds after `since_round`, after who came before."""

    since_round: int
    due_round: int
    place: int


class Line:
    """Requests to be proposed, by lane, and whose turn comes when."""

    def __init__(self) -> None:
        self.lanes: dict[Lane, dict[bytes, Waiting]] = {}  # lane -> digest -> request, in order
        self.turns: dict[Lane, Turn] = {}  # of the same lanes
        self.heap: list[tuple[int, int, Lane]] = []  # due round, place, lane; stale unless as in `turns`
        self.debts: dict[Lane, int] = {}  # of other lanes -> the round up to which they pay
        self._round = 0
        self._arrivals = 0

    def add(self, waiting: "Waiting") -> None:
        """Add a request to those to be proposed."""
        lane = waiting.lane
        queue = self.lanes.get(lane)
        if queue is not None:
            queue[waiting.digest] = waiting
        else:
            self.lanes[lane] = {waiting.digest: waiting}
            self._take_place(lane, self._free_from(lane))

    def withdraw(self, waiting: "Waiting") -> None:
        """Take a request out of those to be proposed, if it is one of them."""
        lane = waiting.lane
        queue = self.lanes.get(lane)
        if queue is not None and queue.pop(waiting.digest, None) is not None and not queue:
            del self.lanes[lane]
            self._owe(lane, self.turns.pop(lane).since_round)

    def first(self) -> "Waiting | None":
        """Return the request at the front of the line, which stays there."""
        while self.heap:
            due, place, lane = self.heap[0]
            turn = self.turns.get(lane)
            if turn is None or (turn.due_round, turn.place) != (due, place):
                heapq.heappop(self.heap)
                continue
            first = next(iter(self.lanes[lane].values()))
            if turn.since_round + _turn_of(first) > due:
                # What was first is executed already, and what comes next costs more.
                heapq.heappop(self.heap)
                self._take_place(lane, turn.since_round)
                continue
            return first
        return None

    def take(self, first: "Waiting") -> None:
        """Take the request at the front, which `first` returned just now."""
        lane = first.lane
        self._round = self.turns[lane].due_round
        paid_at = self._round + cost_of(first.envelope) - _turn_of(first)
        heapq.heappop(self.heap)
        del self.lanes[lane][first.digest]
        if self.lanes[lane]:
            self._take_place(lane, paid_at)
        else:
            del self.lanes[lane], self.turns[lane]
            self._owe(lane, paid_at)

    def begin_view(self, waiting: Iterable["Waiting"], forgiven: Iterable[Lane]) -> None:
        """Line these up instead of all others; what was waited for stays.

        forgiven: lanes of which something was served, and is to be served again. They owe nothing.
        """
        before = {lane: turn.since_round for lane, turn in self.turns.items()}
        for lane in forgiven:
            before.pop(lane, None)
            self.debts.pop(lane, None)
        self.lanes.clear()
        self.turns.clear()
        self.heap.clear()
        for one in waiting:
            self.lanes.setdefault(one.lane, {})[one.digest] = one
        for lane in self.lanes:
            self._take_place(lane, before.pop(lane) if lane in before else self._free_from(lane))
        for lane, since_round in before.items():
            self._owe(lane, since_round)

    def _take_place(self, lane: Lane, since_round: int) -> None:
        """Put a lane into the line, to pay for its first request from this round on."""
        first = next(iter(self.lanes[lane].values()))
        self._arrivals += 1
        turn = self.turns[lane] = Turn(since_round, since_round + _turn_of(first), self._arrivals)
        heapq.heappush(self.heap, (turn.due_round, turn.place, lane))
        if len(self.heap) > 2 * len(self.turns) + STALE_MAX:
            self.heap = [(turn.due_round, turn.place, lane) for lane, turn in self.turns.items()]
            heapq.heapify(self.heap)

    def _free_from(self, lane: Lane) -> int:
        """Return the round from which on a lane that had nothing waiting pays for what comes now."""
        return max(self._round, self.debts.pop(lane, 0))

    def _owe(self, lane: Lane, paid_at: int) -> None:
        """Remember that a lane without requests pays for what it had, up to this round."""
        if paid_at > self._round:
            self.debts[lane] = paid_at
            if len(self.debts) > DEBTS_MAX:
                del self.debts[next(iter(self.debts))]


def _turn_of(waiting: "Waiting") -> int:
    return min(cost_of(waiting.envelope), TURN_MAX)
