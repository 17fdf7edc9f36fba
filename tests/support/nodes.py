"""A cluster of `Node` objects in one event loop: the daemon without processes and signals."""

import contextlib
from pathlib import Path

import structlog

from replica.cluster.clusterfile import load_cluster_file
from replica.cluster.home import load_home
from replica.cluster.provision import init_cluster, replica_folder_name
from replica.core.snapshot import MilestoneRule
from replica.shell.node import Node
from tests.support.cluster import ClientsMixin
from tests.support.waiting import until
from trustlog import AttestedLog, open_log


class Logged:
    """A structlog processor that keeps what was logged and prints nothing."""

    def __init__(self) -> None:
        self.lines: list[dict] = []

    def __call__(self, logger, method, line):
        self.lines.append({**line, "level": method})
        raise structlog.DropEvent

    def texts(self) -> list[str]:
        return [str(line) for line in self.lines]


class Nodes(ClientsMixin, contextlib.AbstractAsyncContextManager):
    """Make it before the loop or in it; `async with` closes what runs.

    milestones: when the state is made durable, if not as usual.
    """

    def __init__(self, directory: Path, f: int = 1, milestones: MilestoneRule | None = None, **options) -> None:
        self.directory = directory
        self.milestones = milestones
        exists = directory.exists()  # a copy of one that was made before
        self.cluster = load_cluster_file(directory) if exists else init_cluster(directory, f=f, base_port=0, **options)
        self.nodes: dict[int, Node] = {}
        self.stopped: dict[int, str] = {}
        self.has_read: list[int] = []  # who has, each time
        self.logged = Logged()
        self._logs: dict[int, AttestedLog] = {}

    def folder(self, number: int) -> Path:
        return self.directory / replica_folder_name(number)

    def make(self, number: int, log=None, prepare=None) -> Node:
        """Build a node without starting it. log: instead of the folder's own."""
        structlog.configure(processors=[self.logged])
        home = load_home(self.folder(number))
        opened = log or open_log(home.log_path)
        try:
            stopped, has_read = (
                lambda reason: self.stopped.setdefault(number, reason),
                lambda: self.has_read.append(number),
            )
            node = Node(home, opened, stopped, self.milestones, has_read=has_read)
        except BaseException:
            opened.close()
            raise
        if prepare is not None:
            prepare(node)
        self.stopped.pop(number, None)
        self.nodes[number], self._logs[number] = node, opened
        return node

    def start(self, *numbers: int, prepare=None) -> None:
        for number in numbers or range(self.cluster.genesis.n):
            self.make(number, prepare=prepare).start()

    async def stop(self, number: int) -> None:
        """Stop one as SIGTERM does."""
        node, log = self.nodes.pop(number), self._logs.pop(number)
        try:
            await node.close()
        finally:
            log.close()

    async def crash(self, number: int) -> None:
        """Drop one as SIGKILL does: what waits to be stored is lost."""
        outbox = self.nodes[number].outbox
        outbox._received.clear()
        outbox._unstored = None
        with contextlib.suppress(Exception):
            await self.stop(number)

    async def wait_quiet(self) -> None:
        """Wait until no running node has anything to read, to store or to say: equal positions alone are not enough."""

        def quiet() -> bool:
            return all(
                not node.outbox.is_busy
                and not node._events
                and not node.core.is_appending
                and not node.core.holds_back
                and all(
                    node.core.read(number) == other.trusted_log.last and not node.core.unread(number)
                    for number, other in self.nodes.items()
                )
                for node in self.nodes.values()
            )

        await until(quiet, "the nodes quiet")

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_) -> None:
        try:
            for number in list(self.nodes):
                await self.stop(number)
        finally:
            structlog.reset_defaults()
