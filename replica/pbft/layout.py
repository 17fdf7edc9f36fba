"""PBFT's messages as bytes, and their signatures.

What travels is a *parcel* (integers big-endian):

    u16 batches, then per batch u32 length and its bytes (`replica.core.batch`)
    signed:  u16 author   u32 length, content   64 signature over the content as it was received

The batches are those that the message proposes, or that a VIEW-CHANGE's certificates hold, each once; the certificates
within a NEW-VIEW are told by what it proposes again. Contents begin with

    16  tag "trustlog/pbftmsg"   u8 version 1   32 cluster id   u8 kind

    1 PRE-PREPARE   u64 view   u64 slot   32 digest of the batch, zeros for null
    2 PREPARE       u64 view   u64 slot   32 digest
    3 COMMIT        u64 view   u64 slot   32 digest
    4 CHECKPOINT    u64 slot   32 digest of the state
    5 VIEW-CHANGE   u64 view   u64 h      u16 CHECKPOINTs, each signed
                    u16 certificates, per certificate its PRE-PREPARE signed, u16 PREPAREs, each signed
    6 NEW-VIEW      u64 view   u16 VIEW-CHANGEs, each signed   u16 PRE-PREPAREs, each signed
    7 MISSING       u64 slot
    8 DECIDED       u64 view   u64 slot   32 digest   u16 COMMITs, each signed

Nothing is encoded again to check a signature: what was received is what is verified, kept and passed on.
"""

import struct
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from replica.cluster.keys import ClientKey
from replica.cluster.pbft import FAULTS_MAX, pbft_replica_count
from replica.core.batch import decode_batch
from replica.core.envelope import Envelope
from replica.core.genesis import Genesis
from replica.core.layout import LayoutError, Reader
from replica.pbft.messages import (
    NULL,
    Body,
    Certificate,
    Checkpoint,
    Commit,
    Decided,
    Missing,
    NewView,
    Prepare,
    PrePrepare,
    Proposal,
    Signed,
    ViewChange,
)
from replica.pbft.pending import BatchProposal
from replica.wire.messages import FRAME_BYTES_MAX
from trustlog import VerificationError, VerifyingKey

TAG: Final = b"trustlog/pbftmsg"
VERSION: Final = 1
SIGNATURE_SIZE: Final = 64
DIGEST_SIZE: Final = 32
NULL_DIGEST: Final = bytes(DIGEST_SIZE)
# Signatures that were verified and are met again: in certificates, and when a link begins anew.
VERIFIED_MAX: Final = 16384

_HEAD: Final = struct.Struct(">16sB32sB")
_VOTE: Final = struct.Struct(">QQ32s")
_STATE: Final = struct.Struct(">Q32s")
_KINDS: Final[dict[type[Body], int]] = {
    PrePrepare: 1,
    Prepare: 2,
    Commit: 3,
    Checkpoint: 4,
    ViewChange: 5,
    NewView: 6,
    Missing: 7,
    Decided: 8,
}
_MEMBERS_MAX: Final = pbft_replica_count(FAULTS_MAX)


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """A batch of which only the digest is known here: in a certificate that a NEW-VIEW does not carry over."""

    of: bytes

    def digest(self) -> bytes:
        """Return d, 32 bytes."""
        return self.of


