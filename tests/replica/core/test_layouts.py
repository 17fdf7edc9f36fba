"""Bytes from outside are either exactly what a layout allows, or a LayoutError: nothing between, and nothing costly."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replica.core import entries as e
from replica.core.batch import CUT_POSITIONS_MAX, decode_batch, encode_batch, make_batch
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
from replica.core.genesis import Limits
from replica.core.group import decode_group, encode_group, encode_payloads
from replica.core.layout import U64_MAX, LayoutError, Reader
from tests.replica.core import test_vectors as v
from tests.replica.core.support import examples

G, LIMITS, CLUSTER_ID = v.G, v.G.limits, v.CLUSTER_ID


def again_envelope(raw: bytes) -> bytes:
    envelope = decode_envelope(raw, CLUSTER_ID, LIMITS)
    encode = encode_open if isinstance(envelope.content, Open) else encode_operations
    return encode(CLUSTER_ID, envelope.client, envelope.content) + envelope.signature  # type: ignore[arg-type]


def again_batch(raw: bytes) -> bytes:
    batch = decode_batch(raw, CLUSTER_ID, LIMITS)
    return encode_batch(batch.time_ms, batch.cut, [again_envelope(x.raw) for x in batch.envelopes])


def again_entry(raw: bytes) -> bytes:
    return decode_entry(raw, G, CLUSTER_ID).encode()


def again_group(raw: bytes) -> bytes:
    group = decode_group(raw, LIMITS)
    return encode_group(group.attestation, encode_payloads(group.payloads))


def again_reply(raw: bytes) -> bytes:
    reply = decode_reply(raw, LIMITS)
    if isinstance(reply, OpenReply):
        return encode_open_reply(reply)
    return encode_operations_reply(reply.session, reply.first, reply.results)


# Each decodes strictly and encodes again what it found.
AGAIN: dict[str, Callable[[bytes], bytes]] = {
    "envelope of operations": again_envelope,
    "envelope that opens a session": again_envelope,
    "batch": again_batch,
    "batch with a cut": again_batch,
    "null batch": again_batch,
    **dict.fromkeys(v.ENTRIES, again_entry),
    "group": again_group,
    "reply to operations": again_reply,
    "reply to an opening": again_reply,
}
VARIANTS = list(AGAIN)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_truncation_is_refused(name: str):
    raw = v.vector(name)
    for size in range(len(raw)):
        with pytest.raises(LayoutError):
            AGAIN[name](raw[:size])


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("tail", [b"\0", b"\1", bytes(8), b"\xff" * 100])
def test_trailing_bytes_are_refused(name: str, tail: bytes):
    with pytest.raises(LayoutError):
        AGAIN[name](v.vector(name) + tail)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_number_changed_anywhere_is_refused_or_means_what_it_says(name: str):
    # Every count, length, number and kind is among these places; widths are those of the layouts' numbers.
    raw = v.vector(name)
    for width in (1, 2, 4, 8):
        for at in range(len(raw) - width + 1):
            now = int.from_bytes(raw[at : at + width], "big")
            for number in {0, 1, now + 1, now - 1, 2 ** (8 * width) - 1, 2 ** (8 * width - 1)}:
                changed = raw[:at] + (number % 2 ** (8 * width)).to_bytes(width, "big") + raw[at + width :]
                try:
                    assert AGAIN[name](changed) == changed
                except LayoutError:
                    continue


@pytest.mark.parametrize("name", VARIANTS)
@examples(40)
@given(data=st.data())
def test_any_bytes_give_a_value_or_a_layout_error(name: str, data: st.DataObject):
    raw = v.vector(name)
    keep = data.draw(st.integers(0, min(len(raw), 120)))
    changed = raw[:keep] + data.draw(st.binary(max_size=200))
    try:
        assert AGAIN[name](changed) == changed
    except LayoutError:
        return


numbers = st.integers(0, U64_MAX)
slots = st.integers(1, U64_MAX // 2)
digests = st.binary(min_size=32, max_size=32)
sessions = st.builds(SessionId, numbers, st.integers(0, 2**32 - 1))
references = st.permutations(range(3)).flatmap(
    lambda order: st.tuples(*(st.builds(Reference, st.just(n), st.integers(1, U64_MAX)) for n in order[:2]))
)


@st.composite
def operations(draw: st.DrawFn) -> Operations:
    first = draw(st.integers(1, U64_MAX - 17))
    listed = draw(st.lists(st.binary(max_size=100), min_size=1, max_size=16))
    return Operations(draw(sessions), first, draw(st.integers(0, first)), tuple(listed))


opens = st.builds(Open, st.binary(min_size=16, max_size=16), numbers)
results = st.builds(Result, st.sampled_from(Status), numbers, st.binary(max_size=50))
simple_entries = st.one_of(
    st.builds(e.Prepare, numbers, slots, digests),
    st.builds(e.Commit, numbers, slots, digests),
    st.builds(e.Checkpoint, slots, digests),
    st.builds(e.Suspect, numbers),
    st.builds(e.ViewChange, numbers),
    st.builds(e.NewView, st.integers(1, U64_MAX), references),
)


@st.composite
def envelopes(draw: st.DrawFn) -> bytes:
    content = draw(st.one_of(operations(), opens))
    encode = encode_open if isinstance(content, Open) else encode_operations
    return encode(CLUSTER_ID, draw(st.binary(min_size=65, max_size=65)), content) + draw(  # type: ignore[arg-type]
        st.binary(min_size=64, max_size=64)
    )


@examples(80)
@given(raw=envelopes())
def test_envelopes_keep_their_content(raw: bytes):
    assert again_envelope(raw) == raw


@examples(80)
@given(entry=simple_entries)
def test_entries_keep_their_content(entry: e.Entry):
    assert decode_entry(entry.encode(), G, CLUSTER_ID) == entry


@examples(50)
@given(raws=st.lists(envelopes(), max_size=4), slot=slots, time=numbers, view=numbers, cut=st.tuples(*[numbers] * 3))
def test_proposals_keep_their_content(raws: list[bytes], slot: int, time: int, view: int, cut: tuple[int, ...]):
    batch = make_batch(time, cut if slot % 4 == 0 else (), [decode_envelope(raw, CLUSTER_ID, LIMITS) for raw in raws])
    entry = e.PrePrepare(view, slot, batch)
    assert decode_entry(entry.encode(), G, CLUSTER_ID) == entry


@examples(50)
@given(session=sessions, first=numbers, listed=st.lists(results, min_size=1, max_size=16))
def test_replies_keep_their_content(session: SessionId, first: int, listed: list[Result]):
    reply = decode_reply(encode_operations_reply(session, first, listed), LIMITS)
    assert (reply.session, reply.first, list(reply.results)) == (session, first, listed)  # type: ignore[union-attr]


REFUSED = {
    "slot 0": e.Prepare(0, 0, bytes(32)).encode(),
    "slot 0 committed": e.Commit(0, 0, bytes(32)).encode(),
    "slot 0 proposed": e.PrePrepare(0, 0, make_batch(0, (), ())).encode(),
    "checkpoint of slot 0": e.Checkpoint(0, bytes(32)).encode(),
    "a slot whose sums leave 64 bits": e.Prepare(0, 2**63, bytes(32)).encode(),
    "NEW-VIEW(0)": e.NewView(0, (Reference(0, 1), Reference(1, 1))).encode(),
    "too few references": e.NewView(1, (Reference(0, 1),)).encode(),
    "too many references": e.NewView(1, tuple(Reference(i, 1) for i in range(3))).encode(),
    "no references": e.NewView(1, ()).encode(),
    "one replica twice": e.NewView(1, (Reference(1, 1), Reference(1, 2))).encode(),
    "a replica that is none": e.NewView(1, (Reference(1, 1), Reference(3, 2))).encode(),
    "index 0": e.NewView(1, (Reference(1, 0), Reference(2, 2))).encode(),
    "a cut where none belongs": e.PrePrepare(0, 3, make_batch(0, (0, 0, 0), ())).encode(),
    "no cut where one belongs": e.PrePrepare(0, 4, make_batch(0, (), ())).encode(),
    "a cut of two logs": e.PrePrepare(0, 4, make_batch(0, (0, 0), ())).encode(),
    "a cut of four logs": e.PrePrepare(0, 4, make_batch(0, (0, 0, 0, 0), ())).encode(),
    "a RESULT of slot 0": e.SlotResult(0, 1, bytes(32)).encode(),
    "a RESULT without operations": e.SlotResult(1, 0, bytes(32)).encode(),
    "a RESULT cut off": e.SlotResult(1, 1, bytes(32)).encode()[:-1],
    "nothing": b"",
    "kind 0": bytes(9),
    "kind 8": b"\x08" + bytes(48),
    "a proposal without a batch": e.PrePrepare(0, 1, make_batch(0, (), ())).encode()[:17],
}


@pytest.mark.parametrize("name", REFUSED)
def test_entries_that_no_correct_replica_writes(name: str):
    with pytest.raises(LayoutError):
        decode_entry(REFUSED[name], G, CLUSTER_ID)


@pytest.mark.parametrize(("first", "acknowledged"), [(0, 0), (3, 4), (U64_MAX, 0), (U64_MAX - 1, 0)])
def test_request_numbers_that_cannot_be(first: int, acknowledged: int):
    content = Operations(SessionId(1, 0), first, acknowledged, (b"x", b"y"))
    with pytest.raises(LayoutError, match="request numbers"):
        again_envelope(encode_operations(CLUSTER_ID, v.CLIENT, content) + v.SIGNATURE)


def test_envelopes_of_another_cluster_version_or_kind_say_so():
    raw = v.OPEN
    for changed, words in (
        (b"trustlog/requesT" + raw[16:], "version"),
        (raw[:16] + b"\2" + raw[17:], "version"),
        (raw[:17] + b"\4" + raw[18:], "unknown kind"),
        (raw[:18] + bytes(32) + raw[50:], "for cluster 0000000000000000"),
        (bytes(LIMITS.envelope_bytes_max + 1), "the limit is"),
    ):
        with pytest.raises(LayoutError, match=words):
            decode_envelope(changed, CLUSTER_ID, LIMITS)


def test_limits_hold_at_their_edge():
    def envelope_of(*listed: bytes) -> bytes:
        content = Operations(SessionId(1, 0), 1, 1, listed)
        return encode_operations(CLUSTER_ID, v.CLIENT, content) + v.SIGNATURE

    good = [
        envelope_of(bytes(LIMITS.operation_bytes_max)),
        envelope_of(*[b""] * LIMITS.envelope_operations_max),
    ]
    assert [again_envelope(raw) for raw in good] == good
    for bad in (
        envelope_of(bytes(LIMITS.operation_bytes_max + 1)),
        envelope_of(*[b""] * (LIMITS.envelope_operations_max + 1)),
        envelope_of(),
    ):
        with pytest.raises(LayoutError):
            again_envelope(bad)
    assert again_batch(encode_batch(0, (), [v.OPEN] * LIMITS.batch_envelopes_max))
    with pytest.raises(LayoutError):
        again_batch(encode_batch(0, (), [v.OPEN] * (LIMITS.batch_envelopes_max + 1)))
    with pytest.raises(LayoutError):
        again_batch(encode_batch(0, range(CUT_POSITIONS_MAX + 1), []))
    head = v.STATEMENT + v.SIGNATURE
    most = (bytes(LIMITS.group_bytes_max // LIMITS.group_entries_max),) * LIMITS.group_entries_max
    assert again_group(head + encode_payloads(most))
    for payloads in ((), (b"",) * (LIMITS.group_entries_max + 1), (bytes(2 * LIMITS.group_bytes_max),)):
        with pytest.raises(LayoutError):
            again_group(head + encode_payloads(payloads))


HUGE: dict[str, tuple[Callable[[bytes], object], bytes]] = {
    "a batch of 65,535 positions": (again_batch, bytes(8) + b"\xff\xff"),
    "a batch of 65,535 envelopes": (again_batch, bytes(10) + b"\xff\xff"),
    "an envelope of 4 GiB": (again_batch, bytes(10) + b"\0\1" + b"\xff" * 4),
    "a batch of 16 MiB": (again_batch, bytes(16 << 20)),
    "an envelope of 16 MiB": (again_envelope, v.OPEN + bytes(16 << 20)),
    "65,535 operations": (again_envelope, v.OPERATIONS[:143] + b"\xff\xff" + v.OPERATIONS[145:]),
    "an operation of 4 GiB": (again_envelope, v.OPERATIONS[:145] + b"\xff" * 4 + v.OPERATIONS[149:]),
    "a group of 65,535 entries": (again_group, v.STATEMENT + v.SIGNATURE + b"\xff\xff" + bytes(100)),
    "payloads of 4 GiB": (again_group, v.STATEMENT + v.SIGNATURE + b"\0\2" + b"\xff" * 8),
    "a group of 16 MiB": (again_group, v.STATEMENT + v.SIGNATURE + b"\0\1" + bytes(16 << 20)),
    "65,535 results": (again_reply, b"\1" + bytes(20) + b"\xff\xff"),
    "a result of 4 GiB": (again_reply, b"\1" + bytes(20) + b"\0\1" + bytes(9) + b"\xff" * 4),
    "65,535 references": (again_entry, e.NewView(1, ()).encode()[:-2] + b"\xff\xff" + bytes(30)),
}


@pytest.mark.parametrize("name", HUGE)
def test_huge_counts_and_lengths_are_refused_without_allocating(name: str):
    decode, raw = HUGE[name]
    with pytest.raises(LayoutError):  # warm: caches and the exception's own machinery are not what is measured
        decode(raw)
    tracemalloc.start()
    try:
        with pytest.raises(LayoutError):
            decode(raw)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 * 1024


def test_the_offsets_in_the_huge_cases_are_the_fields_they_mean():
    assert struct.unpack_from(">H", v.OPERATIONS, 143) == (3,)
    assert struct.unpack_from(">I", v.OPERATIONS, 149) == (5,)


def test_the_reader_counts_what_is_left():
    reader = Reader(b"abcdef", 1, 5)
    assert (reader.left(), reader.u8(), reader.left()) == (4, ord("b"), 3)
    with pytest.raises(LayoutError, match="1 bytes too many"):
        Reader(b"a").finish()
    with pytest.raises(LayoutError, match="4 bytes wanted at offset 2, 3 left"):
        reader.take(4)
    assert reader.take(3) == b"cde"
    reader.finish()
    with pytest.raises(LayoutError, match="the limit is 3"):
        Reader(b"\0\0\0\4abcd").block(3)


def test_other_limits_make_other_judgements_only_through_the_limits():
    wider = replace(Limits(), operation_bytes_max=2000)
    content = Operations(SessionId(1, 0), 1, 1, (bytes(1001),))
    raw = encode_operations(CLUSTER_ID, v.CLIENT, content) + v.SIGNATURE
    assert decode_envelope(raw, CLUSTER_ID, wider).content == content
    with pytest.raises(LayoutError):
        decode_envelope(raw, CLUSTER_ID, LIMITS)
