"""Real replicas on a disk that lies or fails: an fsync that fails once, a flipped bit in the sealed trusted state."""

import json
import signal

import pytest

from tests.cluster.test_kill import Insistent, strace
from tests.support.cluster import Processes
from tests.support.load import check_acknowledged
from tests.support.waiting import on_loop
from trustlog import open_log

pytestmark = pytest.mark.cluster


def last_of(cluster, number: int) -> int:
    with open_log(cluster.folder(number) / "log") as log:
        return log.last


@pytest.mark.parametrize("nth", [40, 41], ids=["one fsync", "the next"])  # of the store, and of the trusted log
def test_an_fsync_that_fails_once_stops_the_replica_before_it_signs(tmp_path, nth):
    """EIO from the kernel, one time only: after it nobody knows what the disk holds, so nothing more is said."""
    inject = f"inject=fsync,fdatasync:error=EIO:when={nth}"
    under = [strace(), "-f", "-qq", "-o", "/dev/null", "-e", "trace=fsync,fdatasync", "-e", inject]
    with Processes(tmp_path / "c") as cluster:
        cluster.start_and_wait()
        assert cluster.kill(1, signal.SIGTERM) == 0
        cluster.log_path(1).write_bytes(b"")
        cluster.start(1, under=under)

        @on_loop
        async def use():
            await cluster.wait_ready()
            async with cluster.client(patience_ms=200) as client:
                async with Insistent(client, workers=2) as load:
                    while cluster.is_running(1):
                        await load.more(2)
                    assert cluster.exit_status(1) == 1
                    await load.more(20)  # the others go on
                (reason,) = critical(cluster, 1)
                assert "cannot make its log durable" in reason
                assert "Nothing more is signed; see the disk" in reason
                assert "Traceback" not in cluster.log_text(1)
                # What it signed before, it goes on from.
                said = last_of(cluster, 1)
                reports = await cluster.reports(client)
                (seen,) = (peer["received"] for peer in reports[0]["peers"] if peer["replica"] == 1)
                assert said >= seen > 0
                cluster.start(1)
                # A backup that comes back just when all is decided has nothing to say of it.
                while (reports := await cluster.wait_equal())[1]["log"]["last"] <= said:
                    await client.incr("again")
                assert not any(peer["exposed"] for report in reports.values() for peer in report["peers"])
                await check_acknowledged(client, load.acknowledged)
                assert len(set(load.counted)) == len(load.counted)

        use()


def critical(cluster, number: int) -> list[str]:
    lines = [json.loads(line) for line in cluster.log_text(number).splitlines()]
    return [line["reason"] for line in lines if line["level"] == "critical"]


def test_a_flipped_bit_in_the_sealed_trusted_state_is_refused_with_what_to_do(tmp_path):
    with Processes(tmp_path / "c") as cluster:
        cluster.start_and_wait()
        assert cluster.kill(1, signal.SIGTERM) == 0
        path = cluster.folder(1) / "log" / "log.state"
        sound = path.read_bytes()
        rotten = bytearray(sound)
        rotten[len(rotten) // 2] ^= 1
        path.write_bytes(rotten)
        cluster.log_path(1).write_bytes(b"")
        cluster.start(1)
        assert cluster.exit_status(1) == 2
        text = cluster.log_text(1)
        assert str(path) in text
        assert "Nothing was signed with it. Check the disk" in text
        assert "A log whose state is lost is retired: create a new one, with a new key" in text
        assert "Traceback" not in text
        assert path.read_bytes() == rotten, "nothing was changed"
        path.write_bytes(sound)
        cluster.start_and_wait(1)
