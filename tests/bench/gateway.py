"""`make bench-gateway`: Redis' own load generator through the gateway, beside etcd and Redis in the same run.

python -m tests.bench.gateway --rounds 3 --requests 20000

redis-benchmark sends SETs over 50 connections, one at a time on each, and then 16 at a time. etcd has no such protocol:
it gets as many puts at a time, over as many connections, from the generator of `make bench-peers`.
"""

import csv
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import click

from client.surroundings import file_system_of
from tests.bench.programs import HOST, ProgramError, answers_at, module, tool_missing, wait_for
from tests.bench.report import RESULTS, failures_of, ratio, surroundings, table, write_into
from tests.bench.rounds import Cell, Plan, Results, present, visit
from tests.bench.systems import ETCD, Etcd, Redis, System, Trustlog, run
from tests.support.ports import free_ports
from trustlog.cli.contract import CommandError

TOOL = "redis-benchmark"
CONNECTIONS = 50
PIPELINES = (1, 16)
VALUE_BYTES = 100
KEYS = 10_000
ROUNDS = 3
REQUESTS = 20_000
SECONDS = 2.0
RUN_S = 180.0


@dataclass
class Figures:
    """What was measured of one system: by operations in a pipeline, one of each per round."""

    rates: dict[int, list[float]] = field(default_factory=dict)
    p50_ms: dict[int, list[float]] = field(default_factory=dict)

    def add(self, pipeline: int, rate: float, p50_ms: float) -> None:
        """Note a run."""
        self.rates.setdefault(pipeline, []).append(rate)
        self.p50_ms.setdefault(pipeline, []).append(p50_ms)


class Gateway(Trustlog):
    """A durable cluster behind one gateway."""

    def missing(self) -> str:
        return tool_missing(TOOL, "redis-tools")

    def serve(self, folder: Path, stack: ExitStack) -> int:
        """Start cluster and gateway; return the port of Redis' protocol."""
        super().start(folder, stack)
        (port,) = free_ports(1)
        command = module("client.cli.main", "-c", str(folder / "cluster"), "gateway", "--resp", f"{HOST}:{port}")
        gateway = run(stack, "gateway", command, folder)
        wait_for(lambda: answers_at(port), "the gateway", [gateway])
        return port


class RedisAlone(Redis):
    """Redis itself, with the same load."""

    def missing(self) -> str:
        return super().missing() or tool_missing(TOOL, "redis-tools")

    def serve(self, folder: Path, stack: ExitStack) -> int:
        """Start it; return its port."""
        return self.server(folder, stack)[1]


SYSTEMS: tuple[System, ...] = (
    ETCD,
    RedisAlone(),
    Gateway("gateway, two-phase", "two-phase"),
    Gateway("gateway, three-phase", "three-phase"),
)


def redis_benchmark(port: int, requests: int, pipeline: int) -> tuple[float, float]:
    """Run it once; return SETs per second and their p50 in ms. ProgramError with its words if it failed."""
    options = ["-h", HOST, "-p", str(port), "-t", "set", "-n", str(requests), "-c", str(CONNECTIONS)]
    options += ["-P", str(pipeline), "-d", str(VALUE_BYTES), "-r", str(KEYS), "--csv"]
    done = subprocess.run([TOOL, *options], capture_output=True, text=True, timeout=RUN_S, check=False)
    rows = [row for row in csv.DictReader(done.stdout.splitlines()) if row.get("test") == "SET"]
    if done.returncode or len(rows) != 1:
        raise ProgramError(f"{TOOL} ended with code {done.returncode}: {(done.stderr or done.stdout).strip()}")
    return float(rows[0]["rps"]), float(rows[0]["p50_latency_ms"])


