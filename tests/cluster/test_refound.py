"""A cluster that lost more replicas than it can do without, and the one that an operator founds with what is left."""

import asyncio
import contextlib
import json
import shutil
import signal

import pytest

from client import Undecided
from client.receipts import verify
from replica.cluster.clusterfile import load_cluster_file
from replica.cluster.memberlists import members_path, write_links
from tests.cluster.test_members import DEADLINE_S, LIMITS, Changing
from tests.support.waiting import on_loop_for, until
from trustlog import BackendKind, VerificationError

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


def lose(cluster, lost=(0, 1), survivor=2) -> dict[str, bytes]:
    """Put keys, lose two replicas under load, and return what was acknowledged and the survivor executed for sure."""
    acknowledged: dict[str, bytes] = {}
    certain: dict[str, bytes] = {}

    @on_loop_for(DEADLINE_S * 2)
    async def use():
        ended = False

        async def work(client, worker):
            number = 0
            while not ended:
                key, value = f"{worker}-{number}", f"value {number}".encode()
                with contextlib.suppress(Undecided):  # once two are lost, nothing is answered any more
                    await client.put(key, value)
                    acknowledged[key] = value
                number += 1

        async with cluster.client(deadline_s=1.0) as client, asyncio.TaskGroup() as group:
            await client.put("begun", b"", deadline_s=DEADLINE_S)  # connecting may take long on a busy machine
            for worker in range(4):
                group.create_task(work(client, worker))
            await until(lambda: len(acknowledged) >= 300, "some load", 60)
            certain.update(acknowledged)
            reports = await cluster.reports(client)
            slot = max(report["executed"] for report in reports.values())

            async def reached():
                return (await cluster.reports(client))[survivor]["executed"] >= slot

            await until(reached, "the survivor has executed that", 60)
            for number in lost:
                cluster.kill(number)
            assert cluster.kill(survivor, signal.SIGTERM) == 0
            ended = True

    use()
    for number in lost:
        shutil.rmtree(cluster.folder(number))
    return certain


def refound(cluster, new, *options, survivors=(2,)):
    """Found the new cluster as an operator does: look at what is lost, and accept just that."""
    command = ["refound", *(cluster.folder(number) for number in survivors), new, "--base-port", 0, *options]
    asked = cluster.command(*command, "-o", "json")
    assert asked.returncode == 1, asked.stdout + asked.stderr
    said = json.loads(asked.stdout)
    assert said["made"] is False
    assert not new.exists()
    wrong = cluster.command(*command, "--accept-loss", said["accept_loss"] + 1)
    assert wrong.returncode == 1
    given = f"--accept-loss {said['accept_loss'] + 1} is not what the survivors show"
    assert wrong.stdout.startswith(given), "plain, where no table says it"
    assert not new.exists()
    done = cluster.command(*command, "--accept-loss", said["accept_loss"], "-o", "json")
    assert done.returncode == 0, done.stdout + done.stderr
    made = json.loads(done.stdout)
    assert made["made"] is True
    assert (made["slot"], made["lost"]) == (said["accept_loss"], said["lost"])
    return made


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"log_kind": BackendKind.SOFTWARE}, id="software", marks=pytest.mark.long),
        pytest.param({"log_kind": BackendKind.PROCESS, "encrypt_store": True}, id="process, sealed"),
    ],
)
def test_what_the_survivor_executed_is_there_and_the_new_cluster_works(tmp_path, options):
    backend = options["log_kind"].name.lower()
    with Changing(tmp_path / "old", **options) as old:
        old.start_and_wait()
        certain = lose(old)
        made = refound(old, tmp_path / "new", "--log-backend", backend)
    genesis = load_cluster_file(tmp_path / "new").genesis
    assert made["founded_from"] == genesis.founding.cluster_id.hex() == old.cluster.cluster_id.hex()
    assert (genesis.limits, genesis.name, genesis.f) == (LIMITS, "old", 1)
    sealed = options.get("encrypt_store", False)
    for number in range(3):
        folder = tmp_path / "new" / f"replica-{number}"
        assert ("encrypt_store = true" in (folder / "replica.toml").read_text()) is sealed
        assert (b"value 7" in (folder / "state.sqlite").read_bytes()) is not sealed
    with Changing(tmp_path / "new") as new:
        (new.folder(1) / "state.sqlite").unlink()
        new.start_and_wait()
        # What was kept beside the old cluster.toml does not follow the new one, and is set aside on request.
        kept = members_path(new.file)
        write_links(kept, [b"the old cluster's"])
        stuck = new.member("list", new.directory, expected=2)
        assert "or remove it, if cluster.toml is of a newer cluster" in stuck.stderr
        assert "is kept as" in new.member("list", new.directory, "--update").stderr
        assert not kept.exists()
        new.member("list", new.directory)
        new.wait_logged(1, "the state with which this cluster was founded is not here")

        @on_loop_for(DEADLINE_S * 4)
        async def use():
            async with new.client() as client:
                for key, value in certain.items():
                    assert await client.get(key) == value
                for number in range(60):
                    await client.put(f"new-{number}", str(number))
            reports = await new.wait_equal()
            assert all(one["executed"] > made["slot"] for one in reports.values())
            new.kill(0)
            async with new.client() as client:
                await client.put("without", "the first primary")
            new.start(0)
            await new.wait_ready()
            async with new.client() as client:
                receipts.append((await client.with_receipt(lambda calls: calls.put("proven", "x")))[1])
            await new.wait_equal()

        receipts = []
        use()
        new.wait_logged(1, "state installed")
        verify(receipts[0].encode(), new.file)
        with pytest.raises(VerificationError):
            verify(receipts[0].encode(), old.file)
        for number in range(3):
            assert new.kill(number, signal.SIGTERM) == 0
        audited = new.command("audit", new.directory, "-o", "json")
        assert audited.returncode == 0, audited.stdout
        notes = json.loads(audited.stdout)["replicas"][0]["notes"]
        assert f"cluster {made['founded_from']}" in notes[0]


