"""`make bench-chain`: one operation at a time through the bare chain of steps that two-phase ordering has, and no protocol.

python -m tests.bench.chain --rounds 3 --seconds 2

A client signs a request; a primary verifies it, forces it to its disk, has a log in a process of its own attest it
(which forces its state to the disk, and signs), and sends it to two backups; each verifies both signatures, forces it to
its disk, has its own log attest that, and answers the client, which waits for both. TLS 1.3, uvloop, one turn of the
loop for each step, no threads. Nothing is encoded, ordered, executed, kept in order or made whole after a loss: what
trustlog adds to this is its own work, and what this takes, no arrangement of that work can save.
"""

import asyncio
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import click
import uvloop

from client.bench import initialise
from client.surroundings import file_system_of
from replica.cluster.clusterfile import load_cluster_file
from replica.cluster.keys import ClientKey
from replica.shell.verify import verify_by_client
from replica.wire.tls import client_context, server_context
from tests.bench.programs import HOST, START_S, ProgramError, answers_at, module, wait_for
from tests.bench.report import RESULTS, ratio, surroundings, table, write_into
from tests.bench.rounds import Cell, Plan, present, visit
from tests.bench.systems import ETCD, Trustlog, run
from tests.support.ports import free_ports
from trustlog.cli.contract import CommandError

SOCKET = "log.sock"
VALUE_BYTES = 100
NUMBER_BYTES, SIGNATURE_BYTES, DIGEST_BYTES = 8, 64, 32
REQUEST_BYTES = NUMBER_BYTES + 16 + VALUE_BYTES + SIGNATURE_BYTES
FORWARDED_BYTES = REQUEST_BYTES + SIGNATURE_BYTES
ROUNDS, SECONDS = 3, 2.0
WARM_UP = 50
CHAIN = "the bare chain"
SYSTEMS = (ETCD, Trustlog("trustlog two-phase", "two-phase"), Trustlog("trustlog three-phase", "three-phase"))


class Pieces(asyncio.Protocol):
    """Hands over pieces of one size."""

    def __init__(self, size: int, on_piece: Callable[[bytes, asyncio.Transport], None]) -> None:
        self._size, self._on_piece, self._rest = size, on_piece, b""

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self._rest += data
        while len(self._rest) >= self._size:
            piece, self._rest = self._rest[: self._size], self._rest[self._size :]
            self._on_piece(piece, self.transport)


class Disk:
    """A file to which everything is forced."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)

    def keep(self, data: bytes) -> None:
        os.write(self._file, data)
        os.fdatasync(self._file)


def log(folder: str) -> None:
    """A trusted log: it keeps its newest digest, and signs it."""
    os.chdir(folder)  # a socket's path must be short
    key, disk = ClientKey.generate(), Disk(Path("state"))
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(SOCKET)
        listening.listen()
        print(key.public_key.hex(), flush=True)
        served, _ = listening.accept()
        while digest := served.recv(DIGEST_BYTES):
            disk.keep(digest)
            served.sendall(key.sign(digest))


def attested_in(folder: Path) -> Callable[[bytes], bytes]:
    """Connect to the log in a folder; return what has it attest a request."""
    os.chdir(folder)
    link = socket.socket(socket.AF_UNIX)
    link.connect(SOCKET)

    def attest(request: bytes) -> bytes:
        link.sendall(request[-DIGEST_BYTES:])
        return link.recv(SIGNATURE_BYTES)

    return attest


async def replica(folder: str, port: str, answers: str, client: str, primary_log: str, *backups: str) -> None:
    """A primary if there are backups behind it, or else a backup, whose primary's log has the key `primary_log`."""
    home, attest, disk = Path(folder), attested_in(Path(folder)), Disk(Path(folder) / "requests")
    client_key, loop = bytes.fromhex(client), asyncio.get_running_loop()
    trusted = client_context(load_cluster_file(home.parent / "cluster.toml").replicas[0].certificate_der)
    behind = [
        (await loop.create_connection(lambda: Pieces(1, lambda *_: None), HOST, int(one), ssl=trusted))[0]
        for one in backups
    ]

    def on_request(piece: bytes, asker: asyncio.Transport) -> None:
        request = piece[:REQUEST_BYTES]
        good = verify_by_client(client_key, request[-SIGNATURE_BYTES:], request[:-SIGNATURE_BYTES])
        if primary_log:
            attested = request[-DIGEST_BYTES:]
            good = good and verify_by_client(bytes.fromhex(primary_log), piece[REQUEST_BYTES:], attested)
        if not good:
            raise RuntimeError("a signature is not good")
        disk.keep(piece)
        attestation = attest(request)
        for one in behind:
            one.write(request + attestation)
        if not behind:
            answered.write(request[:NUMBER_BYTES])

    def accepted() -> Pieces:
        return Pieces(FORWARDED_BYTES if primary_log else REQUEST_BYTES, on_request)

    answered: asyncio.Transport

    class Answered(asyncio.Protocol):
        def connection_made(self, transport):
            nonlocal answered
            answered = transport

    own = home.parent / "replica-0"
    context = server_context(own / "tls.crt", own / "tls.key", [])
    await loop.create_server(accepted, HOST, int(port), ssl=context)
    await loop.create_server(Answered, HOST, int(answers), ssl=context)
    await asyncio.Event().wait()


