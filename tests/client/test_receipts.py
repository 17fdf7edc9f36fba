"""Collecting a receipt: replicas that lie, hesitate, or have nothing; only what verifies here counts."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from client import receipts
from client.core import ClientCore
from client.events import Complete, Settings
from client.receipts import ANSWER_S, PAUSE_S, PAUSE_S_MAX, ReceiptRound
from replica.core.envelope import Result, SessionId, Status, encode_operations_reply
from replica.core.genesis import Genesis, Member
from replica.core.proof import EntryProof
from replica.wire.messages import ReceiptShown, decode_message, encode_frame
from tests.replica.core.evidence_world import KeyedLog
from tests.replica.core.harness import make_genesis
from tests.trustlog.support import CONTEXT
from tests.trustlog.test_receipts import World
from trustlog import Attestation, VerificationError, entry_digest
from trustlog.merkle import MerkleTree
from trustlog.receipts import Entry, Outcome, Receipt, result_payload, verify_receipt


class Collecting:
    """A round about one operation, and what each of three replicas would show."""

    def __init__(self, place: int = 2) -> None:
        self.world = World()
        self.place = place
        self.said = self.world.outcomes[place]
        self.round = ReceiptRound(self.world.members, self.said)
        self.now = 0.0

    def answer(self, member: int, **other: object) -> ReceiptShown:
        payload = self.world.result()
        entry = self.world.say(member, payload)
        proof = EntryProof(entry.attestation, entry.digests, entry.place, payload)
        path = b"".join(self.world.tree.path(self.place))
        shown = ReceiptShown(1, 7, "", proof.encode(), self.place, self.world.tree.size, path)
        return shown._replace(**other)

    def hear(self, replica: int, message: ReceiptShown) -> None:
        self.round.on_shown(replica, message, self.now)


def refusal(code: str, version: int = 1) -> ReceiptShown:
    return ReceiptShown(version, 7, code, b"", 0, 0, b"")


def test_f_plus_1_replicas_make_a_receipt():
    c = Collecting()
    assert c.round.to_ask(0.0, {2, 0, 1}) == [0, 1, 2]
    c.hear(2, c.answer(2))
    assert c.round.receipt is None
    c.hear(2, c.answer(2))
    assert c.round.receipt is None, "one replica twice is one"
    c.hear(0, c.answer(0))
    assert c.round.receipt is not None
    verify_receipt(c.round.receipt, c.world.members)
    made = c.round.receipt
    assert [entry.member for entry in made.entries] == [0, 2]
    c.hear(1, c.answer(1))
    assert c.round.receipt is made, "what comes late makes it no longer"


@pytest.mark.parametrize(
    "lie",
    [
        {"proof": b""},
        {"proof": b"\0" * 500},
        {"path": b"x"},
        {"path": bytes(32)},
        {"path": bytes(32 * 40)},
        {"place": 1},
        {"size": 4},
        {"size": 0},
    ],
)
def test_a_lie_is_not_counted_and_its_author_asked_no_more(lie):
    c = Collecting()
    c.hear(0, c.answer(0, **lie))
    assert c.round.to_ask(10.0, {0, 1}) == [1]
    assert "replica 0: what it shows does not verify" in c.round.reasons()
    c.hear(1, c.answer(1))
    assert c.round.receipt is None
    c.hear(2, c.answer(2))
    assert [entry.member for entry in c.round.receipt.entries] == [1, 2]


def test_another_replicas_entry_or_another_root_is_a_lie():
    c = Collecting()
    c.hear(0, c.answer(1))  # replica 1's entry over replica 0's connection
    assert not c.round.is_hopeless
    payload = result_payload(c.said.slot, 1, c.said.leaf)
    entry = c.world.say(1, payload)
    proof = EntryProof(entry.attestation, entry.digests, entry.place, payload)
    # It verifies: replica 1 attests a slot of this operation only. But no other does.
    c.hear(1, ReceiptShown(1, 7, "", proof.encode(), 0, 1, b""))
    c.hear(2, c.answer(2))
    assert c.round.receipt is None
    assert c.round.to_ask(100.0, {0, 1, 2}) == []


def test_an_entry_of_another_context_is_a_lie():
    c = Collecting()
    c.world.members = replace(c.world.members, contexts=(bytes(32),) * len(c.world.members.identities))
    c.round = ReceiptRound(c.world.members, c.said)
    assert bytes(32) != CONTEXT
    c.hear(0, c.answer(0))
    c.hear(1, c.answer(1))
    assert c.round.receipt is None
    assert c.round.is_hopeless


def test_who_may_have_it_soon_is_asked_again_with_growing_pauses():
    c = Collecting()
    assert c.round.to_ask(0.0, {0}) == [0]
    pause = PAUSE_S
    for _ in range(10):
        c.hear(0, refusal("later"))
        assert c.round.to_ask(c.now + pause / 2, {0}) == []
        c.now += pause
        assert c.round.to_ask(c.now, {0}) == [0]
        pause = min(2 * pause, PAUSE_S_MAX)
    # One that says nothing is asked again as well, after a while.
    assert c.round.to_ask(c.now + ANSWER_S / 2, {0}) == []
    assert c.round.to_ask(c.now + ANSWER_S, {0}) == [0]
    c.hear(0, refusal("busy"))
    assert "before its next checkpoint" in c.round.reasons()
    assert not c.round.is_hopeless
    c.hear(0, c.answer(0))
    assert c.round.reasons() == "replica 0: shown"


@pytest.mark.parametrize("code", ["gone", "absent", "version", "\x1b[2J" * 100])
def test_it_is_given_up_when_too_many_can_never_show_it(code):
    c = Collecting()
    c.hear(0, refusal(code))
    assert not c.round.is_hopeless
    c.hear(1, refusal(code))
    assert c.round.is_hopeless
    assert "\x1b" not in c.round.reasons()
    assert len(c.round.reasons()) < 400
    assert ReceiptRound(c.world.members, c.said).reasons() == "nobody answered"


def test_another_version_is_never_read():
    c = Collecting()
    c.hear(0, c.answer(0, version=2))
    assert "speaks another version" in c.round.reasons()


def receipt_of(slot: int, genesis: Genesis, *signers: KeyedLog) -> bytes:
    """A receipt for an operation of this slot, attested by these logs."""
    said = Outcome(b"\x04" + b"\1" * 64, (3, 0), 1, b"pay", slot, 0, b"done")
    payload = result_payload(slot, 1, MerkleTree([said.leaf]).root)
    entries = []
    for log in signers:
        log.context = genesis.contexts()[log.author]
        group = log.append((payload,))
        entries.append(Entry(log.author, Attestation.of_group(group.raw), (entry_digest(payload),), 0))
    return Receipt(genesis.cluster_id(), said, 0, 1, (), tuple(entries)).encode()


def test_every_slot_is_proven_by_the_logs_of_its_own_list(monkeypatch):
    """Log 2 was replaced after slot 12. What it says of slots above, with another faulty one, proves nothing."""
    logs = [KeyedLog(log) for log in range(3)]
    new = KeyedLog(2, 7777)
    first = replace(make_genesis(), members=tuple(Member(log.author, 1, log.public_key) for log in logs))
    second = first.successor(1, 12, (*first.members[:2], Member(2, 1, new.public_key, b"", 1)))
    third = second.successor(2, 20, second.members)
    monkeypatch.setattr(receipts, "load_present_cluster", lambda _: SimpleNamespace(lists=(first, second, third)))
    for slot in (1, 12):
        receipts.verify(receipt_of(slot, first, logs[1], logs[2]), "any")
        with pytest.raises(VerificationError):
            receipts.verify(receipt_of(slot, second, logs[1], new), "any")
    for slot in (13, 20, 21, 5000):
        receipts.verify(receipt_of(slot, second, logs[1], new), "any")
        with pytest.raises(VerificationError):
            receipts.verify(receipt_of(slot, first, logs[1], logs[2]), "any")


def test_the_messages_travel():
    shown = Collecting().answer(0)
    assert decode_message(encode_frame(shown)[4:]) == shown


# Where an operation's address comes from


def test_results_come_with_the_numbers_of_their_operations():
    genesis = make_genesis()
    core = ClientCore(
        genesis,
        genesis.cluster_id(),
        b"\x04" + bytes(64),
        sign=lambda _: bytes(64),
        nonce=lambda: bytes(16),
        settings=Settings(),
    )
    core._session, core._next = SessionId(3, 1), 5
    for replica in range(2):
        core.on_connected(replica, 3, 0)
    for ticket, deadline in (("a", 900), ("b", 100), ("c", 900)):
        core.submit(ticket, b"op", deadline)
    core.flush(0)
    core.tick(100)  # b is given up
    raw = encode_operations_reply(SessionId(3, 1), 5, [Result(Status.OK, 7, b"%d" % at) for at in range(3)])
    effects = core.on_reply(0, raw) + core.on_reply(1, raw)
    (done,) = [effect for effect in effects if isinstance(effect, Complete)]
    assert (list(done.tickets), done.session, list(done.numbers)) == (["a", "c"], SessionId(3, 1), [5, 7])
