"""What `bench` prints and draws."""

from collections.abc import Sequence
from typing import IO, Any

import click
from rich.console import Group
from rich.text import Text

from client.chart import Axes, line_chart
from client.measure import GENERATOR, GENERATOR_BUSY, KEY_BYTES, VALUE_BYTES, Level
from client.queries import ReplicaStatus
from trustlog.cli.contract import Output, grid

AT_ONCE, ASKED = "at once", "asked/s"
EXPLAINED = (
    "medians over the runs, and the least and greatest rate; µs: CPU time per operation; r0: replica 0, "
    "l0: its log's process, cl: the client; "
    "cl CPUs, other CPUs: processors that the client, and programs outside the measurement, kept busy"
)
EXPLAINED_OPEN = "latency counts from the intended start; late ms: by how much the client itself started late, p99"


def report_of(found: Sequence[ReplicaStatus], ordering: str, clients: int = 1) -> dict[str, Any]:
    """Return what is measured, as the replicas report it."""
    durabilities = {str(replica.report.get("durability", "unknown")) for replica in found if replica.report}
    return {
        "replicas": len(found),
        "reachable": sum(1 for replica in found if replica.reachable),
        "ordering": ordering,
        "durability": ", ".join(sorted(durabilities)) or "unknown",
        "clients": clients,
        "key_bytes": KEY_BYTES,
        "operation": "put",
    }


def show(
    output: Output,
    levels: Sequence[Level],
    measured_cluster: dict[str, Any],
    machine: dict[str, Any],
    plot: IO[str] | None = None,
) -> None:
    """Print a measurement, and draw it."""
    if plot is not None:
        plot.write(chart_of(levels))
    data = {
        "cluster": measured_cluster,
        "machine": machine,
        "levels": [level.as_data() for level in levels],
    }
    about = [f"{name}={value}" for name, value in {**measured_cluster, **machine}.items()]
    done, used = what_was_done(levels), what_was_used(levels)
    if output.format == "plain":
        # One table, in which the loads stand once.
        lines = ["\t".join([*row, *more[1:]]) for row, more in zip(done, used, strict=True)]
        for line in [*about, *lines, *notes_on(levels)]:
            click.echo(line)
        return
    output.result(data, "", Group(grid(done[0], done[1:]), Text(), grid(used[0], used[1:])))
    if output.format == "table":
        click.echo("\n" + EXPLAINED)
        for line in [*notes_on(levels), *about]:
            click.echo(line)


def what_was_done(levels: Sequence[Level]) -> list[list[str]]:
    """Return rates and latencies, headings first; a column that would say the same of every load is left out."""
    is_open = any(level.rate is not None for level in levels)
    sized = any(level.value_bytes != VALUE_BYTES for level in levels)
    headings = [ASKED if is_open else AT_ONCE, *(["bytes"] if sized else []), "ops/s", "min", "max"]
    headings += [*(["MB/s"] if sized else []), "p50 ms", "p99 ms", "p99.9 ms", *(["late ms"] if is_open else [])]
    rows = [headings]
    for level in levels:
        row = [asked_of(level)]
        row += [f"{level.value_bytes}"] if sized else []
        row += [f"{level.ops_per_second:,.0f}", f"{level.slowest:,.0f}", f"{level.fastest:,.0f}"]
        row += [f"{level.mb_per_second:.1f}"] if sized else []
        row += [f"{level.p50_ms:.2f}", f"{level.p99_ms:.2f}", f"{level.p999_ms:.2f}"]
        rows.append([*row, *([f"{level.late_p99_ms:.2f}"] if is_open else [])])
    return rows


def what_was_used(levels: Sequence[Level]) -> list[list[str]]:
    """Return processor time by process, headings first."""
    processes = list(levels[0].cpu_us_per_operation) if levels else []
    is_open = any(level.rate is not None for level in levels)
    shown = [f"{shortened(name)} µs" for name in processes]
    rows = [[ASKED if is_open else AT_ONCE, *shown, "cl CPUs", "other CPUs"]]
    for level in levels:
        times = [f"{level.cpu_us_per_operation[name]:.1f}" for name in processes]
        rows.append([asked_of(level), *times, f"{level.generator_cpus:.2f}", f"{level.others_cpus:.2f}"])
    return rows


def shortened(process: str) -> str:
    """Return a process's name as it stands in headings: r0, l0, cl."""
    return process.replace("replica ", "r").replace("log ", "l").replace(GENERATOR, "cl")


def asked_of(level: Level) -> str:
    """Return what was asked of the cluster: operations at a time, or per second."""
    return f"{level.concurrency}" if level.rate is None else f"{level.rate:,g}"


def notes_on(levels: Sequence[Level]) -> list[str]:
    """Return what a reader must know of the figures."""
    notes = [EXPLAINED_OPEN] if any(level.rate is not None for level in levels) else []
    for level in levels:
        asked = f"at {level.rate:g} per second" if level.rate is not None else f"with {level.concurrency} at once"
        if level.generator_is_limit:
            notes.append(
                f"note: {asked} the client itself used {level.generator_cpus:.2f} of a processor, more than "
                f"{GENERATOR_BUSY:g}: it may have been the limit, and not the cluster"
            )
        if level.not_started:
            notes.append(
                f"note: {asked} {level.not_started} operations were due and never started, as too many were under "
                "way; they count with the time that they had waited"
            )
    return notes


def chart_of(levels: Sequence[Level]) -> str:
    """Draw the percentiles of latency over what was done per second, for every size of values."""
    sizes = sorted({level.value_bytes for level in levels})
    series = {}
    for size in sizes:
        of_size = sorted((level for level in levels if level.value_bytes == size), key=lambda one: one.ops_per_second)
        suffix = f", {size} B" if len(sizes) > 1 else ""
        for name in ("p50", "p99", "p99.9"):
            field = f"{name.replace('.', '')}_ms"
            series[name + suffix] = [
                (level.ops_per_second, getattr(level, field)) for level in of_size if level.ops_per_second > 0
            ]
    kind = "open loop" if any(level.rate is not None for level in levels) else "closed loop"
    return line_chart(Axes("operations per second", "latency, ms", f"put, {kind}", log_y=True), series)