class Asker:
    """A client, which waits for an answer of each backup."""

    def __init__(self, key: ClientKey) -> None:
        self._key, self._number, self._heard = key, 0, 0
        self._done: asyncio.Future[None] | None = None
        self.primary: asyncio.Transport

    def answered(self, piece: bytes, _: asyncio.Transport) -> None:
        """Take the number of a request that a backup carried out."""
        if int.from_bytes(piece) == self._number:
            self._heard += 1
            if self._heard == 2:
                self._done.set_result(None)

    async def ask(self) -> float:
        """Have one request carried out; return how many seconds that took."""
        began = time.perf_counter()
        self._number, self._heard, self._done = self._number + 1, 0, asyncio.get_running_loop().create_future()
        request = self._number.to_bytes(NUMBER_BYTES) + bytes(16) + os.urandom(VALUE_BYTES)
        self.primary.write(request + self._key.sign(request))
        async with asyncio.timeout(START_S):
            await self._done
        return time.perf_counter() - began


async def ask(directory: Path, key: ClientKey, primary: int, backups: list[int], seconds: float) -> list[float]:
    """Ask for so long, one request after the other; return what each took."""
    loop, asker = asyncio.get_running_loop(), Asker(key)
    trusted = client_context(load_cluster_file(directory / "cluster.toml").replicas[0].certificate_der)
    opened = []
    try:
        for port in backups:
            answers, _ = await loop.create_connection(
                lambda: Pieces(NUMBER_BYTES, asker.answered), HOST, port, ssl=trusted
            )
            opened.append(answers)
        asker.primary, _ = await loop.create_connection(asyncio.Protocol, HOST, primary, ssl=trusted)
        opened.append(asker.primary)
        for _ in range(WARM_UP):
            await asker.ask()
        ends, took = time.perf_counter() + seconds, []
        while time.perf_counter() < ends:
            took.append(await asker.ask())
        return took
    finally:
        for one in opened:
            one.abort()
        await asyncio.sleep(0)  # what was aborted is given up in the next turn of the loop


def started_log(stack: ExitStack, folder: Path) -> str:
    """Start a log in a new folder; return its public key."""
    folder.mkdir()
    program = run(stack, f"log of {folder.name}", module("tests.bench.chain", "log", str(folder)), folder, talks=True)
    return program.line(START_S)


