"""A correct replica's disk: what it holds after a crash, and what damage can take from it.

What a replica receives is durable once it appends something (an entry's causes become durable before the entry), and
may be before. Its own groups are durable before they are attested. A milestone becomes durable as a whole or not at
all; the groups before its cut are then dropped.

Damage changes bytes; what that means is found out by whoever reads: every group must be the one of its place and
verify, the milestone must be what its header and certificate name. What a reader is left with: of another log, nothing
from a damaged group on, because its author and others have it; of the own log, all but that group, which peers give
back; of a milestone, nothing.
"""

import random
from collections.abc import Callable
from dataclasses import replace
from enum import Enum

from replica.core.genesis import Genesis
from replica.core.group import VerifiedGroup
from replica.core.snapshot import Milestone
from replica.sim.library import Kept, Library

# (log, bytes) -> the group, or None if that log did not attest these bytes.
Verify = Callable[[int, bytes], VerifiedGroup | None]


class Damage(Enum):
    """What happens to a disk while its replica is away."""

    NONE = "none"
    OTHERS_LOG = "others-log"  # a flipped bit in a group of another log
    OWN_LOG = "own-log"  # the same in a group of the own log
    TORN = "torn-group"  # only a piece of the group that was written last
    MISDIRECTED = "misdirected-group"  # another group's bytes in the place of one
    STATE = "state"  # a flipped bit in the milestone's state
    LOG_STATES = "log-states"  # in the reduced state of a log
    BATCHES = "batches"  # in a batch in flight
    CERTIFICATE = "certificate"  # in what shows that the milestone is stable
    MILESTONE = "milestone"  # the milestone is gone
    DISK = "disk"  # everything is gone; the trusted log is not


class Disk:
    """Groups of all logs as they came, own groups, and the newest durable milestone."""

    def __init__(self) -> None:
        self.kept: Kept | None = None
        self.milestones: list[Milestone] = []  # handed out, not yet durable
        self._received: list[VerifiedGroup] = []
        self._durable = 0
        self._own: dict[int, VerifiedGroup] = {}  # by first index
        self._spoiled: dict[tuple[int, int], bytes] = {}  # (log, first index) -> what stands there instead

    def receive(self, group: VerifiedGroup, owner: int) -> None:
        """Take a group; it may be lost until `sync`. An own group that peers gave back is as durable as any."""
        if group.author == owner:
            self._own[group.first] = group
        else:
            self._received.append(group)

    def say(self, group: VerifiedGroup) -> None:
        """Take a group of the own log."""
        self._own[group.first] = group

    def sync(self) -> None:
        """Make durable what was received."""
        self._durable = len(self._received)

    def take(self, kept: Kept | None, library: Library) -> None:
        """Note that a milestone is durable; groups that the library dropped are dropped here."""
        self.kept = kept
        self._received = [group for group in self._received if group.last >= library.first(group.author)]
        self._durable = len(self._received)
        self._own = {first: group for first, group in self._own.items() if group.last >= library.first(group.author)}

    def read(self, verify: Verify) -> tuple[list[VerifiedGroup], int]:
        """Return every group that is what it should be, the own log first, and how many were found not to be."""
        found: list[VerifiedGroup] = []
        broken: dict[int, int] = {}  # another log -> the first index that cannot be read
        noticed = 0
        own = [self._own[first] for first in sorted(self._own)]
        for place, written in enumerate((*own, *self._received)):
            if written.first >= broken.get(written.author, written.first + 1):
                continue
            group = self._at(written, verify)
            if group is not None:
                found.append(group)
                continue
            noticed += 1
            if place >= len(own):
                broken[written.author] = written.first
        return found, noticed

    def _at(self, written: VerifiedGroup, verify: Verify) -> VerifiedGroup | None:
        raw = self._spoiled.get((written.author, written.first))
        if raw is None:
            return written
        group = verify(written.author, raw)
        return group if group is not None and group.first == written.first else None

    def emptied(self) -> "Disk":
        """Return a disk with the same milestone and no groups: they are written again as they are read."""
        fresh = Disk()
        fresh.kept = self.kept
        return fresh

    def drop_logs(self, before: Genesis, after: Genesis) -> None:
        """Drop the groups of logs that are no members any more."""
        staying = {member.number for member in after.members if member in before.members}
        self._received = [group for group in self._received if group.author in staying]
        self._durable = len(self._received)

    def copy(self) -> "Disk":
        """Return a copy of what is durable."""
        twin = self.emptied()
        for group in self._own.values():
            twin.say(group)
        for group in self._received[: self._durable]:
            twin.receive(group, owner=-1)
        twin.sync()
        return twin

    def crash(self, chance: random.Random) -> int:
        """Lose some of what was not durable; return how many groups and milestones that were."""
        before = len(self._received) + len(self.milestones)
        self._received = self._received[: chance.randint(self._durable, len(self._received))]
        self._durable = len(self._received)
        self.milestones.clear()
        return before - len(self._received)

    def damage(self, what: Damage, chance: random.Random) -> bool:
        """Suffer damage; say whether there was anything to suffer it."""
        if what in {Damage.OTHERS_LOG, Damage.OWN_LOG, Damage.TORN, Damage.MISDIRECTED}:
            return self._damage_group(what, chance)
        if what is Damage.DISK:
            self._received, self._own, self._durable = [], {}, 0
        elif what is Damage.NONE or self.kept is None:
            return False
        if what in {Damage.DISK, Damage.MILESTONE}:
            self.kept = None
        elif self.kept is not None:
            damaged = _damaged(self.kept, what, chance)
            if damaged is None:
                return False
            self.kept = damaged
        return True

    def _damage_group(self, what: Damage, chance: random.Random) -> bool:
        own = list(self._own.values())
        if what is Damage.OTHERS_LOG:
            suffering = self._received
        elif what is Damage.OWN_LOG:
            suffering = own
        else:
            suffering = [*self._received, *own]
        if not suffering:
            return False
        hit = chance.choice(suffering)
        if what is Damage.TORN:
            hit = chance.choice([written[-1] for written in (self._received, own) if written])
            raw = hit.raw[: chance.randrange(len(hit.raw))]
        elif what is Damage.MISDIRECTED:
            raw = chance.choice([*self._received, *own]).raw
        else:
            raw = _flipped(hit.raw, chance)
        if raw == hit.raw:
            return False
        self._spoiled[hit.author, hit.first] = raw
        return True


def _damaged(kept: Kept, what: Damage, chance: random.Random) -> Kept | None:
    """Return a milestone with a flipped bit in this part of it; None if it has no such part."""
    if what is Damage.LOG_STATES:
        return replace(kept, logs=_one_flipped(kept.logs, chance))
    if what is Damage.BATCHES:
        return replace(kept, batches=_one_flipped(kept.batches, chance)) if kept.batches else None
    if what is Damage.CERTIFICATE:
        return replace(kept, certificate=_flipped(kept.certificate, chance))
    is_application = bool(kept.application)
    content = dict(kept.application if is_application else kept.table)
    if not content:
        return None
    key = chance.choice(sorted(content))
    content[key] = _flipped(content[key] or b"\0", chance)
    return replace(kept, application=content) if is_application else replace(kept, table=content)


def _one_flipped(parts: tuple[bytes, ...], chance: random.Random) -> tuple[bytes, ...]:
    hit = chance.randrange(len(parts))
    return tuple(_flipped(part, chance) if place == hit else part for place, part in enumerate(parts))


def _flipped(raw: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(raw))
    return raw[:at] + bytes([raw[at] ^ 1 << chance.randrange(8)]) + raw[at + 1 :]
