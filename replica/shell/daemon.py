"""Starting and stopping one replica: `trustlog-replica run`."""

import asyncio
import logging
import signal
import socket
import sys
from contextlib import closing
from typing import TYPE_CHECKING

import structlog
import uvloop

from replica.application import ApplicationLoadError
from replica.cluster.home import ReplicaHome
from replica.cluster.renewal import settle
from replica.cluster.reopening import under_next_list, with_key_kept
from replica.cluster.strict_toml import ConfigError
from replica.shell.garbage import give_free, set_apart
from replica.shell.node import Node
from replica.shell.opening import open_trusted_log
from replica.shell.store import StoreError
from replica.shell.trustedlog import TrustedLog
from trustlog import TrustLogError

if TYPE_CHECKING:
    from replica.wire.http import HttpDoor

LOG_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


# Not an exit code: the replica goes on under another list of members.
_RENEWED = -1


class StartError(ConfigError):
    """The replica cannot start; the text says why and what to do."""


def run(home: ReplicaHome) -> int:
    """Run the replica in `home` until SIGTERM or SIGINT (0), or until it must stop by itself (1).

    StartError if it cannot start.
    """
    configure_logging(home)
    try:
        log = open_trusted_log(home, structlog.get_logger().bind(replica=home.number))
    except (TrustLogError, OSError) as error:
        raise StartError(f"{home.log_path}: {error}") from error
    with closing(log):
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


async def _serve(home: ReplicaHome, log: TrustedLog) -> int:
    """Serve under one list of members after the other. A signal that comes between two of them ends it as well."""
    loop = asyncio.get_running_loop()
    signalled: asyncio.Future[None] = loop.create_future()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _note, signalled)
    home = with_key_kept(_settled(home))
    while (status := await _serve_list(home, log, signalled)) == _RENEWED:
        if signalled.done():
            structlog.get_logger().bind(replica=home.number).info("stopped", while_going_over=True)
            return 0
        give_free()
        home = _settled(under_next_list(home))
    return status


def _settled(home: ReplicaHome) -> ReplicaHome:
    try:
        settled = settle(home)
    except OSError as error:
        raise StartError(
            f"{home.certificate_path}: cannot take the place of the certificate before it: {error.strerror}; see to "
            "the folder's permissions, and start the replica again"
        ) from error
    log = structlog.get_logger().bind(replica=home.number, path=str(home.path))
    if home.is_renewed:
        log.warning("a new certificate is in force", has_its_name=not settled.is_renewed)
    if home.waiting_trouble:
        log.error("a certificate that waits cannot be used", text=home.waiting_trouble)
    return settled


def _note(signalled: asyncio.Future[None]) -> None:
    if not signalled.done():
        signalled.set_result(None)


async def _serve_list(home: ReplicaHome, log: TrustedLog, signalled: asyncio.Future[None]) -> int:
    ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def end(status: int) -> None:
        if not ended.done():
            ended.set_result(status)

    signalled.add_done_callback(lambda _: end(0))
    try:
        node = Node(home, log, lambda _: end(1), renew=lambda: end(_RENEWED), has_read=set_apart)
    except TrustLogError as error:
        raise StartError(f"{home.log_path}: {error}") from error
    door: HttpDoor | None = None
    try:
        try:
            node.start()
        except OSError as error:
            host, port = home.listen_address
            if isinstance(error, socket.gaierror):
                raise StoreError(
                    f"cannot listen at {host}:{port}: the name {host} cannot be resolved here: {error.strerror}; set "
                    "`listen` in replica.toml to an address of this machine"
                ) from error
            raise StoreError(
                f"cannot listen at {host}:{port}: {error}; is another program, or this replica already, running there?"
            ) from error
        if home.settings.http is not None:
            door = await _open_http(node, *home.settings.http)
        status = await ended
        if status != _RENEWED:
            node.log.info("stopping", signal=status == 0)
    finally:
        if door is not None:
            await door.close()
        await node.close()
    if status != _RENEWED:
        node.log.info("stopped")
    return status


async def _open_http(node: Node, host: str, port: int) -> "HttpDoor":
    # Imported here: without this door a replica starts sooner.
    from replica.shell.http import ReplicaHttp  # noqa: PLC0415

    door = ReplicaHttp(node).door
    try:
        address = await door.start(host, port)
    except OSError as error:
        raise StoreError(
            f"cannot listen for HTTP at {host}:{port}: {error}; choose another address for `http` in replica.toml"
        ) from error
    node.log.info("http", address=f"{address[0]}:{address[1]}")
    return door
