"""`make bench-peers`: trustlog beside what people would take instead, in one run, in one table with ratios.

python -m tests.bench.peers --rounds 3 --seconds 2 --size 100 --level 1 --level 200

Whatever is not installed is named, on standard error and in the table, and the rest is measured.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import IO

import click

from client.chart import Axes, line_chart
from tests.bench.report import (
    RESULTS,
    failures_of,
    files_on,
    generator_share,
    milliseconds,
    others_of,
    rate_and_ratio,
    surroundings,
    table,
    write_into,
)
from tests.bench.rounds import Cell, Plan, Results, measure, present
from tests.bench.signatures import signature_costs
from tests.bench.systems import ETCD, SYSTEMS, System

SIZES = (100, 1024, 16384)
LEVELS = (1, 10, 50, 200)
OWN_SIZES = (100,)
ROUNDS = 3
SECONDS = 2.0


@click.command()
@click.option("--size", "sizes", type=int, multiple=True, default=SIZES, show_default=True)
@click.option("--level", "levels", type=int, multiple=True, default=LEVELS, show_default=True)
@click.option("--own-size", "own_sizes", type=int, multiple=True, default=OWN_SIZES, show_default=True)
@click.option("--no-own", is_flag=True, help="Measure nothing with a connection for every operation at a time.")
@click.option("--rounds", type=click.IntRange(1, 100), default=ROUNDS, show_default=True)
@click.option("--seconds", type=click.FloatRange(0.1, 600), default=SECONDS, show_default=True, help="Length of a run.")
@click.option("--only", multiple=True, help="Measure only systems with this in their name; may be given several times.")
@click.option("--dir", "parent", type=click.Path(path_type=Path, exists=True, file_okay=False), help="A real disk.")
@click.option("--write", is_flag=True, help=f"Put the table into {RESULTS.name}.")
@click.option("--json", "data", type=click.File("w"), help="Write all figures into this file.")
@click.option("--plot", type=click.File("w", encoding="utf-8"), help="Draw them into this file, as SVG.")
def main(*, sizes, levels, own_sizes, no_own, rounds, seconds, only, parent, write, data, plot) -> None:
    """Measure trustlog and its peers by puts, closed loop."""
    wanted = [system for system in SYSTEMS if not only or any(part in system.name for part in only)]
    systems, missing = present(wanted)
    for name, what in missing.items():
        click.echo(f"skipped: {name}: {what}", err=True)
    if not systems:
        raise click.ClickException("nothing of what was asked for is installed")
    plan = Plan(tuple(sizes), tuple(levels), () if no_own else tuple(own_sizes), rounds, seconds)
    results = measure(systems, plan, parent, lambda text: click.echo(text, err=True))
    text = page_of(wanted, missing, plan, results, where(systems, parent))
    click.echo(text)
    if data:
        json.dump(as_data(results), data, indent=1)
    if plot:
        plot_into(plot, systems, plan, results)
    if write:
        write_into(RESULTS, "peers", text)


def where(systems: list[System], parent: Path | None) -> dict[str, str]:
    """Return what of the surroundings matters for these figures."""
    kind = files_on(parent)
    versions = {system.name: system.version() for system in systems}
    return {**versions, "files on": kind, "signatures:": signature_costs().words()}


def page_of(systems: list[System], missing: dict[str, str], plan: Plan, results: Results, extra: dict[str, str]) -> str:
    """Return the table and what must be known of it."""
    baseline = ETCD.name if ETCD.name not in missing and ETCD in systems else None
    compared = (
        f"in brackets how many times {baseline}'s" if baseline else "etcd was not measured, so there are no ratios"
    )
    lines = [
        (
            f"Puts of 16-byte keys per second, closed loop, medians of {plan.rounds} runs of {plan.seconds:g} s; {compared}. "
            "All servers and the load generator share the machine. Generator: the part of one processor that the load "
            "generator used; PySyncObj's runs inside its leader's process."
        ),
        "",
        rows_of(systems, missing, plan, results, baseline),
        "",
        *failures_of(results),
        guarantees(systems, missing),
        "",
        f"{others_of(results)} {surroundings(extra)}".strip(),
    ]
    return "\n".join(lines)


def rows_of(systems: list[System], missing: dict[str, str], plan: Plan, results: Results, baseline: str | None) -> str:
    """Return the table of figures, by size of value and by connections."""
    first, last = min(plan.levels), max(plan.levels)
    headings = ["value", "connections", "system", "n, faults, durable", *(f"{level} at once" for level in plan.levels)]
    headings += [f"p50 at {first}, ms", f"p99 at {last}, ms", f"generator at {last}"]
    kinds = sorted({(cell.value_bytes, cell.own_connections) for cell in plan.cells})
    rows = []
    for size, own in kinds:
        for system in systems:
            held = system.guarantee
            row = [f"{size:,} B", "one each" if own else "one", system.name]
            row.append(f"{held.n}; {held.faults}; {held.durable}")
            if system.name in missing:
                rows.append([*row, *(["not installed"] * len(plan.levels)), "-", "-", "-"])
                continue
            if own and not system.with_connections:
                continue
            levels = [results.get(system.name, Cell(size, own, level)) for level in plan.levels]
            bases = [results.get(baseline or "", Cell(size, own, level)) for level in plan.levels]
            row += [rate_and_ratio(level, base) for level, base in zip(levels, bases, strict=True)]
            least = results.get(system.name, Cell(size, own, first))
            most = results.get(system.name, Cell(size, own, last))
            row += [milliseconds(least, "p50_ms"), milliseconds(most, "p99_ms")]
            rows.append([*row, generator_share(most)])
    return table(headings, rows)


def guarantees(systems: list[System], missing: dict[str, str]) -> str:
    """Return what each system withstands; what is missing says what it needs."""
    rows = [
        [
            system.name,
            str(system.guarantee.n),
            system.guarantee.faults,
            system.guarantee.durable,
            system.guarantee.link,
            missing.get(system.name) or "measured",
        ]
        for system in systems
    ]
    return table(["system", "servers", "withstands", "answered when", "connections", ""], rows)


def as_data(results: Results) -> list[dict]:
    return [{"system": name, **asdict(cell), **level.as_data()} for (name, cell), level in results.levels.items()]


def plot_into(file: IO[str], systems: list[System], plan: Plan, results: Results) -> None:
    size = min(plan.sizes)
    series = {}
    for system in systems:
        found = [(level, results.get(system.name, Cell(size, False, level))) for level in sorted(plan.levels)]
        series[system.name] = [(level, one.ops_per_second) for level, one in found if one and one.ops_per_second]
    axes = Axes("operations at a time", "operations per second", f"put, {size}-byte values", log_x=True, log_y=True)
    file.write(line_chart(axes, series))


if __name__ == "__main__":
    sys.exit(main())
