"""Receipts from real replicas: by the commands and the API, verified with nothing running, by every backend of the log."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace

import pytest

from client import NoReceipt, SyncClient, Undecided
from client.cli.main import main
from client.receipts import verify
from replica.apps import kv
from replica.cluster.provision import init_cluster
from replica.wire.messages import AskReceipt, encode_frame
from tests.cluster.test_tpm import TpmCluster
from tests.support.cluster import Processes, environment
from tests.support.waiting import on_loop
from trustlog import BackendKind, VerificationError
from trustlog.receipts import RECEIPT_BYTES_MAX, Receipt

pytestmark = pytest.mark.cluster


def run(*words: str, cluster=None, deadline: str = "20") -> tuple[int, dict, str]:
    """Run `trustlog-client ... -o json`: its exit code, document and standard error."""
    where = [] if cluster is None else ["-c", str(cluster)]
    command = [sys.executable, "-m", "client.cli.main", *where, "--deadline", deadline, *words, "-o", "json"]
    kept = {name: value for name, value in environment().items() if name != "TRUSTLOG_CLUSTER"}
    done = subprocess.run(command, capture_output=True, text=True, env=kept, timeout=120, check=False)
    return done.returncode, json.loads(done.stdout), done.stderr


def test_receipts_of_the_commands_are_verified_with_nothing_running(tmp_path, capfd):
    def show(*words: str) -> str:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([*words, "-o", "plain"])
        assert not ended.value.code
        return capfd.readouterr().out

    folder = tmp_path / "receipts"
    folder.mkdir()
    calls = {
        "put": (["put", "k", "v"], 0, 'put "k" "v" gave created'),
        "incr": (["incr", "n", "-5"], 0, 'incr "n" "-5" gave -5'),
        "swapped": (["cas", "k", "v", "w"], 0, 'cas "k" "v" "w" gave swapped'),
        "kept": (["cas", "k", "v", "w"], 1, 'cas "k" "v" "w" gave not swapped'),
        "new": (["cas", "l", "w", "--absent"], 0, 'cas "l" "w" gave swapped'),
        "exec": (["exec", "--hex", kv.get(b"k").hex()], 0, 'get "k" gave "w"'),
        "del": (["del", "k"], 0, 'del "k" gave deleted'),
        "absent": (["del", "k"], 1, 'del "k" gave absent'),
    }
    with Processes(tmp_path / "c") as cluster:
        cluster.start_and_wait()
        for name, (words, code, _) in calls.items():
            file = folder / f"{name}.json"
            ended, said, error = run(*words, "--receipt", str(file), cluster=cluster.directory)
            assert (ended, said["receipt"]) == (code, str(file)), error
        # What fails leaves no file, and neither does a file that stands there already get replaced.
        ended, said, _ = run("exec", "nonsense", "--receipt", str(folder / "no.json"), cluster=cluster.directory)
        assert (ended, said["error"]["code"]) == (1, "operation-failed")
        ended, said, _ = run("incr", "n", "--receipt", str(folder / "put.json"), cluster=cluster.directory)
        assert (ended, said["error"]["code"]) == (2, "exists")
        ended, said, _ = run("incr", "n", "--receipt", str(folder / "none" / "r.json"), cluster=cluster.directory)
        assert (ended, said["error"]["code"]) == (2, "not-writable")
        (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
        ended, said, _ = run("incr", "n", "--receipt", str(tmp_path / "dangling"), cluster=cluster.directory)
        assert (ended, said["error"]["code"]) == (2, "exists")
        for name in ("", "-"):
            ended, said, _ = run("incr", "n", "--receipt", name, cluster=cluster.directory)
            assert (ended, said["error"]["code"]) == (2, "usage")
        ended, said, _ = run("exec", "x", "--stale", "--receipt", str(folder / "s.json"), cluster=cluster.directory)
        assert (ended, said["error"]["code"]) == (2, "usage")
        assert run("get", "n", cluster=cluster.directory)[1]["value"] == "-5", "what was refused was not executed"
    assert sorted(file.stem for file in folder.iterdir()) == sorted(calls)
    # Somebody else, with a copy of the public file and no key.
    public = tmp_path / "public.toml"
    shutil.copy(cluster.directory / "cluster.toml", public)
    for name, (_, _, text) in calls.items():
        file = folder / f"{name}.json"
        code, said, _ = run("receipt", "verify", str(file), "--cluster", str(public))
        assert (code, said["proven"], said["status"]) == (0, True, "ok")
        assert said["client"] == cluster.key().public_key.hex()
        assert len(said["replicas"]) >= 2
        plain = show("receipt", "verify", str(file), "--cluster", str(public))
        assert plain.startswith(f"slot {said['slot']}: {text}; by client ")
    code, said, _ = run("receipt", "verify", str(folder / "put.json"), cluster=cluster.directory)
    assert (code, said["command"], said["key"], said["value"]) == (0, "put", "k", "v")


def test_what_proves_nothing_ends_with_1_and_says_why(tmp_path, capfd):
    """Forged, cut off, aimed at something else: exit 1. Used wrongly: exit 2."""
    with Processes(tmp_path / "c") as cluster:
        cluster.start_and_wait()

        @on_loop
        async def use():
            async with cluster.client() as client:
                _, receipt = await client.with_receipt(lambda calls: calls.put("k", "v"))
                (tmp_path / "put.json").write_bytes(receipt.encode())

        use()
    file, public = tmp_path / "put.json", cluster.directory / "cluster.toml"

    def run(*words: str, cluster=None) -> tuple[int, dict]:
        """In this process: there are many."""
        where = [] if cluster is None else ["-c", str(cluster)]
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([*where, *words, "-o", "json"])
        return ended.value.code, json.loads(capfd.readouterr().out)

    assert run("receipt", "verify", str(file), "--cluster", str(public))[0] == 0
    content = json.loads(file.read_bytes())
    first = content["entries"][0]
    operation = kv.put(b"k", b"other").hex()
    altered = {
        "its entry is not the RESULT": [{"operation": operation}, {"result": "01"}, {"slot": content["slot"] + 1}],
        "entries of 1 distinct members": [{"entries": [first]}],
        "not of distinct members": [{"entries": [first, first]}],
        "of cluster": [{"cluster": "00" * 32}],
        f"replica {first['member']}: signature": [
            {"entries": [{**first, "signature": "11" * 64}, *content["entries"][1:]]}
        ],
        "a receipt of version 2": [{"receipt": 2}],
    }
    bad = tmp_path / "bad.json"
    for why, changes in altered.items():
        for change in changes:
            bad.write_text(json.dumps(content | change))
            code, said = run("receipt", "verify", str(bad), "--cluster", str(public))
            assert (code, said["error"]["code"], said["error"]["exit"]) == (1, "not-proven", 1), why
            assert why in said["error"]["message"]
    for raw in (
        file.read_bytes()[:-3],
        b"",
        b"{}",
        base64.b64encode(file.read_bytes()),
        b" " * (RECEIPT_BYTES_MAX + 1),
    ):
        bad.write_bytes(raw)
        code, said = run("receipt", "verify", str(bad), "--cluster", str(public))
        assert (code, said["error"]["code"]) == (1, "not-proven")
        assert "proves nothing" in said["error"]["message"]
    init_cluster(tmp_path / "other", f=1, base_port=0)
    code, said = run("receipt", "verify", str(file), cluster=tmp_path / "other")
    assert (code, said["error"]["code"]) == (1, "not-proven")
    assert "it is of cluster" in said["error"]["message"]
    assert run("receipt", "verify", str(file))[0] == 2
    assert run("receipt", "verify", str(tmp_path / "none.json"), "--cluster", str(public))[0] == 2
    assert run("receipt", "verify", str(file), "--cluster", str(tmp_path / "none.toml"))[0] == 2


def test_receipts_with_one_replica_down_and_none_with_two(tmp_path):
    with Processes(tmp_path / "c") as cluster:
        cluster.start_and_wait()
        cluster.kill(0)
        file = tmp_path / "r.json"
        code, _, error = run("put", "k", "v", "--receipt", str(file), cluster=cluster.directory)
        assert code == 0, error
        assert [entry.member for entry in verify(file.read_bytes(), cluster.directory).entries] == [1, 2]
        cluster.kill(1)
        late = tmp_path / "late.json"
        code, said, _ = run("put", "k", "w", "--receipt", str(late), cluster=cluster.directory, deadline="2")
        assert (code, said["error"]["exit"]) == (3, 3)
        assert not late.exists()
        assert [path.name for path in tmp_path.glob(".*")] == []


async def receipts_everywhere(cluster) -> None:
    """Receipts before and after all replicas were killed and started again: of one operation the same entries."""
    async with cluster.client() as client:
        done = await client.driver.execute(kv.put(b"k", b"v"), 20.0)
        said = done.outcome(client.public_key, kv.put(b"k", b"v"))
        first = await client.driver.receipt(said, 20.0)
        raw = first.encode()
        assert verify(raw, cluster.directory) == first == Receipt.decode(raw)
        again = await client.driver.receipt(said, 20.0)
        assert entries_of(again).items() & entries_of(first).items(), "f+1 of them share at least one"
        for number in range(3):
            cluster.kill(number)
        cluster.start(0, 1, 2)
        await cluster.wait_ready()
        after = await client.driver.receipt(said, 20.0)
        verify(after.encode(), cluster.directory)
        known = {entry.member: entry.attestation.statement for entry in (*first.entries, *again.entries)}
        for entry in after.entries:
            assert known.get(entry.member, entry.attestation.statement) == entry.attestation.statement
        # Nobody shows what was not so; the client sees that at once.
        with pytest.raises(Undecided, match="no such operation with this result"):
            await client.driver.receipt(replace(said, result=b"\x01"), 20.0)
        with pytest.raises(Undecided, match="keeps that slot no more"):
            await client.driver.receipt(replace(said, slot=0), 20.0)
        forged = replace(first, outcome=replace(said, result=b"\x01"))
        with pytest.raises(VerificationError):
            verify(forged.encode(), cluster.directory)
    reports = await cluster.wait_equal()
    assert not any(peer["exposed"] for report in reports.values() for peer in report["peers"])
    verdicts = {verdict["verdict"] for report in reports.values() for verdict in report["verdicts"]}
    assert verdicts <= {"trusted", "suspected"}, "suspected: it was away a moment ago"


def entries_of(receipt: Receipt) -> dict[int, bytes]:
    return {entry.member: entry.attestation.statement for entry in receipt.entries}


@pytest.mark.parametrize("kind", [BackendKind.SOFTWARE, BackendKind.PROCESS])
def test_receipts_over_a_restart(tmp_path, kind):
    with Processes(tmp_path / "c", log_kind=kind) as cluster:
        cluster.start_and_wait()

        @on_loop
        async def use():
            await receipts_everywhere(cluster)

        use()


@pytest.mark.parametrize("numbers", [(0, 1, 2), (0, 1)], ids=["all", "two"])
def test_receipts_of_logs_in_tpms(tmp_path, numbers):
    with ExitStack() as stack:
        cluster = TpmCluster(tmp_path / "t", numbers, stack).processes
        cluster.start_and_wait()

        @on_loop
        async def use():
            async with cluster.client() as client:
                value, receipt = await client.with_receipt(lambda calls: calls.incr("n"))
                assert value == 1
                assert verify(receipt.encode(), cluster.directory) == receipt
                quoted = receipt.entries[0]
                altered = bytearray(quoted.attestation.signature)
                altered[-1] ^= 1
                attestation = replace(quoted.attestation, signature=bytes(altered))
                bad = replace(receipt, entries=(replace(quoted, attestation=attestation), *receipt.entries[1:]))
                with pytest.raises(VerificationError):
                    verify(bad.encode(), cluster.directory)

        use()


def test_the_api_and_its_synchronous_twin(tmp_path):
    with Processes(tmp_path / "c") as cluster:
        cluster.start_and_wait()

        @on_loop
        async def use():
            async with cluster.client() as client:
                replaced, receipt = await client.with_receipt(lambda calls: calls.put("greeting", "hello"))
                assert (replaced, receipt.outcome.operation) == (False, kv.put(b"greeting", b"hello"))
                # Others share its envelope, and its slot: the path leads past them (of 21 leaves the last is not deep).
                waiting = [client.submit(kv.incr(b"n")) for _ in range(20)]
                number, receipt = await client.with_receipt(lambda calls: calls.incr("n"))
                for one in waiting:
                    await one
                assert (number, receipt.size, len(receipt.path)) == (21, 21, 2)
                with pytest.raises(ValueError, match="one operation"):
                    await client.with_receipt(lambda calls: calls.transact(two_operations))
                with pytest.raises(ValueError, match="not ordered"):
                    await client.with_receipt(lambda calls: calls.stale_get("n"))
                # Everybody is asked within the deadline only.
                client.driver._members = replace(client.driver._members, quorum=4)
                with pytest.raises(NoReceipt, match="the operation was executed; no receipt") as caught:
                    await client.with_receipt(lambda calls: calls.incr("n"), deadline_s=3)
                assert caught.value.value == 22

        use()
        with SyncClient.from_dir(cluster.directory) as client:
            number, receipt = client.with_receipt(lambda calls: calls.incr("n"))
            assert (number, verify(receipt.encode(), cluster.directory).outcome.status) == (23, 0)
            with pytest.raises(ValueError, match="one ordered operation"):
                client.with_receipt(nothing)


def test_thousands_of_questions_neither_stop_ordering_nor_fill_logs(tmp_path):
    """A client that asks about all that is and is not: one entry for its slot, and others are served meanwhile."""
    with Processes(tmp_path / "c") as cluster:
        cluster.start_and_wait()

        @on_loop
        async def use():
            async with cluster.client() as client, cluster.client() as other:
                done = await client.driver.execute(kv.put(b"k", b"v"), 20.0)
                said = done.outcome(client.public_key, kv.put(b"k", b"v"))
                good = encode_frame(AskReceipt(1, 10**6, said.slot, said.leaf))
                bad = [
                    encode_frame(AskReceipt(1, 10**6, slot, leaf))
                    for slot, leaf in ((said.slot, bytes(32)), (said.slot + 10**6, said.leaf), (0, said.leaf))
                ]
                bad.append(encode_frame(AskReceipt(9, 10**6, said.slot, said.leaf)))
                before = {number: report["log"]["last"] for number, report in (await cluster.reports(other)).items()}
                for _ in range(1500):
                    for link in client.driver.links:
                        for frame in (good, *bad):
                            link.send_frame(frame)
                assert await other.incr("n") == 1
                number, receipt = await other.with_receipt(lambda calls: calls.incr("n"))
                assert (number, verify(receipt.encode(), cluster.directory)) == (2, receipt)
                await client.driver.receipt(said, 20.0)
            reports = await cluster.wait_equal()
            for number, report in reports.items():
                # Two operations and a session's opening; a RESULT for each of two slots.
                assert report["log"]["last"] - before[number] < 30
                refused = report["refused"]
                assert all(refused.get(f"receipt-{code}") for code in ("absent", "later", "gone", "version")), refused
            assert not any(peer["exposed"] for report in reports.values() for peer in report["peers"])

        use()


async def two_operations(transaction) -> None:
    await transaction.get("n")
    transaction.incr("n")


async def nothing(_calls) -> None:
    return None
