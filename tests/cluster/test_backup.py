"""Backup and restore with real replicas: data comes back, and no log is ever rolled back by it."""

import asyncio
import io
import json
import os
import shutil
import signal
import sqlite3
import tarfile
from contextlib import closing

import pytest

from replica.cluster.provision import assemble, keygen, make_client
from replica.cluster.replicatoml import TrustedLogSettings
from replica.operations.backup import own_end
from tests.cluster.test_members import Changing
from tests.support.calling import json_caller
from tests.support.cluster import Processes
from tests.support.keymaterial import exposed_in, secrets_of
from tests.support.ports import free_ports
from tests.support.waiting import on_loop, wait_for
from tests.trustlog.service.support import Service, public_folder
from trustlog import BackendKind, open_log

pytestmark = pytest.mark.cluster


@pytest.fixture
def call(capsys):
    return json_caller(capsys)


def put(cluster, first, count):
    @on_loop
    async def work():
        async with cluster.client() as client:
            for number in range(first, first + count):
                await client.put(f"k{number}", f"v{number}")

    work()


def check(cluster, count):
    """All are equal, nobody is doubted, and what was acknowledged is there."""

    @on_loop
    async def work():
        reports = await cluster.wait_equal()
        assert all(one["verdict"] in {"trusted", "suspected"} for r in reports.values() for one in r["verdicts"])
        async with cluster.client() as client:
            for number in range(count):
                assert await client.get(f"k{number}") == f"v{number}".encode()

    work()


def members(archive):
    with tarfile.open(archive) as opened:
        return {member.name: opened.extractfile(member).read() for member in opened}


def rewrite(archive, target, change):
    """Write the archive again with `change(name, content)` for its members."""
    with tarfile.open(target, "w") as opened:
        for name, content in members(archive).items():
            new = change(name, content)
            if new is not None:
                member = tarfile.TarInfo(name)
                member.size = len(new)
                opened.addfile(member, io.BytesIO(new))


def log_end(cluster, number):
    with open_log(cluster.folder(number) / "log") as log:
        return log.last


def files(folder):
    """What is in a folder; what SQLite makes to read a database holds nothing."""
    found = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content for name, content in found.items() if not name.endswith(("-shm", "-wal"))}


def give_away(folder):
    """Make the folder another user's, as root finds it who restores it."""
    for path in (folder, *folder.rglob("*")) if os.geteuid() == 0 else ():
        os.chown(path, 65534, 65534)


def owners(folder):
    return {path.stat().st_uid for path in (folder, *folder.rglob("*"))}


