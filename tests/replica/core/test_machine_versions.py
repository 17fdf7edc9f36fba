"""A replica whose code is too old stops before the first slot of the version in force, and with new code goes on."""

from __future__ import annotations

from dataclasses import replace

import pytest

from replica.core.checkpoint import Header, state_digest
from replica.core.envelope import Administer, decode_envelope, encode_administer
from replica.core.events import Executed, GroupReceived, Halt, Tick
from replica.core.execution import Executor
from replica.core.genesis import Ordering
from replica.core.layout import U64_MAX
from replica.core.logstate import LogState
from replica.core.snapshot import Snapshot
from replica.core.versions import encode_activation
from tests.replica.core.harness import (
    GOOD_SIGNATURE,
    Cluster,
    FakeClient,
    come_home,
    heads,
    make_core,
    make_genesis,
    opened,
)
from tests.replica.core.policed import OPERATOR, Policed
from tests.replica.core.test_versions import Old, Versioned, restored


class Mixed(Cluster):
    """A cluster in which the last replica has old code."""

    def __init__(self, ordering: Ordering = Ordering.THREE_PHASE) -> None:
        super().__init__(replace(make_genesis(ordering=ordering), operators=(OPERATOR,)))
        for number in self.cores:
            self.cores[number] = make_core(self.genesis, number, Old() if number == 2 else Versioned())
        self.client = opened(self, FakeClient(self.genesis))

    def ask(self, *keys: bytes) -> None:
        for key in keys:
            self.request(self.client.operations(key))
            self.settle(2)

    def activate(self, version: int) -> None:
        content = Administer(U64_MAX, encode_activation(version))
        signed = encode_administer(self.genesis.cluster_id(), OPERATOR, content)
        self.request(decode_envelope(signed + GOOD_SIGNATURE, self.genesis.cluster_id(), self.genesis.limits))
        self.settle(2)


@pytest.mark.parametrize("ordering", Ordering)
def test_it_stops_by_itself_and_the_others_go_on(ordering: Ordering):
    cluster = Mixed(ordering)
    cluster.ask(b"a")
    assert all(core.executor.state.get(b"a") == b"0" for core in cluster.cores.values())
    cluster.activate(1)
    old = cluster.cores[2]
    last = old.executed
    assert old.executor.versions.after == last, "the slot of the command is the last one that it executed"
    (halt,) = cluster.of(2, Halt)
    assert halt.reason == old.halted == old.executor.outdated
    said = cluster.logs[2].last
    cluster.ask(b"b", b"c")
    assert (old.executed, cluster.logs[2].last) == (last, said), "it executes nothing, and says nothing"
    assert old.executor.state.get(b"b") is None
    for number in (0, 1):
        assert cluster.cores[number].halted is None
        assert cluster.cores[number].executor.state.get(b"b") == b"1"


def test_with_new_code_it_goes_on_where_it_was_and_old_code_stops_again():
    cluster = Mixed()
    cluster.ask(b"a")
    cluster.activate(1)
    cluster.ask(b"b", b"c")
    groups = [group for log in cluster.logs for group in log.groups]
    again = make_core(cluster.genesis, 2, Old(), live=False)
    effects = [effect for group in groups for effect in again.handle(GroupReceived(group))]
    assert len([effect for effect in effects if isinstance(effect, Halt)]) == 1
    assert again.executed == again.executor.versions.after
    new = make_core(cluster.genesis, 2, Versioned(), live=False)
    effects = [effect for group in groups for effect in new.handle(GroupReceived(group))]
    come_home(new, cluster.logs[2])
    assert new.halted is None
    assert [e.slot for e in effects if isinstance(e, Executed)] == list(range(1, cluster.cores[0].executed + 1))
    assert new.executor.state.get(b"a") == b"0", "what version 0 executed is executed so again"
    assert new.executor.digest() == cluster.cores[0].executor.digest()
    cluster.cores[2] = new
    cluster.activate(3)
    cluster.ask(b"d")
    assert all(core.executor.state.get(b"d") == b"3" for core in cluster.cores.values())


def a_snapshot(cluster: Cluster, executor: Executor) -> Snapshot:
    states = tuple(LogState(number) for number in range(cluster.genesis.n))
    digests = tuple(state_digest(state.encode()) for state in states)
    header = Header(executor.slot, 0, *executor.roots(), (0,) * len(states), tuple(heads(cluster.genesis)), digests)
    return Snapshot(header, b"", states, (), executor)


def test_a_core_that_begins_with_a_state_that_is_too_new_halts_before_anything_else():
    w = Policed(Versioned())
    w.done(encode_activation(1))
    cluster = Mixed()
    begun = a_snapshot(cluster, restored(w, Old()))
    core = make_core(cluster.genesis, 2, Old(), live=False, snapshot=begun)
    assert core.halted is not None
    assert core.halted == begun.executor.outdated
    effects = core.handle(Tick(1, 1))
    assert effects == [Halt(core.halted)]
    assert core.handle(Tick(2, 2)) == []
