"""The header of a checkpoint and the certificate that shows it: strict, and believed for q logs' own words only."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from dataclasses import replace

import pytest

from replica.core.batch import NULL_BATCH
from replica.core.checkpoint import (
    Header,
    batches_in_flight,
    check_certificate,
    decode_header,
    distinct_digests,
    encode_certificate,
)
from replica.core.entries import Checkpoint, Commit
from replica.core.layout import LayoutError
from replica.core.logstate import LogState
from replica.core.proof import EntryProof, prove
from tests.replica.core.signed import SignedCluster
from tests.replica.core.test_proof import flips

D, E = b"d" * 32, b"e" * 32


def header(n: int, slot: int = 8) -> Header:
    digests = [bytes([number]) * 32 for number in range(2 * n + 2)]
    cut = tuple(range(10, 10 + n))
    return Header(
        slot, 1_700_000_000_000, digests[0], digests[1], cut, tuple(digests[2 : n + 2]), tuple(digests[n + 2 :])
    )


def test_a_header_is_read_as_it_was_written():
    for n in (3, 5, 21):
        raw = header(n).encode()
        assert decode_header(raw, n) == header(n)
        assert header(n).digest == hashlib.sha256(raw).digest()


def test_every_other_header_has_another_digest_or_is_none():
    raw = header(3).encode()
    digests = set()
    for bit, flipped in flips(raw):
        try:
            decoded = decode_header(flipped, 3)
        except LayoutError:
            assert bit // 8 < 16 or 96 <= bit // 8 < 98, "only the tag and the number of logs can be wrong"
            continue
        assert decoded.encode() == flipped
        digests.add(decoded.digest)
    assert header(3).digest not in digests
    assert len(digests) == 8 * (len(raw) - 18)


@pytest.mark.parametrize("n", [1, 4, 5])
def test_a_header_of_a_cluster_of_another_size(n: int):
    with pytest.raises(LayoutError):
        decode_header(header(3).encode(), n)


def test_truncated_headers_and_headers_with_more():
    raw = header(3).encode()
    for size in range(len(raw)):
        with pytest.raises(LayoutError):
            decode_header(raw[:size], 3)
    with pytest.raises(LayoutError, match="too many"):
        decode_header(raw + b"\0", 3)


class Shown:
    """A cluster of n = 2f + 1 whose logs all said CHECKPOINT of one header."""

    def __init__(self, f: int) -> None:
        self.cluster = SignedCluster(f)
        self.genesis = self.cluster.genesis
        self.header = header(self.genesis.n)
        entry = Checkpoint(self.header.slot, self.header.digest)
        self.proofs = {log: self.proof(log, entry.encode()) for log in range(self.genesis.n)}

    def proof(self, log: int, *payloads: bytes) -> EntryProof:
        return prove(group := self.cluster.say(log, b"before", *payloads, b"after"), group.first + 1)

    def check(self, raw: bytes) -> None:
        check_certificate(raw, self.header, self.genesis, self.cluster.verify)

    def certificate(self, *logs: int) -> bytes:
        return encode_certificate({log: self.proofs[log] for log in logs})


def laid_out(*proofs: tuple[int, EntryProof], count: int | None = None) -> bytes:
    """A certificate as it is laid out, whatever stands in it."""
    raw = struct.pack(">H", len(proofs) if count is None else count)
    for log, proof in proofs:
        encoded = proof.encode()
        raw += struct.pack(">HI", log, len(encoded)) + encoded
    return raw


@pytest.mark.parametrize("f", [1, 2])
def test_q_logs_or_more_show_a_header(f: int):
    shown = Shown(f)
    for count in range(f + 1, 2 * f + 2):
        shown.check(shown.certificate(*range(count)))
        shown.check(shown.certificate(*reversed(range(2 * f + 1 - count, 2 * f + 1))))


S = Shown(1)
P = S.proofs
SAID = Checkpoint(S.header.slot, S.header.digest)
Proofs = list[tuple[int, EntryProof]]
BAD: dict[str, tuple[str, Callable[[], bytes]]] = {
    "no entry": ("of 0 entries", laid_out),
    "fewer than q": ("of 1 entries", lambda: laid_out((0, P[0]))),
    "more than there are logs": ("of 4 entries", lambda: laid_out(*P.items(), (2, P[2]))),
    "one log twice": ("ascending", lambda: laid_out((1, P[1]), (1, P[1]))),
    "not ascending": ("ascending", lambda: laid_out((1, P[1]), (0, P[0]))),
    "a log that there is not": ("ascending", lambda: laid_out((1, P[1]), (3, P[2]))),
    "one log's word as another's": ("did not attest", lambda: laid_out((0, P[0]), (1, P[0]))),
    "another digest": ("something else", lambda: laid_out((0, P[0]), (1, S.proof(1, Checkpoint(8, D).encode())))),
    "another digest first": (
        "something else",
        lambda: laid_out((0, S.proof(0, Checkpoint(8, D).encode())), (1, P[1])),
    ),
    "another slot": (
        "something else",
        lambda: laid_out((0, P[0]), (1, S.proof(1, Checkpoint(12, S.header.digest).encode()))),
    ),
    "another kind of entry": (
        "something else",
        lambda: laid_out((0, P[0]), (1, S.proof(1, Commit(0, 8, S.header.digest).encode()))),
    ),
    "no entry at all": ("no entry", lambda: laid_out((0, P[0]), (1, S.proof(1, b"\xff")))),
    "a signature that is none": (
        "did not attest",
        lambda: laid_out((0, P[0]), (1, replace(P[1], attestation=replace(P[1].attestation, signature=bytes(64))))),
    ),
    "another cluster's": (
        "did not attest",
        lambda: laid_out(
            (0, P[0]), (1, prove(S.cluster.logs[1].say(bytes(32), SAID.encode()), S.cluster.logs[1]._log.last))
        ),
    ),
    "a count of more than follow": ("bytes wanted", lambda: laid_out((0, P[0]), (1, P[1]), count=3)),
    "a count of fewer than follow": ("too many", lambda: laid_out(*P.items(), count=2)),
}


@pytest.mark.parametrize("name", BAD)
def test_certificates_that_show_nothing(name: str):
    words, make = BAD[name]
    with pytest.raises(LayoutError, match=words):
        S.check(make())
    S.check(S.certificate(0, 1))


def test_truncated_certificates():
    raw = S.certificate(0, 1)
    for size in range(len(raw)):
        with pytest.raises(LayoutError):
            S.check(raw[:size])


def test_what_a_certificate_shows_is_the_header_and_no_other():
    other = replace(S.header, time_ms=S.header.time_ms + 1)
    with pytest.raises(LayoutError, match="something else"):
        check_certificate(S.certificate(0, 1), other, S.genesis, S.cluster.verify)


def test_batches_in_flight_are_what_primaries_proposed():
    states = [LogState(author) for author in range(3)]
    states[0].votes = {9: {0: D}, 10: {0: NULL_BATCH.digest}, 11: {0: E}}
    states[1].votes = {9: {0: E, 1: D}, 10: {1: E}, 12: {0: E}}
    states[2].votes = {9: {0: D, 1: E}}
    in_flight = batches_in_flight(states)
    assert in_flight == [(9, 0, D), (9, 1, D), (10, 1, E), (11, 0, E)], "proposals, ascending; no null batch, no vote"
    assert distinct_digests(in_flight) == [D, E], "each once, though a carried batch stands there repeatedly"