def test_lost_databases_come_back_and_the_log_goes_on(tmp_path, call):
    with Processes(tmp_path / "c") as cluster:
        cluster.start_and_wait()
        put(cluster, 0, 20)
        code, made = call("backup", cluster.folder(1), tmp_path / "old")  # while it runs
        assert code == 0
        assert (tmp_path / "old").stat().st_mode & 0o777 == 0o600
        assert made["log_last"] > 10
        put(cluster, 20, 20)
        assert cluster.kill(1, signal.SIGTERM) == 0
        said = log_end(cluster, 1)
        (cluster.folder(1) / "store.sqlite").write_bytes(os.urandom(8192))
        for name in ("store.sqlite-wal", "store.sqlite-shm", "state.sqlite"):
            (cluster.folder(1) / name).unlink(missing_ok=True)
        give_away(cluster.folder(1))
        code, done = call("restore", tmp_path / "old", cluster.folder(1))
        assert code == 0, done
        assert owners(cluster.folder(1)) == ({65534} if os.geteuid() == 0 else {os.geteuid()}), (
            "root does it for another"
        )
        assert (done["log_last"], done["missing"], done["warnings"]) == (said, said - made["log_last"], [])
        assert own_end(cluster.folder(1) / "store.sqlite", 1) == made["log_last"]
        assert (cluster.folder(1) / "store.sqlite.damaged-1").exists(), "what was there is kept"
        cluster.start_and_wait(1)
        put(cluster, 40, 5)
        check(cluster, 45)
        wait_for(lambda: call("health", cluster.folder(1))[0] == 0, "healthy")
        assert cluster.kill(1, signal.SIGTERM) == 0
        assert log_end(cluster, 1) > said


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_backup_from_before_a_change_of_members(tmp_path, call):
    """Its state is of no use, which is said, and is no damage; also if it is put there by hand."""
    with Changing(tmp_path / "c") as cluster:
        cluster.start_and_wait()
        put(cluster, 0, 150)
        folder = cluster.folder(1)
        code, made = call("backup", folder, tmp_path / "old")
        assert (code, made["slot"] > 0) == (0, True)
        cluster.kill(2)
        cluster.member("replace", cluster.directory, cluster.make(2, "new-2"))
        cluster.start(2)
        asyncio.run(cluster.until_all_are_over(1))
        put(cluster, 150, 20)
        assert cluster.kill(1, signal.SIGTERM) == 0
        kept = cluster.log_text(1)
        for path in [*folder.glob("store.sqlite*"), *folder.glob("state.sqlite*")]:
            path.unlink()
        code, done = call("restore", tmp_path / "old", folder)
        assert (code, done["left_of_list"], done["files"]) == (0, 0, ["store.sqlite"])
        assert (done["slot"], done["missing"], done["warnings"]) == (None, None, [])
        for by_hand in (False, True):
            if by_hand:
                for path in folder.glob("state.sqlite*"):
                    path.unlink()
                (folder / "state.sqlite").write_bytes(members(tmp_path / "old")["state.sqlite"])
                (folder / "state.sqlite").chmod(0o600)
            cluster.start(1)
            wait_for(lambda: call("health", folder)[0] == 0, "healthy")
            assert cluster.kill(1, signal.SIGTERM) == 0
            said = [json.loads(line) for line in cluster.log_text(1).removeprefix(kept).splitlines()]
            kept = cluster.log_text(1)
            assert any("no state of the present members is here" in line["event"] for line in said)
            assert any("of an earlier list of members and is not used" in line["event"] for line in said) is by_hand
            assert [line for line in said if line["level"] == "error" or "damaged" in line["event"]] == []
            assert [path.name for path in folder.glob("*.*-1")] == ["state.sqlite.earlier-1"] * by_hand
        _, found = call("doctor", folder, "--offline")
        assert [one for one in found["findings"] if one["severity"] != "ok" and one["check"] != "mode"] == []


def test_what_is_refused_changes_nothing(tmp_path, call):
    with Processes(tmp_path / "c") as cluster:
        cluster.start_and_wait()
        put(cluster, 0, 10)
        folder = cluster.folder(1)
        assert call("backup", folder, tmp_path / "one")[0] == 0
        code, done = call("backup", folder, tmp_path / "one")
        assert (code, "not overwritten" in done["error"]["message"]) == (1, True)
        put(cluster, 10, 3)
        code, done = call("restore", tmp_path / "one", folder)
        assert (code, "stop the replica first" in done["error"]["message"]) == (1, True)
        for number in range(3):
            cluster.kill(number, signal.SIGTERM)
        before = files(folder)

        def refused(archive, where, words):
            code, done = call("restore", archive, where)
            assert code == 1
            assert words in done["error"]["message"]

        refused(tmp_path / "one", cluster.folder(2), "of replica 1")
        refused(tmp_path / "one", folder, "is whole and reaches entry")
        (folder / "store.sqlite").rename(tmp_path / "kept.sqlite")
        flipped = lambda name, content: content[:-1] + bytes([content[-1] ^ 1]) if name == "store.sqlite" else content  # noqa: E731
        rewrite(tmp_path / "one", tmp_path / "flipped", flipped)
        refused(tmp_path / "flipped", folder, "is damaged or altered")
        rewrite(tmp_path / "one", tmp_path / "short", lambda name, content: None if name == "state.sqlite" else content)
        refused(tmp_path / "short", folder, "cut off")
        log_state = (folder / "log" / "log.state").read_bytes()
        more = json.loads(members(tmp_path / "one")["manifest.json"])
        more["files"]["log/log.state"] = {"size": len(log_state), "sha256": "00" * 32}
        rewrite(
            tmp_path / "one",
            tmp_path / "smuggled",
            lambda name, content: json.dumps(more).encode() if name == "manifest.json" else content,
        )
        refused(tmp_path / "smuggled", folder, "which no backup holds")
        (tmp_path / "junk").write_bytes(b"no tar at all" * 100)
        refused(tmp_path / "junk", folder, "not a backup")
        (tmp_path / "cut").write_bytes((tmp_path / "one").read_bytes()[:20_000])
        refused(tmp_path / "cut", folder, "not a backup")
        (tmp_path / "kept.sqlite").rename(folder / "store.sqlite")
        assert before == files(folder)


