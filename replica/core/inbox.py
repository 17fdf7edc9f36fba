"""Where verified groups wait until they can be read: in order, without gaps, within bounds.

Order of arrival never matters. A group that comes too early is held until the gap before it is filled; what does not
fit is dropped and asked for again, never forgotten silently (a reorder buffer that lost messages has wedged systems
like this one for good).
"""

from collections import deque
from dataclasses import dataclass, field
from enum import Enum

from replica.core.events import VerifiedGroup

# Groups that may wait behind a gap, per log.
EARLY_GROUPS_MAX = 64
EARLY_BYTES_MAX = 16 * 1024 * 1024
# Entries in order that may wait for their causes, per log.
WAITING_ENTRIES_MAX = 4096
WAITING_BYTES_MAX = 32 * 1024 * 1024


class Arrival(Enum):
    """What became of a group."""

    TAKEN = "taken"  # in order, it and perhaps more
    KNOWN = "known"  # taken before
    EARLY = "early"  # held until the gap is filled
    DROPPED = "dropped"  # no room: ask again later
    FORKED = "forked"  # contradicts what the same log attested before


@dataclass(slots=True)
class Inbox:
    """One log's groups, from arrival to reading.

    received: index of the last entry that arrived in order; head: the chain's head there, 32 bytes.
    contradiction: the group that contradicts what was taken, once one came.
    seen: the highest index that any group of this log, kept or dropped, has shown to exist.
    unread: payloads in order, each with its index and the group that holds it.
    """

    head: bytes
    received: int = 0
    seen: int = 0
    unread: deque[tuple[int, bytes, VerifiedGroup]] = field(default_factory=deque)
    unread_bytes: int = 0
    contradiction: VerifiedGroup | None = None
    _early: dict[int, VerifiedGroup] = field(default_factory=dict)
    _early_bytes: int = 0

    @property
    def wanting(self) -> bool:
        """Say whether something is known to exist, did not arrive in order, and could be taken now."""
        return self.received < self.seen and self.has_room

    @property
    def has_room(self) -> bool:
        """Say whether the next group could be taken: not while too much waits for its causes."""
        return len(self.unread) < WAITING_ENTRIES_MAX and self.unread_bytes < WAITING_BYTES_MAX

    def arrive(self, group: VerifiedGroup) -> Arrival:
        """Take a verified group of this log."""
        self.seen = max(self.seen, group.last)
        if group.last <= self.received:
            return Arrival.KNOWN
        if group.first > self.received + 1:
            return self._hold(group)
        # A log attests each index once, so a group that reaches back over the end, or one that continues from another
        # head, cannot be: one trusted part has attested two histories.
        if group.first != self.received + 1 or group.head_before != self.head:
            self.contradiction = group
            return Arrival.FORKED
        if not self.has_room:
            return Arrival.DROPPED
        self._take(group)
        while (following := self._early.pop(self.received + 1, None)) is not None:
            self._early_bytes -= len(following.raw)
            if following.head_before != self.head:
                self.contradiction = following
                return Arrival.FORKED
            self._take(following)
        self._drop_overtaken()
        return Arrival.TAKEN

    def pop(self) -> None:
        """Remove the first unread entry."""
        _, payload, _ = self.unread.popleft()
        self.unread_bytes -= len(payload)

    def _take(self, group: VerifiedGroup) -> None:
        for index, payload in enumerate(group.payloads, group.first):
            self.unread.append((index, payload, group))
            self.unread_bytes += len(payload)
        self.received = group.last
        self.head = group.head_after

    def _hold(self, group: VerifiedGroup) -> Arrival:
        if group.first in self._early:
            return Arrival.KNOWN
        full = len(self._early) >= EARLY_GROUPS_MAX or self._early_bytes + len(group.raw) > EARLY_BYTES_MAX
        if full:
            return Arrival.DROPPED
        self._early[group.first] = group
        self._early_bytes += len(group.raw)
        return Arrival.EARLY

    def _drop_overtaken(self) -> None:
        for first in [f for f in self._early if f <= self.received]:
            self._early_bytes -= len(self._early.pop(first).raw)
