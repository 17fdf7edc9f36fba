"""The entries of a replica's log: what they say and how they are laid out.

v = view, s = slot, d = digest of a batch, D = digest of the agreed state. All integers are u64 big-endian unless noted.

    1 PRE-PREPARE   u8 1, v, s, batch (the rest; layout in `replica.core.batch`); d is the batch's digest
    2 PREPARE       u8 2, v, s, 32 d
    3 COMMIT        u8 3, v, s, 32 d
    4 CHECKPOINT    u8 4, s, 32 D
    5 SUSPECT       u8 5, v
    6 VIEW-CHANGE   u8 6, v'
    7 NEW-VIEW      u8 7, v', u16 count, count x (u16 replica, index)
    8 CLOSE         of a trusted log's epoch, 9 OPEN of the next one: trustlog.tpm.chain. They order nothing. What may
                    stand before and after them is judged with the heads, when the groups are chained
   10 RESULT        u8 10, s, u32 size, 32 root: what executing s gave (trustlog.receipts). It orders nothing either

Names follow PBFT (Castro & Liskov, OSDI 1999, section 4); SUSPECT is MinBFT's REQ-VIEW-CHANGE. An entry that does not
have one of these layouts exposes its author: it needs nothing but itself to be judged.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass

from replica.core.batch import Batch, decode_batch
from replica.core.envelope import Envelope
from replica.core.genesis import Genesis
from replica.core.layout import U64_MAX, LayoutError, Reader
from trustlog import is_epoch_mark
from trustlog.receipts import read_result, result_payload

PRE_PREPARE, PREPARE, COMMIT, CHECKPOINT, SUSPECT, VIEW_CHANGE, NEW_VIEW = range(1, 8)

_PROPOSAL = struct.Struct(">BQQ")
_VOTE = struct.Struct(">BQQ32s")
_CHECKPOINT = struct.Struct(">BQ32s")
_VIEW = struct.Struct(">BQ")
_REFERENCE = struct.Struct(">HQ")

VerifyEnvelope = Callable[[Envelope], bool]


@dataclass(frozen=True, slots=True)
class PrePrepare:
    """The primary of `view` proposes `batch` for `slot`; this is its vote."""

    view: int
    slot: int
    batch: Batch

    def encode(self) -> bytes:
        """Return the payload."""
        return _PROPOSAL.pack(PRE_PREPARE, self.view, self.slot) + self.batch.raw


@dataclass(frozen=True, slots=True)
class Prepare:
    """A backup votes for the batch with `digest` at (`view`, `slot`)."""

    view: int
    slot: int
    digest: bytes

    def encode(self) -> bytes:
        """Return the payload."""
        return _VOTE.pack(PREPARE, self.view, self.slot, self.digest)


@dataclass(frozen=True, slots=True)
class Commit:
    """q replicas voted for the batch with `digest` at (`view`, `slot`)."""

    view: int
    slot: int
    digest: bytes

    def encode(self) -> bytes:
        """Return the payload."""
        return _VOTE.pack(COMMIT, self.view, self.slot, self.digest)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The author executed `slot`; `digest` covers the whole agreed state after it."""

    slot: int
    digest: bytes

    def encode(self) -> bytes:
        """Return the payload."""
        return _CHECKPOINT.pack(CHECKPOINT, self.slot, self.digest)


@dataclass(frozen=True, slots=True)
class Suspect:
    """The author's patience with `view` ended."""

    view: int

    def encode(self) -> bytes:
        """Return the payload."""
        return _VIEW.pack(SUSPECT, self.view)


@dataclass(frozen=True, slots=True)
class ViewChange:
    """The author leaves its view for `view`."""

    view: int

    def encode(self) -> bytes:
        """Return the payload."""
        return _VIEW.pack(VIEW_CHANGE, self.view)


@dataclass(frozen=True, slots=True)
class Reference:
    """An entry of another log, by the replica's number and the entry's index."""

    replica: int
    index: int


@dataclass(frozen=True, slots=True)
class NewView:
    """The primary of `view` opens it; `references` name q VIEW-CHANGE entries for it."""

    view: int
    references: tuple[Reference, ...]

    def encode(self) -> bytes:
        """Return the payload."""
        packed = [_REFERENCE.pack(r.replica, r.index) for r in self.references]
        return _VIEW.pack(NEW_VIEW, self.view) + struct.pack(">H", len(packed)) + b"".join(packed)


@dataclass(frozen=True, slots=True)
class EpochMark:
    """CLOSE or OPEN of an epoch of the author's trusted log, by that log itself."""

    payload: bytes

    def encode(self) -> bytes:
        """Return the payload."""
        return self.payload


@dataclass(frozen=True, slots=True)
class SlotResult:
    """RESULT: the author executed `slot`; `root` is of the tree over its `size` operations and their results."""

    slot: int
    size: int
    root: bytes

    def encode(self) -> bytes:
        """Return the payload."""
        return result_payload(self.slot, self.size, self.root)