def test_only_what_is_lost_is_put_back(tmp_path, call):
    """The store is whole and newer, the state is gone: the state comes back, the store stays."""
    with Processes(tmp_path / "c") as cluster:
        cluster.start_and_wait()
        put(cluster, 0, 10)
        folder = cluster.folder(1)
        assert call("backup", folder, tmp_path / "one")[0] == 0
        put(cluster, 10, 5)
        cluster.kill(1, signal.SIGTERM)
        store = (folder / "store.sqlite").read_bytes()
        (folder / "state.sqlite").unlink()
        code, done = call("restore", tmp_path / "one", folder)
        assert (code, done["files"], done["missing"]) == (0, ["state.sqlite"], 0)
        assert (folder / "store.sqlite").read_bytes() == store
        cluster.start_and_wait(1)
        put(cluster, 15, 5)
        check(cluster, 20)


def test_a_log_that_was_rolled_back_is_found_before_it_speaks(tmp_path, call):
    """Somebody copied the whole folder, and put it back: the newer backup shows what that log denies."""
    with Processes(tmp_path / "c") as cluster:
        cluster.start_and_wait()
        put(cluster, 0, 10)
        cluster.kill(1, signal.SIGTERM)
        shutil.copytree(cluster.folder(1), tmp_path / "copy")
        cluster.start_and_wait(1)
        put(cluster, 10, 10)
        assert call("backup", cluster.folder(1), tmp_path / "new")[0] == 0
        cluster.kill(1, signal.SIGTERM)
        shutil.rmtree(cluster.folder(1))
        shutil.copytree(tmp_path / "copy", cluster.folder(1))
        (cluster.folder(1) / "store.sqlite").unlink()
        code, done = call("restore", tmp_path / "new", cluster.folder(1))
        assert code == 1
        assert "the log was rolled back" in done["error"]["message"]
        assert "a new log" in done["error"]["message"]
        assert not (cluster.folder(1) / "store.sqlite").exists()
        # The store of a log that was rolled back shows it too, whatever the backup.
        assert call("backup", cluster.folder(1), tmp_path / "empty")[0] == 0
        (tmp_path / "newer").write_bytes(members(tmp_path / "new")["store.sqlite"])
        (tmp_path / "newer").replace(cluster.folder(1) / "store.sqlite")
        assert "was rolled back" in call("restore", tmp_path / "empty", cluster.folder(1))[1]["error"]["message"]
        (cluster.folder(1) / "store.sqlite").unlink()
        # A manifest that lies about it does not help: what the store holds counts.
        manifest = json.loads(members(tmp_path / "new")["manifest.json"]) | {"log_last": 1}
        lying = lambda name, content: json.dumps(manifest).encode() if name == "manifest.json" else content  # noqa: E731
        rewrite(tmp_path / "new", tmp_path / "lying", lying)
        assert "was rolled back" in call("restore", tmp_path / "lying", cluster.folder(1))[1]["error"]["message"]


