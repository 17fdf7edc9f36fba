"""What survivors of a cluster show, where they contradict each other, and the cluster that is founded with it."""

import hashlib
import shutil
import sqlite3
from contextlib import closing, contextmanager
from dataclasses import replace

import pytest
import structlog

from replica.application import ApplicationLoadError
from replica.cluster.clusterfile import dump_cluster_file, load_cluster_file
from replica.cluster.home import load_home
from replica.cluster.keys import load_client_key
from replica.cluster.provision import ProvisionError, init_cluster
from replica.core.checkpoint import decode_header
from replica.core.genesis import Limits
from replica.core.snapshot import MilestoneRule
from replica.core.versions import encode_activation
from replica.operations import refounding, survivors
from replica.operations.audit import Audit
from replica.operations.backup import make_backup
from replica.operations.changing import Council
from replica.operations.refounding import planned
from replica.operations.survivors import SurvivorError
from replica.shell.sqlitefile import StoreError
from replica.shell.statestore import Milestone
from tests.replica.core.test_versions import Versioned
from tests.replica.shell.states import NONE, MappedStore
from tests.support.nodes import Nodes
from tests.support.waiting import on_loop, until
from trustlog import open_log
from trustlog.appraisal import EvidenceLevel

RULE = MilestoneRule(intervals=2)
LIMITS = Limits(checkpoint_interval=4, window=8)
KEYS = 22


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The directory of a cluster that ordered something; replica 0 was stopped earlier than the others."""
    directory = tmp_path_factory.mktemp("old") / "c"

    @on_loop
    async def make():
        async with Nodes(directory, limits=LIMITS, milestones=RULE) as cluster:
            cluster.start()
            await cluster.wait_ready()
            async with cluster.client(patience_ms=100) as client:
                for number in range(KEYS):
                    if number == KEYS - 5:
                        await cluster.wait_quiet()
                        await cluster.stop(0)
                    await client.put(f"k{number}", f"v{number}")
            await cluster.wait_quiet()

    make()
    return directory


@pytest.fixture
def old(written, tmp_path):
    return shutil.copytree(written, tmp_path / "old")


def files(folder):
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).digest())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@contextmanager
def plan_of(tmp_path, *places):
    with planned(places, tmp_path / "new", structlog.get_logger()) as plan:
        yield plan


def refound(tmp_path, *places, **options):
    with plan_of(tmp_path, *places) as plan:
        return plan, init_cluster(
            tmp_path / "new",
            base_port=0,
            limits=plan.genesis.limits,
            foundation=plan.foundation(),
            **options,
        )


def edit(path, statement, *values):
    with closing(sqlite3.connect(path)) as db, db:
        assert db.execute(statement, values).rowcount != 0


def rewrite(path, cluster_id, number, changes, *, with_header=False):
    """Change keys of a state file, and all digests above them; with the header's as well if asked for."""
    with closing(MappedStore(path, cluster_id, number)) as store:
        with store.load() as view:
            kept = Milestone(view.slot, view.header, view.certificate, view.logs, view.batches, (changes, []), NONE)
        store.write(kept)
        if with_header:
            with store.load() as view:
                header = replace(decode_header(kept.header, 3), application=view.trees[0].root())
            store.write(replace(kept, header=header.encode(), changes=([], [])))


def refused(tmp_path, *places):
    before = [files(place) for place in places if place.is_dir()]
    with pytest.raises(SurvivorError) as caught, plan_of(tmp_path, *places):
        pass
    assert [files(place) for place in places if place.is_dir()] == before
    assert [path.name for path in tmp_path.iterdir() if ".survivors." in path.name] == []
    return str(caught.value)


def test_a_survivor_shows_everything_that_it_executed_and_stays_as_it_is(old, tmp_path):
    before = files(old)
    with plan_of(tmp_path, old / "replica-1") as plan:
        best = plan.best
        assert best.executed >= KEYS
        assert 0 < best.began < best.executed, "from its milestone on, the store is read"
        assert plan.founding.slot == best.executed
        assert plan.founding.cluster_id == load_cluster_file(old).cluster_id
        assert plan.base % 4 == 0
        assert plan.base - 4 < best.executed <= plan.base
        assert (plan.keys, plan.listed, plan.encrypts_store) == (KEYS, False, False)
        assert any("other 2 of 3 replicas" in text for text in plan.losses())
    assert files(old) == before


