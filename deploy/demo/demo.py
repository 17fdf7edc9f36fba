"""make demo: three real replicas order real requests; one is killed, and the others go on.

Everything is done through the programs a user has: trustlog-replica, trustlog-client and trustlog, as processes.
Exit 0 if every step did what it says; else 1, and the replicas' logs are shown.
"""

import argparse
import asyncio
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

from client.api import Client

RECORDS = Path(__file__).with_name("airports.tsv")
READY_S = 20.0
CLIENT_DEADLINE_S = 20.0
AFTER_KILL = 500

console = Console(highlight=False)


class DemoError(Exception):
    """A step did not do what it should; the text says which and how."""


def program(module: str, *arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", f"{module}.cli.main", *map(str, arguments)]


def shown(command: list[str]) -> str:
    """The command as a user would type it."""
    names = {"trustlog": "trustlog", "replica": "trustlog-replica", "client": "trustlog-client"}
    return shlex.join([names[command[2].split(".")[0]], *command[3:]])


def run(module: str, *arguments: str | Path, capture: bool = False) -> str:
    command = program(module, *arguments)
    console.print(f"[bold cyan]$ {shown(command)}[/]", soft_wrap=True)
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE if capture else None, text=True)
    if done.returncode != 0:
        raise DemoError(f"{shown(command)} ended with exit {done.returncode}")
    return done.stdout or ""


def step(text: str) -> None:
    console.print(f"\n[bold]{text}[/]", soft_wrap=True)


class Replicas:
    """The three processes; only they are ever signalled, by their pid."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        for number in range(3):
            command = program("replica", "run", self.directory / f"replica-{number}")
            console.print(f"[bold cyan]$ {shown(command)} &[/]", soft_wrap=True)
            with self.log_path(number).open("wb") as log:
                # A session of their own, so that Ctrl-C ends the demo and the demo ends them.
                self.processes.append(subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True))

    def log_path(self, number: int) -> Path:
        return self.directory / f"replica-{number}.log"

    def kill(self, number: int) -> None:
        self.processes[number].send_signal(signal.SIGKILL)
        self.processes[number].wait()

    def stop(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.terminate()
        for process in self.processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def show_logs(self) -> None:
        for number in range(len(self.processes)):
            console.print(f"[bold]replica-{number}, last words:[/]")
            lines = self.log_path(number).read_text(errors="replace").splitlines()
            console.print("\n".join(lines[-8:]), markup=False)


async def wait_until_ready(directory: Path, replicas: Replicas) -> None:
    deadline = time.monotonic() + READY_S
    async with Client.from_dir(directory, deadline_s=2) as client:
        while time.monotonic() < deadline:
            for number, process in enumerate(replicas.processes):
                if process.poll() is not None:
                    raise DemoError(f"replica-{number} ended with exit {process.returncode}")
            reports = [status.report for status in await client.status() if status.reachable]
            if len(reports) == 3 and all(peer["connected"] for report in reports for peer in report["peers"]):
                return
            await asyncio.sleep(0.1)
    raise DemoError(f"the replicas were not ready within {READY_S:.0f} s")


async def read_back(directory: Path) -> int:
    """Read every record through the cluster and compare; return how many there are."""
    expected = dict(line.split("\t", 1) for line in RECORDS.read_text().splitlines())
    async with Client.from_dir(directory, deadline_s=CLIENT_DEADLINE_S) as client:
        values = await asyncio.gather(*(client.get(key) for key in expected))
    wrong = [key for (key, text), value in zip(expected.items(), values, strict=True) if value != text.encode()]
    if wrong:
        raise DemoError(f"{len(wrong)} records read back differ, {wrong[0]} first")
    return len(expected)


async def go_on(directory: Path) -> float:
    """Write and read with one replica dead; return operations per second."""
    started = time.monotonic()
    async with Client.from_dir(directory, deadline_s=CLIENT_DEADLINE_S) as client:
        counts = await asyncio.gather(*(client.incr("visits") for _ in range(AFTER_KILL)))
        if sorted(counts) != list(range(1, AFTER_KILL + 1)):
            raise DemoError("the counter did not count every increment exactly once")
        if await client.get("visits") != b"%d" % AFTER_KILL:
            raise DemoError("the counter's value is lost")
    return AFTER_KILL / (time.monotonic() - started)


def verify_offline(directory: Path) -> None:
    """Take a group of replica-0's log from replica-1's disk, and check it with nothing but replica-0's public key."""
    document = run("replica", "inspect", directory / "replica-1", "--log", "0", "-o", "json", capture=True)
    content = json.loads(document)
    file = directory / "group.json"
    file.write_text(document)
    console.print(f"  replica-0 said, as replica-1 holds it: {content['entries'][0]['entry']}", markup=False)
    key = directory / "replica-0" / "log" / "log.pub"
    run("trustlog", "verify", "--key", key, "--context", content["context"], file, "-o", "plain")


def demo(directory: Path, *, keep: bool) -> None:
    replicas = Replicas(directory)
    started = time.monotonic()
    kept = False
    try:
        step("1. A cluster of 3 = 2f+1 replicas, of which f = 1 may fail in any way")
        run("replica", "init", directory, "--f", "1", "--base-port", "0", "-o", "plain")
        replicas.start()
        asyncio.run(wait_until_ready(directory, replicas))

        step("2. Load real records: every reply must come alike from 2 replicas")
        run("client", "-c", directory, "load", RECORDS)

        step("3. Read every record back and compare")
        count = asyncio.run(read_back(directory))
        console.print(f"  {count} records, all equal")

        step("4. What each replica says of itself")
        run("client", "-c", directory, "status", "-o", "table")

        step("5. One attestation, verified offline with a public key and nothing else")
        verify_offline(directory)

        step("6. Kill a backup (SIGKILL) and go on")
        replicas.kill(2)
        console.print(f"  replica-2 (pid {replicas.processes[2].pid}) is dead")
        rate = asyncio.run(go_on(directory))
        console.print(f"  {AFTER_KILL} increments, each counted once, {rate:,.0f} per second")
        run("client", "-c", directory, "status", "-o", "table")

        seconds = time.monotonic() - started
        step(f"Done in {seconds:.0f} s: {count} records written and read back, 1 of 3 replicas killed, nothing lost.")
        if keep:
            kept = True
            pids = " ".join(str(p.pid) for p in replicas.processes[:2])
            again = shown(program("replica", "run", directory / "replica-2"))
            lines = [
                f"Left running: replicas 0 and 1 (pids {pids}); their files are in {directory}. Try:",
                "  source .venv/bin/activate",
                f"  export TRUSTLOG_CLUSTER={shlex.quote(str(directory))}",
                "  trustlog-client get LHR",
                "  trustlog-client put greeting hello",
                "  trustlog-client status",
                f"  {again} &    # bring the killed one back",
                f"Stop them with: kill {pids}",
            ]
            console.print("\n".join(lines), soft_wrap=True, markup=False)
    except DemoError as error:
        replicas.show_logs()
        raise SystemExit(f"demo: {error}") from None
    finally:
        if not kept:
            replicas.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", action="store_true", help="leave the replicas running")
    arguments = parser.parse_args()
    os.environ.pop("TRUSTLOG_CLUSTER", None)
    if arguments.keep:
        demo(Path(tempfile.mkdtemp(prefix="trustlog-demo-")) / "cluster", keep=True)
        return
    with tempfile.TemporaryDirectory(prefix="trustlog-demo-") as directory:
        demo(Path(directory) / "cluster", keep=False)


if __name__ == "__main__":
    main()