@pytest.mark.long
def test_a_replica_of_the_new_cluster_is_replaced_by_a_new_log(tmp_path):
    with Changing(tmp_path / "old", log_kind=BackendKind.SOFTWARE) as old:
        old.start_and_wait()
        certain = lose(old)
        refound(old, tmp_path / "new", "--log-backend", "software")
    with Changing(tmp_path / "new") as new:
        new.start_and_wait(0, 1)
        shutil.rmtree(new.folder(2))
        public = new.make(2, "new-2")
        new.member("replace", new.directory, public, "--reason", "its disk is gone")
        new.start(2)

        @on_loop_for(DEADLINE_S * 3)
        async def use():
            await new.until_all_are_over(1)
            new.kill(0)
            async with new.client_now() as client:
                await client.put("with", "the new log")
                for key, value in certain.items():
                    assert await client.get(key) == value

        use()


def test_the_old_cluster_and_the_new_one_are_never_taken_for_each_other(tmp_path):
    """Replicas of both at one address, and clients that were not told."""
    with Changing(tmp_path / "old", log_kind=BackendKind.SOFTWARE) as old:
        old.start_and_wait()
        lose(old)
        refound(old, tmp_path / "new", "--log-backend", "software")
    addresses = [place.address for place in load_cluster_file(tmp_path / "new").replicas]
    text = old.file.read_text()
    for place, address in zip(old.cluster.replicas, addresses, strict=True):
        text = text.replace(f'"{place.address}"', f'"{address}"')
    old.file.write_text(text)
    with Changing(tmp_path / "new") as new:
        new.start_and_wait()
        told = new.command("status", tmp_path / "old")
        assert told.stdout.count("wrong-certificate") == 3
        # The survivor cannot be made a member of the new cluster by its cluster file.
        shutil.copy(new.file, old.file)
        started = new.command("run", old.folder(2))
        assert started.returncode == 2
        assert "this folder belongs to another cluster" in started.stderr


def test_nothing_is_made_of_a_running_replica_or_over_something(tmp_path):
    with Changing(tmp_path / "old", log_kind=BackendKind.PROCESS) as old:
        old.start_and_wait()
        running = old.command("refound", old.folder(0), tmp_path / "new", "--accept-loss", 1)
        assert running.returncode == 1
        assert "its replica runs; stop it first" in running.stderr
        assert not (tmp_path / "new").exists()
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "x").touch()
        taken = old.command("refound", old.folder(0), tmp_path / "full")
        assert taken.returncode == 2
        assert "not overwritten" in taken.stderr
