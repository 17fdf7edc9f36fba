"""Audits of folders in a cluster whose members changed: nobody is accused of what the rules of his own list allow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import NamedTuple, Self

import pytest

from replica.cluster.clusterfile import ClusterFile
from replica.core.batch import make_batch
from replica.core.entries import Checkpoint, PrePrepare, Suspect
from replica.core.events import Persist
from replica.core.genesis import Genesis
from replica.operations import audit
from replica.operations.tenure import may_end_with
from replica.shell.store import Store, StoredGroup
from tests.replica.core.evidence_world import ACCUSED, KeyedLog, World, signed_envelope
from tests.replica.core.test_members import OPERATOR, STRANGER, G, envelope, listed, replaced
from tests.replica.core.test_proving_lists import joining
from trustlog import Attestation

JUNK = b"\x09junk"
NULL = bytes(32)


@pytest.fixture(autouse=True)
def _stand_in_signatures(monkeypatch):
    monkeypatch.setattr(audit, "EnvelopeVerifier", lambda: signed_envelope)


class Folder:
    """Replica 0's folder with what the logs said, as far as `lists` of its cluster know the members."""

    def __init__(self, path, logs: list[KeyedLog], *lists: Genesis) -> None:
        self.path, self.number = path, 0
        self.store_path, self.state_path = path / "store.sqlite", path / "state.sqlite"
        self.cluster = ClusterFile(lists[-1], (), b"", lists=lists)
        path.mkdir()
        with closing(Store(self.store_path, lists[0].cluster_id(), 0)) as store:
            for log in logs:
                for group in log.groups:
                    size = len(Attestation.of_group(group.raw).raw)
                    parts = (group.raw[:size], group.raw[size:])
                    store.write([StoredGroup(log.author, group.first, group.last, *parts)], None, None)


def audited(*folders: Folder) -> list[str]:
    """Return what is wrong, and where."""
    one = audit.Audit()
    found = [one.run(folder, lambda _: None) for folder in folders]  # type: ignore[arg-type]
    return [f"{fault.where}: {fault.text}" for each in found for fault in each.faults]


def grown() -> tuple[World, Genesis]:
    """A world in which two came in; replica 2, correct, is the first one to say something under list 1."""
    world = World(4, operators=(OPERATOR,))
    world.say(Suspect(0))
    after = world.change(*world.genesis.members, *joining(3, 4))
    world.follow(after.base)
    return world, after


def proposal(genesis: Genesis) -> PrePrepare:
    """One that carries the positions in all logs of this list."""
    return PrePrepare(2, genesis.base + genesis.limits.checkpoint_interval, make_batch(1, (1,) * genesis.n, ()))


def test_what_was_said_under_a_list_that_the_folder_does_not_know_is_not_judged(tmp_path):
    world, after = grown()
    world.log.say(Suspect(0), proposal(after))
    folder = Folder(tmp_path / "late", world.cluster.logs, world.genesis)
    assert audited(folder) == []
    (note,) = audit.Audit().run(folder, lambda _: None).notes  # type: ignore[arg-type]
    assert note.startswith(f"log {ACCUSED}: the last 2 entries cannot be judged here: they may be of a later list")


class Tree(NamedTuple):
    items: tuple[tuple[bytes, bytes], ...]
    digest: bytes

    def entries(self) -> Iterator[tuple[bytes, bytes]]:
        return iter(self.items)

    def root(self) -> bytes:
        return self.digest


