"""Checkpoints: what this replica's state is after every K-th slot, what others say, what is stable, what is kept.

Executing slot s, a multiple of K, moves the agreed cut and fixes the header of the checkpoint, whose digest D this
replica then says. q logs that say the same D make s stable. A milestone (`replica.core.snapshot`) is handed out to be
made durable when it is stable, with the q entries that show it.

A faulty replica may say what is right of every checkpoint but the milestones. While another one is away, these would
never be stable, what they hold would pile up, and no log could be truncated. So when one was passed over, every
checkpoint from there on may take its place, until one does: either one is stable soon, or none is and nobody goes on.
"""

from collections import deque
from dataclasses import dataclass

from replica.core.batch import Batch
from replica.core.checkpoint import Header, batches_in_flight, distinct_digests, encode_certificate, state_digest
from replica.core.cut import AgreedCut
from replica.core.entries import Checkpoint
from replica.core.execution import Executor
from replica.core.frozen import FrozenMap
from replica.core.genesis import Genesis
from replica.core.group import VerifiedGroup
from replica.core.proof import EntryProof, prove
from replica.core.quorum import is_quorum
from replica.core.slots import SlotBook
from replica.core.snapshot import Changes, Milestone, MilestoneRule

# At a checkpoint, the cut must reach what this replica had itself read so many checkpoints ago, all within one view.
CUT_LAG_INTERVALS = 4
# With so many entries beyond it, a cut that lags is waited for no longer: they are kept in memory.
BEYOND_CUT_MAX = 65_536


@dataclass(frozen=True, slots=True)
class Said:
    """A log's CHECKPOINT for one slot: the entry's index, D, and the entry's proof if the slot is a milestone."""

    index: int
    digest: bytes
    proof: EntryProof | None


@dataclass(frozen=True, slots=True)
class _Kept:
    """A milestone that is not yet stable, or could not be handed out yet."""

    header: Header
    logs: tuple[bytes, ...]
    batches: tuple[bytes, ...]
    maps: tuple[FrozenMap, FrozenMap]
    application: Changes
    table: Changes