def test_the_furthest_of_several_is_taken(old, tmp_path):
    folders = [old / f"replica-{number}" for number in range(3)]
    with plan_of(tmp_path, *folders) as plan:
        executed = [one.executed for one in plan.survivors]
        assert executed[0] < executed[1] == executed[2]
        assert plan.best.home.number == 1
        assert plan.best.marked[executed[0]] == plan.survivors[0].digest
        assert plan.best.executor.digest() == plan.best.digest
        assert not any("other" in text and "of 3 replicas" in text for text in plan.losses())
    with plan_of(tmp_path, folders[0]) as alone:
        assert alone.best.executed == executed[0]
        assert alone.best.digest == plan.survivors[0].digest


def test_votes_for_what_was_not_executed_are_named(old, tmp_path):
    """Replica 1's store lacks the end of log 2: it holds its own votes, and cannot show that they decided."""
    store = old / "replica-1" / "store.sqlite"
    edit(store, "delete from groups where log = 2 and last > (select max(last) - 3 from groups where log = 2)")
    with plan_of(tmp_path, old / "replica-1") as plan:
        assert plan.best.top > plan.best.executed
        text = f"slots {plan.best.executed + 1} to {plan.best.top}: survivors hold votes"
        assert any(one.startswith(text) for one in plan.losses())