class Pinned:
    """Replica 0's last milestone, as the state file would hold it."""

    exists = True

    def __init__(self, world: World) -> None:
        core = world.cluster.cores[0]
        milestone = world.cluster.of(0, Persist)[-1].milestone
        assert milestone.slot == core.executed
        self.path, self.header, self.certificate = "state", milestone.header, milestone.certificate
        self.logs, self.batches = milestone.logs, milestone.batches
        roots = core.executor.roots()
        maps = (core.executor.state, core.executor.table.records)
        self.trees = [Tree(tuple(one.scan()), root) for one, root in zip(maps, roots, strict=True)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...


@pytest.mark.parametrize("waited", [0, 2])
def test_the_state_tells_with_which_slot_the_list_ends(tmp_path, monkeypatch, waited):
    """The command lies before the milestone, in slots that need not be retained: the last of the list, or one before."""
    world = World(4, operators=(OPERATOR,))
    after = world.change(*world.genesis.members, *joining(3, 4))
    world.follow(after.base - waited)
    pinned = Pinned(world)
    world.follow(after.base)
    world.log.say(Suspect(0), Suspect(0), proposal(after))
    folder = Folder(tmp_path / "left", world.cluster.logs, world.genesis)
    folder.state_path.touch()
    monkeypatch.setattr(audit, "PinnedState", lambda *_: pinned)
    assert audited(folder) == []
    found = audit.Audit().run(folder, lambda _: None)  # type: ignore[arg-type]
    assert found.slot == after.base - waited
    assert "the last 3 entries cannot be judged here" in found.notes[-1]


def test_what_was_malformed_before_is_named_there_too(tmp_path):
    world = World(4, operators=(OPERATOR,))
    world.change(*world.genesis.members, *joining(3, 4))
    world.log.say(JUNK)
    rule, malformed = audited(Folder(tmp_path / "late", world.cluster.logs, world.genesis))
    assert malformed.startswith(f"log {ACCUSED}, entry {world.log.last}: was attested by its log and is malformed")
    assert rule.startswith(f"log {ACCUSED}, entry {world.log.last}: breaks the rule malformed")


def test_only_what_an_operator_ordered_of_the_next_list_may_end_this_one():
    seats = listed(G, m2=replaced())
    proposed = lambda command, **by: PrePrepare(0, 6, make_batch(1, (), [envelope(command, **by)]))  # noqa: E731
    good = proposed(seats.encode())
    assert may_end_with(good, G, 5) == 16
    assert may_end_with(good, G, 6) is None, "that was executed, and the state says what came of it"
    assert may_end_with(proposed(seats.encode(), key=STRANGER), G, 5) is None
    assert may_end_with(proposed(replace(seats, number=2).encode()), G, 5) is None
    assert may_end_with(proposed(b"go on"), G, 5) is None
    assert may_end_with(Suspect(0), G, 5) is None


def test_what_is_retained_is_judged_under_its_own_list(tmp_path):
    """PRE-PREPAREs with the positions in three logs, said when there were three; and one said when there were five."""
    world, after = grown()
    logs = world.cluster.logs
    present = Folder(tmp_path / "present", logs, world.genesis, after)
    assert audited(present) == []
    world.log.say(proposal(after), proposal(world.genesis))
    (found,) = [
        text for text in audited(Folder(tmp_path / "bad", logs, world.genesis, after)) if "is malformed" in text
    ]
    assert found.startswith(
        f"log {ACCUSED}, entry {world.log.last}: was attested by its log and is malformed: a cut of 3"
    )


def test_a_log_that_stays_on_after_several_lists_is_read_under_each(tmp_path):
    """Three, five, and three again: after a CHECKPOINT within a list that list's layouts count, whatever others have."""
    world, five = grown()
    three = five.successor(2, five.base + 8, world.genesis.members)
    inside = Checkpoint(five.base + 2, NULL)
    world.log.say(proposal(five), inside, proposal(five), Checkpoint(three.base, NULL), proposal(three))
    lists = (world.genesis, five, three)
    assert [
        text for text in audited(Folder(tmp_path / "good", world.cluster.logs, *lists)) if "is malformed" in text
    ] == []
    for number, wrong in enumerate((five, world.genesis)):
        other = KeyedLog(ACCUSED)
        other.context = world.genesis.context()
        said = [Checkpoint(three.base, NULL)] if wrong is five else [inside]
        other.say(*said, proposal(wrong))
        logs = [*world.cluster.logs[:2], other]
        (found,) = [t for t in audited(Folder(tmp_path / str(number), logs, *lists)) if "is malformed" in t]
        assert found.startswith(f"log {ACCUSED}, entry 2: ")


def test_numbers_change_hands_and_histories_do_not(tmp_path):
    """A folder that is late has the old log 2, another one the new: they are two logs, not two histories of one."""
    world, new = World(4), KeyedLog(ACCUSED, 5000 + ACCUSED)
    after = world.genesis.successor(1, 6, (*world.genesis.members[:2], *joining(ACCUSED)))
    new.context = after.contexts()[ACCUSED]
    while new.last < world.log.last:
        new.say(Checkpoint(6, NULL))
    late = Folder(tmp_path / "late", [world.log], world.genesis)
    over = Folder(tmp_path / "over", [new], world.genesis, after)
    assert not [text for text in audited(late, over) if "two histories" in text]
    other = KeyedLog(ACCUSED)
    other.context = world.genesis.context()
    while other.last < world.log.last:
        other.say(Checkpoint(6, NULL))
    assert [
        text for text in audited(late, Folder(tmp_path / "other", [other], world.genesis)) if "two histories" in text
    ]
