"""Clusters of real replicas: child processes that are started, killed by their own pid, and restarted."""

import contextlib
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import uvloop

from client import Client
from client.connection import Timing
from client.events import Settings
from replica.cluster.clusterfile import load_any_cluster_file
from replica.cluster.home import SETTINGS_NAME
from replica.cluster.keys import ClientKey, load_client_key
from replica.cluster.provision import init_cluster, replica_folder_name
from tests.support.waiting import until, wait_for

ROOT = Path(__file__).resolve().parents[2]
READY_S = 40.0


def replica_command(folder: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "replica.cli.main", "run", str(folder), *options]


def environment(**extra: str) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        **extra,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), extra.get("PYTHONPATH")))),
    }


class ClientsMixin:
    """What real and in-process clusters share: `cluster` and `directory`."""

    def set(self, **settings: object) -> None:
        """Add settings, in TOML, to every replica's file."""
        for number in range(self.cluster.genesis.n):
            path = self.folder(number) / SETTINGS_NAME
            # At the top: after a table's head they would belong to that table.
            path.write_text("".join(f"{name} = {value}\n" for name, value in settings.items()) + path.read_text())

    def key(self) -> ClientKey:
        return load_client_key(self.directory / "client")

    def client(self, deadline_s=20.0, key=None, **settings) -> Client:
        # Quick to dial again: tests kill and restart replicas.
        timing = Timing(connect_s=5.0, backoff_first_s=0.02, backoff_s_max=0.2)
        return Client(
            self.cluster, key or self.key(), deadline_s=deadline_s, settings=Settings(**settings), timing=timing
        )

    async def reports(self, client, deadline_s=5.0) -> dict[int, dict]:
        """Return the report of every replica that can be reached."""
        found = await client.status(deadline_s=deadline_s)
        return {status.number: status.report for status in found if status.reachable and status.report}

    async def wait_ready(self, *numbers: int, seconds=READY_S) -> None:
        """Wait until these replicas (default: all) answer, read each other's logs, and may speak if enough are there."""
        wanted = set(numbers or range(self.cluster.genesis.n))
        enough = len(wanted) > self.cluster.genesis.f

        async def ready():
            self.check_alive(wanted)
            reports = await self.reports(client)
            if not wanted <= set(reports) or (enough and any(reports[number]["mute"] for number in wanted)):
                return False
            return all(
                peer["connected"] for number in wanted for peer in reports[number]["peers"] if peer["replica"] in wanted
            )

        async with self.client() as client:
            await until(ready, f"replicas {sorted(wanted)} ready", seconds)

    async def wait_equal(self, *numbers: int, seconds=READY_S) -> dict[int, dict]:
        """Wait until these replicas executed the same and have read each other's logs to the end."""
        wanted = set(numbers or range(self.cluster.genesis.n))

        async def equal():
            self.check_alive(wanted)
            reports = await self.reports(client)
            if not wanted <= set(reports) or len({reports[number]["executed"] for number in wanted}) != 1:
                return None
            last = {number: (reports[number]["log"]["last"], reports[number]["log"]["head"]) for number in wanted}
            for number in wanted:
                for peer in reports[number]["peers"]:
                    known = (peer["received"], peer["head"])
                    if peer["replica"] in wanted and (known != last[peer["replica"]] or peer["read"] != known[0]):
                        return None
            return reports

        async with self.client() as client:
            return await until(equal, f"replicas {sorted(wanted)} equal", seconds)

    def check_alive(self, numbers) -> None:
        """Fail at once if one of them ended."""


class Processes(ClientsMixin, contextlib.AbstractContextManager):
    """A cluster in `directory`; each replica a child process with its standard error in a file.

    As a context manager it ends its own children, and shows what they logged if the test failed.
    """

    def __init__(self, directory: Path, f: int = 1, extra_environment=None, **options) -> None:
        self.directory = directory
        exists = directory.exists()  # a copy of one that was made before
        self.cluster = (
            load_any_cluster_file(directory) if exists else init_cluster(directory, f=f, base_port=0, **options)
        )
        self._environment = environment(**(extra_environment or {}))
        self._children: dict[int, subprocess.Popen] = {}

    def folder(self, number: int) -> Path:
        return self.directory / replica_folder_name(number)

    def log_path(self, number: int) -> Path:
        return self.directory / f"replica-{number}.stderr"

    def log_text(self, number: int) -> str:
        path = self.log_path(number)
        return path.read_text(errors="replace") if path.exists() else ""

    def pid(self, number: int) -> int:
        return self._children[number].pid

    def start(self, *numbers: int, file_bytes_max: int | None = None, under: Sequence[str] = ()) -> None:
        """Start replicas (default: all).

        file_bytes_max: their disk is full beyond files of this size. under: a command that is given theirs to run.
        """

        for number in numbers or range(self.cluster.genesis.n):
            with self.log_path(number).open("ab") as stderr:
                self._children[number] = subprocess.Popen(
                    [*under, *replica_command(self.folder(number))],
                    stdin=subprocess.DEVNULL,
                    stdout=stderr,
                    stderr=stderr,
                    env=self._environment,
                    start_new_session=True,  # with what it starts itself, it can be ended
                )
            if file_bytes_max is not None:
                limits = (file_bytes_max, file_bytes_max)
                resource.prlimit(self._children[number].pid, resource.RLIMIT_FSIZE, limits)

    def start_and_wait(self, *numbers: int) -> None:
        self.start(*numbers)
        uvloop.run(self.wait_ready(*numbers))

    def kill(self, number: int, how: signal.Signals = signal.SIGKILL) -> int:
        """Signal one replica and return its exit status."""
        child = self._children.pop(number)
        child.send_signal(how)
        return child.wait(timeout=20)

    def exit_status(self, number: int, seconds=30.0) -> int:
        """Return the status of a replica that ends by itself."""
        child = self._children.pop(number)
        try:
            return child.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self._children[number] = child
            raise

    def is_running(self, number: int) -> bool:
        return number in self._children and self._children[number].poll() is None

    def check_alive(self, numbers) -> None:
        for number in numbers:
            assert self.is_running(number), f"replica {number} is not running:\n{self.log_text(number)}"

    def wait_logged(self, number: int, text: str, seconds=20.0) -> None:
        wait_for(lambda: text in self.log_text(number), f'replica {number} logs "{text}"', seconds)

    def rss_bytes(self, number: int) -> int:
        status = Path(f"/proc/{self.pid(number)}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
        return int(line.split()[1]) * 1024

    def stop(self) -> None:
        for child in self._children.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
        for child in self._children.values():
            child.wait(timeout=20)
        self._children.clear()

    def __exit__(self, kind, error, traceback) -> None:
        self.stop()
        if kind is not None:
            self.show_logs()

    def show_logs(self) -> None:
        for path in sorted(self.directory.glob("replica-*.stderr")):  # of those too that came in later
            print(f"--- {path.stem}\n{path.read_text(errors='replace')[-6000:]}")
