"""The agreed state on disk: made durable milestone by milestone, handed out in parts to replicas that were away.

Writing happens in a thread of its own, one milestone at a time; those that come meanwhile wait, and become one. A state
that was fetched is written, and made into what a core begins with, in that thread as well, because that takes seconds.
What was offered to a peer stays as it was, by a *lease*: a frozen view of the file, for as long as the peer goes on
asking. While a lease lasts, the logs from its cut on are kept as well, so that whoever installed the state can read on
from there.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

from replica.core.checkpoint import Header
from replica.core.layout import LayoutError
from replica.core.snapshot import Changes, Fetched, Milestone, PartWanted, Snapshot, Source
from replica.core.tree import with_values
from replica.core.treeparts import part_of
from replica.shell.statestore import Milestone as StoredMilestone
from replica.shell.statestore import PinnedState, StateStore, discard_state
from replica.shell.statetree import StateBrokenError

# A lease ends when nobody asked for anything of it for so long, or at once if the file's write-ahead log is too large.
LEASE_S = 30.0
# Nor is it renewed beyond this age: it holds logs back, and a faulty replica could go on asking for ever.
LEASE_S_MAX = 900.0
LEASES_MAX = 4
WAL_BYTES_MAX = 1024 * 1024 * 1024
# Pages of 4 KiB that hold nothing and are given back at a time after a milestone, and how long milestones may then be
# written before it goes on.
GIVE_PAGES = 1024
GIVE_PAUSE_S = 0.2

Make = Callable[[Fetched], Snapshot]


@dataclass(slots=True)
class _Lease:
    """A frozen view of one milestone. cut: every log's index there."""

    view: PinnedState
    cut: tuple[int, ...]
    began_at: float
    used_at: float