class Checkpoints:
    """One replica's checkpoints; `own` holds D of those executed here, by slot, from the stable one on.

    cut_ms: for how long, in milliseconds, the cut may lag at every checkpoint.
    """

    def __init__(
        self, genesis: Genesis, rule: MilestoneRule, cut: AgreedCut, own: dict[int, bytes], cut_ms: int = 0
    ) -> None:
        self.cut = cut
        self.own = own
        self._genesis = genesis
        self._rule = rule
        self._said: dict[int, dict[int, Said]] = {}
        self._kept: dict[int, _Kept] = {}
        self._passed: tuple[Changes, Changes] | None = None  # what those held that can be stable no more
        self._milestone = 0  # the last one that was due when it was executed, or that was begun with
        self._batch_bytes = 0
        self._ends: deque[tuple[int, ...]] = deque(maxlen=CUT_LAG_INTERVALS)
        self._cut_ms = cut_ms
        self._lags_since_ms: int | None = None

    def __len__(self) -> int:
        """Return for how many slots something is kept."""
        return max(len(self._said), len(self._kept), len(self.own))

    def begin(self, slot: int, digest: bytes) -> None:
        """Begin after a milestone that this replica did not execute."""
        self._milestone = slot
        self.own[slot] = digest

    # Executing

    def executed(
        self, slot: int, batch: Batch, executor: Executor, slots: SlotBook, *, last: bool = False
    ) -> Header | None:
        """Take in that the batch of `slot` was executed; return the header if that is a checkpoint.

        last: the list of members ends with it, and whoever is to learn that is shown this milestone.
        """
        self._batch_bytes += len(batch.raw)
        interval = self._genesis.limits.checkpoint_interval
        if slot % interval:
            return None
        self.cut.execute(slot, batch.cut)
        logs = tuple(state.encode() for state in self.cut.states)
        application, table = executor.roots()
        digests = tuple(map(state_digest, logs))
        agreed = (slot, executor.time_ms, application, table)
        listed = (self._genesis.list_number, executor.membership.digest)
        header = Header(*agreed, self.cut.positions, self.cut.heads, digests, *listed)
        self.own[slot] = header.digest
        period = self._rule.intervals * interval
        is_due = slot // period > self._milestone // period or self._batch_bytes >= self._rule.batch_bytes or last
        if is_due:
            self._milestone = slot
            self._batch_bytes = 0
        if is_due or self._passed is not None:
            self._keep(header, logs, executor, slots)
        return header

    def _keep(self, header: Header, logs: tuple[bytes, ...], executor: Executor, slots: SlotBook) -> None:
        in_flight = batches_in_flight(self.cut.states)
        slot_of = {digest: slot for slot, _, digest in in_flight}
        batches = tuple(slots.batch(slot_of[digest], digest).raw for digest in distinct_digests(in_flight))
        self._kept[header.slot] = _Kept(header, logs, batches, executor.frozen(), *executor.take_changes())

    # The primary's duty to move the cut

    def cut_lags(self, ends: tuple[int, ...], now_ms: int) -> bool:
        """Say at a checkpoint, where this replica has read up to `ends`, whether the cut lies too far behind.

        A primary that never moved it could have logs grow for ever. This is one replica's opinion: it says SUSPECT for
        it, and nothing else. It waits for a while to see the lag last: a replica that was away executes batches from a
        time when nobody could know what it has read and said since.
        """
        full = len(self._ends) == CUT_LAG_INTERVALS
        lags = full and any(at < had for at, had in zip(self.cut.positions, self._ends[0], strict=True))
        self._ends.append(ends)
        if not lags:
            self._lags_since_ms = None
            return False
        if self._lags_since_ms is None:
            self._lags_since_ms = now_ms
        return now_ms - self._lags_since_ms >= self._cut_ms or len(self.cut) > BEYOND_CUT_MAX

    def begin_view(self) -> None:
        """Give the new primary as much time as the one before."""
        self._ends.clear()
        self._lags_since_ms = None

    # Counting

    def say(self, log: int, index: int, entry: Checkpoint, group: VerifiedGroup) -> bool:
        """Note a CHECKPOINT above the stable one; say whether its slot is stable now."""
        proof = prove(group, index) if entry.slot in self._kept else None
        said = self._said.setdefault(entry.slot, {})
        said[log] = Said(index, entry.digest, proof)
        agreeing = sum(1 << other for other, one in said.items() if one.digest == entry.digest)
        return is_quorum(agreeing, self._genesis.f)

    def stable(self, slot: int, digest: bytes) -> tuple[list[tuple[int, int]], Milestone | None]:
        """Forget what is older than `slot`, which is stable with `digest`, this replica's own.

        Return (log, index) of those who said something else, and the milestone if `slot` is one.
        """
        said = self._said[slot]
        liars = [(log, one.index) for log, one in sorted(said.items()) if one.digest != digest]
        proofs = {log: one.proof for log, one in said.items() if one.digest == digest and one.proof is not None}
        milestone = self._hand_out(slot, proofs)
        for old in [s for s in self._said if s <= slot]:
            del self._said[old]
        # The own CHECKPOINT(slot) may still be owed: others can make a slot stable before this replica says so, and
        # a log that skipped it could never commit past the votes pruned here.
        for old in [s for s in self.own if s < slot]:
            del self.own[old]
        return liars, milestone

    def _hand_out(self, slot: int, proofs: dict[int, EntryProof]) -> Milestone | None:
        passed = [self._kept.pop(s) for s in sorted(self._kept) if s < slot]
        application = [*([self._passed[0]] if self._passed else ()), *(one.application for one in passed)]
        table = [*([self._passed[1]] if self._passed else ()), *(one.table for one in passed)]
        kept = self._kept.pop(slot, None)
        if kept is None:
            self._passed = (_latest(application), _latest(table)) if application else None
            return None
        self._passed = None
        return Milestone(
            slot,
            kept.header.encode(),
            encode_certificate(proofs),
            kept.logs,
            kept.batches,
            _latest([*application, kept.application]),
            _latest([*table, kept.table]),
            kept.maps,
        )


def _latest(changes: list[Changes]) -> Changes:
    if len(changes) == 1:
        return changes[0]
    return list({key: value for some in changes for key, value in some}.items())
