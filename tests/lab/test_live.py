"""The view of a live cluster: real entries, verified; the replicas' verdicts; and nothing is changed by looking."""

from __future__ import annotations

import sqlite3
import urllib.error
import urllib.request
from contextlib import closing

import pytest

from client.api import Client
from replica.cluster.provision import init_cluster
from replica.cluster.strict_toml import ConfigError
from replica.lab.live import LiveCluster
from tests.lab.support import served
from tests.support.nodes import Nodes
from tests.support.waiting import on_loop, until


@on_loop
async def test_the_entries_and_verdicts_of_running_replicas(tmp_path):
    async with Nodes(tmp_path / "c") as cluster:
        cluster.start()
        async with Client.from_dir(tmp_path / "c") as client, LiveCluster(tmp_path / "c") as live:
            for number in range(5):
                await client.put(b"k%d" % number, b"v")
            await cluster.wait_quiet()
            before = {number: node.trusted_log.last for number, node in cluster.nodes.items()}
            # A group's attestation is stored with the next group.
            await client.put(b"next", b"v")
            await cluster.wait_quiet()
            after = {number: node.trusted_log.last for number, node in cluster.nodes.items()}

            async def seen():
                found = await live.look()
                is_there = all(found["logs"][number]["groups"][-1]["last"] >= last for number, last in before.items())
                return found if is_there and all(r["executed"] == 7 for r in found["replicas"]) else None

            found = await until(seen, "the page shows all")
            assert found["problem"] == ""
            assert [(r["reachable"], r["view"], len(r["verdicts"])) for r in found["replicas"]] == [(True, 0, 3)] * 3
            assert all(v["verdict"] == "trusted" for r in found["replicas"] for v in r["verdicts"])
            for number, log in enumerate(found["logs"]):
                assert log["held_by"] == number
                own = cluster.nodes[number].trusted_log
                shown = {group["last"]: group["head"] for group in log["groups"]}
                assert shown.get(own.last, own.head.hex()) == own.head.hex()
                for earlier, later in zip(log["groups"], log["groups"][1:], strict=False):
                    assert (earlier["last"] + 1, earlier["head"]) == (later["first"], later["head_before"])
            kinds = {e["kind"] for log in found["logs"] for g in log["groups"] for e in g["entries"]}
            assert kinds == {"PRE-PREPARE", "PREPARE", "COMMIT"}
            assert {number: node.trusted_log.last for number, node in cluster.nodes.items()} == after
            # One that stopped: its own store still shows its log, and it is said that it does not answer.
            await cluster.stop(2)

            async def gone():
                return None if (await live.look())["replicas"][2]["reachable"] else await live.look()

            found = await until(gone, "replica 2 is away")
            assert found["replicas"][2]["problem"]
            assert found["logs"][2]["held_by"] == 2


@on_loop
async def test_what_is_damaged_is_shown_from_another_store_or_named(tmp_path):
    async with Nodes(tmp_path / "c") as cluster:
        cluster.start()
        async with Client.from_dir(tmp_path / "c") as client:
            await client.put(b"k", b"v")
            await cluster.wait_quiet()
        for number in range(3):
            await cluster.stop(number)
        spoil(cluster.folder(0) / "store.sqlite", log=0)
        async with LiveCluster(tmp_path / "c") as live:
            assert (await live.look())["logs"][0]["held_by"] == 1
        for number in (1, 2):
            spoil(cluster.folder(number) / "store.sqlite", log=0)
        async with LiveCluster(tmp_path / "c") as live:
            log = (await live.look())["logs"][0]
        assert log["held_by"] is None
        assert "store.sqlite of replica-2" in log["problem"]


def spoil(path, log):
    """Flip a bit of the last payload of a log."""
    with closing(sqlite3.connect(path)) as db, db:
        seq, payloads = db.execute(
            "select seq, payloads from groups where log = ? order by seq desc", (log,)
        ).fetchone()
        db.execute("update groups set payloads = ? where seq = ?", (payloads[:-1] + bytes([payloads[-1] ^ 1]), seq))


@on_loop
async def test_a_cluster_that_never_ran_or_whose_key_is_not_here(tmp_path):
    init_cluster(tmp_path / "c", f=1, base_port=0)
    for path in sorted((tmp_path / "c" / "client").iterdir()):
        path.unlink()
    async with LiveCluster(tmp_path / "c") as live:
        found = await live.look()
    assert "cannot be asked for" in found["problem"]
    assert [log["problem"] for log in found["logs"]] == ["nothing is there yet"] * 3


def test_no_cluster_is_an_error_that_names_the_file(tmp_path):
    with pytest.raises(ConfigError, match=r"cluster\.toml"):
        LiveCluster(tmp_path)


def test_it_is_served_and_nothing_but_get_is_answered(tmp_path):
    init_cluster(tmp_path / "c", f=1, base_port=0)
    with served("--attach", str(tmp_path / "c")) as url:
        with urllib.request.urlopen(url + "api/live", timeout=60) as answer:  # noqa: S310 - ours
            assert answer.status == 200
        request = urllib.request.Request(url + "api/live", data=b"{}", method="POST")  # noqa: S310 - ours
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=60)  # noqa: S310 - ours
        assert refused.value.code == 405
        refused.value.close()
