"""A watch as a pure state machine: chains of links from several replicas, of which f+1 must be equal.

Every correct replica tells the same chain of links (`replica.wire.changes`), so from a position that f+1 of them
vouched for there is one next link. Rules:

  W1  A link counts for the replica over whose authenticated connection it came. It is taken when it begins where the
      watch stands and f+1 distinct replicas told it, byte for byte: one of them is correct.
  W2  So nothing is missed, repeated, or out of order, whoever disconnects: a replica that is asked again is asked from
      where the watch stands.
  W3  A replica whose link differs from one that was taken is not listened to again on this connection.
  W4  A replica goes no further than its window beyond what was acknowledged; one that does is not listened to. So a
      watch keeps at most (window + one link) for each replica, and an owner that is slow costs nobody memory.
  W5  When f+1 replicas say that what follows is gone, it is: one of them is correct. Fewer do not end a watch.
  W6  When f+1 replicas say that they did not come to where the watch begins, the position is taken for one that does
      not exist. Never one up to which links were taken: f+1 replicas were there, and are waited for.
  W7  When f+1 replicas say that this client may not watch these keys, it may not.
"""

from collections import Counter, deque
from enum import Enum

from replica.wire.changes import LINK_BYTES_MAX, VALUE_BYTES_MAX, WINDOW_BYTES, WINDOW_LINKS, Link, Position

# A link holds one change at least, which may be larger than the rest.
LINK_BYTES_ACCEPTED = LINK_BYTES_MAX + 2 * VALUE_BYTES_MAX
BYTES_MAX = WINDOW_BYTES + LINK_BYTES_ACCEPTED


class Part(Enum):
    """What a replica has to do with a watch."""

    ABSENT = "absent"  # not asked, or not connected
    ASKED = "asked"
    TELLING = "telling"
    GONE = "gone"  # it keeps only what comes later
    BUSY = "busy"
    REFUSED = "refused"  # W3 or W4


class Merge:
    """One watch of n replicas from a position on; `position` is up to where links were taken.

    Invariant: every link that waits begins at or after `position`.
    """

    def __init__(self, n: int, quorum: int, position: Position) -> None:
        self.position = position
        self.parts = [Part.ABSENT] * n
        self.refused = Counter[str]()
        self._quorum = quorum
        self._floors = [0] * n
        # Where replicas are that did not come to where the watch begins, as they said last.
        self._behind: dict[int, int] = {}
        # Who says that this client may not watch these keys.
        self._denied: set[int] = set()
        self._has_moved = False
        self._links: list[deque[Link]] = [deque() for _ in range(n)]
        self._sizes = [0] * n
        # Where each replica's chain has come to.
        self._ends = [position] * n

    def renewed(self, n: int, quorum: int) -> "Merge":
        """Return this watch among other replicas: it stands where it stood, and nobody is asked yet."""
        made = Merge(n, quorum, self.position)
        made.refused, made._has_moved = self.refused, self._has_moved
        return made

    # What happens

    def asked(self, replica: int) -> None:
        """Take in that a replica is asked to tell from `position` on."""
        self.parts[replica] = Part.ASKED
        self._ends[replica] = self.position
        self._forget(replica)

    def lost(self, replica: int) -> None:
        """Take in that a replica is not connected."""
        self.parts[replica] = Part.ABSENT
        self._behind.pop(replica, None)
        self._denied.discard(replica)
        self._forget(replica)

    def ended(self, replica: int, code: str, slot: int) -> None:
        """Take in that a replica tells no more: it keeps only what comes after `slot`, or ("ahead") is there only.

        Or this client ("not-allowed") may not be told.
        """
        self.parts[replica] = Part.GONE if code == "gone" else Part.BUSY
        self._floors[replica] = slot
        if code == "ahead":
            self._behind[replica] = slot
        if code == "not-allowed":
            self._denied.add(replica)
        if code != "gone":
            self._forget(replica)

    def told(self, replica: int, link: Link) -> list[Link]:
        """Take a replica's link; return the links that are now taken, in order."""
        if self.parts[replica] not in {Part.ASKED, Part.TELLING}:
            return []
        self.parts[replica] = Part.TELLING
        self._behind.pop(replica, None)
        self._denied.discard(replica)
        if link.start == link.end and not link.changes:
            return []  # it says that it has begun
        waiting = self._links[replica]
        if link.end <= link.start or len(link.changes) > LINK_BYTES_ACCEPTED or link.start != self._ends[replica]:
            self._refuse(replica, "broken-chain")
            return []
        self._ends[replica] = link.end
        if link.end <= self.position:
            return []  # others were quicker
        if len(waiting) >= WINDOW_LINKS or self._sizes[replica] + len(link.changes) > BYTES_MAX:
            self._refuse(replica, "too-far-ahead")
            return []
        waiting.append(link)
        self._sizes[replica] += len(link.changes)
        return self._take()

    # What is so

    @property
    def telling(self) -> int:
        """How many replicas take part."""
        return sum(part is Part.TELLING for part in self.parts)

    @property
    def is_gone(self) -> bool:
        """Say whether what follows can no longer be had (W5)."""
        return sum(part is Part.GONE for part in self.parts) >= self._quorum

    @property
    def is_ahead(self) -> bool:
        """Say whether the watch begins at a position that does not exist (W6)."""
        return not self._has_moved and len(self._behind) >= self._quorum

    @property
    def is_denied(self) -> bool:
        """Say whether this client may not be told (W7)."""
        return len(self._denied) >= self._quorum

    def executed(self) -> int:
        """Return a slot that f+1 of the replicas that did not come to the position have executed, as they say."""
        slots = sorted(self._behind.values(), reverse=True)
        return slots[self._quorum - 1] if len(slots) >= self._quorum else 0

    def kept_from(self) -> int:
        """Return a slot after which f+1 replicas, as they say, keep everything."""
        floors = sorted(floor for floor, part in zip(self._floors, self.parts, strict=True) if part is Part.GONE)
        return floors[self._quorum - 1] if len(floors) >= self._quorum else 0

    def to_ask_again(self) -> list[int]:
        """Return the replicas that could take part again: busy ones, and those that have what follows by now."""
        return [
            replica
            for replica, part in enumerate(self.parts)
            if part is Part.BUSY or (part is Part.GONE and self.position >= Position(self._floors[replica]))
        ]

    # How

    def _take(self) -> list[Link]:
        taken = []
        while (link := self._agreed()) is not None:
            taken.append(link)
            self.position = link.end
            self._has_moved = True
            for replica, waiting in enumerate(self._links):
                if not waiting or waiting[0].start >= link.end:
                    continue
                if waiting[0] == link:
                    self._sizes[replica] -= len(waiting.popleft().changes)
                else:
                    self._refuse(replica, "differs")
        return taken

    def _agreed(self) -> Link | None:
        counts = Counter(waiting[0] for waiting in self._links if waiting and waiting[0].start == self.position)
        return next((link for link, count in counts.items() if count >= self._quorum), None)

    def _refuse(self, replica: int, reason: str) -> None:
        self.refused[reason] += 1
        self.parts[replica] = Part.REFUSED
        self._forget(replica)

    def _forget(self, replica: int) -> None:
        self._links[replica].clear()
        self._sizes[replica] = 0