def test_a_lost_log_is_never_restored(tmp_path, call):
    with Processes(tmp_path / "c") as cluster:
        cluster.start_and_wait()
        put(cluster, 0, 5)
        assert call("backup", cluster.folder(1), tmp_path / "b")[0] == 0
        cluster.kill(1, signal.SIGTERM)
        shutil.rmtree(cluster.folder(1))
        code, done = call("restore", tmp_path / "b", cluster.folder(1))
        assert code == 1
        assert "Make a new log" in done["error"]["message"]
        assert "trustlog-replica keygen" in done["error"]["message"]
        assert not cluster.folder(1).exists()
        assert not [path for path in tmp_path.joinpath("c").iterdir() if path.name.startswith(".")]


def test_nothing_of_the_log_is_in_a_backup(tmp_path, call):
    with Processes(tmp_path / "c", log_kind=BackendKind.PROCESS) as cluster:
        cluster.start_and_wait()
        put(cluster, 0, 5)
        assert call("backup", cluster.folder(0), tmp_path / "b")[0] == 0
        cluster.kill(0, signal.SIGTERM)
        assert not {name for name in members(tmp_path / "b") if name.startswith("log/")}
        secrets = secrets_of(cluster.folder(0), tls=False)
        assert exposed_in((tmp_path / "b").read_bytes(), secrets) == []
        # The search finds what is there: the TLS key, and a log's key that somebody would have added.
        assert exposed_in((tmp_path / "b").read_bytes(), secrets_of(cluster.folder(0))) == ["tls.key"]
        seal = (cluster.folder(0) / "log" / "seal.key").read_bytes()
        assert exposed_in((tmp_path / "b").read_bytes() + seal, secrets) == ["log/seal.key"]


def test_what_was_stored_and_not_attested_is_left_out(tmp_path, call):
    with Processes(tmp_path / "c") as cluster:
        cluster.start_and_wait()
        put(cluster, 0, 5)
        cluster.kill(1, signal.SIGTERM)
        end = log_end(cluster, 1)
        with closing(sqlite3.connect(cluster.folder(1) / "store.sqlite")) as db:
            row = (1, end + 1, end + 1, None, b"\0\1\0\0\0\1x")
            db.execute("insert into groups (log, first, last, attestation, payloads) values (?, ?, ?, ?, ?)", row)
            db.commit()
        code, made = call("backup", cluster.folder(1), tmp_path / "b")
        assert (code, made["log_last"]) == (0, end)
        (tmp_path / "copy").write_bytes(members(tmp_path / "b")["store.sqlite"])
        with closing(sqlite3.connect(tmp_path / "copy")) as db:
            assert db.execute("select max(last) from groups where log = 1").fetchone() == (end,)


def test_a_folder_comes_back_where_a_service_keeps_the_log(tmp_path, call):
    """The machine's disk is lost, and the log's, under a user of its own, is not: the folder is made again."""
    with public_folder() as kept, Service(kept) as service:
        folders = [tmp_path / "c" / f"replica-{number}" for number in range(3)]
        ports = free_ports(3)
        served = TrustedLogSettings(BackendKind.PROCESS, service.socket)
        publics = [
            keygen(folder, number, "127.0.0.1", port, served if number == 1 else TrustedLogSettings())
            for number, (folder, port) in enumerate(zip(folders, ports, strict=True))
        ]
        assemble(publics, tmp_path / "c" / "cluster.toml")
        make_client(tmp_path / "c" / "client")
        with Processes(tmp_path / "c") as cluster:
            cluster.start_and_wait()
            put(cluster, 0, 10)
            assert call("backup", folders[1], tmp_path / "b")[0] == 0
            put(cluster, 10, 10)
            code, done = call("restore", tmp_path / "b", tmp_path / "c" / "elsewhere")
            assert code == 1, "its log is in use"
            assert not (tmp_path / "c" / "elsewhere").exists()
            assert cluster.kill(1, signal.SIGTERM) == 0
            shutil.rmtree(folders[1])
            code, done = call("restore", tmp_path / "b", folders[1])
            assert code == 0, done
            assert done["missing"] > 0
            assert (folders[1] / "tls.key").stat().st_mode & 0o777 == 0o600
            assert folders[1].stat().st_mode & 0o777 == 0o700
            cluster.start_and_wait(1)
            put(cluster, 20, 5)
            check(cluster, 25)