@dataclass(frozen=True, slots=True)
class Skipped:
    """What a log says before it joins a list of members: its layout is not looked at."""

    payload: bytes

    def encode(self) -> bytes:
        """Return the payload."""
        return self.payload


Entry = PrePrepare | Prepare | Commit | Checkpoint | Suspect | ViewChange | NewView | SlotResult | EpochMark | Skipped


def decode_entry(payload: bytes, genesis: Genesis, cluster_id: bytes) -> Entry:
    """Decode a payload strictly; LayoutError for anything that no correct replica writes."""
    size = len(payload)
    if size == _VOTE.size and payload[0] in {PREPARE, COMMIT}:
        kind, view, slot, digest = _VOTE.unpack(payload)
        _require_slot(slot)
        return Prepare(view, slot, digest) if kind == PREPARE else Commit(view, slot, digest)
    if size > _PROPOSAL.size and payload[0] == PRE_PREPARE:
        _, view, slot = _PROPOSAL.unpack_from(payload)
        _require_slot(slot)
        return PrePrepare(view, slot, _batch_for(slot, payload[_PROPOSAL.size :], genesis, cluster_id))
    if size == _CHECKPOINT.size and payload[0] == CHECKPOINT:
        _, slot, digest = _CHECKPOINT.unpack(payload)
        _require_slot(slot)
        return Checkpoint(slot, digest)
    if size == _VIEW.size and payload[0] in {SUSPECT, VIEW_CHANGE}:
        kind, view = _VIEW.unpack(payload)
        return Suspect(view) if kind == SUSPECT else ViewChange(view)
    if size > _VIEW.size and payload[0] == NEW_VIEW:
        return _decode_new_view(payload, genesis)
    result = read_result(payload)
    if result is not None:
        return _slot_result(*result)
    if is_epoch_mark(payload):
        return EpochMark(payload)
    raise LayoutError(f"{size} bytes that are no entry")


def decode_joining(payload: bytes, genesis: Genesis) -> Checkpoint | Skipped:
    """Return the CHECKPOINT with which a log joins the list that `genesis` is of, or that it has not joined yet."""
    if len(payload) == _CHECKPOINT.size and payload[0] == CHECKPOINT:
        _, slot, digest = _CHECKPOINT.unpack(payload)
        if slot >= genesis.base and slot % genesis.limits.checkpoint_interval == 0:
            return Checkpoint(slot, digest)
    return Skipped(payload)


def decode_judged(payload: bytes, genesis: Genesis, cluster_id: bytes, verify_envelope: VerifyEnvelope) -> Entry:
    """Decode an entry and verify what its batch holds, as every reader does: a function of the payload alone.

    LayoutError if no correct replica writes that.
    """
    entry = decode_entry(payload, genesis, cluster_id)
    if isinstance(entry, PrePrepare):
        for place, envelope in enumerate(entry.batch.envelopes):
            if not verify_envelope(envelope):
                raise LayoutError(f"envelope {place} of the batch has an invalid signature")
    return entry


def _slot_result(slot: int, size: int, root: bytes) -> SlotResult:
    _require_slot(slot)
    if size < 1:
        raise LayoutError(f"a RESULT of slot {slot} without operations")
    return SlotResult(slot, size, root)


def _require_slot(slot: int) -> None:
    # The last few numbers are kept free so that sums of slots and windows stay within 64 bits.
    if not 1 <= slot <= U64_MAX // 2:
        raise LayoutError(f"slot {slot} does not exist")


def _batch_for(slot: int, raw: bytes, genesis: Genesis, cluster_id: bytes) -> Batch:
    batch = decode_batch(raw, cluster_id, genesis.limits)
    # Every K-th slot carries the proposer's position in every log (design section 4.3); no other does.
    wanted = genesis.n if slot % genesis.limits.checkpoint_interval == 0 else 0
    if len(batch.cut) != wanted:
        raise LayoutError(f"a cut of {len(batch.cut)} positions in slot {slot}, {wanted} belong there")
    return batch


def _decode_new_view(payload: bytes, genesis: Genesis) -> NewView:
    reader = Reader(payload, 1)
    view, count = reader.u64(), reader.u16()
    if view == 0:
        raise LayoutError("view 0 is open from the beginning")
    if count != genesis.quorum:
        raise LayoutError(f"{count} references, q = {genesis.quorum} belong there")
    references = tuple(Reference(reader.u16(), reader.u64()) for _ in range(count))
    reader.finish()
    if any(r.replica >= genesis.n or r.index < 1 for r in references):
        raise LayoutError("a reference to a log or an index that does not exist")
    if len({r.replica for r in references}) != count:
        raise LayoutError("two references to one replica")
    return NewView(view, references)
