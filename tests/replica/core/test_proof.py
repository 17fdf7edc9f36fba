"""One entry shown to someone who does not read its log: any bit that is changed is noticed."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replica.core.layout import LayoutError
from replica.core.proof import PAYLOAD_BYTES_MAX, PROOF_BYTES_MAX, EntryProof, decode_proof, prove
from tests.replica.core.harness import FakeLog
from tests.replica.core.signed import SignedCluster
from tests.replica.core.support import examples
from trustlog import APPEND_SIZE, GROUP_ENTRIES_MAX, SIGNATURE_SIZE, Attestation, entry_digest

COUNT_AT = APPEND_SIZE + SIGNATURE_SIZE


def flips(raw: bytes) -> Iterator[tuple[int, bytes]]:
    """Every (bit, bytes) that differ from `raw` in that bit."""
    for bit in range(8 * len(raw)):
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        yield bit, bytes(flipped)


@examples(100)
@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=12), data=st.data())
def test_a_proof_is_read_as_it_was_written(sizes: list[int], data: st.DataObject):
    log = FakeLog(1)
    log.say(b"something before")
    payloads = tuple(bytes([place]) * size for place, size in enumerate(sizes))
    group = log.append(payloads)
    index = data.draw(st.integers(group.first, group.last))
    proof = prove(group, index)
    assert decode_proof(proof.encode()) == proof
    assert proof.payload == payloads[index - group.first]
    assert proof.digests == tuple(map(entry_digest, payloads))
    assert proof.attestation.statement + proof.attestation.signature == group.raw[:COUNT_AT]


def test_every_entry_of_a_group_is_proved_to_whoever_knows_the_key():
    cluster = SignedCluster()
    cluster.say(0, b"before")
    group = cluster.say(0, b"one", b"two", b"three")
    for index, payload in zip((2, 3, 4), (b"one", b"two", b"three"), strict=True):
        shown = decode_proof(prove(group, index).encode())
        assert shown.payload == payload
        assert cluster.verify(0, shown)
        assert not cluster.verify(1, shown), "another log's"


def test_every_bit_that_is_flipped_is_refused():
    cluster = SignedCluster()
    raw = prove(cluster.say(0, b"one", b"two", b"three"), 2).encode()
    survivors = []
    for bit, flipped in flips(raw):
        try:
            shown = decode_proof(flipped)
        except LayoutError:
            continue
        if cluster.verify(0, shown):
            survivors.append(bit)
    assert survivors == []


def test_every_truncation_and_every_addition_is_refused():
    raw = prove(FakeLog(0).say(b"one", b"two"), 1).encode()
    for size in range(len(raw)):
        with pytest.raises(LayoutError):
            decode_proof(raw[:size])
    with pytest.raises(LayoutError):
        decode_proof(raw + b"\0")


GOOD = prove(FakeLog(0).say(b"one", b"two"), 2)
BAD: dict[str, EntryProof] = {
    "another entry of the group": replace(GOOD, payload=b"one"),
    "another place": replace(GOOD, place=0),
    "a place beyond the group": replace(GOOD, place=2),
    "no entries": replace(GOOD, digests=(), place=0),
    "too many entries": replace(GOOD, digests=(GOOD.digests[1],) * (GROUP_ENTRIES_MAX + 1)),
    "too large a payload": replace(
        GOOD, payload=bytes(PAYLOAD_BYTES_MAX + 1), digests=(entry_digest(bytes(PAYLOAD_BYTES_MAX + 1)),), place=0
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_no_group_can_show(name: str):
    with pytest.raises(LayoutError):
        decode_proof(BAD[name].encode())


def test_the_largest_proof_is_as_large_as_is_said():
    largest = bytes(PAYLOAD_BYTES_MAX)
    digests = (entry_digest(largest),) * GROUP_ENTRIES_MAX
    by_tpm = Attestation(bytes(17) + b"\x03" + bytes(APPEND_SIZE - 18), bytes(209))
    raw = EntryProof(by_tpm, digests, GROUP_ENTRIES_MAX - 1, largest).encode()
    assert len(raw) == PROOF_BYTES_MAX
    assert decode_proof(raw).payload == largest
    assert struct.unpack_from(">H", raw, len(by_tpm.raw)) == (GROUP_ENTRIES_MAX,)
