"""Committed vectors of every byte layout, built from the layouts in words and not by the code under test."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from replica.apps import kv
from replica.core import entries as e
from replica.core.batch import NULL_BATCH, decode_batch, encode_batch
from replica.core.checkpoint import Header, decode_header, encode_certificate
from replica.core.entries import Reference, decode_entry
from replica.core.envelope import (
    Open,
    OpenReply,
    Operations,
    Result,
    SessionId,
    Status,
    decode_envelope,
    decode_reply,
    encode_open,
    encode_open_reply,
    encode_operations,
    encode_operations_reply,
)
from replica.core.genesis import Founding, Genesis, Limits, Member, Ordering
from replica.core.group import decode_group, encode_group, encode_payloads
from replica.core.logstate import Departure, LogState, Opening
from replica.core.proof import EntryProof, decode_proof
from tests.replica.core.support import REWRITE, block, text
from trustlog import Attestation

PATH = Path(__file__).parent / "vectors" / "layouts.json"
u8, u16, u32, u64 = (struct.Struct(f">{c}").pack for c in "BHIQ")
SIGNATURE = bytes(range(64))
CLIENT = b"\x04" + bytes(range(64))

GENESIS = {
    "name": "münster",
    "nonce": bytes(range(32)).hex(),
    "f": 1,
    "ordering": 3,
    "application": "replica.apps.kv:KeyValue",
    "limits": [4, 8, 1000, 16, 4096, 10, 65536, 20, 200000, 1000, 30, 3, 40],
    "members": [[i, 1, (b"\x04" + bytes([i + 1]) * 64).hex()] for i in range(3)],
}


def genesis_by_hand() -> bytes:
    """The layout table of replica.core.genesis, byte by byte."""
    raw = b"trustlog/genesis" + u8(1) + text(GENESIS["name"]) + bytes.fromhex(GENESIS["nonce"])
    raw += u16(GENESIS["f"]) + u8(GENESIS["ordering"]) + text(GENESIS["application"])
    raw += b"".join(map(u64, GENESIS["limits"])) + u16(len(GENESIS["members"]))
    return raw + b"".join(u16(number) + u8(kind) + bytes.fromhex(key) for number, kind, key in GENESIS["members"])


CLUSTER_ID = hashlib.sha256(genesis_by_hand()).digest()


def envelope_by_hand(kind: int, body: bytes) -> bytes:
    return b"trustlog/request" + u8(1) + u8(kind) + CLUSTER_ID + CLIENT + body + SIGNATURE


def operations_by_hand(*operations: bytes) -> bytes:
    body = u64(3) + u32(2) + u64(7) + u64(5) + u16(len(operations)) + b"".join(map(block, operations))
    return envelope_by_hand(1, body)


def batch_by_hand(time_ms: int, cut: tuple[int, ...], envelopes: tuple[bytes, ...]) -> bytes:
    return (
        u64(time_ms) + u16(len(cut)) + b"".join(map(u64, cut)) + u16(len(envelopes)) + b"".join(map(block, envelopes))
    )


OPEN = envelope_by_hand(2, bytes(range(16)) + u64(99))
OPERATIONS = operations_by_hand(b"", b"first", b"\xff" * 300)
BATCH = batch_by_hand(1_700_000_000_123, (), (OPEN, OPERATIONS))
CUT_BATCH = batch_by_hand(5, (10, 0, 2**64 - 1), ())
DIGEST = hashlib.sha256(b"trustlog/batch\0\0" + BATCH).digest()
STATEMENT = bytes(i % 251 for i in range(170))
SAID = u8(4) + u64(1024) + DIGEST
OTHERS = (hashlib.sha256(b"before").digest(), hashlib.sha256(b"after").digest())
PROOF = (
    STATEMENT
    + SIGNATURE
    + u16(3)
    + OTHERS[0]
    + hashlib.sha256(b"\0" + SAID).digest()
    + OTHERS[1]
    + u16(1)
    + block(SAID)
)


def by_hand() -> dict[str, str]:
    """Every vector, from the documented layouts."""
    vectors = {
        "genesis": genesis_by_hand(),
        "cluster id": CLUSTER_ID,
        "genesis of a founded cluster": genesis_by_hand() + u16(0) + b"\x11" * 32 + u64(258) + DIGEST
        + u64(1_700_000_000_123) + OTHERS[0] + OTHERS[1],
        "context of list 0": hashlib.sha256(b"trustlog/context" + CLUSTER_ID + u64(0)).digest(),
        "context of list 258": hashlib.sha256(b"trustlog/context" + CLUSTER_ID + u64(258)).digest(),
        "envelope of operations": OPERATIONS,
        "envelope that opens a session": OPEN,
        "batch": BATCH,
        "batch digest": DIGEST,
        "batch with a cut": CUT_BATCH,
        "null batch": bytes(12),
        "PRE-PREPARE": u8(1) + u64(258) + u64(3) + BATCH,
        "PRE-PREPARE with a cut": u8(1) + u64(0) + u64(8) + CUT_BATCH,
        "PREPARE": u8(2) + u64(258) + u64(3) + DIGEST,
        "COMMIT": u8(3) + u64(258) + u64(3) + DIGEST,
        "CHECKPOINT": u8(4) + u64(1024) + DIGEST,
        "RESULT": u8(10) + u64(258) + u32(3) + DIGEST,
        "SUSPECT": u8(5) + u64(258),
        "VIEW-CHANGE": u8(6) + u64(259),
        "NEW-VIEW": u8(7) + u64(259) + u16(2) + u16(2) + u64(77) + u16(0) + u64(2**64 - 1),
        "group": STATEMENT + SIGNATURE + u16(3) + u32(5) + u32(0) + u32(300) + b"first" + b"\xff" * 300,
        "reply to operations": u8(1) + u64(3) + u32(2) + u64(7) + u16(2)
        + u8(0) + u64(9) + block(b"value") + u8(4) + u64(0) + block(b""),
        "reply to an opening": u8(2) + bytes(range(16)) + u8(5) + u64(0) + u32(0),
        "log state": u16(2) + u64(77) + u64(5) + u8(1) + u64(9) + u64(0) + u64(8) + u64(12)
        + u32(2) + u64(2) + u64(4) + u64(6) + u64(5) + u64(8) + u64(10)
        + u32(1) + u64(5) + u64(70) + u64(8) + u64(10)
        + u32(3) + u64(9) + u64(2) + DIGEST + u64(9) + u64(5) + OTHERS[0] + u64(12) + u64(0) + DIGEST
        + u32(1) + u64(9) + u64(2) + DIGEST,
        "empty log state": u16(1) + bytes(8 + 8 + 1 + 4 * 8 + 4 * 4),
        "log state with RESULTs": u16(1) + bytes(8 + 8 + 1 + 4 * 8 + 4 * 4) + u64(258),
        "checkpoint header": b"trustlog/state\0\2" + u64(1024) + u64(1_700_000_000_123) + OTHERS[0] + OTHERS[1]
        + u16(2) + u64(77) + DIGEST + OTHERS[0] + u64(2**64 - 1) + OTHERS[1] + DIGEST,
        "entry proof": PROOF,
        "certificate": u16(2) + u16(0) + block(PROOF) + u16(258) + block(PROOF),
    }  # fmt: skip
    key = u16(3) + b"key"
    vectors |= {
        "kv PUT": u8(1) + key + b"value",
        "kv GET": u8(2) + key,
        "kv DELETE": u8(3) + key,
        "kv CAS absent": u8(4) + key + u8(0) + u32(0) + b"new",
        "kv CAS value": u8(4) + key + u8(1) + u32(3) + b"old" + b"new",
        "kv INCR": u8(5) + key + struct.pack(">q", -258),
        "kv SCAN": u8(6) + u16(1) + b"k" + u32(100) + u16(2) + b"ka",
        "kv result GET none": u8(0),
        "kv result GET value": u8(1) + b"value",
        "kv result CAS swapped": u8(1),
        "kv result CAS other": u8(0) + u8(1) + b"value",
        "kv result CAS none": u8(0) + u8(0),
        "kv result INCR": struct.pack(">q", -258),
        "kv result SCAN": u8(1) + u32(2) + u16(1) + b"a" + block(b"1") + u16(1) + b"b" + block(b""),
    }
    return {name: raw.hex() for name, raw in vectors.items()}


def genesis() -> Genesis:
    return Genesis(
        name=GENESIS["name"],
        nonce=bytes.fromhex(GENESIS["nonce"]),
        f=GENESIS["f"],
        ordering=Ordering(GENESIS["ordering"]),
        application=GENESIS["application"],
        limits=Limits(*GENESIS["limits"]),
        members=tuple(Member(number, kind, bytes.fromhex(key)) for number, kind, key in GENESIS["members"]),
    )


G = genesis()
FOUNDING = Founding(b"\x11" * 32, 258, DIGEST, 1_700_000_000_123, *OTHERS)
SESSION = SessionId(3, 2)
DECODED_BATCH = decode_batch(BATCH, CLUSTER_ID, G.limits)
DECODED_CUT = decode_batch(CUT_BATCH, CLUSTER_ID, G.limits)
CONTENT = Operations(SESSION, 7, 5, (b"", b"first", b"\xff" * 300))
OPENING = Open(bytes(range(16)), 99)
RESULTS = (Result(Status.OK, 9, b"value"), Result(Status.FORGOTTEN, 0, b""))
VOID = OpenReply(bytes(range(16)), Status.VOID, SessionId(0, 0))
ENTRIES = {
    "PRE-PREPARE": e.PrePrepare(258, 3, DECODED_BATCH),
    "PRE-PREPARE with a cut": e.PrePrepare(0, 8, DECODED_CUT),
    "PREPARE": e.Prepare(258, 3, DIGEST),
    "COMMIT": e.Commit(258, 3, DIGEST),
    "CHECKPOINT": e.Checkpoint(1024, DIGEST),
    "RESULT": e.SlotResult(258, 3, DIGEST),
    "SUSPECT": e.Suspect(258),
    "VIEW-CHANGE": e.ViewChange(259),
    "NEW-VIEW": e.NewView(259, (Reference(2, 77), Reference(0, 2**64 - 1))),
}
LOG_STATE = LogState(
    author=2,
    position=77,
    view=5,
    suspected=True,
    last_vote=9,
    last_checkpoint=8,
    top=12,
    opened={5: Opening(8, 10), 2: Opening(4, 6)},
    view_change_at={5: Departure(70, 8, 10)},
    votes={12: {0: DIGEST}, 9: {5: OTHERS[0], 2: DIGEST}},
    commits={9: {2: DIGEST}},
)
HEADER = Header(1024, 1_700_000_000_123, *OTHERS, (77, 2**64 - 1), (DIGEST, OTHERS[1]), (OTHERS[0], DIGEST))
SHOWN = EntryProof(
    Attestation(STATEMENT, SIGNATURE), (OTHERS[0], hashlib.sha256(b"\0" + SAID).digest(), OTHERS[1]), 1, SAID
)
ENCODED = {
    "genesis": G.encode(),
    "cluster id": G.cluster_id(),
    "genesis of a founded cluster": replace(G, founding=FOUNDING, base=260).encode(),
    "context of list 0": G.context(),
    "context of list 258": G.context(258),
    "envelope of operations": encode_operations(CLUSTER_ID, CLIENT, CONTENT) + SIGNATURE,
    "envelope that opens a session": encode_open(CLUSTER_ID, CLIENT, OPENING) + SIGNATURE,
    "batch": encode_batch(1_700_000_000_123, (), (OPEN, OPERATIONS)),
    "batch digest": DECODED_BATCH.digest,
    "batch with a cut": encode_batch(5, (10, 0, 2**64 - 1), ()),
    "null batch": NULL_BATCH.raw,
    **{name: entry.encode() for name, entry in ENTRIES.items()},
    "group": encode_group(Attestation(STATEMENT, SIGNATURE), encode_payloads((b"first", b"", b"\xff" * 300))),
    "reply to operations": encode_operations_reply(SESSION, 7, RESULTS),
    "reply to an opening": encode_open_reply(VOID),
    "log state": LOG_STATE.encode(),
    "empty log state": LogState(1).encode(),
    "log state with RESULTs": LogState(1, results=258).encode(),
    "checkpoint header": HEADER.encode(),
    "entry proof": SHOWN.encode(),
    "certificate": encode_certificate({258: SHOWN, 0: SHOWN}),
    "kv PUT": kv.put(b"key", b"value"),
    "kv GET": kv.get(b"key"),
    "kv DELETE": kv.delete(b"key"),
    "kv CAS absent": kv.cas(b"key", None, b"new"),
    "kv CAS value": kv.cas(b"key", b"old", b"new"),
    "kv INCR": kv.incr(b"key", -258),
    "kv SCAN": kv.scan(b"k", 100, b"ka"),
}


def load() -> dict[str, str]:
    if REWRITE:
        PATH.write_text(json.dumps(by_hand(), indent=1) + "\n")
    vectors: dict[str, str] = json.loads(PATH.read_text())
    return vectors


VECTORS = load()


def vector(name: str) -> bytes:
    return bytes.fromhex(VECTORS[name])


def test_the_committed_vectors_follow_from_the_layouts_in_words():
    assert by_hand() == VECTORS


@pytest.mark.parametrize("name", ENCODED)
def test_encoding_gives_the_committed_bytes(name: str):
    assert ENCODED[name].hex() == VECTORS[name]


def test_every_vector_is_used():
    assert {name for name in VECTORS if not name.startswith("kv result")} == ENCODED.keys()


@pytest.mark.parametrize("name", ENTRIES)
def test_entries_decode_to_what_was_encoded(name: str):
    assert decode_entry(vector(name), G, CLUSTER_ID) == ENTRIES[name]


def test_envelopes_decode_to_what_was_encoded():
    operations = decode_envelope(vector("envelope of operations"), CLUSTER_ID, G.limits)
    opening = decode_envelope(vector("envelope that opens a session"), CLUSTER_ID, G.limits)
    assert (operations.content, operations.client, operations.signature) == (CONTENT, CLIENT, SIGNATURE)
    assert (opening.content, opening.client, opening.signature) == (OPENING, CLIENT, SIGNATURE)
    assert opening.signed + opening.signature == opening.raw == vector("envelope that opens a session")
    assert operations.digest() == hashlib.sha256(operations.raw).digest()


def test_batches_decode_to_what_was_encoded():
    assert (DECODED_BATCH.time_ms, DECODED_BATCH.cut, DECODED_BATCH.digest) == (1_700_000_000_123, (), DIGEST)
    assert [envelope.raw for envelope in DECODED_BATCH.envelopes] == [OPEN, OPERATIONS]
    assert DECODED_CUT.cut == (10, 0, 2**64 - 1)
    assert decode_batch(vector("null batch"), CLUSTER_ID, G.limits) == NULL_BATCH


def test_groups_and_replies_decode_to_what_was_encoded():
    group = decode_group(vector("group"), G.limits)
    assert group.payloads == (b"first", b"", b"\xff" * 300)
    assert (group.attestation.statement, group.attestation.signature) == (STATEMENT, SIGNATURE)
    reply = decode_reply(vector("reply to operations"), G.limits)
    assert (reply.session, reply.first, reply.results) == (SESSION, 7, RESULTS)
    assert decode_reply(vector("reply to an opening"), G.limits) == VOID


def test_what_checkpoints_are_made_of_decodes_to_what_was_encoded():
    assert LogState.decode(vector("log state")) == LOG_STATE
    assert LogState.decode(vector("empty log state")) == LogState(1)
    assert decode_header(vector("checkpoint header"), 2) == HEADER
    assert HEADER.digest == hashlib.sha256(vector("checkpoint header")).digest()
    assert decode_proof(vector("entry proof")) == SHOWN


def test_results_of_the_key_value_store_are_read_as_documented():
    assert kv.read_value(vector("kv result GET none")) is None
    assert kv.read_value(vector("kv result GET value")) == b"value"
    assert kv.read_cas(vector("kv result CAS swapped")) == kv.CasResult(True, None)
    assert kv.read_cas(vector("kv result CAS other")) == kv.CasResult(False, b"value")
    assert kv.read_cas(vector("kv result CAS none")) == kv.CasResult(False, None)
    assert kv.read_number(vector("kv result INCR")) == -258
    assert kv.read_scan(vector("kv result SCAN")) == kv.ScanResult(((b"a", b"1"), (b"b", b"")), True)


def test_statuses_and_kinds_have_their_numbers():
    assert [s.value for s in Status] == list(range(len(Status)))
    assert [Status.OK, Status.ERROR, Status.EXPIRED, Status.OUT_OF_WINDOW] == [0, 1, 2, 3]
    assert [Status.FORGOTTEN, Status.VOID, Status.BUSY] == [4, 5, 6]
    assert [k.value for k in kv.Code] == list(range(1, 19))
    assert [k.name for k in kv.Code][:6] == ["PUT", "GET", "DELETE", "CAS", "INCR", "SCAN"]
    assert [o.label for o in Ordering] == ["two-phase", "three-phase"]
