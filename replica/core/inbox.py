"""Where verified groups wait until they can be read: in order, without gaps, within bounds.

Order of arrival never matters. A group that comes too early is held until the gap before it is filled; what does not
fit is dropped and asked for again, never forgotten silently (a reorder buffer that lost messages has wedged systems
like this one for good).
"""

from collections import OrderedDict, deque
from dataclasses import dataclass, field
from enum import Enum

from replica.core.group import VerifiedGroup

# Groups that may wait behind a gap, per log.
EARLY_GROUPS_MAX = 64
EARLY_BYTES_MAX = 16 * 1024 * 1024
# Entries in order that may wait for their causes, per log.
WAITING_ENTRIES_MAX = 4096
WAITING_BYTES_MAX = 32 * 1024 * 1024
# Groups whose bounds and heads are remembered after they were taken, per log, to notice a second history.
REMEMBERED_GROUPS_MAX = 1024


class Arrival(Enum):
    """What became of a group."""

    TAKEN = "taken"  # in order, it and perhaps more
    KNOWN = "known"  # taken before
    EARLY = "early"  # held until the gap is filled
    DROPPED = "dropped"  # no room: ask again later
    STRAY = "stray"  # continues nothing, and proves nothing: its author's host made it up
    FORKED = "forked"  # contradicts what the same log attested before


@dataclass(slots=True)
class Inbox:
    """One log's groups, from arrival to reading.

    received: index of the last entry that arrived in order; head: the chain's head there, 32 bytes.
    contradiction: the group that contradicts what was taken, once one came.
    seen: the highest index that any group of this log, kept or dropped, has shown to exist.
    unread: payloads in order, each with its index and the group that holds it.
    fresh: groups taken since they were last collected, in order.
    """

    head: bytes
    received: int = 0
    seen: int = 0
    unread: deque[tuple[int, bytes, VerifiedGroup]] = field(default_factory=deque)
    unread_bytes: int = 0
    contradiction: VerifiedGroup | None = None
    fresh: list[VerifiedGroup] = field(default_factory=list)
    _ends: OrderedDict[int, tuple[int, bytes, bytes]] = field(default_factory=OrderedDict)  # first -> last, the heads
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
            return self._compare(group)
        if group.first > self.received + 1:
            return self._hold(group)
        if group.first != self.received + 1 or group.head_before != self.head:
            return self._misfit(group)
        if not self.has_room:
            return Arrival.DROPPED
        self._take(group)
        while (following := self._early.pop(self.received + 1, None)) is not None:
            self._early_bytes -= len(following.raw)
            if following.head_before != self.head:
                if self._misfit(following) is Arrival.FORKED:
                    return Arrival.FORKED
                break
            self._take(following)
        self._drop_overtaken()
        return Arrival.TAKEN

    def collect(self) -> list[VerifiedGroup]:
        """Return the groups taken since the last call, in order."""
        fresh, self.fresh = self.fresh, []
        return fresh

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
        self.fresh.append(group)
        self._ends[group.first] = (group.last, group.head_before, group.head_after)
        if len(self._ends) > REMEMBERED_GROUPS_MAX:
            self._ends.popitem(last=False)

    def _compare(self, group: VerifiedGroup) -> Arrival:
        """Take a group that lies within what was taken: it must be one of the groups that were."""
        known = self._ends.get(group.first)
        if known is None:
            oldest = next(iter(self._ends), self.received + 1)
            same = group.first < oldest  # too long ago to say
        else:
            same = known == (group.last, group.head_before, group.head_after)
        return Arrival.KNOWN if same else self._misfit(group)

    def _misfit(self, group: VerifiedGroup) -> Arrival:
        """Judge a group that is none of those taken and continues none of them.

        A log that counts its indexes attests each once, so a group that reaches back over the end, or one that
        continues from another head, cannot be: one trusted part has attested two histories. One that does not count
        them has only if it continued a head twice.
        """
        if not group.counted and all(before != group.head_before for _, before, _ in self._ends.values()):
            return Arrival.STRAY
        self.contradiction = group
        return Arrival.FORKED

    def head_at(self, index: int) -> bytes | None:
        """Return the chain's head at `index`, 32 bytes, if a group remembered here ends there."""
        if index == self.received:
            return self.head
        # Peers mostly ask about what came lately.
        return next((head for last, _, head in reversed(self._ends.values()) if last == index), None)

    def differs(self, index: int, head: bytes) -> bool:
        """Say whether the chain here has another head at `index`, or a group that reaches across it.

        False if that index is too old to be remembered, or has not arrived.
        """
        known = self.head_at(index)
        if known is not None:
            return known != head
        oldest = next((last for last, _, _ in self._ends.values()), self.received)
        return oldest < index < self.received

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
