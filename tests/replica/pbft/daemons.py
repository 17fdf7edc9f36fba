"""PBFT replicas in one event loop: the daemon without processes and signals."""

import contextlib
from pathlib import Path

import structlog

from replica.cluster.home import load_any_home
from replica.cluster.pbft import PBFT
from replica.cluster.provision import init_cluster, replica_folder_name
from replica.pbft.node import PATIENCE_MS, PbftNode
from tests.support.cluster import ClientsMixin
from tests.support.nodes import Logged


class Daemons(ClientsMixin, contextlib.AbstractAsyncContextManager):
    def __init__(self, directory: Path, f: int = 1, patience_ms: int = PATIENCE_MS) -> None:
        self.patience_ms = patience_ms
        self.directory = directory
        self.cluster = init_cluster(directory, f=f, base_port=0, ordering=PBFT)
        self.nodes: dict[int, PbftNode] = {}
        self.stopped: dict[int, str] = {}
        self.logged = Logged()

    def folder(self, number: int) -> Path:
        return self.directory / replica_folder_name(number)

    def start(self, *numbers: int) -> None:
        structlog.configure(processors=[self.logged])
        for number in numbers or range(self.cluster.genesis.n):
            home = load_any_home(self.folder(number))
            self.nodes[number] = PbftNode(home, lambda reason, n=number: self.stopped.setdefault(n, reason))
            self.nodes[number].core.patience_ms = self.patience_ms
            self.nodes[number].start()

    async def stop(self, number: int) -> None:
        await self.nodes.pop(number).close()

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_) -> None:
        try:
            for number in list(self.nodes):
                await self.stop(number)
        finally:
            structlog.reset_defaults()
        assert not self.stopped
