"""A cluster founded with another one's state: what its genesis names, what replicas begin with, and what they refuse."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest

from replica.application import Right
from replica.apps import kv
from replica.apps.kv import KeyValue
from replica.core.batch import make_batch
from replica.core.catchup import OFFERS_PAUSE_MS
from replica.core.checkpoint import check_certificate, decode_header, founding_header, is_founding
from replica.core.clients import Allow, Mode, Permission, SetMode
from replica.core.envelope import Administer, OpenReply, OperationsReply, Status, decode_envelope, encode_administer
from replica.core.events import (
    AskCheckpoint,
    AskPart,
    CheckpointOffered,
    Executed,
    GroupReceived,
    Install,
    PartReceived,
    Stable,
    Tick,
    ViewOpened,
)
from replica.core.evidence import Basis
from replica.core.execution import Executor
from replica.core.founding import carried_over, founding_of, founding_state
from replica.core.genesis import Founding, new_genesis
from replica.core.knowledge import beginning
from replica.core.layout import LayoutError
from replica.core.logstate import Opening
from replica.core.proving import Replay
from replica.core.snapshot import Fetched, Source
from replica.core.state import BucketedMap
from replica.core.treeparts import part_of
from replica.core.versions import CURRENT, encode_activation
from tests.replica.core.harness import (
    GOOD_SIGNATURE,
    Cluster,
    FakeClient,
    heads,
    make_core,
    make_genesis,
    opened,
    public_key,
)
from tests.replica.core.test_versions import Old, Versioned

OPERATOR = public_key(200)
OLD = replace(make_genesis(), operators=(OPERATOR,))
USER, STRANGER = FakeClient(OLD, 100), FakeClient(OLD, 101)


def command(raw: bytes):
    sealed = encode_administer(OLD.cluster_id(), OPERATOR, Administer(99, raw)) + GOOD_SIGNATURE
    return decode_envelope(sealed, OLD.cluster_id(), OLD.limits)


def lost() -> Executor:
    """What a survivor has come to: one key, a listed client with a session."""
    executor, client = Executor(KeyValue(), OLD), FakeClient(OLD, 100)
    executor.execute(1, make_batch(1001, (), [client.open()]))
    client.session = executor.table.opened(client.key, bytes(16))
    executor.execute(2, make_batch(1002, (), [client.operations(kv.put(b"a", b"1"))]))
    allowed = Allow(1, USER.key, "user", (Permission(Right.READ | Right.WRITE, b"a"),))
    executor.execute(3, make_batch(1003, (), [command(allowed.encode())]))
    executor.execute(4, make_batch(1004, (), [command(SetMode(2, Mode.LISTED).encode())]))
    executor.execute(5, make_batch(2000, (), []))
    return executor


EXECUTOR = lost()
EXECUTOR.roots()  # what sessions changed is in the records only then
TABLE = carried_over(EXECUTOR)
FOUNDING = founding_of(OLD.cluster_id(), EXECUTOR, TABLE)
NEW = new_genesis("new", b"\7" * 32, 1, OLD.ordering, OLD.application, OLD.limits, OLD.members, (OPERATOR,), FOUNDING)


def state(genesis=NEW) -> Fetched:
    return founding_state(genesis, EXECUTOR.state.frozen(), TABLE.frozen())


def founded(genesis=NEW) -> Cluster:
    cluster = Cluster(genesis)
    cluster.cores = {i: make_core(genesis, i, snapshot=state().snapshot(KeyValue(), genesis)) for i in range(genesis.n)}
    return cluster


def test_what_the_genesis_says_of_the_state():
    assert Founding(OLD.cluster_id(), 5, EXECUTOR.digest(), 2000, EXECUTOR.state.root(), TABLE.root()) == FOUNDING
    assert (NEW.base, FOUNDING.base(4), FOUNDING.base(5), FOUNDING.base(1)) == (8, 8, 5, 5)
    tail = struct.pack(">H", 1) + OPERATOR
    layout = OLD.cluster_id() + struct.pack(">Q", 5) + EXECUTOR.digest() + struct.pack(">Q", 2000)
    layout += EXECUTOR.state.root() + TABLE.root()
    assert NEW.encode() == replace(NEW, founding=None, base=0).encode() + layout
    assert NEW.encode().endswith(tail + layout)
    # Without operators their number stands there all the same: what follows it is never taken for keys.
    assert replace(NEW, operators=()).encode().endswith(struct.pack(">H", 0) + layout)


@pytest.mark.parametrize(
    "change",
    [{"cluster_id": bytes(32)}, {"slot": 6}, {"digest": bytes(32)}, {"time_ms": 1}, {"application": bytes(32)},
     {"table": bytes(32)}],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_another_founding_is_another_cluster(change):
    other = replace(NEW, founding=replace(FOUNDING, **change))
    assert other.cluster_id() != NEW.cluster_id()
    assert other.context() != NEW.context()


@pytest.mark.parametrize(
    ("change", "base", "words"),
    [
        ({}, 4, "in force after slot 8, not 4"),
        ({}, 0, "in force after slot 8, not 0"),
        ({"slot": 9}, 8, "in force after slot 12"),
        ({"slot": 0}, 0, "slot is from 1 on"),
        ({"slot": 1 << 62}, 1 << 62, "slot is from 1 on"),
        ({"time_ms": -1}, 8, "not negative"),
        ({"digest": bytes(31)}, 8, "32 bytes each"),
        ({"table": b""}, 8, "32 bytes each"),
    ],
)
def test_a_founding_that_cannot_be(change, base, words):
    with pytest.raises(ValueError, match=words):
        replace(NEW, founding=replace(FOUNDING, **change), base=base)


def test_without_a_founding_a_cluster_begins_at_slot_0():
    with pytest.raises(ValueError, match="in force after slot 0, not 8"):
        replace(make_genesis(), base=8)
    assert founding_header(make_genesis()) is None
    assert not make_genesis().needs_state
    assert NEW.needs_state


def test_logs_begin_behind_the_old_slots():
    states = beginning(NEW)
    assert [one.opened for one in states] == [{0: Opening(8, 8)}, {}, {}]
    assert {(one.last_checkpoint, one.top, one.position, one.joined) for one in states} == {(8, 8, 0, True)}


def test_every_key_and_the_policy_are_there_and_sessions_are_not():
    executor = state().snapshot(KeyValue(), NEW).executor
    assert (executor.slot, executor.time_ms) == (8, 2000)
    assert executor.state.get(b"a") is not None
    assert len(EXECUTOR.table) == 1
    assert len(executor.table) == 0
    assert executor.clients.mode is Mode.LISTED
    assert executor.clients.number == 2
    assert not executor.clients.is_allowed(STRANGER.key)
    assert executor.clients.is_allowed(USER.key)
    assert executor.clients.is_restricted(USER.key)


@pytest.mark.parametrize("activated_at", [2, 3], ids=["in force before the end", "commanded in the last slot"])
def test_the_version_in_force_stays_in_force(activated_at):
    """Also one of the last slot that a survivor shows: it is in force after that, so there is none on its way."""
    executor, client = Executor(Versioned(), OLD), FakeClient(OLD, 100)
    executor.execute(1, make_batch(1001, (), [client.open()]))
    client.session = executor.table.opened(client.key, bytes(16))
    for slot in (2, 3):
        asked = command(encode_activation(2)) if slot == activated_at else client.operations(b"k")
        executor.execute(slot, make_batch(1000 + slot, (), [asked]))
    executor.roots()
    table = carried_over(executor)
    assert {key for key, _ in table.scan()} == {CURRENT}
    founding = founding_of(OLD.cluster_id(), executor, table)
    genesis = replace(NEW, founding=founding, base=founding.base(OLD.limits.checkpoint_interval))
    begun = founding_state(genesis, executor.state.frozen(), table.frozen())
    with pytest.raises(LayoutError, match="client table has the digest"):
        founding_state(genesis, executor.state.frozen(), BucketedMap().frozen())
    cluster = Cluster(genesis)
    for number, code in enumerate((Versioned(), Versioned(), Old())):
        cluster.cores[number] = make_core(genesis, number, code, snapshot=begun.snapshot(code, genesis))
    versions = cluster.cores[0].executor.versions
    assert (versions.present, versions.after) == (2, activated_at)
    # Code that does not know it stops before it executes anything, as after an activation.
    assert cluster.cores[2].halted == cluster.cores[2].executor.outdated
    assert "version 2 is in force" in cluster.cores[2].halted
    cluster.settle()
    cluster.request(opened(cluster, FakeClient(genesis, 100)).operations(b"new"))
    cluster.settle()
    assert [cluster.cores[number].executor.state.get(b"new") for number in range(3)] == [b"2", b"2", None]
    assert cluster.cores[2].executed == genesis.base


def test_a_founded_cluster_goes_on():
    cluster = founded()
    user = opened(cluster, FakeClient(NEW, 100))
    cluster.request(user.operations(kv.get(b"a"), kv.put(b"a", b"2")))
    cluster.settle()
    for replica, core in cluster.cores.items():
        slots = [effect.slot for effect in cluster.of(replica, Executed)]
        assert slots == list(range(9, 9 + len(slots)))
        replies = [one for one in cluster.replies(replica) if isinstance(one, OperationsReply)]
        assert [result.status for result in replies[0].results] == [Status.OK, Status.OK]
        assert b"1" in replies[0].results[0].value
        assert core.halted is None
        assert not core.exposed
    stranger = FakeClient(NEW, 101)
    cluster.request(stranger.open(void_after=20))
    cluster.settle(2)
    assert any(isinstance(reply, OpenReply) and reply.status == Status.NOT_ALLOWED for reply in cluster.replies(0))


def test_checkpoints_and_views_of_a_founded_cluster():
    cluster = founded()
    user = opened(cluster, FakeClient(NEW, 100))
    for number in range(8):
        cluster.request(user.operations(kv.put(b"a", b"%d" % number)))
        cluster.settle(2)
    assert {effect.slot for effect in cluster.of(1, Stable)} >= {12, 16}
    del cluster.cores[0]  # the first primary
    before = cluster.cores[1].executed
    cluster.request(user.operations(kv.put(b"a", b"x")))
    cluster.settle(60)
    assert cluster.of(1, ViewOpened)
    assert cluster.cores[1].executed == cluster.cores[2].executed > before


def test_who_reads_the_logs_from_their_beginning_judges_them_alike():
    cluster = founded()
    opened(cluster, FakeClient(NEW, 100))

    class Keys:
        initial_heads = staticmethod(lambda: heads(NEW))
        entry = staticmethod(lambda log, proof: False)

    basis = Basis(founding_header(NEW).encode(), b"", tuple(one.encode() for one in beginning(NEW)))
    for begun in (None, basis):
        replay = Replay(NEW, Keys(), begun, lambda envelope: True)
        for log in cluster.logs:
            for group in log.groups:
                replay.add(group)
        assert replay.run(-1, 0) is None
        assert [state.position for state in replay.states] == [log.last for log in cluster.logs]
        assert not replay.waits


def test_the_header_needs_no_certificate_and_no_other_header_goes_without():
    header = founding_header(NEW)
    assert decode_header(header.encode(), 3) == header
    check_certificate(b"", header, NEW, lambda *_: False)
    for change in (
        {"application": bytes(32)},
        {"table": bytes(32)},
        {"time_ms": 2001},
        {"slot": 12},
        {"slot": 4},
        {"cut": (1, 0, 0)},
        {"heads": tuple(heads(NEW))},
        {"logs": (bytes(32),) * 3},
        {"members": bytes(32)},
    ):
        other = replace(header, **change)
        assert not is_founding(other, NEW)
        with pytest.raises(LayoutError):
            check_certificate(b"", other, NEW, lambda *_: True)
    later = NEW.successor(1, 16, NEW.members)
    assert founding_header(later) is None
    with pytest.raises(LayoutError):
        check_certificate(b"", header, later, lambda *_: True)
    with pytest.raises(LayoutError):
        check_certificate(b"", header, make_genesis(), lambda *_: True)


def test_a_state_that_is_not_the_one_that_the_genesis_names_is_refused():
    other = BucketedMap([(b"a", b"forged")])
    with pytest.raises(LayoutError, match="application's state has the digest"):
        founding_state(NEW, other.frozen(), TABLE.frozen())
    with pytest.raises(LayoutError, match="client table has the digest"):
        founding_state(NEW, EXECUTOR.state.frozen(), BucketedMap().frozen())
    with pytest.raises(LayoutError, match="not founded"):
        founding_state(make_genesis(), EXECUTOR.state.frozen(), TABLE.frozen())


def test_a_core_without_the_state_reads_nothing_and_fetches_it():
    cluster = founded()
    opened(cluster, FakeClient(NEW, 100))
    late = make_core(NEW, 2, live=False)
    for log in cluster.logs:
        for group in log.groups:
            late.handle(GroupReceived(group))
    assert late.executed == 0
    assert [late.read(log) for log in range(3)] == [0, 0, 0]
    asked = late.handle(Tick(OFFERS_PAUSE_MS, 0))
    assert [effect.ask for effect in asked if isinstance(effect, AskCheckpoint)] == [0, 1]
    truth = state()
    questions = [e for e in late.handle(CheckpointOffered(0, truth.header, b"")) if isinstance(e, AskPart)]
    assert questions
    poisoned = questions[0]
    late.handle(PartReceived(0, 8, poisoned.want, b"poison"))
    assert late.refusals["part-poisoned"] == 1
    late.handle(Tick(2 * OFFERS_PAUSE_MS, 0))
    effects = late.handle(CheckpointOffered(1, truth.header, b""))
    installed = serve(late, truth, effects)
    again = make_core(NEW, 2, live=False, snapshot=installed.snapshot(KeyValue(), NEW))
    assert again.stable_digest == founding_header(NEW).digest
    for log in cluster.logs:
        for group in log.groups:
            again.handle(GroupReceived(group))
    assert again.executed == cluster.cores[0].executed > 8


def serve(core, truth: Fetched, effects) -> Fetched:
    """Answer what a core asks for with the parts of a state."""
    maps = {Source.APPLICATION: truth.application, Source.TABLE: truth.table}
    waiting = list(effects)
    while waiting:
        effect = waiting.pop(0)
        if isinstance(effect, Install):
            return effect.fetched
        if isinstance(effect, AskPart):
            want = effect.want
            data = truth.states[want.number].encode() if want.want is None else part_of(maps[want.source], want.want)
            waiting += core.handle(PartReceived(effect.ask, effect.slot, want, data))
    raise AssertionError("nothing was installed")
