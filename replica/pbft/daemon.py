"""Starting and stopping one replica of a PBFT cluster: `trustlog-replica run`."""

import asyncio
import signal

import uvloop

from replica.application import ApplicationLoadError
from replica.cluster.home import STARTED_NAME, ReplicaHome
from replica.cluster.keys import write_new
from replica.pbft.node import PbftNode
from replica.shell.daemon import StartError, configure_logging
from replica.shell.garbage import set_apart


def run(home: ReplicaHome) -> int:
    """Run the replica in `home` until SIGTERM or SIGINT (0), or until it must stop by itself (1).

    StartError if it cannot start, or ran before: a replica keeps nothing of what it promised, so that it would break
    its promises if it came back under the same key.
    """
    configure_logging(home)
    try:
        return uvloop.run(_serve(home))
    except ApplicationLoadError as error:
        raise StartError(str(error)) from error


def begin_life(home: ReplicaHome) -> None:
    """Note that the replica runs; StartError if it did before."""
    path = home.path / STARTED_NAME
    try:
        write_new(path, b"", 0o600)
    except FileExistsError:
        raise StartError(
            f"{path}: this replica ran before. One of a PBFT cluster keeps nothing on disk, so what it promised then "
            "is forgotten, and it would count as faulty: leave it stopped (the cluster goes on without f of them), or "
            "make a new cluster"
        ) from None
    except OSError as error:
        raise StartError(f"{path}: cannot be written: {error.strerror}") from error


async def _serve(home: ReplicaHome) -> int:
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[int] = loop.create_future()

    def end(status: int) -> None:
        if not ended.done():
            ended.set_result(status)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end, 0)
    node = PbftNode(home, lambda _: end(1))
    try:
        begin_life(home)
        try:
            node.start()
        except OSError as error:
            host, port = home.listen_address
            (home.path / STARTED_NAME).unlink()  # it said nothing yet
            raise StartError(
                f"cannot listen at {host}:{port}: {error}; is another program, or this replica already, running there?"
            ) from error
        set_apart()
        status = await ended
        node.log.info("stopping", signal=status == 0)
    finally:
        await node.close()
    node.log.info("stopped")
    return status
