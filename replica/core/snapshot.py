"""The whole agreed state after a checkpoint: what is made durable, served to others, and begun with.

A *milestone* is a checkpoint at which replicas make their state durable: the first one at or after a multiple of so
many intervals, or after so many bytes that were executed since the last. This is a function of what was executed, so
all replicas have the same milestones and a replica that was away finds several that serve the same one. Where one is
passed over, `replica.core.checkpoints` has others take its place.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from replica.application import Application
from replica.core.batch import Batch
from replica.core.checkpoint import Header
from replica.core.execution import Executor
from replica.core.frozen import FrozenMap
from replica.core.genesis import MIB, Genesis
from replica.core.layout import LayoutError
from replica.core.logstate import LogState
from replica.core.state import BucketedMap
from replica.core.treeparts import Want

Changes = Sequence[tuple[bytes, bytes | None]]


@dataclass(frozen=True, slots=True)
class MilestoneRule:
    """When a checkpoint is a milestone: every so many intervals, or after so many bytes of batches since the last."""

    intervals: int = 8
    batch_bytes: int = 32 * MIB


@dataclass(frozen=True, slots=True)
class Milestone:
    """What a milestone adds to the one before.

    header: encoded. logs: every log's reduced state at the cut, encoded. batches: those in flight, in the order of
    `replica.core.checkpoint.distinct_digests`, as proposed. application, table: (key, its item, or None if it is gone).
    maps: application and table as they are after it. is_whole: the changes are not relative to the milestone before but
    everything there is.
    """

    slot: int
    header: bytes
    certificate: bytes
    logs: tuple[bytes, ...]
    batches: tuple[bytes, ...]
    application: Changes
    table: Changes
    maps: tuple[FrozenMap, FrozenMap]
    is_whole: bool = False


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A verified state to begin with. The executor holds the state; nobody else may use it.

    founded: D of the last checkpoint of the list of members before, with which this one begins; b"" if it does not.
    """

    header: Header
    certificate: bytes
    states: tuple[LogState, ...]
    batches: tuple[Batch, ...]
    executor: Executor
    founded: bytes = b""

    @property
    def digest(self) -> bytes:
        """D, which CHECKPOINT entries of this slot say."""
        return self.founded or self.header.digest


@dataclass(frozen=True, slots=True)
class Moved:
    """What a transfer took from others: bytes of parts, and the application's buckets with their keys."""

    part_bytes: int = 0
    buckets: int = 0
    bucket_keys: int = 0


@dataclass(frozen=True, slots=True)
class Fetched:
    """A state that was fetched and verified, and that nothing changes any more.

    What both methods do takes seconds with a large state. They change nothing here, so that another thread may do it.
    """

    header: Header
    certificate: bytes
    states: tuple[LogState, ...]
    batches: tuple[Batch, ...]
    application: FrozenMap
    table: FrozenMap
    moved: Moved = Moved()

    def snapshot(self, application: Application, genesis: Genesis) -> Snapshot:
        """Return it as what a core begins with; LayoutError if its table is none, which no correct replica says."""
        maps = (BucketedMap.thawed(self.application), BucketedMap.thawed(self.table))
        executor = Executor.restored(application, genesis, self.header.slot, self.header.time_ms, *maps)
        return Snapshot(self.header, self.certificate, self.states, self.batches, executor)

    def milestone(self) -> Milestone:
        """Return it as it is made durable."""
        return Milestone(
            self.header.slot,
            self.header.encode(),
            self.certificate,
            tuple(state.encode() for state in self.states),
            tuple(batch.raw for batch in self.batches),
            list(self.application.items()),
            list(self.table.items()),
            (self.application, self.table),
            is_whole=True,
        )


class Source(IntEnum):
    """What a part belongs to."""

    APPLICATION = 0
    TABLE = 1
    LOGS = 2
    BATCHES = 3


_SOURCES = frozenset(Source)
# Logs' reduced states, and batches in flight, are numbered up to here.
PARTS_MAX = 65536


@dataclass(frozen=True, slots=True)
class PartWanted:
    """A part of the state, as it is asked for.

    number: which log's reduced state, or the batch's place in `Milestone.batches`; these come whole. want: of a map.
    """

    source: Source
    number: int = 0
    want: Want | None = None

    @classmethod
    def decode(cls, source: int, number: int, want: bytes) -> "PartWanted":
        """Take apart what stands in a message; LayoutError if it asks for nothing that can be."""
        if source not in _SOURCES:
            raise LayoutError(f"there is no source {source}")
        wanted = Want.decode(want) if source in {Source.APPLICATION, Source.TABLE} else None
        if (wanted is None and want) or (wanted is not None and number) or number >= PARTS_MAX:
            raise LayoutError("a want that does not fit its source")
        return cls(Source(source), number, wanted)