class Codec:
    """Parcels of one cluster. accepts: says whether an envelope is signed by its client."""

    def __init__(self, genesis: Genesis, accepts: Callable[[Envelope], bool]) -> None:
        self._cluster_id, self._limits, self._accepts = genesis.cluster_id(), genesis.limits, accepts

    def content(self, body: Body) -> bytes:
        """Return the bytes that a message's author signs."""
        head = _HEAD.pack(TAG, VERSION, self._cluster_id, _KINDS[type(body)])
        if isinstance(body, PrePrepare | Prepare | Commit | Decided):
            vote = head + _VOTE.pack(body.view, body.slot, body.digest or NULL_DIGEST)
            return b"".join([vote, *self._list(body.commits)]) if isinstance(body, Decided) else vote
        if isinstance(body, Missing):
            return head + struct.pack(">Q", body.slot)
        if isinstance(body, Checkpoint):
            return head + _STATE.pack(body.slot, body.digest)
        parts = [head, struct.pack(">Q", body.view)]
        if isinstance(body, NewView):
            return b"".join([*parts, *self._list(body.changes), *self._list(body.proposals)])
        parts += [struct.pack(">Q", body.stable), *self._list(body.proof), struct.pack(">H", len(body.prepared))]
        for one in body.prepared:
            parts += [self._signed(one.proposal), *self._list(one.prepares)]
        return b"".join(parts)

    def encode(self, message: Signed) -> bytes:
        """Return the parcel of a message."""
        requests = [one.request for one in _proposals(message.body)]
        batches = {batch.digest(): batch for batch in requests if isinstance(batch, BatchProposal)}
        parts = [struct.pack(">H", len(batches))]
        for batch in batches.values():
            parts += [struct.pack(">I", len(batch.batch.raw)), batch.batch.raw]
        return b"".join([*parts, self._signed(message)])

    def decode(self, parcel: bytes, author: int, genuine: Callable[[Signed], bool]) -> Signed:
        """Decode a parcel of `author`; LayoutError for anything else, or if `genuine` refuses the outer signature.

        That is asked before anything within is looked at.
        """
        reader = Reader(parcel)
        raw_batches = [reader.block(self._limits.batch_bytes_max) for _ in range(_count(reader, self._limits.window))]
        who, content, signature = _take_signed(reader)
        reader.finish()
        if who != author:
            raise LayoutError(f"a message of replica {who}, sent by replica {author}")
        # Its body is not known yet, and is not what is signed.
        if not genuine(Signed(author, Checkpoint(0, b""), signature, content)):
            raise LayoutError(f"a message that replica {author} did not sign")
        batches = dict(self._batch(raw) for raw in raw_batches)
        message = Signed(author, self._body(content, batches, frozenset(_KINDS.values())), signature, content)
        named = {one.digest for one in _proposals(message.body)} - {NULL}
        if len(batches) != len(raw_batches) or named != set(batches):
            raise LayoutError("proposals without their batches, or batches that no proposal names")
        return message

    def _batch(self, raw: bytes) -> tuple[bytes, BatchProposal]:
        batch = decode_batch(raw, self._cluster_id, self._limits)
        if batch.cut or not batch.envelopes:
            raise LayoutError("a batch with a cut, or of nothing")
        for envelope in batch.envelopes:
            if not self._accepts(envelope):
                raise LayoutError("a batch with an envelope that its client did not sign")
        return batch.digest, BatchProposal(batch)

    def _body(self, content: bytes, batches: dict[bytes, BatchProposal], kinds: frozenset[int]) -> Body:
        reader = Reader(content)
        tag, version, cluster_id, kind = _HEAD.unpack(reader.take(_HEAD.size))
        if tag != TAG or version != VERSION or cluster_id != self._cluster_id or kind not in kinds:
            raise LayoutError("not a message that belongs here")
        body: Body
        if kind == 1:
            view, slot, digest = _VOTE.unpack(reader.take(_VOTE.size))
            body = PrePrepare(view, slot, *_proposed(digest, batches))
        elif kind in {2, 3}:
            view, slot, digest = _VOTE.unpack(reader.take(_VOTE.size))
            body = (Prepare if kind == 2 else Commit)(view, slot, NULL if digest == NULL_DIGEST else digest)
        elif kind == 4:
            body = Checkpoint(*_STATE.unpack(reader.take(_STATE.size)))
        elif kind == 5:
            view, stable = reader.u64(), reader.u64()
            proof = self._members(reader, batches, 4)
            count = _count(reader, self._limits.window)
            prepared = tuple(self._certificate(reader, batches) for _ in range(count))
            body = ViewChange(view, prepared, stable, proof)
        elif kind == 7:
            body = Missing(reader.u64())
        elif kind == 8:
            view, slot, digest = _VOTE.unpack(reader.take(_VOTE.size))
            body = Decided(view, slot, *_proposed(digest, batches), self._members(reader, batches, 3))
        else:
            view, changes = reader.u64(), self._members(reader, batches, 5)
            count = _count(reader, self._limits.window)
            body = NewView(view, changes, tuple(self._nested(reader, batches, 1) for _ in range(count)))
        reader.finish()
        return body

    def _certificate(self, reader: Reader, batches: dict[bytes, BatchProposal]) -> Certificate:
        return Certificate(self._nested(reader, batches, 1), self._members(reader, batches, 2))

    def _members(self, reader: Reader, batches: dict[bytes, BatchProposal], kind: int) -> tuple[Signed, ...]:
        return tuple(self._nested(reader, batches, kind) for _ in range(_count(reader, _MEMBERS_MAX)))

    def _nested(self, reader: Reader, batches: dict[bytes, BatchProposal], kind: int) -> Signed:
        author, content, signature = _take_signed(reader)
        return Signed(author, self._body(content, batches, frozenset({kind})), signature, content)

    def _list(self, messages: Sequence[Signed]) -> list[bytes]:
        return [struct.pack(">H", len(messages)), *(self._signed(message) for message in messages)]

    def _signed(self, message: Signed) -> bytes:
        content = message.raw or self.content(message.body)
        return struct.pack(">HI", message.author, len(content)) + content + message.signature


