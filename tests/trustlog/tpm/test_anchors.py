"""Anchors in an NV index: they survive power cuts, and nobody replaces them without the verifier."""

from __future__ import annotations

import json
import struct
from itertools import pairwise

import pytest

from replica.shell.trustedlog import details
from tests.trustlog.support import NONCE, OTHER_NONCE, fixed_key, flip
from tests.trustlog.tpm.support import add, public_of, sign
from trustlog import MisuseError, SealedStateError, VerificationError, VerifyingKey
from trustlog.appraisal import make_evidence
from trustlog.appraisal.evidence import ANCHOR_SIZE, ANCHORS_BYTES_MAX
from trustlog.tpm.anchors import (
    ANCHORS_FILE,
    INDEX_DEFAULT,
    PLACE_FILE,
    Anchor,
    Anchorage,
    AnchorIndex,
    AutomaticAnchors,
    anchor_digest,
    read_anchors,
    value_of,
    verifier_public,
    verify_anchors,
)
from trustlog.tpm.chain import initial_head
from trustlog.tpm.client import Signed
from trustlog.tpm.enrol import create
from trustlog.tpm.exchange import no_password, session_auth
from trustlog.tpm.opening import open_log
from trustlog.tpm.structures import sized
from trustlog.tpm.wire import TpmError

VERIFIER = fixed_key(7)
NOBODY = fixed_key(8)


def by(key):
    return lambda message: sign(key, message)


class Anchored:
    """A log in a software TPM, with its anchorage."""

    def __init__(self, machine, folder):
        self.machine = machine
        self.folder = folder
        self.log = open_log(folder)
        self.key = self.log.identity.key
        self.first_head = initial_head(self.log.config.pins)
        verifier = VerifyingKey.from_bytes(public_of(VERIFIER))
        self.place = AnchorIndex(INDEX_DEFAULT, self.log.log_id, verifier)
        self.tpm = self.log._tpm
        self.anchorage = Anchorage(self.tpm, self.place, folder)

    def reopen(self):
        """After a reboot: the log has ended, the anchors have not."""
        self.log.close()
        self.tpm = self.machine.connect()
        self.anchorage = Anchorage(self.tpm, self.place, self.folder)

    def verified(self, anchors=None, nonce=NONCE, certified=None):
        proof = certified or self.anchorage.certify(self.log.config.handle, NONCE)
        return verify_anchors(self.place, self.key, self.first_head, anchors or self.anchorage.anchors, proof, nonce)


@pytest.fixture
def anchored(machine, tmp_path):
    create(tmp_path / "log", address=machine.address).close()
    made = Anchored(machine, tmp_path / "log")
    made.anchorage.begin(made.first_head, by(VERIFIER))
    yield made
    made.log.close()


def test_heads_are_anchored_and_survive_a_power_cut(anchored):
    for count in range(1, 4):
        add(anchored.log, str(count))
        anchored.anchorage.anchor(anchored.log.last, anchored.log.head)
    anchored.anchorage.anchor(anchored.log.last, anchored.log.head)  # once is enough
    assert [anchor.last for anchor in anchored.anchorage.anchors] == [0, 1, 2, 3]
    before = anchored.verified()
    anchored.log.close()
    anchored.machine.cut_power()
    anchored.machine.start()
    anchored.reopen()
    after = anchored.verified()
    assert after.content == before.content
    assert (before.clock.reset_count, after.clock.reset_count) == (1, 2)
    anchored.anchorage.anchor(9, bytes(32))


def test_no_anchor_is_left_out_added_or_replaced(anchored):
    add(anchored.log, "one")
    anchored.anchorage.anchor(1, anchored.log.head)
    anchored.anchorage.anchor(5, bytes(32))
    whole = anchored.anchorage.anchors
    anchored.verified()
    for wrong in (
        whole[:-1],
        whole[1:],
        [whole[0], whole[2]],
        [*whole, Anchor(7, bytes(32))],
        [whole[0], Anchor(1, bytes(32)), whole[2]],
        [whole[0], Anchor(2, whole[1].head), whole[2]],
        [whole[0], whole[2], whole[1]],
        [Anchor(0, bytes(32)), *whole[1:]],
    ):
        with pytest.raises(VerificationError) as caught:
            anchored.verified(wrong)
        assert caught.value.reason == "wrong-anchors"
    with pytest.raises(VerificationError, match="another question"):
        anchored.verified(nonce=OTHER_NONCE)
    proof = anchored.anchorage.certify(anchored.log.config.handle, NONCE)
    for bit in range(8 * len(proof.attest)):
        with pytest.raises(VerificationError):
            anchored.verified(certified=Signed(flip(proof.attest, bit), proof.signature))
    with pytest.raises(MisuseError, match="5 is anchored; 4 is not after it"):
        anchored.anchorage.anchor(4, bytes(32))


