"""What a node takes from the network as a group: a forged, altered, foreign or old one changes nothing, and is counted."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from replica.cluster.keys import ClientKey
from replica.core.entries import Prepare
from replica.core.group import encode_group, encode_payloads
from replica.wire.messages import GroupMessage
from tests.support.nodes import Nodes
from tests.support.waiting import on_loop
from trustlog import APPEND_SIZE, AttestedLog, BackendKind, LogState, entry_digest, open_log

ATTESTATION = APPEND_SIZE + 64


class Target:
    """Node 1 of a cluster, not started, and the real logs of the other replicas."""

    def __init__(self, folder) -> None:
        self.cluster = Nodes(folder / "c")
        self.node = self.cluster.make(1)
        self.logs = {number: open_log(self.cluster.folder(number) / "log") for number in (0, 2)}
        self.context = self.cluster.cluster.genesis.context()

    def say(self, number, *payloads, context=None, log=None) -> bytes:
        log = log or self.logs[number]
        attestation = log.append([entry_digest(p) for p in payloads], context=context or self.context)
        return encode_group(attestation, encode_payloads(payloads))

    def deliver(self, raw: bytes, log: int = 0, sender: int | None = None) -> None:
        """Hand it in as a link does, and have the core take what comes of it."""
        self.node.on_group(GroupMessage(log, raw), log if sender is None else sender)
        self.node._drain()

    def snapshot(self):
        """Everything that a group could change."""
        core = self.node.core
        inboxes = [
            (i.received, i.head, i.wanting, list(i.unread), dict(i._early), i.unread_bytes, i._early_bytes)
            for i in core._inboxes
        ]
        return (
            inboxes,
            [state.copy() for state in core._known.states],
            (core.executed, core.executor.digest(), core.stable, core.halted, dict(core.exposed)),
            dict(core._catch_up.fetcher.waits),
            (dict(self.node.outbox._received), self.node.outbox._to_say, self.node.trusted_log.last),
            [list(recent._groups) for recent in self.node.streams._recent],
        )

    def refused(self) -> Counter:
        return self.node.refusals + self.node.core.refusals

    def assert_refused(self, raw: bytes, log: int = 0, reason: str | None = None) -> str:
        before, counted = self.snapshot(), self.refused()
        self.deliver(raw, log)
        assert self.snapshot() == before
        (found,) = (self.refused() - counted).elements()
        assert reason in {None, found}
        return found

    async def __aenter__(self):
        return self

    async def __aexit__(self, *exception):
        for log in self.logs.values():
            log.close()
        await self.cluster.__aexit__(*exception)


@on_loop
async def test_every_altered_byte_and_bit_of_a_real_group(tmp_path):
    async with Target(tmp_path) as target:
        raw = target.say(0, b"first", b"second payload")
        reasons = Counter()
        for place in range(len(raw)):
            # Every bit of what is signed and of the signature; elsewhere a few.
            masks = [1 << bit for bit in range(8)] if place < ATTESTATION else [0x01, 0x80, 0xFF]
            for mask in masks:
                altered = raw[:place] + bytes([raw[place] ^ mask]) + raw[place + 1 :]
                reasons[target.assert_refused(altered)] += 1
        assert sum(reasons.values()) == 8 * ATTESTATION + 3 * (len(raw) - ATTESTATION)
        assert {"group-malformed", "group-wrong-log", "group-wrong-context", "group-bad-signature"} <= set(reasons)
        assert reasons["group-wrong-head"] > 0
        # The group itself is good, so each of these was refused for its alteration.
        target.deliver(raw)
        assert target.node.core.received(0) == 2


@on_loop
async def test_cut_stretched_and_spliced_groups(tmp_path):
    async with Target(tmp_path) as target:
        first, second = target.say(0, b"one", b"two"), target.say(0, b"three")

        @settings(max_examples=200, deadline=None)
        @given(cut=st.integers(0, len(first) - 1), more=st.binary(min_size=1, max_size=8), junk=st.binary(max_size=600))
        def check(cut, more, junk):
            target.assert_refused(first[:cut])
            target.assert_refused(first + more)
            target.assert_refused(junk)

        check()
        spliced = first[:ATTESTATION] + second[ATTESTATION:]
        assert target.assert_refused(spliced) == "group-wrong-count"
        signed_elsewhere = first[:APPEND_SIZE] + second[APPEND_SIZE:ATTESTATION] + first[ATTESTATION:]
        assert target.assert_refused(signed_elsewhere) == "group-bad-signature"
        swapped = first[:ATTESTATION] + encode_payloads((b"two", b"one"))
        assert target.assert_refused(swapped) == "group-wrong-head"
        target.deliver(first)
        assert target.node.core.received(0) == 2


class ForgetfulStore:
    def save(self, state):
        """Keep nothing."""


@on_loop
async def test_groups_of_elsewhere(tmp_path):
    async with Target(tmp_path) as target:
        theirs = target.say(2, b"x")
        assert target.assert_refused(theirs, log=0) == "group-wrong-log"
        assert target.assert_refused(theirs, log=9) == "group-wrong-log"
        other_context = target.say(0, b"x", context=bytes(32))
        assert target.assert_refused(other_context) == "group-wrong-context"
        log = target.logs[0]
        later = AttestedLog(log._private_key, log.kind, LogState.empty(log.log_id, epoch=1), ForgetfulStore())
        assert target.assert_refused(target.say(0, b"x", log=later)) == "group-wrong-epoch"
        for kind, reason in ((BackendKind.PROCESS, "wrong-kind"), (BackendKind.TPM, "malformed")):
            stronger = AttestedLog(log._private_key, kind, LogState.empty(log.log_id), ForgetfulStore())
            assert target.assert_refused(target.say(0, b"x", log=stronger)) == f"group-{reason}"
        good = target.say(0, b"x")
        forged = good[:APPEND_SIZE] + ClientKey.generate().sign(good[:APPEND_SIZE]) + good[ATTESTATION:]
        assert target.assert_refused(forged) == "group-bad-signature"


@on_loop
async def test_replayed_groups_change_nothing_and_are_counted(tmp_path):
    async with Target(tmp_path) as target:
        raws = [target.say(2, Prepare(0, slot, bytes([slot]) * 32).encode()) for slot in range(1, 6)]
        for raw in raws:
            target.deliver(raw, log=2)
        assert target.node.core.received(2) == 5
        for raw in (*raws, raws[0], raws[0]):
            assert target.assert_refused(raw, log=2) == "group-known"


@on_loop
async def test_a_group_that_is_held_already_is_not_held_twice(tmp_path):
    async with Target(tmp_path) as target:
        first, second = (target.say(2, Prepare(0, slot, bytes(32)).encode()) for slot in (1, 2))
        target.deliver(second, log=2)
        before = target.snapshot()[0]
        for _ in range(3):
            target.deliver(second, log=2)
        assert target.snapshot()[0] == before
        # Beyond a gap, it is nothing that anything could depend on: it is stored when the gap is closed.
        assert not target.node.outbox._received
        target.deliver(first, log=2)
        assert target.node.core.received(2) == 2
        assert set(target.node.outbox._received) == {(2, 1), (2, 2)}


@on_loop
async def test_a_peer_cannot_speak_for_the_own_log(tmp_path):
    async with Target(tmp_path) as target:
        assert target.assert_refused(target.say(0, b"x"), log=1) == "group-wrong-log"


@on_loop
async def test_own_groups_are_taken_back_before_the_first_word_and_not_later(tmp_path):
    """While it may not speak, a replica takes its own log from peers; afterwards only what it never said is news."""
    async with Target(tmp_path) as target:
        own = target.say(1, Prepare(0, 1, bytes(32)).encode(), log=target.node.trusted_log)
        target.deliver(own, log=1, sender=0)
        assert target.node.core.received(1) == 1
        target.node.core._live = True
        assert target.assert_refused(own, log=1) == "group-own-log"


@on_loop
async def test_a_forked_log_is_shown_and_read_no_further(tmp_path):
    """Two trusted parts with one key: the assumption is broken, and what must happen is that it is shown."""
    async with Target(tmp_path) as target:
        log = target.logs[2]
        clone = AttestedLog(log._private_key, log.kind, LogState.empty(log.log_id), ForgetfulStore())
        target.deliver(target.say(2, Prepare(0, 1, bytes(32)).encode()), log=2)
        target.say(2, b"unused", log=clone)
        fork = target.say(2, Prepare(0, 2, bytes(32)).encode(), log=clone)
        target.deliver(fork, log=2)
        assert target.node.core.exposed[2].rule == "forked"
        assert any("trusted log broken" in text for text in target.cluster.logged.texts())
        before = target.snapshot()
        target.deliver(target.say(2, Prepare(0, 2, bytes(32)).encode()), log=2)
        assert target.snapshot() == before
