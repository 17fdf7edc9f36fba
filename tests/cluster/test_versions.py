"""An upgrade of the application under load, by what an operator types: new code one replica after the other, then a
command, and from one slot on every replica does something else. One that still has the old code stops and comes back."""

import asyncio
import json
import subprocess
import sys

import pytest

from replica.core.genesis import Limits
from tests.support.cluster import Processes, environment
from tests.support.waiting import on_loop_for, until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]
LIMITS = Limits(checkpoint_interval=8, window=16)
DEADLINE_S = 240.0
CLIENTS = 2
PAUSE_S = 0.02
MORE = 20

OLD = """
class Steps:
    def apply(self, operation, context):
        total = int(context.state.get(b"total") or b"0") + 1
        context.state.put(b"total", b"%d" % total)
        return b"%d %d" % (context.slot, total)
"""
NEW = """
class Steps:
    version = 2

    def apply(self, operation, context):
        total = int(context.state.get(b"total") or b"0") + (1, 10, 100)[context.version]
        context.state.put(b"total", b"%d" % total)
        return b"%d %d" % (context.slot, total)
"""


class Upgraded(Processes):
    """A cluster in which every replica has code of its own; `counted`: slot and total of all that was answered."""

    def __init__(self, directory) -> None:
        super().__init__(directory / "c", limits=LIMITS, application="steps:Steps")
        self.set(retain_mib=0)
        self._code = directory
        self.counted: list[tuple[int, int]] = []
        for number in range(3):
            self.install(number, OLD)

    def install(self, number: int, code: str) -> None:
        folder = self._code / f"code-{number}"
        folder.mkdir(exist_ok=True)
        (folder / "steps.py").write_text(code)

    def start(self, *numbers: int, **options) -> None:
        for number in numbers or range(3):
            # No compiled files: code that is written twice within a second would be taken for the same.
            code = str(self._code / f"code-{number}")
            self._environment = environment(PYTHONPATH=code, PYTHONDONTWRITEBYTECODE="1")
            super().start(number, **options)

    def typed(self, *words, expected=0):
        command = [sys.executable, "-m", "replica.cli.main", *map(str, words)]
        done = subprocess.run(command, check=False, env=environment(), capture_output=True, text=True, timeout=120)
        assert done.returncode == expected, done.stdout + done.stderr
        return done

    def application(self, verb, *words, expected=0):
        return self.typed("application", verb, self.directory, *words, expected=expected)

    def shown(self):
        return json.loads(self.application("show", "-o", "json").stdout)

    def upgrade(self, number: int) -> None:
        self.kill(number)
        self.install(number, NEW)
        self.start_and_wait(number)

    def stops_with(self, number: int, wanted: int, status: int) -> str:
        """Wait until a replica ends by itself; check that it said why, and return what it logged."""
        assert self.exit_status(number) == status, self.log_text(number)
        text = self.log_text(number)
        assert f"application steps:Steps: version {wanted} is in force after slot" in text
        assert f"install the code that knows version {wanted}" in text
        if status == 2:
            assert "\nerror: application steps:Steps: " in text, "at its start it names the application, and no file"
        return text

    async def count(self, client, ended) -> None:
        while not ended.is_set():
            slot, total = map(int, (await client.execute(b"count", deadline_s=30.0)).split())
            self.counted.append((slot, total))
            await asyncio.sleep(PAUSE_S)

    async def more(self, count: int = MORE) -> None:
        wanted = len(self.counted) + count
        await until(lambda: len(self.counted) >= wanted, f"{count} more are counted", 60)

    async def one(self) -> tuple[int, int]:
        async with self.client() as client:
            slot, total = map(int, (await client.execute(b"count")).split())
            self.counted.append((slot, total))
            return slot, total

    def steps_were_right(self, *changes: tuple[int, int]) -> None:
        """Every answer, whoever gave it, is of the version in force in its slot. changes: version, after slot."""
        before = 0
        for slot, total in sorted(self.counted):
            version = max([0, *(version for version, after in changes if slot > after)])
            assert total - before == (1, 10, 100)[version], (slot, total, before)
            before = total


@on_loop_for(DEADLINE_S)
async def under_load(cluster: Upgraded, disturb) -> None:
    ended = asyncio.Event()
    async with cluster.client() as one, cluster.client() as other, asyncio.TaskGroup() as tasks:
        for client in (one, other):
            tasks.create_task(cluster.count(client, ended))
        await cluster.more()
        await asyncio.to_thread(disturb)
        await cluster.more()
        ended.set()


def activated(done) -> tuple[int, int]:
    said = json.loads(done.stdout)
    return said["version"], said["after"]


