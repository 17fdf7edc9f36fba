"""Payloads at rest: sealed rows open at their own place with the key only, and a sealed cluster lives like any other."""

import dataclasses
import json
import os
import random
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from replica.cluster.home import load_home
from replica.core.group import encode_payloads
from replica.core.tree import bucket_of, root_digest
from replica.shell.atrest import CLEAR, GROUP, Clear, Sealed, UnsealError
from replica.shell.opening import open_trusted_log, payload_seal
from replica.shell.salvage import salvage
from replica.shell.sqlitefile import StoreError
from replica.shell.statestore import Milestone, StateStore
from replica.shell.statetree import StateDamagedError
from replica.shell.store import GroupDamagedError, Store, own_group
from tests.replica.shell.states import NONE, MappedStore
from tests.support.cluster import Processes
from tests.support.waiting import on_loop
from trustlog import BackendKind

KEY, OTHER = bytes(range(32)), bytes(range(1, 33))
CLUSTER_ID = bytes(32)
SECRET = b"a secret operation"


def test_a_sealed_value_opens_at_its_own_place_with_its_key_only():
    seal = Sealed(KEY)
    sealed = seal.seal(GROUP, 1, 2, SECRET)
    assert len(sealed) == len(SECRET) + 32
    assert seal.unseal(GROUP, 1, 2, sealed) == SECRET
    assert seal.seal(GROUP, 1, 2, SECRET) != sealed
    for bad in (
        lambda: seal.unseal(GROUP, 1, 3, sealed),
        lambda: seal.unseal(GROUP, 2, 2, sealed),
        lambda: seal.unseal(b"p", 1, 2, sealed),
        lambda: Sealed(OTHER).unseal(GROUP, 1, 2, sealed),
        lambda: seal.unseal(GROUP, 1, 2, sealed[:31]),
        lambda: seal.unseal(GROUP, 1, 2, b""),
    ):
        with pytest.raises(UnsealError):
            bad()
    for at in range(len(sealed)):
        changed = bytearray(sealed)
        changed[at] ^= 1
        with pytest.raises(UnsealError):
            seal.unseal(GROUP, 1, 2, bytes(changed))


@pytest.mark.parametrize(("key", "value"), [(b"k", b""), (b"k" * 300, b"v" * 1000)])
def test_a_sealed_entry(key, value):
    seal = Sealed(KEY)
    name, sealed = seal.seal_entry(1, key, value)
    assert (len(name), seal.entry_name(1, key)) == (32, name)
    assert seal.entry_name(0, key) != name
    assert seal.unseal_entry(1, name, sealed) == (key, value)
    for tree, other in ((0, name), (1, bytes(32))):
        with pytest.raises(UnsealError):
            seal.unseal_entry(tree, other, sealed)
    assert CLEAR.unseal_entry(1, *CLEAR.seal_entry(1, key, value)) == (key, value)


def filled(folder: Path, seal: Clear) -> Store:
    store = Store(folder / "store.sqlite", CLUSTER_ID, 0, seal=seal)
    other = dataclasses.replace(own_group(1, 1, (SECRET, b"x")), attestation=b"a" * 234)
    store.write([other], None, own_group(0, 1, (SECRET,)))
    store.write([], (1, b"b" * 234), own_group(0, 2, (SECRET, SECRET)))
    return store


def everything(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file())


@pytest.mark.parametrize("seal", [CLEAR, Sealed(KEY)], ids=["clear", "sealed"])
def test_the_store_holds_no_payload_in_the_clear(tmp_path, seal):
    with closing(filled(tmp_path, seal)) as store:
        assert store.read(1, 1)[0].payloads == encode_payloads((SECRET, b"x"))
        assert [group.payloads for group in store.groups(0)] == [
            encode_payloads((SECRET,)),
            encode_payloads((SECRET, SECRET)),
        ]
        assert store.last_group(0).last == 3
        good = dataclasses.replace(own_group(0, 1, (b"other",)), attestation=b"c" * 234)
        store.replace(good)
        assert store.read(0, 1)[0] == good
    assert (SECRET in everything(tmp_path)) is (seal is CLEAR), "the check can fail"


def test_a_row_that_was_moved_is_damage(tmp_path):
    filled(tmp_path, Sealed(KEY)).close()
    with closing(sqlite3.connect(tmp_path / "store.sqlite", isolation_level=None)) as db:
        (content,) = db.execute("select payloads from groups where log = 0 and first = 1").fetchone()
        db.execute("update groups set payloads = ? where log = 1", (content,))
    with closing(Store(tmp_path / "store.sqlite", CLUSTER_ID, 0, seal=Sealed(KEY))) as store:
        assert store.read(0, 1)
        with pytest.raises(GroupDamagedError):
            store.read(1, 1)


@pytest.mark.parametrize(("made", "opened"), [(CLEAR, Sealed(KEY)), (Sealed(KEY), CLEAR)], ids=["clear", "sealed"])
def test_a_file_stays_as_it_was_made(tmp_path, made, opened):
    filled(tmp_path, made).close()
    StateStore(tmp_path / "state.sqlite", CLUSTER_ID, 0, seal=made).close()
    before = everything(tmp_path)
    for kind, name in ((Store, "store.sqlite"), (StateStore, "state.sqlite")):
        with pytest.raises(StoreError, match="cannot be changed"):
            kind(tmp_path / name, CLUSTER_ID, 0, seal=opened)
    assert len(everything(tmp_path)) >= len(before)
    with closing(Store(tmp_path / "store.sqlite", CLUSTER_ID, 0, seal=made)) as store:
        assert store.read(0, 1)


