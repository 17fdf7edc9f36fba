"""A cluster with real keys in which replica 2 does what the test wants, and evidence against it."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from dataclasses import replace

from cryptography.hazmat.primitives.asymmetric import ec

from replica.apps import kv
from replica.core.batch import make_batch
from replica.core.entries import CHECKPOINT, Checkpoint, Commit, Prepare, PrePrepare, Suspect, ViewChange
from replica.core.envelope import Administer, Envelope, decode_envelope, encode_administer
from replica.core.events import Exposed, Lied, Persist
from replica.core.evidence import Basis, Claim, Evidence, Kind
from replica.core.genesis import Genesis, Member
from replica.core.group import VerifiedGroup, encode_group, encode_payloads
from replica.core.members import MemberList, Seat
from replica.core.places import Place
from replica.core.proving import MALFORMED, bare, collect_checkpoint, collect_replay, examine
from replica.shell.verify import GroupVerifier
from tests.replica.core.harness import BAD_SIGNATURE, GOOD_SIGNATURE, Cluster, FakeClient, FakeLog, make_genesis, opened
from tests.replica.core.traffic import EVERY_CHECKPOINT, one_by_one
from trustlog import AttestedLog, entry_digest, genesis_head, in_memory

ACCUSED = 2
NAMES = [
    "junk",
    "envelope",
    "wrong-view",
    "slot-skipped",
    "view-backwards",
    "not-primary",
    "checkpoint-misplaced",
    "commit-without-vote",
    "false-vote",
    "false-commit",
    "false-checkpoint",
]


def signed_envelope(envelope: Envelope) -> bool:
    return envelope.signature == GOOD_SIGNATURE


class KeyedLog(FakeLog):
    """A log with a real key."""

    def __init__(self, author: int, key: int | None = None) -> None:
        super().__init__(author)
        self._log: AttestedLog = in_memory(ec.derive_private_key(key or 2000 + author, ec.SECP256R1()))
        self.public_key = self._log.public_key
        self.head = genesis_head(self._log.log_id, 0)
        self.context = bytes(32)

    def append(self, payloads: tuple[bytes, ...]) -> VerifiedGroup:
        before, first = self.head, self.last + 1
        attestation = self._log.append([entry_digest(p) for p in payloads], context=self.context)
        self.last, self.head = self._log.last, self._log.head
        raw = encode_group(attestation, encode_payloads(payloads))
        group = VerifiedGroup(self.author, first, self.last, before, self.head, payloads, raw)
        self.groups.append(group)
        return group


class World:
    """Replicas 0 and 1, correct, and the log of replica 2, which was correct for the first `slots` slots."""

    def __init__(self, slots: int, nonce: int = 0, operators: tuple[bytes, ...] = ()) -> None:
        logs = [KeyedLog(author) for author in range(3)]
        usual = one_by_one(make_genesis(interval=2))
        members = tuple(Member(log.author, 1, log.public_key) for log in logs)
        self.genesis = replace(usual, members=members, nonce=bytes([nonce]) * 32, operators=operators)
        for log in logs:
            log.context = self.genesis.context()
        self.keys = GroupVerifier(self.genesis)
        self.cluster = Cluster(self.genesis, faulty=(), milestones=EVERY_CHECKPOINT)
        self.cluster.logs = list(logs)
        self.client = opened(self.cluster, FakeClient(self.genesis))
        for _ in range(slots - 1):
            self.order()
        self.core = self.cluster.cores.pop(ACCUSED)
        self.cluster.faulty = {ACCUSED}
        self.log = logs[ACCUSED]

    def order(self) -> None:
        self.cluster.request(self.client.operations(kv.incr(b"n")))
        self.cluster.settle(2)

    def change(self, *members: Member) -> Genesis:
        """Have an operator order that these are the members next; return what is agreed under that list.

        The accused does what the others do.
        """
        genesis, (operator, *_) = self.genesis, self.genesis.operators
        seats = tuple(Seat(one, Place(f"host-{one.number}", 1, b"%d" % one.number).encode()) for one in members)
        listed = MemberList(genesis.list_number + 1, 0, seats)
        raw = encode_administer(genesis.cluster_id(), operator, Administer(1000, listed.encode())) + GOOD_SIGNATURE
        self.cluster.request(decode_envelope(raw, genesis.cluster_id(), genesis.limits))
        self.cluster.settle(2)
        ends = self.cluster.cores[0].ends
        if ends is None:
            raise RuntimeError("the list was refused")
        self._follow(self.cluster.history(0)[-1][1])
        return replace(listed, after=ends).genesis(genesis)

    def follow(self, last: int) -> None:
        """Have the accused do what the others do, up to CHECKPOINT of slot `last`."""
        while self.slot < last:
            self._follow(self.proposed())

    def overrun(self, last: int) -> int:
        """Have the accused follow up to slot `last`, the last one of its list, and then vote for the next."""
        self.follow(last - 1)
        digest = self.proposed()
        self.say(Prepare(0, last, digest), Commit(0, last, digest))
        return self.say(Prepare(0, last + 1, bytes(32)))

    def _follow(self, digest: bytes) -> None:
        slot = self.slot
        self.say(Prepare(0, slot, digest), Commit(0, slot, digest))
        if slot % self.genesis.limits.checkpoint_interval == 0:
            self.say(Checkpoint(slot, self.cluster.cores[0]._known.own_digests[slot]))

    @property
    def slot(self) -> int:
        return self.slot_of(0)

    def slot_of(self, replica: int) -> int:
        return self.cluster.cores[replica].executed

    def say(self, *entries) -> int:
        """Have the accused say this; return the index of the last entry."""
        group = self.log.say(*entries)
        self.cluster.publish(group)
        self.cluster.settle(2)
        return group.last

    def proposed(self) -> bytes:
        """Order one more, without the accused; return its digest."""
        self.order()
        return self.cluster.history(0)[-1][1]

    def groups(self, log: int, first: int) -> Iterator[VerifiedGroup]:
        return iter([group for group in self.cluster.logs[log].groups if group.last >= first])

    def holding(self, log: int, index: int) -> VerifiedGroup:
        return next(group for group in self.groups(log, index))

    def found(self, kind: type) -> list:
        return [effect for replica in (0, 1) for effect in self.cluster.of(replica, kind)]

    def basis(self, number: int = -1) -> Basis:
        milestone = self.cluster.of(0, Persist)[number].milestone
        return Basis(milestone.header, milestone.certificate, milestone.logs)

    def examine(self, raw: bytes) -> tuple[Claim, str]:
        return examine(raw, self.genesis, self.keys, signed_envelope)

    def collect(self, basis: Basis | None) -> Evidence:
        """Collect evidence of the one thing that the cores found."""
        found = [*self.found(Exposed), *self.found(Lied)]
        assert found
        log, index = found[0].log, found[0].index
        assert log == ACCUSED
        assert all((one.log, one.index) == (log, index) for one in found)
        group = self.holding(log, index)
        if isinstance(found[0], Exposed) and found[0].violation.rule == MALFORMED:
            return bare(Claim(log, index, MALFORMED), group, self.genesis, Kind.ENTRY)
        is_checkpoint = group.payloads[index - group.first][0] == CHECKPOINT
        if is_checkpoint and isinstance(found[0], Lied):
            evidence = collect_checkpoint(group, index, (1, 1, 1), self.genesis, self.groups)
        else:
            evidence = collect_replay(log, index, self.genesis, self.keys, basis, self.groups)
        assert evidence is not None
        return evidence


def misbehave(world: World, name: str) -> None:
    """Have replica 2 break the rule; the others read it."""
    slot = world.slot
    batch = make_batch(1, (), [world.client.operations(kv.get(b"x"), signature=BAD_SIGNATURE)])
    empty = make_batch(1, (), ())
    bad = {
        "junk": [b"\x09junk"],
        "envelope": [PrePrepare(0, 2 * slot + 1, batch)],
        "wrong-view": [Suspect(3)],
        "slot-skipped": [Prepare(0, slot + 2, bytes(32))],
        "view-backwards": [ViewChange(0)],
        "not-primary": [PrePrepare(0, 2 * slot + 1, empty)],
        "checkpoint-misplaced": [Checkpoint(2 * slot + 1, bytes(32))],
        "commit-without-vote": [Commit(0, slot + 1, bytes(32))],
    }
    if name in bad:
        world.say(*bad[name])
    elif name == "false-vote":
        world.proposed()
        world.say(Prepare(0, slot + 1, b"\7" * 32))
    elif name == "false-commit":
        world.say(Prepare(0, slot + 1, world.proposed()), Commit(0, slot + 1, b"\7" * 32))
    elif name == "false-checkpoint":
        said = []
        for number in range(slot + 1, slot + 3):
            digest = world.proposed()
            said += [Prepare(0, number, digest), Commit(0, number, digest)]
            if number % 2 == 0:
                said.append(Checkpoint(number, b"\7" * 32))
                break
        world.say(*said)


@functools.cache
def genuine(name: str, slots: int = 4, *, with_basis: bool = False) -> tuple[World, Evidence]:
    """A world in which replica 2 did `name` after so many slots, and the evidence; not to be changed."""
    world = World(slots)
    basis = world.basis() if with_basis else None
    misbehave(world, name)
    return world, world.collect(basis)


def altered(raw: bytes, chance: random.Random, count: int) -> Iterator[bytes]:
    """Yield copies with one bit flipped: every bit of the first hundred bytes, and `count` others."""
    places = [(at, bit) for at in range(min(100, len(raw))) for bit in range(8)]
    places += [(chance.randrange(len(raw)), chance.randrange(8)) for _ in range(count)]
    for at, bit in places:
        yield raw[:at] + bytes([raw[at] ^ 1 << bit]) + raw[at + 1 :]