class Signatures:
    """Makes the own signatures and verifies everybody's: over the bytes as they were received."""

    def __init__(self, genesis: Genesis, codec: Codec, key: ClientKey) -> None:
        self._keys = [VerifyingKey.from_bytes(member.log_public_key) for member in genesis.members]
        self._codec, self._key = codec, key
        self._verified: OrderedDict[tuple[int, bytes, bytes], None] = OrderedDict()

    def sign(self, author: int, body: Body) -> bytes:
        """Return the 64-byte signature of the own message."""
        content = self._codec.content(body)
        signature = self._key.sign(content)
        self._remember((author, content, signature))
        return signature

    def verify(self, message: Signed) -> bool:
        """Say whether the author signed the message."""
        if not 0 <= message.author < len(self._keys):
            return False
        known = (message.author, message.raw or self._codec.content(message.body), message.signature)
        if known in self._verified:
            self._verified.move_to_end(known)
            return True
        try:
            self._keys[message.author].verify(message.signature, known[1])
        except VerificationError:
            return False
        self._remember(known)
        return True

    def _remember(self, known: tuple[int, bytes, bytes]) -> None:
        if len(known[1]) > _VOTE.size + _HEAD.size:
            return  # a view change: rare, and large
        self._verified[known] = None
        if len(self._verified) > VERIFIED_MAX:
            self._verified.popitem(last=False)


def _proposed(digest: bytes, batches: dict[bytes, BatchProposal]) -> tuple[bytes, Proposal | None]:
    if digest == NULL_DIGEST:
        return NULL, None
    return digest, batches.get(digest) or Elsewhere(digest)


def _count(reader: Reader, most: int) -> int:
    count = reader.u16()
    if count > most:
        raise LayoutError(f"{count} pieces where at most {most} can be")
    return count


def _take_signed(reader: Reader) -> tuple[int, bytes, bytes]:
    return reader.u16(), reader.block(FRAME_BYTES_MAX), reader.take(SIGNATURE_SIZE)


def _proposals(body: Body) -> list[PrePrepare]:
    """Return the proposals whose batches travel with a message."""
    signed: list[Signed] = []
    if isinstance(body, PrePrepare):
        return [body]
    if isinstance(body, Decided):
        return [PrePrepare(body.view, body.slot, body.digest, body.request)]
    if isinstance(body, ViewChange):
        signed += [one.proposal for one in body.prepared]
    elif isinstance(body, NewView):
        signed += body.proposals
    return [one.body for one in signed if isinstance(one.body, PrePrepare)]
