"""The systems that are compared: how each is started and loaded, what it withstands, and what its answer means.

A system is started on an empty folder, measured, and stopped. `guarantee` stands beside its figures: a figure without it
means nothing.
"""

import asyncio
import json
from abc import ABC, abstractmethod
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from client.api import Client
from client.bench import all_up, initialise, started
from client.cli.bench_command import local_pids
from client.surroundings import describe
from tests.bench.programs import (
    HOST,
    START_S,
    Program,
    answers_at,
    fetched,
    first_line,
    module,
    package_missing,
    tool_missing,
    wait_for,
)
from tests.support.ports import free_ports


@dataclass(frozen=True)
class Guarantee:
    """What a system withstands: n servers, which faults of how many, and what is so when an operation is answered."""

    n: int
    faults: str
    durable: str
    link: str


class System(ABC):
    """One way to run one system. `with_connections`: whether every operation at a time can have its own connection."""

    name: str
    guarantee: Guarantee
    with_connections = True

    @abstractmethod
    def missing(self) -> str:
        """Say what must be installed before it can run; nothing if all is there."""

    @abstractmethod
    def version(self) -> str:
        """Return what is installed."""

    @abstractmethod
    def start(self, folder: Path, stack: ExitStack) -> tuple[Program, dict[str, int]]:
        """Start it in an empty folder; return who generates the load, and the servers' process ids by name.

        All that is started is stopped with `stack`.
        """


def run(stack: ExitStack, name: str, command: list[str], folder: Path, *, talks: bool = False) -> Program:
    program = Program(name, command, folder, talks=talks)
    stack.callback(program.stop)
    return program


def generator(stack: ExitStack, system: str, where: str, folder: Path) -> Program:
    return run(stack, "generator", module("tests.bench.generator", system, where), folder, talks=True)


class Etcd(System):
    name = "etcd"
    guarantee = Guarantee(3, "1 crash", "on disk (fsync) at 2", "plain, no signatures")

    def missing(self) -> str:
        return tool_missing("etcd", "etcd-server") or package_missing("grpc", "grpcio")

    def version(self) -> str:
        return first_line(["etcd", "--version"]).removeprefix("etcd Version: ")

    def start(self, folder, stack):
        ports = free_ports(6)
        peers = [f"http://{HOST}:{port}" for port in ports[:3]]
        clients = [f"http://{HOST}:{port}" for port in ports[3:]]
        everybody = ",".join(f"n{number}={url}" for number, url in enumerate(peers))
        servers = []
        for number in range(3):
            options = {
                "name": f"n{number}",
                "data-dir": str(folder / f"n{number}"),
                "listen-peer-urls": peers[number],
                "initial-advertise-peer-urls": peers[number],
                "listen-client-urls": clients[number],
                "advertise-client-urls": clients[number],
                "initial-cluster": everybody,
                "initial-cluster-state": "new",
                "log-level": "error",
            }
            command = ["etcd", *(f"--{name}={value}" for name, value in options.items())]
            servers.append(run(stack, f"etcd {number}", command, folder))
        leaders = []

        def led() -> bool:
            pages = [fetched(f"{url}/metrics") for url in clients]
            leaders[:] = [url for url, page in zip(clients, pages, strict=True) if "etcd_server_is_leader 1" in page]
            return bool(leaders) and all("etcd_server_has_leader 1" in page for page in pages)

        wait_for(led, "a leader of etcd", servers)
        where = leaders[0].removeprefix("http://")  # a follower would only pass everything on
        return generator(stack, "etcd", where, folder), {server.name: server.pid for server in servers}


class Redis(System):
    name = "Redis"
    guarantee = Guarantee(1, "none", "on disk (appendfsync always)", "plain, no signatures")

    def missing(self) -> str:
        return tool_missing("redis-server", "redis-server")

    def version(self) -> str:
        return first_line(["redis-server", "--version"]).partition(" sha=")[0].removeprefix("Redis server v=")

    def server(self, folder: Path, stack: ExitStack) -> tuple[Program, int]:
        """Start Redis alone; return it and its port."""
        (port,) = free_ports(1)
        command = ["redis-server", "--port", str(port), "--bind", HOST, "--dir", str(folder), "--save", ""]
        command += ["--appendonly", "yes", "--appendfsync", "always"]
        server = run(stack, "redis", command, folder)
        wait_for(lambda: answers_at(port), "Redis", [server])
        return server, port

    def start(self, folder, stack):
        server, port = self.server(folder, stack)
        return generator(stack, "redis", f"{HOST}:{port}", folder), {server.name: server.pid}