def test_the_first_write_needs_the_verifier(machine, tmp_path):
    create(tmp_path / "log", address=machine.address).close()
    made = Anchored(machine, tmp_path / "log")
    with made.log, pytest.raises(TpmError, match=r"PolicySigned was refused with .*: wrong signature"):
        made.anchorage.begin(made.first_head, by(NOBODY))


def test_an_undefined_and_redefined_index_holds_nothing_without_the_verifier(anchored):
    """The owner may remove the index; what comes after is empty, unreadable, and not to be written."""
    add(anchored.log, "one")
    anchored.anchorage.anchor(1, anchored.log.head)
    old = []

    def overheard(message):
        old.append((message, sign(VERIFIER, message)))
        return old[-1][1]

    tpm, place = anchored.tpm, anchored.place
    tpm.nv_undefine(place.index)
    with pytest.raises(MisuseError, match="it was removed, or never written"):
        anchored.anchorage.anchor(2, bytes(32))
    tpm.nv_define(place.public)
    with pytest.raises(MisuseError, match="it was removed, or never written"):
        anchored.anchorage.anchor(2, bytes(32))
    with pytest.raises(TpmError, match="NV_Certify"):
        anchored.anchorage.certify(anchored.log.config.handle, NONCE)
    digest = anchor_digest(place.log_id, Anchor(0, anchored.first_head))
    # As if it were written; by password; with the verifier's signature of another session.
    with pytest.raises(TpmError, match="policy"), anchored.anchorage._authorized(None) as auth:
        tpm.nv_extend(place.index, digest, auth)
    with pytest.raises(TpmError):
        tpm.nv_extend(place.index, digest, no_password())
    with anchored.anchorage._authorized(overheard):
        pass  # the verifier signed once for this session, and that session is gone
    (_, signature), *_ = old
    with pytest.raises(TpmError, match="PolicySigned"), anchored.anchorage._authorized(lambda _: signature) as auth:
        tpm.nv_extend(place.index, digest, auth)
    # Without a nonce a signature would count for ever; the verifier signs none such.
    with tpm.fresh_session() as (session, _):
        tpm.policy_nv_written(session, written=False)
        key = tpm.load_external(verifier_public(place.verifier))
        with tpm.loaded(key), pytest.raises(TpmError, match="PolicySigned"):
            tpm.policy_signed(session, key, b"", place.log_id, signature)
        tpm.policy_nv_written(session, written=False)
        assert session_auth(session)


def test_an_index_with_another_policy_type_or_place_does_not_pass(anchored):
    tpm, place = anchored.tpm, anchored.place
    handle = anchored.log.config.handle
    attributes = 2 << 1 | 1 << 2 | 4 << 4 | 1 << 18 | 1 << 25  # EXTEND, written by password
    fake = struct.pack(">IHI", INDEX_DEFAULT + 1, 11, attributes) + sized(b"") + struct.pack(">H", 32)
    tpm.nv_define(fake)
    tpm.nv_extend(INDEX_DEFAULT + 1, anchor_digest(place.log_id, Anchor(0, anchored.first_head)), no_password())
    proof = tpm.nv_certify(handle, INDEX_DEFAULT + 1, 32, NONCE, no_password())
    with pytest.raises(VerificationError) as caught:
        anchored.verified(certified=proof)
    assert caught.value.reason == "wrong-index"
    tpm.nv_undefine(INDEX_DEFAULT + 1)


def test_a_crash_between_the_list_and_the_index_is_repaired(anchored, monkeypatch):
    class CrashError(Exception):
        pass

    def crash(*_):
        raise CrashError

    monkeypatch.setattr(anchored.tpm, "nv_extend", crash)
    with pytest.raises(CrashError):
        anchored.anchorage.anchor(3, bytes(32))
    monkeypatch.undo()
    path = anchored.folder / ANCHORS_FILE
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"last": 4, "he')
    anchored.anchorage = Anchorage(anchored.tpm, anchored.place, anchored.folder)
    anchored.anchorage.anchor(5, bytes(32))
    assert [anchor.last for anchor in anchored.anchorage.anchors] == [0, 3, 5]
    anchored.verified()
    assert Anchorage(anchored.tpm, anchored.place, anchored.folder).anchors == anchored.anchorage.anchors


