"""The kernel's IMA list, with templates ima, ima-ng and ima-sig; laid out by hand, replayed, and fuzzed."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.trustlog.appraisal.lists import Kernel, u32, usual_programs
from tests.trustlog.appraisal.support import refused
from trustlog import VerificationError
from trustlog.appraisal import ima
from trustlog.appraisal.ima import check_little_endian, parse_ima_list, proven_entries, proven_entries_sha1


@pytest.mark.parametrize("padded", [False, True])
def test_replaying_leads_to_what_the_kernel_extended(padded):
    kernel = usual_programs(padded=padded)
    entries = parse_ima_list(kernel.list)
    assert proven_entries(entries, kernel.sha256, padded=padded) == 5
    assert proven_entries_sha1(entries, kernel.sha1) == 5
    assert [entry.path for entry in entries][1:3] == ["/usr/lib/systemd/systemd", "/usr/bin/python3.11"]
    assert [entry.template for entry in entries] == ["ima-ng", "ima-ng", "ima-sig", "ima-ng", "ima-sig"]
    assert entries[2].digest == hashlib.sha256(b"python").digest()
    assert [entry.is_violation for entry in entries] == [False, False, False, True, False]


def test_the_old_template():
    kernel = Kernel(padded=True)
    kernel.old("/sbin/init", b"init")
    kernel.old("/" + "x" * 254, b"long")
    entries = parse_ima_list(kernel.list)
    assert proven_entries_sha1(entries, kernel.sha1) == 2
    assert proven_entries(entries, kernel.sha256, padded=True) == 2
    assert (entries[0].path, entries[0].algorithm, entries[0].digest) == (
        "/sbin/init",
        "sha1",
        hashlib.sha1(b"init").digest(),
    )


def test_a_changed_name_hides_nothing_of_276_bytes():
    """As long as an entry of template "ima", which has another layout: what its digest is taken over is the same."""
    ng = Kernel()
    ng.ng("/usr/bin/" + "e" * 218, b"evil")
    data = ng.list[-276:]
    assert len(ng.list) == 4 + 20 + 4 + 6 + 4 + 276
    as_old = ng.list[:24] + u32(3) + b"ima" + data[:20] + u32(255) + data[20:275]
    (entry,), (renamed,) = parse_ima_list(ng.list), parse_ima_list(as_old)
    assert renamed == replace(entry, template="ima")
    assert proven_entries([renamed], ng.sha256) == 1
    old = Kernel()
    old.old("/sbin/init", b"init")
    as_ng = old.list[:24] + u32(6) + b"ima-ng" + u32(276) + parse_ima_list(old.list)[0].hashed
    (entry,), (renamed,) = parse_ima_list(old.list), parse_ima_list(as_ng)
    assert renamed == replace(entry, template="ima-ng")


def test_unknown_templates_are_replayed_and_other_registers_are_not():
    kernel = usual_programs()
    kernel.other("ima-buf", b"whatever it holds")
    kernel.ng("/elsewhere", b"x", pcr=11)
    kernel.ng("/last", b"y")
    entries = parse_ima_list(kernel.list)
    assert proven_entries(entries, kernel.sha256) == proven_entries_sha1(entries, kernel.sha1) == 8
    assert (entries[5].path, entries[5].digest) == ("", b"")
    renamed = parse_ima_list(kernel.list.replace(b"ima-ng", b"ima-xx"))
    assert [entry.path for entry in renamed] == [entry.path for entry in entries]


def test_what_came_after_the_quote_is_cut_off():
    kernel = usual_programs()
    quoted, quoted_sha1 = kernel.sha256, kernel.sha1
    kernel.ng("/usr/bin/later", b"later")
    entries = parse_ima_list(kernel.list)
    assert proven_entries(entries, quoted) == proven_entries_sha1(entries, quoted_sha1) == 5
    assert proven_entries(entries, bytes(32)) == proven_entries_sha1(entries, bytes(20)) == 0
    assert proven_entries(entries, b"\1" * 32) is None
    assert proven_entries_sha1(entries, b"\1" * 20) is None


def test_nothing_may_be_left_out_exchanged_or_added():
    kernel = usual_programs()
    entries = parse_ima_list(kernel.list)
    for position in range(5):
        assert proven_entries(entries[:position] + entries[position + 1 :], kernel.sha256) is None
    assert proven_entries([entries[1], entries[0], *entries[2:]], kernel.sha256) is None
    assert proven_entries([entries[0], *entries], kernel.sha256) is None


def entry(data: bytes, name: bytes = b"ima-ng", pcr: int = 10) -> bytes:
    return u32(pcr) + hashlib.sha1(data).digest() + u32(len(name)) + name + u32(len(data)) + data


NG = u32(40) + b"sha256:\0" + bytes(32) + u32(2) + b"/\0"


@pytest.mark.parametrize(
    "data",
    [
        b"\0",
        entry(NG)[:-1],
        entry(NG, pcr=24),
        entry(NG, name=b"x" * 65),
        u32(10) + bytes(20) + u32(3) + b"ima" + bytes(20) + u32(256) + bytes(256),
        u32(10) + bytes(20) + u32(6) + b"ima-ng" + u32(0xFFFFFFFF),
        entry(NG[:-1]),
        entry(NG[:-1] + b"x"),  # a path without its end
        entry(u32(39) + b"sha256-\0" + bytes(31) + u32(2) + b"/\0"),  # a digest without its algorithm
        entry(NG + b"\0"),
        entry(NG + u32(1)),
        entry(u32(300) + bytes(300) + u32(2) + b"/\0"),
        entry(u32(40) + b"sha256:\0" + bytes(32) + u32(5000) + bytes(5000)),
        u32(10) + b"d" * 20 + entry(NG)[24:],  # another digest than the content's
    ],
)
def test_what_is_no_list_is_refused(data):
    assert refused(parse_ima_list, data) == "ima-list-malformed"


def test_a_big_endian_list_is_named():
    assert refused(check_little_endian, bytes([0, 0, 0, 10])) == "ima-list-malformed"
    check_little_endian(usual_programs().list)


def test_the_number_of_entries_is_bounded(monkeypatch):
    monkeypatch.setattr(ima, "ENTRIES_MAX", 4)
    assert refused(parse_ima_list, usual_programs().list) == "ima-list-malformed"


@given(st.binary(max_size=300), st.sampled_from([b"", usual_programs().list, u32(10) + bytes(20) + u32(6) + b"ima-ng"]))
def test_arbitrary_bytes_never_escape_as_another_error(data, before):
    try:
        entries = parse_ima_list(before + data)
    except VerificationError:
        return
    proven_entries(entries, bytes(32))


@pytest.mark.parametrize("flip", [0x01, 0x80])
def test_every_changed_byte_is_refused_or_harmless(flip):
    """Harmless: a template's name, and what is said of a file that changed while it was read: nothing is proven of it."""
    kernel = usual_programs()
    before = parse_ima_list(kernel.list)
    harmless = 0
    for position in range(len(kernel.list)):
        changed = bytearray(kernel.list)
        changed[position] ^= flip
        try:
            after = parse_ima_list(bytes(changed))
        except VerificationError:
            continue
        if proven_entries(after, kernel.sha256) is None:
            continue
        harmless += 1
        for old, new in zip(before, after, strict=True):
            assert (old.pcr, old.is_violation) == (new.pcr, new.is_violation)
            assert old.is_violation or old == replace(new, template=old.template)
    assert 0 < harmless < 100