def until_equal(cluster: Upgraded) -> None:
    """All have executed the same and found each other's checkpoints alike, beyond what was counted."""

    @on_loop_for(DEADLINE_S)
    async def equal() -> None:
        last = max(slot for slot, _ in cluster.counted)
        for _ in range(2 * LIMITS.checkpoint_interval):
            await cluster.one()

        async def alike() -> bool:
            reports = (await cluster.wait_equal()).values()
            trusted = all(one["verdict"] == "trusted" for report in reports for one in report["verdicts"])
            return trusted and all(report["stable"] >= last for report in reports)

        await until(alike, "all trust each other", 60)
        reports = await cluster.wait_equal()
        assert len({json.dumps(report["application_version"]) for report in reports.values()}) == 1

    equal()


def test_an_upgrade_under_load(tmp_path):
    with Upgraded(tmp_path) as cluster:
        cluster.start_and_wait()
        shown = cluster.shown()
        assert (shown["application"], shown["in_force"]) == ("steps:Steps", 0)
        assert [(one["knows"], one["in_force"]) for one in shown["replicas"]] == [(0, 0)] * 3
        changes = []

        def upgrade_two():
            for number in (0, 1):
                cluster.upgrade(number)

        def activate():
            done = cluster.application("activate", "--version", "1", expected=1)
            assert "replica 2 knows no version above 0" in done.stderr
            assert [one["knows"] for one in cluster.shown()["replicas"]] == [2, 2, 0]
            changes.append(activated(cluster.application("activate", "--version", "1", "--force", "-o", "json")))
            cluster.stops_with(2, 1, status=1)

        def come_back():
            cluster.start(2)
            cluster.stops_with(2, 1, status=2)
            cluster.install(2, NEW)
            cluster.start_and_wait(2)
            changes.append(activated(cluster.application("activate", "--version", "2", "-o", "json")))

        for disturb in (upgrade_two, activate, come_back):
            under_load(cluster, disturb)
        until_equal(cluster)
        cluster.steps_were_right(*changes)
        assert cluster.shown()["in_force"] == 2

        @on_loop_for(DEADLINE_S)
        async def stale():
            slot, total = await cluster.one()
            async with cluster.client() as client:
                answer = await client.stale(b"count")
                assert answer.value == b"%d %d" % (slot, total + 100), "of the version in force"

        stale()
        # All at once, from their disks; and the retained history bears an auditor's look.
        for number in range(3):
            cluster.kill(number)
        cluster.start_and_wait()
        until_equal(cluster)
        cluster.steps_were_right(*changes)
        for number in range(3):
            cluster.kill(number)
        cluster.typed("audit", cluster.directory)


@pytest.mark.long
def test_one_that_was_away_with_old_code_gets_the_version_with_the_state(tmp_path):
    with Upgraded(tmp_path) as cluster:
        cluster.start_and_wait()
        for number in (0, 1):
            cluster.upgrade(number)
        cluster.kill(2)
        done = cluster.application("activate", "--version", "1", expected=1)
        assert "replica 2 does not answer" in done.stderr
        assert "--force" in done.stderr
        change = activated(cluster.application("activate", "--version", "1", "--force", "-o", "json"))

        @on_loop_for(DEADLINE_S)
        async def much():
            async with cluster.client() as client:
                for _ in range(8 * LIMITS.checkpoint_interval * 4):
                    slot, total = map(int, (await client.execute(bytes(60_000))).split())
                    cluster.counted.append((slot, total))

        much()
        cluster.start(2)
        assert "state transferred" in cluster.stops_with(2, 1, status=1)
        cluster.start(2)
        cluster.stops_with(2, 1, status=2)
        cluster.install(2, NEW)
        cluster.start_and_wait(2)
        until_equal(cluster)
        cluster.steps_were_right(change)


def test_what_is_refused(tmp_path):
    with Upgraded(tmp_path) as cluster:
        cluster.start_and_wait()
        for number in (0, 1):
            cluster.upgrade(number)
        # What only one knows, or nobody, would end the cluster: not even by force.
        for words in (("--version", 3), ("--version", 3, "--force")):
            done = cluster.application("activate", *words, expected=1)
            assert "replica 0 knows no version above 2; replica 1 knows" in done.stderr
            assert "none could go on" in done.stderr
        assert "65535" in cluster.application("activate", "--version", 65536, expected=2).stderr
        cluster.upgrade(2)
        cluster.application("activate", "--version", 2)
        done = cluster.application("activate", "--version", 1, expected=2)
        assert "none goes back to version 1" in done.stderr
        again = cluster.application("activate", "--version", 2, "-o", "plain").stdout
        assert again.startswith("version=2\nafter=")
        assert cluster.application("show", "-o", "plain").stdout.startswith(
            "application=steps:Steps in_force=2\n0 2 2 -"
        )
        cluster.kill(0)
        cluster.kill(1)
        assert "within 2 s" in cluster.application("show", "--deadline", 2, expected=2).stderr
