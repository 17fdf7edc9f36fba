"""The audit of folders that real replicas wrote: all of it is looked at, and whatever is bad is named."""

import json
import shutil
import signal
import sqlite3
from contextlib import closing
from dataclasses import replace

import pytest

from replica.cli.main import main
from replica.cluster.clusterfile import load_cluster_file
from replica.cluster.provision import init_cluster
from replica.core.entries import Commit, Suspect, decode_entry
from replica.core.genesis import Limits
from replica.core.group import encode_group, encode_payloads
from replica.core.layout import Reader
from tests.support.cluster import Processes
from tests.support.waiting import on_loop
from trustlog import entry_digest, open_log

pytestmark = pytest.mark.cluster


@pytest.fixture
def call(capsys):
    def call_program(*arguments, output="json"):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["audit", *(str(argument) for argument in arguments), "-o", output])
        out, err = capsys.readouterr()
        return ended.value.code, json.loads(out) if output == "json" else out, err

    return call_program


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A cluster's directory after some work and a change of view; nobody runs."""
    directory = tmp_path_factory.mktemp("a") / "c"
    with Processes(directory) as cluster:
        cluster.start_and_wait()

        @on_loop
        async def work():
            async with cluster.client() as client:
                for number in range(30):
                    await client.put(f"k{number}", f"v{number}")
                cluster.kill(0)
                await client.put("after", "a change of view")
                cluster.start(0)
                await cluster.wait_ready()
                for number in range(30):
                    await client.put(f"l{number}", f"v{number}")
            await cluster.wait_equal()

        work()
        for number in range(3):
            cluster.kill(number, signal.SIGTERM)
    return directory


@pytest.fixture
def copy(written, tmp_path):
    shutil.copytree(written, tmp_path / "c")
    return tmp_path / "c"


def change(folder, statement, *values):
    with closing(sqlite3.connect(folder / "store.sqlite")) as db:
        db.create_function("flip", 2, lambda blob, at: blob[:at] + bytes([blob[at] ^ 1]) + blob[at + 1 :])
        changed = db.execute(statement, values).rowcount
        db.commit()
    assert changed == 1


def a_group(folder, log):
    """The first entry of some group of `log` between others: where groups begin depends on what the author had to say."""
    with closing(sqlite3.connect(folder / "store.sqlite")) as db:
        return db.execute("select first from groups where log = ? order by first limit 1 offset 2", (log,)).fetchone()[
            0
        ]


def test_everything_is_well_and_was_looked_at(written, call):
    code, found, err = call(written)
    assert (code, found["faults"], err) == (0, [], "")
    assert len(found["replicas"]) == 3
    for replica in found["replicas"]:
        for log in replica["logs"]:
            assert log["entries"] == log["last"] - log["first"] + 1 == log["judged"] > 30
        assert not [note for note in replica["notes"] if "cannot be judged" not in note]
    code, out, _ = call(written / "replica-0", output="table")
    assert (code, "all is well" in out) == (0, True)
    _, out, err = call(written / "replica-0", "--progress", output="plain")
    assert out == ""
    assert "replica 0" in err
    assert "100%" in err or "/" in err


@pytest.mark.parametrize("column", ["payloads", "attestation"])
def test_one_flipped_bit_is_named(copy, call, column):
    first = a_group(copy / "replica-0", 1)
    change(
        copy / "replica-0",
        f"update groups set {column} = flip({column}, 40) where log = 1 and first = ?",  # noqa: S608
        first,
    )
    code, found, _ = call(copy / "replica-0")
    assert code == 1
    named = [fault["where"] for fault in found["faults"]]
    assert named[0].startswith(f"log 1, entries {first} to ")
    assert found["faults"][0]["file"] == str(copy / "replica-0" / "store.sqlite")
    assert "stop the replica and start it again" in found["faults"][0]["remedy"]
    code, out, _ = call(copy / "replica-0", output="plain")
    assert out.splitlines()[0].split("\t")[1] == named[0]
    # The others' folders are whole.
    assert call(copy / "replica-1", copy / "replica-2")[0] == 0


def test_a_missing_group_is_named(copy, call):
    first = a_group(copy / "replica-2", 0)
    change(copy / "replica-2", "delete from groups where log = 0 and first = ?", first)
    code, found, _ = call(copy / "replica-2")
    assert code == 1
    (fault,) = found["faults"]
    assert fault["where"].startswith(f"log 0, entries {first} to ")
    assert "are missing" in fault["text"]


def test_a_group_in_another_place_is_named(copy, call):
    change(
        copy / "replica-2",
        "update groups set log = 1, first = 100000, last = 100000 + last - first where log = 0 and first = ?",
        a_group(copy / "replica-2", 0),
    )
    code, found, _ = call(copy / "replica-2")
    assert code == 1
    assert any(fault["where"].startswith("log 1, entries 100000") for fault in found["faults"])


def test_damage_of_the_files_structure_is_named(copy, call):
    for name in ("store.sqlite", "state.sqlite"):
        path = copy / "replica-1" / name
        whole = path.read_bytes()
        path.write_bytes(whole[:100] + bytes(len(whole) - 100))
        code, found, _ = call(copy / "replica-1")
        assert code == 1
        assert str(path) in {fault["file"] for fault in found["faults"]}
        path.write_bytes(whole)
    assert call(copy / "replica-1")[0] == 0