def measure_chain(parent: Path | None, seconds: float) -> list[float]:
    """Start the chain, ask it for so long, and stop it; return what each request took, in seconds."""
    with tempfile.TemporaryDirectory(prefix="trustlog-bench-", dir=parent) as place, ExitStack() as stack:
        directory, key = Path(place) / "c", ClientKey.generate()
        initialise(directory, 1, "two-phase", "software")  # for its certificates
        logs = [started_log(stack, directory / name) for name in ("primary", "backup-1", "backup-2")]
        ports = free_ports(6)
        for number, name in ((1, "backup-1"), (2, "backup-2"), (0, "primary")):
            words = [str(directory / name), *map(str, ports[2 * number : 2 * number + 2])]
            words += [key.public_key.hex(), *((logs[0],) if number else ("", str(ports[2]), str(ports[4])))]
            program = run(stack, name, module("tests.bench.chain", "replica", *words), directory)
            wait_for(lambda port=ports[2 * number + 1]: answers_at(port), name, [program])
        return uvloop.run(ask(directory, key, ports[0], [ports[3], ports[5]], seconds))


def measure(rounds: int, seconds: float, parent: Path | None) -> tuple[dict[str, list[float]], list[str]]:
    """Measure all, in turns; return p50 in ms by system, one of each per round, and what went wrong."""
    systems, missing = present(SYSTEMS)
    found: dict[str, list[float]] = {system.name: [] for system in systems} | {CHAIN: []}
    failures = [f"{name}: not installed: {what}" for name, what in missing.items()]
    plan = Plan((VALUE_BYTES,), (1,), (), 1, seconds)
    for number in range(rounds):
        click.echo(f"round {number + 1} of {rounds}", err=True)
        for name, times in found.items():
            try:
                if name == CHAIN:
                    times.append(median(measure_chain(parent, seconds)) * 1000)
                    continue
                (system,) = (one for one in systems if one.name == name)
                times += [
                    done.p50_ms for cell, done in visit(system, plan, parent) if cell == Cell(VALUE_BYTES, False, 1)
                ]
            except (ProgramError, CommandError, TimeoutError) as error:
                failures.append(f"round {number + 1}: {name}: {error}")
                click.echo(f"failed: {failures[-1]}", err=True)
    return found, failures


def page_of(found: dict[str, list[float]], failures: list[str], rounds: int, where: str) -> str:
    """Return the table and what must be known of it."""
    base = median(found[CHAIN]) if found[CHAIN] else None
    rows = []
    for name, times in found.items():
        p50 = f"{median(times):.2f}" if times else "-"
        rows.append([name, p50, ratio(median(times) / base) if times and base else "-"])
    lines = [
        f"One put of {VALUE_BYTES} bytes at a time, closed loop; medians of {rounds} runs, in turns. The chain: each step that",
        "two-phase ordering has between a client's question and its second answer, and no protocol (`tests/bench/chain.py`).",
        "",
        table(["system", "p50 ms", "to the chain"], rows),
        "",
        *(f"- {failure.partition(chr(10))[0]}" for failure in failures),
        *([""] if failures else []),
        where,
    ]
    return "\n".join(lines)


@click.command()
@click.option("--rounds", type=click.IntRange(1, 100), default=ROUNDS, show_default=True)
@click.option("--seconds", type=click.FloatRange(0.1, 600), default=SECONDS, show_default=True, help="Length of a run.")
@click.option("--dir", "parent", type=click.Path(path_type=Path, exists=True, file_okay=False), help="A real disk.")
@click.option("--write", is_flag=True, help=f"Put the table into {RESULTS.name}.")
def main(*, rounds: int, seconds: float, parent: Path | None, write: bool) -> None:
    """Measure one operation at a time through the bare chain of steps, beside etcd and trustlog."""
    found, failures = measure(rounds, seconds, parent)
    text = page_of(found, failures, rounds, surroundings({"files on": file_system_of(parent or Path("/tmp"))}))
    click.echo(text)
    if write:
        write_into(RESULTS, "chain", text)


ROLES = {"log": log, "replica": lambda *words: uvloop.run(replica(*words))}

if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1] in ROLES:
        ROLES[sys.argv[1]](*sys.argv[2:])
    else:
        sys.exit(main())
