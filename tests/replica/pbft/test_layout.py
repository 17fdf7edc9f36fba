"""PBFT's messages as bytes: what is signed is what was received, and nothing else is taken."""

import random
import struct

import pytest

from replica.cluster.keys import ClientKey
from replica.cluster.pbft import LIMITS, PBFT, PbftGenesis, pbft_member
from replica.core.batch import make_batch
from replica.core.envelope import Operations, SessionId, decode_envelope, encode_operations
from replica.core.layout import LayoutError
from replica.pbft.layout import Codec, Signatures
from replica.pbft.messages import (
    NULL,
    Certificate,
    Checkpoint,
    Commit,
    Decided,
    Missing,
    NewView,
    Prepare,
    PrePrepare,
    Signed,
    ViewChange,
)
from replica.pbft.pending import BatchProposal
from replica.shell.verify import EnvelopeVerifier

KEYS = [ClientKey.generate() for _ in range(4)]
CLIENT = ClientKey.generate()
MEMBERS = tuple(pbft_member(number, key.public_key) for number, key in enumerate(KEYS))
GENESIS = PbftGenesis("test", bytes(32), 1, PBFT, "replica.apps.kv:KeyValue", LIMITS, MEMBERS)
CODEC = Codec(GENESIS, EnvelopeVerifier())
VOICES = [Signatures(GENESIS, CODEC, key) for key in KEYS]


def batch(*operations: bytes, key: ClientKey = CLIENT) -> BatchProposal:
    envelopes = []
    for number, operation in enumerate(operations, 1):
        content = encode_operations(
            GENESIS.cluster_id(), CLIENT.public_key, Operations(SessionId(1, 0), number, 1, (operation,))
        )
        envelopes.append(decode_envelope(content + key.sign(content), GENESIS.cluster_id(), LIMITS))
    return BatchProposal(make_batch(7, (), envelopes))


def said(author: int, body: object) -> Signed:
    return Signed(author, body, VOICES[author].sign(author, body))


FIRST, SECOND = batch(b"one", b"two"), batch(b"three")
FOREIGN = batch(b"x", key=KEYS[0])  # not signed by the client that it names


def certificate(slot: int, request: BatchProposal | None, view: int = 0) -> Certificate:
    proposal = PrePrepare.of(view, slot, request)
    return Certificate(
        said(view % 4, proposal), tuple(said(author, Prepare(view, slot, proposal.digest)) for author in (2, 3))
    )


PROOF = tuple(said(author, Checkpoint(32, b"D" * 32)) for author in (0, 1, 2))
CHANGES = tuple(
    said(author, ViewChange(5, (certificate(33, FIRST), certificate(34, None), certificate(40, SECOND, 1)), 32, PROOF))
    for author in (0, 2, 3)
)
BODIES = [
    PrePrepare.of(0, 1, FIRST),
    PrePrepare.of(3, 2, None),
    Prepare(0, 1, FIRST.digest()),
    Commit(9, 1, NULL),
    Checkpoint(32, b"D" * 32),
    ViewChange(1, ()),
    CHANGES[0].body,
    NewView(5, CHANGES, (said(1, PrePrepare.of(5, 33, FIRST)), said(1, PrePrepare.of(5, 34, None)))),
    Missing(77),
    Decided(0, 1, FIRST.digest(), FIRST, tuple(said(author, Commit(0, 1, FIRST.digest())) for author in (0, 1, 2))),
]


def reread(parcel: bytes, author: int = 1, reader: int = 0) -> Signed:
    return Codec(GENESIS, EnvelopeVerifier()).decode(parcel, author, VOICES[reader].verify)


@pytest.mark.parametrize("body", BODIES, ids=lambda body: type(body).__name__)
def test_what_is_decoded_is_what_was_said_and_says_the_same_bytes_again(body) -> None:
    message = said(1, body)
    parcel = CODEC.encode(message)
    read = reread(parcel)
    assert read.author == 1
    assert VOICES[3].verify(read)
    assert CODEC.encode(read) == parcel
    if not isinstance(body, NewView):  # in it, batches that are not carried over are told by their digests
        assert read.body == body