def last_group(folder, log):
    with closing(sqlite3.connect(folder / "store.sqlite")) as db:
        return db.execute("select max(last) from groups where log = ?", (log,)).fetchone()[0]


def add_group(folder, log, first, group):
    payloads = encode_payloads(group[1])
    with closing(sqlite3.connect(folder / "store.sqlite")) as db:
        raw = encode_group(group[0], payloads)
        row = (log, first, first + len(group[1]) - 1, raw[: -len(payloads)], payloads)
        db.execute("insert into groups (log, first, last, attestation, payloads) values (?, ?, ?, ?, ?)", row)
        db.commit()


def said_by(folder, payloads, genesis):
    """What a replica's own log attests next, if its host has it say these payloads."""
    with open_log(folder / "log") as log:
        return log.append([entry_digest(payload) for payload in payloads], context=genesis.context())


def test_a_malformed_entry_that_was_attested_accuses_its_author(copy, call):
    genesis = load_cluster_file(copy).genesis
    end = last_group(copy / "replica-0", 2)
    attestation = said_by(copy / "replica-2", [b"junk"], genesis)
    add_group(copy / "replica-0", 2, end + 1, (attestation, (b"junk",)))
    code, found, _ = call(copy / "replica-0")
    assert code == 1
    assert {fault["where"] for fault in found["faults"]} == {f"log 2, entry {end + 1}"}
    assert all("replace its replica" in fault["remedy"] for fault in found["faults"])


def test_an_entry_against_the_rules_accuses_its_author(copy, call):
    """Well formed, and signed: the same COMMIT said a second time."""
    cluster = load_cluster_file(copy)
    with closing(sqlite3.connect(copy / "replica-0" / "store.sqlite")) as db:
        rows = db.execute("select payloads from groups where log = 2 order by first desc").fetchall()
    for (raw,) in rows:
        reader = Reader(raw)
        payloads = [reader.take(size) for size in [reader.u32() for _ in range(reader.u16())]]
        commits = [
            one for one in payloads if isinstance(decode_entry(one, cluster.genesis, cluster.cluster_id), Commit)
        ]
        if commits:
            break
    end = last_group(copy / "replica-0", 2)
    attestation = said_by(copy / "replica-2", [commits[-1]], cluster.genesis)
    add_group(copy / "replica-0", 2, end + 1, (attestation, (commits[-1],)))
    code, found, _ = call(copy / "replica-0")
    assert code == 1
    (fault,) = found["faults"]
    assert fault["where"] == f"log 2, entry {end + 1}"
    assert "breaks the rule" in fault["text"]


def test_two_histories_in_two_folders(copy, call):
    """A trusted part that attests two things at one index: each folder is whole, together they prove it."""
    genesis = load_cluster_file(copy).genesis
    kept = (copy / "replica-2" / "log" / "log.state").read_bytes()
    end = last_group(copy / "replica-0", 2)
    for number, view in ((0, 1), (1, 2)):
        payload = Suspect(view).encode()
        attestation = said_by(copy / "replica-2", [payload], genesis)
        add_group(copy / f"replica-{number}", 2, end + 1, (attestation, (payload,)))
        (copy / "replica-2" / "log" / "log.state").write_bytes(kept)
    code, found, _ = call(copy / "replica-0", copy / "replica-1")
    assert code == 1
    assert any("two histories of one log" in fault["text"] for fault in found["faults"])


def test_what_cannot_be_audited_is_a_usage_error(copy, call, tmp_path):
    init_cluster(tmp_path / "other", base_port=0)
    code, found, _ = call(tmp_path / "other")
    assert (code, found["error"]["code"]) == (2, "no-store")
    code, found, _ = call(copy / "replica-0", tmp_path / "other" / "replica-1")
    assert (code, found["error"]["code"]) == (2, "other-cluster")
    assert call(tmp_path / "nothing")[0] == 2


def test_a_state_with_a_changed_key_is_named(tmp_path, call):
    """After enough work that a milestone is durable."""
    limits = replace(Limits(), checkpoint_interval=4, window=16)
    with Processes(tmp_path / "c", limits=limits) as cluster:
        cluster.start_and_wait()

        @on_loop
        async def work():
            async with cluster.client() as client:
                for number in range(80):
                    await client.put(f"k{number}", f"v{number}")
            await cluster.wait_equal()

        work()
        for number in range(3):
            cluster.kill(number, signal.SIGTERM)
    code, found, _ = call(tmp_path / "c")
    assert (code, found["faults"]) == (0, [])
    assert all(replica["slot"] >= 32 and replica["keys"] > 30 for replica in found["replicas"])
    folder = tmp_path / "c" / "replica-0"
    with closing(sqlite3.connect(folder / "state.sqlite")) as db:
        place = db.execute("select bucket, key from entries where tree = 0 order by key limit 1").fetchone()
        db.execute("update entries set value = ? where tree = 0 and bucket = ? and key = ?", (b"changed", *place))
        db.commit()
    code, found, _ = call(folder)
    assert code == 1
    assert {fault["where"] for fault in found["faults"]} == {"the application's state"}