class StateKeeper:
    """One replica's state file. read: decodes a header, its cut as it is for the logs of the present members.

    on_forgettable is called on the loop with the cut up to which logs are not needed any more, whenever it may have
    moved; on_failed with what went wrong: then the replica must stop.
    """

    def __init__(
        self,
        store: StateStore,
        read: Callable[[bytes], Header],
        on_forgettable: Callable[[Sequence[int]], None],
        on_failed: Callable[[BaseException], None],
    ) -> None:
        self._store = store
        self._read = read
        self._on_forgettable = on_forgettable
        self._on_failed = on_failed
        self._loop = asyncio.get_running_loop()
        self._writer = ThreadPoolExecutor(1, "state")
        self._reader = ThreadPoolExecutor(1, "state-parts")
        self._waiting: list[Milestone] = []
        self._to_install: tuple[Fetched, Make, Callable[[Snapshot], None]] | None = None
        self._writing: asyncio.Future[Any] | None = None
        self._leases: dict[int, _Lease] = {}
        self._highest = 0  # the slot of the newest milestone that was handed in
        self._newest: tuple[int, tuple[int, ...]] | None = None  # slot and cut of the persisted milestone
        self._may_shrink = False  # the file, for all that is known
        self._pausing = False  # before it goes on
        self._closed = False
        self._broken = False  # the file would not be written: it is of no more use, to the next start either

    @property
    def slot(self) -> int:
        """The slot of the persisted milestone, 0 if there is none."""
        return 0 if self._newest is None else self._newest[0]

    def begin(self, slot: int, cut: tuple[int, ...]) -> None:
        """Note what the file holds at the start."""
        self._newest = (slot, cut)
        self._highest = slot

    # Writing

    def persist(self, milestone: Milestone) -> None:
        """Make a milestone durable when the disk gets there. One that a transfer has overtaken is forgotten."""
        if milestone.slot <= self._highest:
            return
        self._highest = milestone.slot
        # Maps are large, and only the last ones are used.
        self._waiting = [*(replace(one, maps=milestone.maps) for one in self._waiting), milestone]
        self._write_next()

    def install(self, fetched: Fetched, make: Make, done: Callable[[Snapshot], None]) -> None:
        """Make a whole state durable, which was fetched; then call `done` with what `make` makes of it."""
        self._highest = fetched.header.slot
        self._waiting.clear()
        self._to_install = (fetched, make, done)
        self._write_next()

    def _write_next(self) -> None:
        if self._writing is not None or self._closed:
            return
        if self._to_install is not None:
            (fetched, make, done), self._to_install = self._to_install, None
            self._writing = self._loop.run_in_executor(self._writer, self._write_fetched, fetched, make)
            installed = self._read(fetched.header.encode())
            self._writing.add_done_callback(lambda work: self._written(work, installed, done))
        elif self._waiting:
            waiting, self._waiting = self._waiting, []
            self._writing = self._loop.run_in_executor(self._writer, self._write_changes, waiting)
            header = self._read(waiting[-1].header)
            self._writing.add_done_callback(lambda work: self._written(work, header, None))
        elif self._may_shrink:
            self._may_shrink = False
            self._writing = self._loop.run_in_executor(self._writer, self._store.give_back, GIVE_PAGES)
            self._writing.add_done_callback(self._given_back)

    def _write_fetched(self, fetched: Fetched, make: Make) -> Snapshot:
        self._write(fetched.milestone())
        return make(fetched)

    def _write_changes(self, milestones: list[Milestone]) -> None:
        self._write(reduce(_merged, milestones))

    def _write(self, milestone: Milestone) -> None:
        write_milestone(self._store, milestone, self._read(milestone.header))

    def _written(self, work: "asyncio.Future[Any]", header: Header, done: Callable[[Snapshot], None] | None) -> None:
        if not self._is_done(work):
            return
        self._may_shrink = not self._pausing
        self._newest = (header.slot, header.cut)
        self._end_leases()
        if done is not None:
            done(work.result())
        self._on_forgettable(self.needed_from())
        self._write_next()

    def _given_back(self, work: "asyncio.Future[bool]") -> None:
        if not self._is_done(work):
            return
        if work.result():
            self._pausing = True
            self._loop.call_later(GIVE_PAUSE_S, self._go_on_shrinking)
        self._write_next()

    def _go_on_shrinking(self) -> None:
        self._pausing, self._may_shrink = False, True
        self._write_next()

    def _is_done(self, work: "asyncio.Future[Any]") -> bool:
        """Take the end of what the writer's thread did; say whether it went well and there is more to do."""
        self._writing = None
        if work.cancelled():
            return False
        error = work.exception()
        self._broken = self._broken or isinstance(error, StateBrokenError)
        if error is not None and not self._closed:
            self._on_failed(error)
        return error is None and not self._closed

    def needed_from(self) -> tuple[int, ...]:
        """Return the cut up to which no log is needed any more: here, or by those who have a lease."""
        cuts = [lease.cut for lease in self._leases.values()]
        if self._newest is not None:
            cuts.append(self._newest[1])
        return tuple(map(min, zip(*cuts, strict=True))) if cuts else ()

    # Handing out

    async def offer(self) -> tuple[bytes, bytes] | None:
        """Return header and certificate of the persisted milestone, and lease it; None if there is none."""
        if self._closed or self._newest is None:
            return None
        lease = self._leases.get(self._newest[0])
        if lease is None:
            view = await self._loop.run_in_executor(self._reader, self._store.pinned)
            if view is None:
                return None
            lease = self._leased(view)
            if lease is None:
                return None
        lease.used_at = time.monotonic()
        return lease.view.header, lease.view.certificate

    def _leased(self, view: PinnedState) -> _Lease | None:
        """Return the lease of a view that was just opened; another question may have been quicker."""
        known = self._leases.get(view.slot)
        if known is not None or self._closed:
            view.close()
            return known
        cut = self._read(view.header).cut
        return self._leases.setdefault(view.slot, _Lease(view, cut, time.monotonic(), 0.0))

    async def part(self, slot: int, wanted: PartWanted) -> bytes | None:
        """Return a part of the state after `slot`, or None if it is not leased. LayoutError: it asks for nonsense."""
        lease = self._leases.get(slot)
        if lease is None or self._closed:
            return None
        lease.used_at = time.monotonic()
        return await self._loop.run_in_executor(self._reader, _part, lease.view, wanted)

    def tidy(self) -> None:
        """End leases that nobody uses; to be called now and then."""
        if self._end_leases():
            # Else what the lease held back would be kept until the next milestone, which may be long.
            self._on_forgettable(self.needed_from())

    def _end_leases(self) -> bool:
        """End those that nobody uses, or that are too many; say whether there were any."""
        before = len(self._leases)
        now = time.monotonic()
        oldest_first = sorted(self._leases, key=lambda slot: self._leases[slot].used_at)
        too_many = len(oldest_first) - LEASES_MAX
        too_large = self._store.wal_bytes() > WAL_BYTES_MAX
        for place, slot in enumerate(oldest_first):
            lease = self._leases[slot]
            is_over = now - lease.used_at > LEASE_S or now - lease.began_at > LEASE_S_MAX
            if is_over or place < too_many or too_large:
                del self._leases[slot]
                self._reader.submit(lease.view.close)
        return len(self._leases) < before

    async def close(self) -> None:
        """Finish what is being written, end all leases, and give the file back; one that is broken is moved aside.

        It may be so where only writing it shows: the next start would load it, and fail at the first milestone. One of
        which only the content is not what it should be is left to the next start, which verifies it.
        """
        self._closed = True
        if self._writing is not None:
            await asyncio.wait([self._writing])
        for lease in self._leases.values():
            self._reader.submit(lease.view.close)
        self._leases.clear()
        self._reader.shutdown(wait=True)
        self._writer.shutdown(wait=True)
        self._store.close()
        if self._broken:
            with suppress(OSError):  # of the disk that has failed: the next start meets it again
                discard_state(self._store.path)


def write_milestone(store: StateStore, milestone: Milestone, header: Header) -> None:
    """Make a milestone durable; header: its own, decoded. Raises as `StateStore.write`."""
    stored = StoredMilestone(
        milestone.slot,
        milestone.header,
        milestone.certificate,
        milestone.logs,
        milestone.batches,
        (with_values(milestone.application), with_values(milestone.table)),
        milestone.maps,
        (header.application, header.table),
    )
    store.write(stored, replace_all=milestone.is_whole)


def _part(view: PinnedState, wanted: PartWanted) -> bytes:
    if wanted.want is not None:
        return part_of(view.trees[wanted.source], wanted.want)
    parts = view.logs if wanted.source is Source.LOGS else view.batches
    if wanted.number >= len(parts):
        raise LayoutError(f"there is no part {wanted.number}")
    return parts[wanted.number]


def _merged(before: Milestone, after: Milestone) -> Milestone:
    """Return one milestone that takes the file to `after` from where it is before `before`."""
    application, table = _latest(before.application, after.application), _latest(before.table, after.table)
    return replace(after, application=application, table=table)


def _latest(before: Changes, after: Changes) -> Changes:
    return list({**dict(before), **dict(after)}.items())