def test_a_new_view_holds_the_batches_that_it_proposes_and_names_the_others() -> None:
    read = reread(CODEC.encode(said(1, BODIES[7]))).body
    kept = [one.proposal.body for one in read.changes[0].body.prepared]
    assert kept[0].request == FIRST
    assert kept[1].request is None
    assert (kept[2].digest, kept[2].request.digest()) == (SECOND.digest(), SECOND.digest())
    assert not isinstance(kept[2].request, BatchProposal)


@pytest.mark.parametrize("body", BODIES, ids=lambda body: type(body).__name__)
def test_no_altered_byte_is_taken(body) -> None:
    parcel = CODEC.encode(said(1, body))
    chance = random.Random(1)
    places = range(len(parcel)) if len(parcel) < 400 else sorted(chance.sample(range(len(parcel)), 300))
    for place in places:
        altered = parcel[:place] + bytes([parcel[place] ^ 1 << chance.randrange(8)]) + parcel[place + 1 :]
        with pytest.raises(LayoutError):
            reread(altered)
    for size in {0, 1, 2, len(parcel) // 2, len(parcel) - 1}:
        with pytest.raises(LayoutError):
            reread(parcel[:size])
    with pytest.raises(LayoutError):
        reread(parcel + b"\0")


def parcel_of(author: int, content: bytes, *batches: BatchProposal) -> bytes:
    """A parcel whose author really signed this content."""
    parts = [struct.pack(">H", len(batches))]
    parts += [struct.pack(">I", len(one.batch.raw)) + one.batch.raw for one in batches]
    return b"".join([*parts, struct.pack(">HI", author, len(content)), content, KEYS[author].sign(content)])


REFUSED = [
    CODEC.encode(said(2, BODIES[2])),  # another replica's, passed on as one's own
    parcel_of(1, CODEC.content(BODIES[0])),  # without its batch
    parcel_of(1, CODEC.content(BODIES[0]), FIRST, SECOND),
    parcel_of(1, CODEC.content(BODIES[0]), FIRST, FIRST),
    parcel_of(1, CODEC.content(BODIES[2]), FIRST),
    parcel_of(1, CODEC.content(BODIES[0]), SECOND),
    parcel_of(1, CODEC.content(PrePrepare.of(0, 1, FOREIGN)), FOREIGN),
    parcel_of(1, b""),
    parcel_of(1, CODEC.content(BODIES[2])[:-1]),
    parcel_of(1, CODEC.content(BODIES[2]) + b"\0"),
    parcel_of(1, b"x" + CODEC.content(BODIES[2])[1:]),
    parcel_of(1, CODEC.content(BODIES[6]).replace(struct.pack(">QH", 32, 3), struct.pack(">QH", 32, 60000), 1)),
    parcel_of(1, CODEC.content(ViewChange(1, (), 0, (said(0, Prepare(0, 1, NULL)),)))),  # no CHECKPOINT
]


@pytest.mark.parametrize("parcel", REFUSED, ids=map(str, range(len(REFUSED))))
def test_what_its_author_signed_and_no_correct_replica_says_is_refused(parcel: bytes) -> None:
    with pytest.raises(LayoutError):
        reread(parcel)


def test_a_message_for_another_cluster_is_refused() -> None:
    other = PbftGenesis("test", b"\1" * 32, 1, PBFT, "replica.apps.kv:KeyValue", LIMITS, MEMBERS)
    codec = Codec(other, EnvelopeVerifier())
    body = Prepare(0, 1, FIRST.digest())
    signature = Signatures(other, codec, KEYS[1]).sign(1, body)
    with pytest.raises(LayoutError):
        reread(codec.encode(Signed(1, body, signature)))


def test_nothing_is_looked_at_before_the_signature() -> None:
    seen = []
    codec = Codec(GENESIS, lambda envelope: not seen.append(envelope))
    parcel = CODEC.encode(Signed(1, BODIES[0], bytes(64)))
    with pytest.raises(LayoutError, match="did not sign"):
        codec.decode(parcel, 1, VOICES[0].verify)
    assert seen == []