def measure_once(system: System, requests: int, seconds: float, parent: Path | None, found: Figures) -> None:
    """Start a system, load it with each pipeline, and stop it."""
    if isinstance(system, Etcd):
        plan = Plan((VALUE_BYTES,), (CONNECTIONS,), (VALUE_BYTES,), 1, seconds)
        for cell, done in visit(system, plan, parent):
            if cell == Cell(VALUE_BYTES, True, CONNECTIONS):
                found.add(1, done.operations / done.seconds, done.p50_ms)
        return
    with tempfile.TemporaryDirectory(prefix="trustlog-bench-", dir=parent) as folder, ExitStack() as stack:
        port = system.serve(Path(folder), stack)
        redis_benchmark(port, max(CONNECTIONS, requests // 10), 1)
        for pipeline in PIPELINES:
            found.add(pipeline, *redis_benchmark(port, requests * pipeline, pipeline))


@click.command()
@click.option("--rounds", type=click.IntRange(1, 100), default=ROUNDS, show_default=True)
@click.option(
    "--requests", type=click.IntRange(100), default=REQUESTS, show_default=True, help="For each in a pipeline."
)
@click.option(
    "--seconds", type=click.FloatRange(0.1, 600), default=SECONDS, show_default=True, help="Of a run of etcd."
)
@click.option("--dir", "parent", type=click.Path(path_type=Path, exists=True, file_okay=False), help="A real disk.")
@click.option("--write", is_flag=True, help=f"Put the table into {RESULTS.name}.")
def main(*, rounds: int, requests: int, seconds: float, parent: Path | None, write: bool) -> None:
    """Measure SETs through the gateway with redis-benchmark, beside Redis itself and etcd."""
    systems, missing = present(SYSTEMS)
    for name, what in missing.items():
        click.echo(f"skipped: {name}: {what}", err=True)
    if not any(isinstance(system, Gateway) for system in systems):
        raise click.ClickException(f"without {TOOL} there is no load: apt-get install redis-tools")
    found: dict[str, Figures] = {system.name: Figures() for system in systems}
    failures = []
    for number in range(rounds):
        turn = number % len(systems)
        for system in [*systems[turn:], *systems[:turn]]:
            click.echo(f"round {number + 1} of {rounds}: {system.name}", err=True)
            try:
                measure_once(system, requests, seconds, parent, found[system.name])
            except (ProgramError, CommandError, subprocess.TimeoutExpired) as error:
                failures.append(f"round {number + 1}: {system.name}: {error}")
                click.echo(f"failed: {failures[-1]}", err=True)
    where = surroundings({"files on": file_system_of(parent or Path("/tmp"))})
    text = page_of(found, missing, failures, rounds, where)
    click.echo(text)
    if write:
        write_into(RESULTS, "gateway", text)


def page_of(found: dict[str, Figures], missing: dict[str, str], failures: list[str], rounds: int, where: str) -> str:
    """Return the table and what must be known of it; ratios are to etcd with one put at a time on each connection."""
    bases = found[ETCD.name].rates.get(1) if ETCD.name in found else None
    headings = ["system"]
    for pipeline in PIPELINES:
        headings += [f"SETs per second, {pipeline} at a time", "p50 ms"]
    rows = [row_of(name, figures, median(bases) if bases else None) for name, figures in found.items()]
    rows += [[name, *(["not installed", "-"] * len(PIPELINES))] for name in missing]
    return "\n".join(
        [
            (
                f"redis-benchmark, SET of {VALUE_BYTES}-byte values to {KEYS:,} keys over {CONNECTIONS} connections, medians of "
                f"{rounds} runs, in turns; n = 3, the log in a process of its own, on disk; Redis with appendfsync always. etcd: "
                f"puts from the generator of `make bench-peers` over {CONNECTIONS} connections; in brackets how many times that."
            ),
            "",
            table(headings, rows),
            "",
            *failures_of(Results({}, failures)),
            where,
        ]
    )


def row_of(name: str, figures: Figures, base: float | None) -> list[str]:
    """Return a line of the table."""
    row = [name]
    for pipeline in PIPELINES:
        if pipeline not in figures.rates:
            row += ["-", "-"]
            continue
        rate = median(figures.rates[pipeline])
        row += [f"{rate:,.0f} ({ratio(rate / base)})" if base else f"{rate:,.0f}"]
        row += [f"{median(figures.p50_ms[pipeline]):.1f}"]
    return row


if __name__ == "__main__":
    sys.exit(main())
