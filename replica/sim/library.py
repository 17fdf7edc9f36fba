"""What a replica holds for others: logs from some index on, and the state after its newest stable milestone."""

from bisect import bisect_left
from dataclasses import dataclass, field

from replica.application import Application
from replica.core.batch import decode_batch
from replica.core.checkpoint import (
    VerifyProof,
    batches_in_flight,
    check_certificate,
    decode_header,
    distinct_digests,
    state_digest,
)
from replica.core.execution import Executor
from replica.core.genesis import Genesis
from replica.core.group import VerifiedGroup
from replica.core.layout import LayoutError
from replica.core.logstate import LogState
from replica.core.snapshot import Milestone, PartWanted, Snapshot, Source
from replica.core.state import BucketedMap
from replica.core.tree import with_values
from replica.core.treeparts import part_of


@dataclass(slots=True)
class Kept:
    """A milestone with the whole state, as a disk holds it."""

    slot: int
    header: bytes
    certificate: bytes
    logs: tuple[bytes, ...]
    batches: tuple[bytes, ...]
    application: dict[bytes, bytes]
    table: dict[bytes, bytes]
    genesis: Genesis
    _trees: dict[Source, BucketedMap] = field(default_factory=dict, init=False)

    def cut(self, genesis: Genesis) -> tuple[int, ...]:
        """Return the agreed cut, for the logs of a list: of the one under which this was said, or of the next one."""
        cut = decode_header(self.header, self.genesis.n).cut
        if genesis.list_number == self.genesis.list_number:
            return cut
        return tuple(cut[i] if m.since < genesis.list_number else 0 for i, m in enumerate(genesis.members))

    def part(self, wanted: PartWanted) -> bytes:
        """Return a part for whoever asks; LayoutError or IndexError for nonsense."""
        if wanted.source is Source.LOGS:
            return self.logs[wanted.number]
        if wanted.source is Source.BATCHES or wanted.want is None:
            return self.batches[wanted.number]
        if wanted.source not in self._trees:
            content = self.application if wanted.source is Source.APPLICATION else self.table
            self._trees[wanted.source] = BucketedMap(sorted(content.items()))
            self._trees[wanted.source].root()
        return part_of(self._trees[wanted.source], wanted.want)

    def snapshot(self, genesis: Genesis, application: Application, verify: VerifyProof) -> Snapshot | None:
        """Return what a core begins with, or None if this is not what the header and the certificate name."""
        try:
            header = decode_header(self.header, genesis.n)
            check_certificate(self.certificate, header, genesis, verify)
            if tuple(map(state_digest, self.logs)) != header.logs:
                return None
            states = tuple(LogState.decode(raw) for raw in self.logs)
            batches = tuple(decode_batch(raw, genesis.cluster_id(), genesis.limits) for raw in self.batches)
        except LayoutError:
            return None
        maps = [BucketedMap(sorted(content.items())) for content in (self.application, self.table)]
        named = distinct_digests(batches_in_flight(states))
        if [batch.digest for batch in batches] != named or [m.root() for m in maps] != [
            header.application,
            header.table,
        ]:
            return None
        try:
            executor = Executor.restored(application, genesis, self.slot, header.time_ms, *maps)
        except LayoutError:
            return None
        return Snapshot(header, self.certificate, states, batches, executor)


def keep(before: Kept | None, milestone: Milestone, genesis: Genesis) -> Kept:
    """Return what a disk holds once it has taken a milestone, said under the list of `genesis`."""
    application: dict[bytes, bytes] = {}
    table: dict[bytes, bytes] = {}
    if before is not None and not milestone.is_whole:
        application, table = dict(before.application), dict(before.table)
    for content, changes in ((application, milestone.application), (table, milestone.table)):
        for key, value in with_values(changes):
            if value is None:
                content.pop(key, None)
            else:
                content[key] = value
    fixed = (milestone.slot, milestone.header, milestone.certificate, milestone.logs, milestone.batches)
    return Kept(*fixed, application, table, genesis)


class Library:
    """The logs of a cluster of n, each without gaps from some index on."""

    def __init__(self, n: int) -> None:
        self.held: list[list[VerifiedGroup]] = [[] for _ in range(n)]
        self._gone: list[int] = [0] * n  # up to this index nothing is held
        self._early: list[dict[int, VerifiedGroup]] = [{} for _ in range(n)]

    def add(self, group: VerifiedGroup) -> None:
        """Keep a group; what comes too early waits."""
        held, early = self.held[group.author], self._early[group.author]
        early[group.first] = group
        following = self.last(group.author) + 1
        while (found := early.pop(following, None)) is not None:
            held.append(found)
            following = found.last + 1
        for first in [first for first in early if first < following]:
            del early[first]

    def first(self, log: int) -> int:
        """Return the first index that is held."""
        return self._gone[log] + 1

    def last(self, log: int) -> int:
        """Return the last index that is held."""
        return self.held[log][-1].last if self.held[log] else self._gone[log]

    def since(self, log: int, first: int, count: int) -> list[VerifiedGroup]:
        """Return up to `count` groups that end at or above `first`."""
        held = self.held[log]
        at = bisect_left(held, first, key=lambda group: group.last)
        return held[at : at + count]

    def forget(self, log: int, upto: int) -> None:
        """Drop the groups of a log that end at or below an index."""
        held = self.held[log]
        while held and held[0].last <= upto:
            self._gone[log] = held.pop(0).last
        if not held:
            self._gone[log] = max(self._gone[log], upto)