def test_an_older_list_is_refused_and_a_damaged_one_named(anchored):
    path = anchored.folder / ANCHORS_FILE
    old = path.read_bytes()
    for last in (1, 2):
        anchored.anchorage.anchor(last, bytes(32))
    path.write_bytes(old)
    with pytest.raises(MisuseError, match="the file is an older copy"):
        Anchorage(anchored.tpm, anchored.place, anchored.folder).anchor(3, bytes(32))
    path.write_bytes(b"{}\n" + old)
    with pytest.raises(SealedStateError, match="line 1 is damaged"):
        Anchorage(anchored.tpm, anchored.place, anchored.folder)


def test_a_log_is_anchored_in_one_place_from_its_beginning(anchored, tmp_path):
    with pytest.raises(MisuseError, match="anchored already"):
        anchored.anchorage.begin(anchored.first_head, by(VERIFIER))
    elsewhere = Anchorage(anchored.tpm, anchored.place, tmp_path)
    with pytest.raises(MisuseError, match="not anchored yet"):
        elsewhere.anchor(1, bytes(32))
    with pytest.raises(MisuseError, match="is taken"):
        elsewhere.begin(anchored.first_head, by(VERIFIER))


def test_layouts_and_policies_are_the_documented_ones(anchored):
    """The TPM itself computes the same policy and name."""
    place, tpm = anchored.place, anchored.tpm
    assert tpm.nv_read_public(place.index).name == place.name
    assert value_of(place.log_id, []) == bytes(32)
    assert verifier_public(place.verifier)[:4] == bytes.fromhex("0023000b")


def test_what_the_tpm_refuses_and_the_limit_are_said(anchored, tmp_path, monkeypatch):
    elsewhere = Anchorage(anchored.tpm, AnchorIndex(0x017FFFFF, anchored.log.log_id, anchored.place.verifier), tmp_path)
    monkeypatch.setattr(anchored.tpm, "nv_define", lambda _: (_ for _ in ()).throw(TpmError("no space", 0x14B)))
    with pytest.raises(TpmError, match="no space"):
        elsewhere.begin(anchored.first_head, by(VERIFIER))
    monkeypatch.setattr("trustlog.tpm.anchors.ANCHORS_MAX", 1)
    with pytest.raises(MisuseError, match="1 anchors are the most"):
        anchored.anchorage.anchor(1, bytes(32))
    assert read_anchors(anchored.folder / ANCHORS_FILE) == anchored.anchorage.anchors


def test_a_log_anchors_itself_with_an_append_now_and_then_and_when_it_is_closed(anchored, monkeypatch):
    anchored.log.close()
    with open_log(anchored.folder) as log:
        log.anchors._due = 0.0
        add(log, "one")
        add(log, "two")  # not due yet
        assert (log.anchors.anchored_to, log.anchors.trouble) == (1, None)
        assert details(log)["anchored_to"] == 1
        log.anchors._due = 0.0
        add(log, "three")
        log.close_epoch()
        anchored.anchorage = Anchorage(log.client, anchored.place, anchored.folder)
        assert [anchor.last for anchor in anchored.anchorage.anchors] == [0, 1, 3, 4]
        assert anchored.anchorage.anchors[-1].head == log.head
        anchored.verified()


def test_the_pauses_grow_so_that_all_anchors_can_be_shown(monkeypatch):
    """A log that is appended to all the time, for ten years of a clock of our own."""

    class Listed:
        def __init__(self) -> None:
            self.anchors = []

        def anchor(self, last, head) -> None:
            self.anchors.append(Anchor(last, head))

    now, times = 0.0, []
    monkeypatch.setattr("trustlog.tpm.anchors.time.monotonic", lambda: now)
    listed = Listed()
    automatic = AutomaticAnchors(listed)
    year = 365 * 86400.0
    while now < 10 * year and len(times) <= ANCHORS_BYTES_MAX // ANCHOR_SIZE:
        automatic.offer(len(times) + 1, bytes(32))
        times.append(now)
        assert len(listed.anchors) == len(times)  # it was due
        automatic.offer(len(times) + 1, bytes(32))
        assert len(listed.anchors) == len(times)  # and is not any more
        now = automatic._due
    assert len(times) < ANCHORS_BYTES_MAX // ANCHOR_SIZE
    assert times[1] - times[0] == 300.0
    assert max(after - before for before, after in pairwise(times) if after < year) < 2 * 86400


