"""`make bench-trust`: what each guarantee costs, by the same work on clusters that differ in one of them.

python -m tests.bench.trust --rounds 3 --seconds 2 --level 1 --level 200

The cheapest comes first: it trusts each replica's own program with the log, keeps nothing on a disk and decides in two
phases. TLS is on everywhere: the product has no switch to take it off, and gets none for a benchmark.
"""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import click

from replica.cluster.provision import (
    TpmPlace,
    assemble,
    keygen,
    make_client,
    plan_addresses,
    public_file_name,
    replica_folder_name,
)
from replica.cluster.replicatoml import TrustedLogSettings
from replica.core.genesis import Ordering
from tests.bench.programs import HOST, first_line, tool_missing
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
from tests.bench.systems import Pbft, System, Trustlog
from trustlog import BackendKind

LEVELS = (1, 50, 200)
VALUE_BYTES = 100
ROUNDS = 3
SECONDS = 2.0
ORDERINGS = {ordering.label: ordering for ordering in Ordering}
SWTPM = "swtpm"


class TpmTrustlog(Trustlog):
    """Every replica's log in a TPM of its own: software TPMs (swtpm), since one machine has one chip at most."""

    def missing(self) -> str:
        return tool_missing(SWTPM, "swtpm")

    def make(self, directory: Path, stack: ExitStack) -> None:
        from tests.support.swtpm import software_tpm

        directory.mkdir()
        parts = []
        for number, (host, port) in enumerate(plan_addresses(1, [HOST], 0)):
            machine = stack.enter_context(software_tpm(directory / f"tpm-{number}"))
            folder = directory / replica_folder_name(number)
            keygen(folder, number, host, port, TrustedLogSettings(BackendKind.TPM), TpmPlace(machine.address))
            parts.append(folder / public_file_name(number))
        assemble(parts, directory / "cluster.toml", ordering=ORDERINGS[self.ordering])
        make_client(directory / "client")


def variants() -> list[tuple[System, str]]:
    """Return what is compared, each with what it adds to, or changes against, the one before."""
    two, three = "two-phase", "three-phase"
    return [
        (Trustlog("software log, memory, two-phase", two, backend="software", durability="memory"), "the cheapest"),
        (Trustlog("software log, disk, two-phase", two, backend="software"), "durability"),
        (
            Trustlog("process log, memory, two-phase", two, durability="memory"),
            "a log of its own process",
        ),
        (Trustlog("process log, disk, two-phase", two), "both: durable, a log of its own process"),
        (Trustlog("software log, disk, three-phase", three, backend="software"), "durability and a third phase"),
        (Trustlog("process log, disk, three-phase", three), "the same and a third phase: the default"),
        (Pbft("no log, memory, PBFT, n = 4"), "3f+1 replicas and signatures in place of logs"),
        (
            Trustlog("process log, memory, three-phase", three, durability="memory"),
            "PBFT's phases, with logs and n = 3",
        ),
        (TpmTrustlog("TPM log, disk, two-phase", two), "durable, a log that survives root"),
        (TpmTrustlog("TPM log, disk, three-phase", three), "the same and a third phase"),
    ]


@click.command()
@click.option("--level", "levels", type=int, multiple=True, default=LEVELS, show_default=True)
@click.option("--rounds", type=click.IntRange(1, 100), default=ROUNDS, show_default=True)
@click.option("--seconds", type=click.FloatRange(0.1, 600), default=SECONDS, show_default=True, help="Length of a run.")
@click.option("--only", multiple=True, help="Measure only those with this in their name; may be given several times.")
@click.option("--dir", "parent", type=click.Path(path_type=Path, exists=True, file_okay=False), help="A real disk.")
@click.option("--write", is_flag=True, help=f"Put the table into {RESULTS.name}.")
def main(*, levels, rounds, seconds, only, parent, write) -> None:
    """Measure what each guarantee costs, by puts of 100-byte values, closed loop."""
    wanted = [(one, adds) for one, adds in variants() if not only or any(part in one.name for part in only)]
    systems, missing = present([one for one, _ in wanted])
    for name, what in missing.items():
        click.echo(f"skipped: {name}: {what}", err=True)
    if not systems:
        raise click.ClickException("nothing of what was asked for is installed")
    kind = files_on(parent)
    plan = Plan((VALUE_BYTES,), tuple(levels), (), rounds, seconds)
    results = measure(systems, plan, parent, lambda text: click.echo(text, err=True))
    extra = {"files on": kind}
    if not missing and any(isinstance(system, TpmTrustlog) for system in systems):
        extra["TPM:"] = first_line([SWTPM, "--version"])
    text = page_of(wanted, missing, plan, results, surroundings(extra))
    click.echo(text)
    if write:
        write_into(RESULTS, "trust", text)


def page_of(
    wanted: Sequence[tuple[System, str]], missing: dict[str, str], plan: Plan, results: Results, where: str
) -> str:
    """Return the table and what must be known of it. Ratios are to the first that was measured."""
    measured = [system.name for system, _ in wanted if system.name not in missing]
    base = measured[0]
    first, last = min(plan.levels), max(plan.levels)
    headings = ["cluster", "what it pays for", *(f"{level} at once" for level in plan.levels)]
    headings += [f"p50 at {first}, ms", f"p99 at {last}, ms", f"CPU µs per operation at {last}", f"generator at {last}"]
    rows = []
    for system, adds in wanted:
        if system.name in missing:
            rows.append([system.name, adds, *(["not installed"] * len(plan.levels)), *(["-"] * 4)])
            continue
        levels = [results.get(system.name, Cell(VALUE_BYTES, False, level)) for level in plan.levels]
        bases = [results.get(base, Cell(VALUE_BYTES, False, level)) for level in plan.levels]
        row = [system.name, adds, *(rate_and_ratio(one, other) for one, other in zip(levels, bases, strict=True))]
        least = results.get(system.name, Cell(VALUE_BYTES, False, first))
        most = results.get(system.name, Cell(VALUE_BYTES, False, last))
        cpu = f"{sum(most.cpu_us_per_operation.values()):.0f}" if most else "-"
        rows.append([*row, milliseconds(least, "p50_ms"), milliseconds(most, "p99_ms"), cpu, generator_share(most)])
    lines = [
        (
            f"Puts of 16-byte keys and {VALUE_BYTES}-byte values per second through one client, closed loop, n = 3 (PBFT: 4), medians "
            f"of {plan.rounds} runs of {plan.seconds:g} s; in brackets how many times the first line's. CPU: of all replicas, "
            "logs' processes and the client; a TPM's own is not in it. TLS 1.3 is on everywhere, as the product cannot "
            "do without; receipts are not asked for."
        ),
        "",
        table(headings, rows),
        "",
        *failures_of(results),
        f"{others_of(results)} {where}".strip(),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