# On a busy machine its usual 0.4 s without a word from the leader pass now and then, and operations are lost with it.
PATIENT = {"raftMinTimeout": 2.0, "raftMaxTimeout": 4.0, "connectionTimeout": 10.0}


class PySyncObj(System):
    guarantee = Guarantee(3, "1 crash", "in the page cache of 2 (journal, never forced)", "plain, no signatures")
    with_connections = False  # the load comes from the leader's own process

    def __init__(self, name: str, **options: object) -> None:
        self.name, self._options = name, options

    def missing(self) -> str:
        return package_missing("pysyncobj", "pysyncobj")

    def version(self) -> str:
        return version("pysyncobj")

    def start(self, folder, stack):
        addresses = [f"{HOST}:{port}" for port in free_ports(3)]
        nodes = []
        for number, own in enumerate(addresses):
            options = {"journalFile": str(folder / f"journal-{number}"), **PATIENT, **self._options}
            others = [address for address in addresses if address != own]
            settings = json.dumps({"own": own, "others": others, "options": options})
            command = module("tests.bench.pysyncobj_node", settings)
            nodes.append(run(stack, f"pysyncobj {number}", command, folder, talks=True))
        leaders = []

        def led() -> bool:
            leaders[:] = [node for node in nodes if node.ask({"ask": "leader"})["leader"]]
            return len(leaders) == 1

        wait_for(led, "a leader of PySyncObj", nodes)
        followers = [node for node in nodes if node is not leaders[0]]
        # By role, not by number: each round may have another leader.
        return leaders[0], {f"follower {number}": node.pid for number, node in enumerate(followers, 1)}


class Trustlog(System):
    guarantee = Guarantee(3, "1 of any kind, given trusted logs", "on disk (fsync) at 2", "TLS 1.3, signed requests")

    def __init__(self, name: str, ordering: str, *, backend: str = "process", durability: str = "disk") -> None:
        self.name, self.ordering = name, ordering
        self._backend, self._durability = backend, durability

    def missing(self) -> str:
        return ""

    def version(self) -> str:
        return str(describe()["packages"]["trustlog"])

    def start(self, folder, stack):
        directory = folder / "cluster"
        self.make(directory, stack)
        stack.enter_context(started(directory, self._durability))
        pids = asyncio.run(processes_of(directory))
        return generator(stack, "trustlog", str(directory), folder), pids

    def make(self, directory: Path, stack: ExitStack) -> None:
        initialise(directory, 1, self.ordering, self._backend)


class Pbft(Trustlog):
    """The baseline without trusted logs: 3f+1 replicas, every message signed, nothing on disk."""

    guarantee = Guarantee(4, "1 of any kind", "in memory", "TLS 1.3, signed requests and messages")

    def __init__(self, name: str) -> None:
        super().__init__(name, "pbft", durability="memory")


async def processes_of(directory: Path) -> dict[str, int]:
    """Wait until all replicas serve; return their process ids, and those of their logs' services."""
    async with Client.from_dir(directory, deadline_s=START_S) as client:
        await client.put("ready", "yes")
        await all_up(client)
        return local_pids(await client.status())


ETCD = Etcd()
SYSTEMS: tuple[System, ...] = (
    ETCD,
    PySyncObj("PySyncObj", appendEntriesUseBatch=False),
    PySyncObj("PySyncObj, batches of 5 ms", autoTickPeriod=0.005, appendEntriesPeriod=0.005),
    Redis(),
    Trustlog("trustlog two-phase", "two-phase"),
    Trustlog("trustlog three-phase", "three-phase"),
    Pbft("PBFT (trustlog's baseline)"),
)