def test_a_sealed_store_is_salvaged(tmp_path):
    filled(tmp_path, Sealed(KEY)).close()
    done = salvage(tmp_path / "store.sqlite", CLUSTER_ID, 0, Sealed(KEY))
    assert (done.groups, done.missing) == (3, ())
    with closing(Store(tmp_path / "store.sqlite", CLUSTER_ID, 0, seal=Sealed(KEY))) as store:
        assert store.read(0, 1)[0].attestation == b"b" * 234
    assert SECRET not in everything(tmp_path)


def milestone(changes: dict[bytes, bytes | None], slot=1) -> Milestone:
    return Milestone(slot, b"header", b"certificate", (b"log",), (SECRET,), (tuple(changes.items()), ()), NONE)


def content(store: StateStore) -> tuple[dict[bytes, bytes], bytes, tuple[bytes, ...]]:
    with store.load() as view:
        tree = view.trees[0]
        frozen = tree.frozen()  # as a restart reads it
        assert (frozen.nodes(), frozen.count()) == (tree.nodes(), tree.count())
        for bucket in {bucket_of(key) for key, _ in tree.entries()}:
            assert frozen.bucket(bucket) == tree.bucket(bucket)
        return dict(tree.entries()), tree.root(), view.batches


def test_a_sealed_state_is_the_same_state(tmp_path):
    """The same digests, whatever order the sealed names have, through changes and removals."""
    chosen = random.Random(1)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with (
        closing(MappedStore(tmp_path / "a" / "s", CLUSTER_ID, 0)) as clear,
        closing(MappedStore(tmp_path / "b" / "s", CLUSTER_ID, 0, seal=Sealed(KEY))) as sealed,
    ):
        expected: dict[bytes, bytes] = {}
        for slot in range(1, 5):
            changes: dict[bytes, bytes | None] = {}
            for _ in range(800):
                key = b"%d" % chosen.randrange(2000)
                # More than one key in many a bucket, as 65,536 of them would hardly have.
                changes[key] = None if chosen.random() < 0.2 else SECRET + key
            for key, value in changes.items():
                if value is None:
                    expected.pop(key, None)
                else:
                    expected[key] = value
            for store in (clear, sealed):
                store.write(milestone(changes, slot))
            assert content(sealed) == content(clear)
            assert content(sealed)[0] == expected
        assert content(sealed)[1] != root_digest((bytes(32),) * 256, 0)
    assert SECRET in everything(tmp_path / "a")
    assert SECRET not in everything(tmp_path / "b")


@pytest.mark.parametrize(
    "rot",
    ["update entries set value = zeroblob(length(value))", "update parts set content = zeroblob(length(content))"],
)
def test_damage_to_a_sealed_state_is_damage(tmp_path, rot):
    with closing(MappedStore(tmp_path / "s", CLUSTER_ID, 0, seal=Sealed(KEY))) as store:
        store.write(milestone({b"k": b"v"}))
    with closing(sqlite3.connect(tmp_path / "s", isolation_level=None)) as db:
        db.execute(rot)
    with (
        closing(MappedStore(tmp_path / "s", CLUSTER_ID, 0, seal=Sealed(KEY))) as store,
        pytest.raises(StateDamagedError),
    ):
        content(store)


@pytest.mark.cluster
def test_a_cluster_that_seals_its_payloads(tmp_path):
    """It restarts and reads its store; its files hold no operation; `inspect` asks the stopped replica's log."""
    with Processes(tmp_path / "c", log_kind=BackendKind.PROCESS, encrypt_store=True) as cluster:
        cluster.start_and_wait()

        @on_loop
        async def use(expected=None):
            async with cluster.client() as client:
                if expected is None:
                    await client.put("name", SECRET.decode())
                else:
                    assert await client.get("name") == expected
                reports = await cluster.wait_equal()
                assert {report["payloads_at_rest"] for report in reports.values()} == {"sealed"}

        use()
        for number in range(3):
            cluster.kill(number, how=15)
        for number in range(3):
            assert SECRET not in everything(cluster.folder(number))
        assert SECRET.decode() not in "".join(map(cluster.log_text, range(3)))
        command = [sys.executable, "-m", "replica.cli.main", "inspect", cluster.folder(0), "--log", "0", "-o", "json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=dict(os.environ))
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["entries"]
        cluster.start_and_wait()
        use(SECRET)


def test_the_key_is_the_logs(tmp_path):
    """Each replica's own, the same at every opening, and never in the replica's folder outside the log's."""
    cluster = Processes(tmp_path / "c", log_kind=BackendKind.PROCESS, encrypt_store=True)
    keys = []
    for number in (0, 0, 1):
        home = load_home(cluster.folder(number))
        with closing(open_trusted_log(home, None)) as log:
            keys.append(log.store_key())
            assert isinstance(payload_seal(home, log), Sealed)
    assert keys[0] == keys[1] != keys[2]
    assert keys[0] not in everything(cluster.folder(0)) + everything(cluster.folder(0) / "log")