def test_a_backup_is_a_survivor_as_well(old, tmp_path):
    make_backup(load_home(old / "replica-1"), tmp_path / "one.backup")
    with plan_of(tmp_path, old / "replica-1") as plan:
        pass
    shutil.rmtree(old)
    with plan_of(tmp_path, tmp_path / "one.backup") as backed:
        assert backed.founding == plan.founding
    raw = bytearray((tmp_path / "one.backup").read_bytes())
    raw[len(raw) // 2] ^= 1
    (tmp_path / "one.backup").write_bytes(raw)
    assert "damaged or altered" in refused(tmp_path, tmp_path / "one.backup")


def test_a_replica_that_runs_is_none(old, tmp_path):
    with open_log(old / "replica-1" / "log"):
        assert "its replica runs; stop it first" in refused(tmp_path, old / "replica-1")


def test_a_lost_log_does_not_matter(old, tmp_path):
    shutil.rmtree(old / "replica-1" / "log")
    with plan_of(tmp_path, old / "replica-1") as plan:
        assert plan.keys == KEYS
        assert any("is lost, and not needed" in note for note in plan.best.notes)


def test_survivors_of_two_clusters_are_refused(old, tmp_path):
    init_cluster(tmp_path / "other", base_port=0)
    assert "name survivors of one cluster" in refused(tmp_path, old / "replica-1", tmp_path / "other" / "replica-0")


def test_a_cluster_that_executed_nothing_has_nothing_to_go_on_from(tmp_path):
    init_cluster(tmp_path / "other", base_port=0)
    assert "nothing was executed there" in refused(tmp_path, tmp_path / "other" / "replica-0")


def test_a_damaged_state_is_named_and_not_passed_over(old, tmp_path):
    edit(old / "replica-1" / "state.sqlite", "update entries set value = x'00' where tree = 0")
    assert "its state cannot be used: state file damaged" in refused(tmp_path, old / "replica-1")


def test_a_forged_state_is_refused(old, tmp_path):
    """Whoever changes a key and all digests above it cannot change what a quorum attested."""
    path = old / "replica-1" / "state.sqlite"
    rewrite(path, load_cluster_file(old).cluster_id, 1, [(b"k0", b"forged")])
    assert "its state cannot be used: state file damaged" in refused(tmp_path, old / "replica-1")
    rewrite(path, load_cluster_file(old).cluster_id, 1, [], with_header=True)
    assert "its state cannot be used: state file damaged" in refused(tmp_path, old / "replica-1")


@pytest.fixture
def otherwise(monkeypatch):
    """Have survivors be read as if `change` had happened to the one with this number."""

    def plan(number, change):
        read = survivors._read

        def changed(opened, marks=None):
            survivor = read(opened, marks)
            if survivor.home.number == number:
                change(survivor)
            return survivor

        monkeypatch.setattr(survivors, "_read", changed)

    return plan


@pytest.mark.parametrize("number", [0, 2], ids=["the shorter", "the equal"])
def test_two_whose_states_differ_are_named_and_nothing_is_made(old, tmp_path, otherwise, number):
    otherwise(number, lambda survivor: setattr(survivor, "digest", b"\xaa" * 32))
    text = refused(tmp_path, old / "replica-1", old / f"replica-{number}")
    assert "contradict each other at slot" in text
    for one in (1, number):
        assert f"replica {one} ({old / f'replica-{one}'})" in text
    assert "aaaaaaaaaaaaaaaa" in text
    assert not (tmp_path / "new").exists()


def test_two_that_executed_different_batches_are_named_by_the_slot(old, tmp_path, otherwise):
    def change(survivor):
        survivor.batches[survivor.executed] = b"\xaa" * 32

    otherwise(2, change)
    with plan_of(tmp_path, old / "replica-1") as plan:
        executed = plan.best.executed
    text = refused(tmp_path, old / "replica-1", old / "replica-2")
    assert f"contradict each other after slot {executed - 1}: replica 1" in text
    assert "aaaaaaaaaaaaaaaa" in text


# The new cluster


def test_the_new_cluster_has_the_state_and_names_it(old, tmp_path):
    plan, cluster = refound(tmp_path, old / "replica-1")
    genesis, before = cluster.genesis, load_cluster_file(old).genesis
    assert genesis.founding == plan.founding
    assert genesis.cluster_id() != before.cluster_id()
    assert genesis.limits == before.limits
    assert set(before.operators) < set(genesis.operators)
    assert not {m.log_public_key for m in genesis.members} & {m.log_public_key for m in before.members}
    for number in range(3):
        home = load_home(tmp_path / "new" / f"replica-{number}")
        found = Audit().run(home, lambda _: None)
        assert found.faults == []
        assert (found.slot, found.keys) == (plan.base, KEYS)
        assert plan.founding.cluster_id.hex() in found.notes[0]


@on_loop
async def test_the_version_in_force_stays_in_force_and_its_code_is_needed(tmp_path, monkeypatch):
    monkeypatch.setattr(Versioned, "version", 2)
    application = "tests.replica.core.test_versions:Versioned"
    async with Nodes(tmp_path / "old", limits=LIMITS, milestones=RULE, application=application) as cluster:
        cluster.start()
        await cluster.wait_ready()
        async with cluster.client() as client:
            assert await client.execute(b"k") == b"0"
            operator = load_client_key(tmp_path / "old" / "operator")
            async with Council(cluster.cluster, operator) as council:
                done = await council.order(encode_activation(2))
            assert await client.execute(b"k") == b"2"
        await cluster.wait_quiet()
    with plan_of(tmp_path, tmp_path / "old" / "replica-1") as plan:
        assert (plan.version, plan.has_appraisal) == (2, False)
        assert plan.base > done.slot
    monkeypatch.setattr(Versioned, "version", 1)
    text = refused(tmp_path, tmp_path / "old" / "replica-1")
    assert f"version 2 of the application {application} is in force after slot {done.slot}" in text
    assert "no version above 1: install the code" in text
    monkeypatch.setattr(Versioned, "version", 2)
    refound(tmp_path, tmp_path / "old" / "replica-1", application=application)
    async with Nodes(tmp_path / "new", milestones=RULE) as cluster:
        cluster.start(0, 1)
        monkeypatch.setattr(Versioned, "version", 1)
        cluster.make(2)
        with pytest.raises(ApplicationLoadError, match="version 2 is in force after slot"):
            cluster.nodes[2].start()
        await cluster.stop(2)
        await cluster.wait_ready(0, 1)
        async with cluster.client() as client:
            assert await client.execute(b"k") == b"2"


def test_what_is_demanded_of_the_old_logs_is_not_carried_over_and_said_to_be_lost(old, tmp_path):
    with (old / "cluster.toml").open("a") as file:
        file.write('\n[appraisal]\nminimum_evidence = "self-asserted"\n')
    plan, cluster = refound(tmp_path, old / "replica-1")
    assert plan.has_appraisal
    assert sum("[appraisal]" in text for text in plan.losses()) == 1
    assert cluster.appraisal.minimum_evidence is EvidenceLevel.NONE
    assert "appraisal" not in (tmp_path / "new" / "cluster.toml").read_text()


def test_nothing_is_left_where_the_state_cannot_be_written(old, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "no room")

    monkeypatch.setattr(refounding, "write_milestone", full)
    with pytest.raises(ProvisionError, match="no room"):
        refound(tmp_path, old / "replica-1")
    assert not (tmp_path / "new").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old"]


@on_loop
async def test_it_goes_on_and_who_lacks_the_state_has_it_from_the_others(old, tmp_path):
    plan, _ = refound(tmp_path, old / "replica-1")
    (tmp_path / "new" / "replica-2" / "state.sqlite").unlink()
    async with Nodes(tmp_path / "new", milestones=RULE) as cluster:
        cluster.start()
        assert cluster.nodes[0].core.executed == plan.base
        assert cluster.nodes[2].core.executed == 0
        await until(lambda: cluster.nodes[2].core.executed == plan.base, "the founding state fetched")
        await cluster.wait_ready()
        async with cluster.client(patience_ms=100) as client:
            for number in range(KEYS):
                assert await client.get(f"k{number}") == f"v{number}".encode()
                await client.put(f"n{number}", "new")
            await until(lambda: cluster.nodes[2].core.executed == cluster.nodes[0].core.executed, "equal")
            await cluster.wait_quiet()
            assert len({node.core.executor.digest() for node in cluster.nodes.values()}) == 1
            # Beyond its first milestone it is restarted like any other.
            await until(lambda: cluster.nodes[1].keeper.slot > plan.base, "a milestone of its own")
            await cluster.stop(1)
            cluster.start(1)
            await cluster.wait_ready()
            assert await client.get("n0") == b"new"


async def refused_at_start(directory, number):
    async with Nodes(directory) as nodes:
        with pytest.raises(StoreError) as caught:
            nodes.make(number)
        return str(caught.value)


@pytest.mark.parametrize("forged", ["a key", "a key and the header"])
@on_loop
async def test_a_folder_with_another_state_is_refused_at_its_start(old, tmp_path, forged):
    plan, cluster = refound(tmp_path, old / "replica-1")
    path = tmp_path / "new" / "replica-1" / "state.sqlite"
    rewrite(path, cluster.cluster_id, 1, [(b"k0", b"forged")], with_header=forged.endswith("header"))
    text = await refused_at_start(tmp_path / "new", 1)
    assert str(path) in text
    assert "begins with another state than this cluster was founded with" in text
    assert f"cluster {plan.founding.cluster_id.hex()} after slot {plan.best.executed}" in text
    assert "the application's state has the digest" in text
    assert "move this file away" in text
    assert path.exists(), "perhaps nobody else has it"


@on_loop
async def test_a_folder_of_another_founding_is_refused_at_its_start(old, tmp_path):
    """With another origin in its genesis it is another cluster, of the same keys and the same state."""
    _, cluster = refound(tmp_path, old / "replica-1")
    changed = replace(cluster.genesis, founding=replace(cluster.genesis.founding, digest=bytes(32)))
    (tmp_path / "new" / "cluster.toml").write_bytes(dump_cluster_file(changed, cluster.replicas))
    assert "belongs to another replica or cluster" in await refused_at_start(tmp_path / "new", 1)
