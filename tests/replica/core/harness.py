"""A cluster of cores without I/O: logs are chains of digests, "signatures" are a flag in the bytes."""

import random
import struct
from collections import defaultdict, deque

from replica.apps.kv import KeyValue
from replica.core.entries import Entry
from replica.core.envelope import (
    Open,
    OpenReply,
    Operations,
    OperationsReply,
    SessionId,
    decode_envelope,
    decode_reply,
    encode_open,
    encode_operations,
)
from replica.core.events import (
    Append,
    Appended,
    Effect,
    Executed,
    Exposed,
    Fetch,
    Forked,
    GroupReceived,
    Lied,
    PeerHolds,
    Recovered,
    Relay,
    RequestReceived,
    Send,
    Tick,
)
from replica.core.genesis import Genesis, Limits, Member, Ordering
from replica.core.group import VerifiedGroup, encode_payloads
from replica.core.machine import ReplicaCore
from replica.core.patience import Patience
from replica.core.snapshot import MilestoneRule, Snapshot
from trustlog import chain, entry_digest, genesis_head, log_id

GOOD_SIGNATURE = b"\x01" * 64
BAD_SIGNATURE = b"\x00" * 64


def public_key(number: int) -> bytes:
    return b"\x04" + bytes([number]) * 64


def make_genesis(f: int = 1, ordering: Ordering = Ordering.THREE_PHASE, interval: int = 4) -> Genesis:
    return Genesis(
        name="test",
        nonce=bytes(32),
        f=f,
        ordering=ordering,
        application="replica.apps.kv:KeyValue",
        limits=Limits(checkpoint_interval=interval, window=2 * interval),
        members=tuple(Member(i, 1, public_key(i)) for i in range(2 * f + 1)),
    )


class FakeLog:
    """A log that chains digests as the real one does and never says two things at one index."""

    def __init__(self, author: int) -> None:
        self.author = author
        self.head = genesis_head(log_id(public_key(author)), 0)
        self.groups: list[VerifiedGroup] = []
        self.last = 0

    def append(self, payloads: tuple[bytes, ...]) -> VerifiedGroup:
        before, first = self.head, self.last + 1
        for payload in payloads:
            self.last += 1
            self.head = chain(self.head, self.last, entry_digest(payload))
        raw = bytes(242) + encode_payloads(payloads)
        group = VerifiedGroup(self.author, first, self.last, before, self.head, payloads, raw)
        self.groups.append(group)
        return group

    def say(self, *entries: Entry | bytes) -> VerifiedGroup:
        """Append entries of the test's choice: the log of a faulty replica."""
        return self.append(tuple(e if isinstance(e, bytes) else e.encode() for e in entries))


def heads(genesis: Genesis) -> list[bytes]:
    return [genesis_head(log_id(m.log_public_key), 0) for m in genesis.members]


def make_core(
    genesis: Genesis,
    number: int,
    application: object | None = None,
    *,
    live: bool = True,
    patience: Patience | None = None,
    snapshot: Snapshot | None = None,
    milestones: MilestoneRule | None = None,
) -> ReplicaCore:
    core = ReplicaCore(
        genesis,
        number,
        application or KeyValue(),  # type: ignore[arg-type]
        heads(genesis),
        lambda envelope: envelope.signature == GOOD_SIGNATURE,
        patience,
        snapshot=snapshot,
        milestones=milestones,
    )
    if live:
        come_home(core)
    return core


def come_home(core: ReplicaCore, log: "FakeLog | None" = None) -> list[Effect]:
    """Let the core, which was handed what its store holds, begin to speak; `log` is its trusted log."""
    number, n, f = core.number, core.genesis.n, core.genesis.f
    last, head = (0, heads(core.genesis)[number]) if log is None else (log.last, log.head)
    peers = [peer for peer in range(n) if peer != number][:f]
    effects = core.handle(Recovered(last, head), *(PeerHolds(peer, number, 1, last) for peer in peers))
    return [effect for effect in effects if not isinstance(effect, Fetch) or effect.log != number]


class FakeClient:
    def __init__(self, genesis: Genesis, number: int = 100) -> None:
        self.genesis = genesis
        self.key = public_key(number)
        self.session = SessionId(0, 0)
        self.next = 1

    def open(self, nonce: bytes = bytes(16), void_after: int = 8, signature: bytes = GOOD_SIGNATURE):
        raw = encode_open(self.genesis.cluster_id(), self.key, Open(nonce, void_after)) + signature
        return decode_envelope(raw, self.genesis.cluster_id(), self.genesis.limits)

    def operations(
        self, *operations: bytes, first: int | None = None, acknowledged: int = 1, signature: bytes = GOOD_SIGNATURE
    ):
        if first is None:
            first = self.next
            self.next += len(operations)
        content = Operations(self.session, first, acknowledged, operations)
        raw = encode_operations(self.genesis.cluster_id(), self.key, content) + signature
        return decode_envelope(raw, self.genesis.cluster_id(), self.genesis.limits)


