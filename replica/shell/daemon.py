"""Starting and stopping one replica: `trustlog-replica run`."""

import asyncio
import logging
import signal
import sys

import structlog
import uvloop

from replica.application import ApplicationLoadError
from replica.cluster.home import ReplicaHome
from replica.cluster.strict_toml import ConfigError
from replica.shell.node import Node
from replica.shell.store import StoreError
from trustlog import AttestedLog, TrustLogError, open_log
from trustlog.sealed import Files

LOG_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


class StartError(ConfigError):
    """The replica cannot start; the text says why and what to do."""


class UnsyncedFiles(Files):
    """Files for `durability = "memory"`: nothing is forced to disk, so a power cut forgets what was said."""

    def sync(self, fd: int) -> None:
        """Leave it to the operating system."""

    def sync_directory(self, directory: object) -> None:
        """Leave it to the operating system."""


def run(home: ReplicaHome) -> int:
    """Run the replica in `home` until SIGTERM or SIGINT (0), or until it must stop by itself (1).

    StartError if it cannot start.
    """
    configure_logging(home)
    try:
        log = _open_trusted_log(home)
    except (TrustLogError, OSError) as error:
        raise StartError(f"{home.log_path}: {error}") from error
    with log:
        try:
            return uvloop.run(_serve(home, log))
        except (ApplicationLoadError, StoreError) as error:
            raise StartError(str(error)) from error


def configure_logging(home: ReplicaHome) -> None:
    """Log to standard error: for people on a terminal, as JSON lines elsewhere, or as the settings say."""
    style = home.settings.log_format
    console = style == "console" or (style == "auto" and sys.stderr.isatty())
    renderer = (
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()) if console else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(LOG_LEVELS[home.settings.log_level]),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )


def _open_trusted_log(home: ReplicaHome) -> AttestedLog:
    if home.settings.durability == "memory":
        return open_log(home.log_path, files=UnsyncedFiles())
    return open_log(home.log_path)


async def _serve(home: ReplicaHome, log: AttestedLog) -> int:
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[int] = loop.create_future()

    def end(status: int) -> None:
        if not ended.done():
            ended.set_result(status)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end, 0)
    node = Node(home, log, lambda _: end(1))
    try:
        try:
            node.start()
        except OSError as error:
            host, port = home.listen_address
            raise StoreError(
                f"cannot listen at {host}:{port}: {error}; is another program, or this replica already, running there?"
            ) from error
        status = await ended
        node.log.info("stopping", signal=status == 0)
    finally:
        await node.close()
    node.log.info("stopped")
    return status