def test_anchoring_that_fails_is_shown_and_does_not_stop_the_log(anchored):
    anchored.log.close()
    with open_log(anchored.folder) as log:
        log.client.nv_undefine(anchored.place.index)
        add(log, "one")
        assert "it was removed, or never written" in log.anchors.trouble
        assert "it was removed" in details(log)["anchor_trouble"]
        add(log, "two")
        assert log.last == 2


def test_damage_of_the_anchors_files_is_said_and_never_stops_the_log(anchored):
    anchored.log.close()
    place, listed = anchored.folder / PLACE_FILE, anchored.folder / ANCHORS_FILE
    good = place.read_text()
    for path, wrong, named in (
        (place, "", "anchor.json is damaged"),
        (place, "{", "anchor.json is damaged"),
        (place, '{"index": "0x1", "verifier": "04"}', "anchor.json is damaged"),
        (place, '{"index": "0x1ffffffffff", "verifier": "04"}', "anchor.json is damaged"),
        (place, good.replace('"0x', '"0xfffffffff'), "anchor.json is damaged"),
        (place, good.replace('"0x', '"-0x'), "anchor.json is damaged"),
        (listed, "{}\n", "line 1 is damaged"),
        (listed, json.dumps({"last": -1, "head": "00" * 32}) + "\n", "line 1 is damaged"),
        (listed, json.dumps({"last": float("inf"), "head": "00" * 32}) + "\n", "line 1 is damaged"),
        (listed, json.dumps({"last": 2**64, "head": "00" * 32}) + "\n", "line 1 is damaged"),
        (listed, '{"last": 1, "head": "00"}\n', "line 1 is damaged"),
        (listed, "[" * 100_000 + "\n", "line 1 is damaged"),
    ):
        place.write_text(good)
        path.write_text(wrong)
        with open_log(anchored.folder) as log:
            add(log, "said")
            assert named in log.anchors.trouble
            assert named in details(log)["anchor_trouble"]
            assert details(log)["anchored_to"] is None
            make_evidence(log, nonce=bytes(32), context=bytes(32))


def test_a_beginning_that_a_crash_left_half_done_is_finished(machine, tmp_path, monkeypatch):
    class CrashError(Exception):
        pass

    def crash(*_):
        raise CrashError

    create(tmp_path / "log", address=machine.address).close()
    made = Anchored(machine, tmp_path / "log")
    for call in ("nv_define", "nv_extend"):  # before the index is there, and before it is written
        monkeypatch.setattr(made.tpm, call, crash)
        with pytest.raises(CrashError):
            made.anchorage.begin(made.first_head, by(VERIFIER))
        monkeypatch.undo()
        assert (made.folder / PLACE_FILE).exists()
        made.anchorage = Anchorage(made.tpm, made.place, made.folder)
    made.anchorage.begin(made.first_head, by(VERIFIER))
    made.verified()
    for remains in (None, ""):  # what an older version left: an index, and no durable name of it
        if remains is None:
            (made.folder / PLACE_FILE).unlink()
        else:
            (made.folder / PLACE_FILE).write_text(remains)
        Anchorage(made.tpm, made.place, made.folder).begin(made.first_head, by(NOBODY))
        made.log.close()
        made.tpm.close()  # a software TPM serves one connection
        with open_log(made.folder) as log:
            assert log.anchors.trouble is None
        made.reopen()
        made.verified()
        with pytest.raises(MisuseError, match="anchored already"):
            made.anchorage.begin(made.first_head, by(VERIFIER))
    made.tpm.close()


def test_a_beginning_that_the_tpm_refuses_leaves_nothing(anchored, tmp_path):
    elsewhere = Anchorage(anchored.tpm, anchored.place, tmp_path)
    with pytest.raises(MisuseError, match="is taken"):
        elsewhere.begin(anchored.first_head, by(VERIFIER))
    assert (elsewhere.anchors, [path.name for path in tmp_path.iterdir() if path.is_file()]) == ([], [])