class Cluster:
    """Cores joined by queues; `deliver` hands over one thing at a time, in an order that the test chooses."""

    def __init__(
        self,
        genesis: Genesis,
        faulty: tuple[int, ...] = (),
        seed: int = 0,
        milestones: MilestoneRule | None = None,
    ) -> None:
        self.genesis = genesis
        self.random = random.Random(seed)
        self.faulty = set(faulty)
        self.logs = [FakeLog(i) for i in range(genesis.n)]
        self.cores = {i: make_core(genesis, i, milestones=milestones) for i in range(genesis.n) if i not in self.faulty}
        self.in_flight: deque = deque()  # (replica, event)
        self.effects: dict[int, list[Effect]] = defaultdict(list)
        self.cut_off: set[tuple[int, int]] = set()  # (author, reader): nothing is delivered
        self.now = 0
        self.duplicate = 0.0
        self.appending: set[int] = set()

    def request(self, envelope, to: int | None = None, relayed: bool = False) -> None:
        for replica in self.cores if to is None else (to,):
            self.in_flight.append((replica, RequestReceived(envelope, relayed)))

    def publish(self, group: VerifiedGroup, to: tuple[int, ...] | None = None) -> None:
        for replica in self.cores:
            if (
                replica != group.author
                and (to is None or replica in to)
                and (group.author, replica) not in self.cut_off
            ):
                self.in_flight.append((replica, GroupReceived(group)))

    def run(self, shuffle: bool = False, steps_max: int = 100_000) -> None:
        """Deliver until nothing is in flight."""
        for _ in range(steps_max):
            if not self.in_flight:
                return
            if shuffle:
                self.in_flight.rotate(self.random.randrange(len(self.in_flight)))
            replica, event = self.in_flight.popleft()
            if self.duplicate and isinstance(event, GroupReceived) and self.random.random() < self.duplicate:
                self.in_flight.append((replica, event))
            self.handle(replica, event)
        raise AssertionError("no end in sight")

    def tick(self, ms: int = 200) -> None:
        self.now += ms
        for replica in self.cores:
            self.handle(replica, Tick(self.now, 1_700_000_000_000 + self.now))

    def settle(self, rounds: int = 30, shuffle: bool = False) -> None:
        for _ in range(rounds):
            self.run(shuffle)
            self.tick()
        self.run(shuffle)

    def handle(self, replica: int, event) -> None:
        if isinstance(event, Appended):
            self.appending.discard(replica)
        for effect in self.cores[replica].handle(event):
            self.effects[replica].append(effect)
            if isinstance(effect, Append):
                if replica in self.appending:
                    raise AssertionError(f"replica {replica} appends while an append is under way")
                self.appending.add(replica)
                group = self.logs[replica].append(effect.payloads)
                self.in_flight.append((replica, Appended(group)))
                self.publish(group)
            elif isinstance(effect, Relay) and effect.to in self.cores:
                self.in_flight.append((effect.to, RequestReceived(effect.envelope, relayed=True, peer=replica)))
            elif isinstance(effect, Fetch) and effect.ask in self.cores:
                holder = self.cores[effect.ask]
                for group in self.logs[effect.log].groups:
                    if effect.first <= group.last <= holder.received(effect.log):
                        self.in_flight.append((replica, GroupReceived(group)))
                last = holder.received(effect.log)
                self.in_flight.append((replica, PeerHolds(effect.ask, effect.log, 1, last)))

    def check(self) -> None:
        """Raise AssertionError unless all correct replicas agree and none of them accuses another."""
        histories = [self.history(replica) for replica in self.cores]
        longest = max(histories, key=len)
        for replica, core in self.cores.items():
            history = self.history(replica)
            assert history == longest[: len(history)], f"replica {replica} executed something else"
            assert [slot for slot, _ in history] == list(range(1, len(history) + 1))
            assert core.halted is None, core.halted
            blamed = [e for e in self.effects[replica] if isinstance(e, Exposed | Lied | Forked)]
            assert all(e.log in self.faulty for e in blamed), blamed
            for state in (*core._known.states, core._pen.state):
                state.check()

    def replies(self, replica: int) -> list[OpenReply | OperationsReply]:
        return [decode_reply(e.reply, self.genesis.limits) for e in self.effects[replica] if isinstance(e, Send)]

    def history(self, replica: int) -> list[tuple[int, bytes]]:
        return [(e.slot, e.batch.digest) for e in self.effects[replica] if isinstance(e, Executed)]

    def of(self, replica: int, kind: type) -> list:
        return [e for e in self.effects[replica] if isinstance(e, kind)]


def opened(cluster: Cluster, client: FakeClient) -> FakeClient:
    """Open the client's session; every correct replica has executed it afterwards."""
    slot = max(core.executed for core in cluster.cores.values())
    nonce = struct.pack(">16s", client.key[1:9])
    cluster.request(client.open(nonce=nonce, void_after=slot + 8))
    cluster.settle(2)
    reply = next(
        r for core in cluster.cores for r in cluster.replies(core) if isinstance(r, OpenReply) and r.nonce == nonce
    )
    client.session = reply.session
    return client
