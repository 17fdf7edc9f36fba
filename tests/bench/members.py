"""`make bench-members`: what an operation costs with three, five, seven and nine replicas, by the same work.

python -m tests.bench.members --rounds 3 --seconds 3 --n 3 --n 9 --level 1 --level 200

Every replica's log is in a process of its own, on disk, with TLS. Processes are told apart by what they are, not by number:
the primary, and the backups. A view that changes meanwhile mixes them up, so that is looked for and told.
"""

import asyncio
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import click

from client.api import Client
from client.bench import all_up, initialise, started
from client.cli.bench_command import local_pids
from client.errors import ClientError
from client.measure import GENERATOR, Level
from client.queries import ReplicaStatus, number_in
from replica.core.quorum import primary
from tests.bench.programs import START_S, Program, ProgramError
from tests.bench.report import RESULTS, failures_of, files_on, others_of, surroundings, table, write_into
from tests.bench.rounds import Cell, Plan, Results, measure
from tests.bench.systems import Guarantee, Trustlog, generator

SIZES = (3, 5, 7, 9)
LEVELS = (1, 200)
ORDERINGS = ("two-phase", "three-phase")
VALUE_BYTES = 100
ROUNDS = 3
SECONDS = 3.0
# A backup's cost counts as flat up to so many times that of the smallest cluster.
FLAT_MAX = 1.25
PRIMARY, BACKUP, LOG = "primary", "backup", "log"


class Members(Trustlog):
    """A cluster of n replicas. views_left: how many views were left while it was measured, in all rounds."""

    def __init__(self, n: int, ordering: str) -> None:
        super().__init__(f"{ordering}, n = {n}", ordering)
        self.n, self.faults = n, (n - 1) // 2
        self.guarantee = Guarantee(
            n,
            f"{self.faults} of any kind, given trusted logs",
            f"on disk (fsync) at {self.faults + 1}",
            Trustlog.guarantee.link,
        )
        self.views_left = 0

    def start(self, folder: Path, stack: ExitStack) -> tuple[Program, dict[str, int]]:
        directory = folder / "cluster"
        self.make(directory, stack)
        stack.enter_context(started(directory, "disk"))
        try:
            found = asyncio.run(serving(directory))
        except (ClientError, TimeoutError) as error:
            raise ProgramError(f"{self.n} replicas did not all serve in time: {error}") from error
        view = view_of(found)
        pids = by_role(local_pids(found), primary(view, self.n))
        if len(pids) != 2 * self.n:
            raise ProgramError(f"{2 * self.n} processes were expected, {len(pids)} told of themselves: {sorted(pids)}")
        stack.callback(self._look, directory, view)
        return generator(stack, "trustlog", str(directory), folder), pids

    def make(self, directory: Path, stack: ExitStack) -> None:
        initialise(directory, self.faults, self.ordering)

    def _look(self, directory: Path, before: int) -> None:
        """Count the views that were left since `before`; called while the replicas still run."""
        self.views_left += max(0, view_of(asyncio.run(asked(directory))) - before)


async def serving(directory: Path) -> list[ReplicaStatus]:
    """Wait until all replicas serve; return what they say."""
    async with Client.from_dir(directory, deadline_s=START_S) as client:
        await client.put("ready", "yes")
        await all_up(client)
        return await client.status()


async def asked(directory: Path) -> list[ReplicaStatus]:
    async with Client.from_dir(directory) as client:
        return await client.status()


def view_of(found: Sequence[ReplicaStatus]) -> int:
    return max(number_in(replica.report, "view") for replica in found)


def by_role(pids: dict[str, int], leader: int) -> dict[str, int]:
    """Name the processes by what they do, so that runs with different primaries can be put together."""
    roles = {}
    backups = 0
    for name, pid in pids.items():
        kind, _, number = name.partition(" ")
        if kind != "replica":
            roles[name] = pid
        elif int(number) == leader:
            roles[PRIMARY] = pid
        else:
            backups += 1
            roles[f"{BACKUP} {backups}"] = pid
    return roles


def cost(level: Level | None, role: str) -> float | None:
    """Return a role's CPU µs per operation, the median of those who have it; None without a figure."""
    if level is None:
        return None
    used = [us for name, us in level.cpu_us_per_operation.items() if name.partition(" ")[0] == role]
    return median(used) if used else None


def cell_of(level: int) -> Cell:
    return Cell(VALUE_BYTES, False, level)


def growth(system: Members, base: Members, level: int, results: Results) -> float | None:
    """Return how many times the smallest cluster's a backup's cost is."""
    own, least = (cost(results.get(one.name, cell_of(level)), BACKUP) for one in (system, base))
    return own / least if own and least else None


def row_of(system: Members, base: Members, level: int, results: Results) -> list[str]:
    """Return one line of the table; dashes for what was not measured."""
    found = results.get(system.name, cell_of(level))
    figures = [f"{found.ops_per_second:,.0f}", f"{found.p50_ms:.1f}"] if found else ["-", "-"]
    for role in (PRIMARY, BACKUP, LOG, GENERATOR):
        used = cost(found, role)
        figures.append("-" if used is None else f"{used:,.1f}")
    times = growth(system, base, level, results)
    grown = "-" if times is None else f"{times:.2f}x"
    return [system.ordering, str(system.n), str(level), *figures, grown, f"{system.n / base.n:.2f}x"]


def judged(group: Sequence[Members], level: int, results: Results, *, flat: bool) -> str:
    """Say of one load whether a backup's cost grows as little as it is meant to, and where it comes closest to too much."""
    base = group[0]
    wanted = "it stays flat" if flat else "it grows at most in proportion to n"
    found = {one.n: growth(one, base, level, results) for one in group[1:]}
    missing = [n for n, times in found.items() if times is None]
    if missing or not found:
        lacking = f"n = {missing[0]}" if missing else f"more than n = {base.n}"
        return f"with {level} at once {wanted}: not known, as {lacking} was not measured"
    bounds = {n: FLAT_MAX if flat else n / base.n for n in found}
    worst = max(found, key=lambda n: found[n] / bounds[n])
    kept = "yes" if found[worst] <= bounds[worst] else "no"
    return f"with {level} at once {wanted}: {kept} (n = {worst}: {found[worst]:.2f}x, at most {bounds[worst]:.2f}x)"


def verdicts(systems: Sequence[Members], plan: Plan, results: Results) -> list[str]:
    """Say of each ordering whether a backup's cost grows at most linearly at small load, and stays flat at full batches."""
    said = []
    least, most = min(plan.levels), max(plan.levels)
    for ordering in dict.fromkeys(system.ordering for system in systems):
        group = [system for system in systems if system.ordering == ordering]
        parts = [judged(group, least, results, flat=False)]
        if most > least:
            parts.append(judged(group, most, results, flat=True))
        said.append(f"- A backup's cost per operation, {ordering}: {'; '.join(parts)}.")
    return said


def page_of(systems: Sequence[Members], plan: Plan, results: Results, where: str) -> str:
    """Return the table, what it says, and what must be known of it."""
    bases = {system.ordering: system for system in reversed(systems)}
    least = systems[0].n
    headings = ["ordering", "n", "operations at once", "puts per second", "p50 ms"]
    headings += [f"CPU µs per operation: {PRIMARY}", f"a {BACKUP}", "a log's process", GENERATOR]
    headings += [f"the {BACKUP}'s cost is n = {least}'s", f"n / {least}"]
    rows = [row_of(system, bases[system.ordering], level, results) for level in plan.levels for system in systems]
    left = [f"{system.name}: {system.views_left}" for system in systems if system.views_left]
    views = f"Views that were left, which mixes up primary and backups: {'; '.join(left)}." if left else ""
    lines = [
        (
            f"Puts of 16-byte keys and {VALUE_BYTES}-byte values through one client, closed loop, every log in a process "
            f"of its own, on disk, TLS; medians of {plan.rounds} runs of {plan.seconds:g} s, in turns. Of backups and of "
            "logs' processes the median one. All processes share the machine: its processors are the limit with many "
            "replicas, so puts per second say less than costs per operation."
        ),
        "",
        table(headings, rows),
        "",
        *verdicts(systems, plan, results),
        "",
        *failures_of(results),
        " ".join(part for part in (views or "No view was left.", others_of(results), where) if part),
    ]
    return "\n".join(lines)


def clusters(sizes: Sequence[int], orderings: Sequence[str]) -> list[Members]:
    """Return what is measured, the smallest first."""
    even = [n for n in sizes if n % 2 == 0]
    if even:
        raise click.BadParameter(f"n = 2f+1 is odd, {even[0]} is not", param_hint="--n")
    return [Members(n, ordering) for ordering in dict.fromkeys(orderings) for n in sorted(set(sizes))]


@click.command()
@click.option("--n", "sizes", type=click.IntRange(3, 21), multiple=True, default=SIZES, show_default=True)
@click.option(
    "--level",
    "levels",
    type=click.IntRange(1, 16384),
    multiple=True,
    default=LEVELS,
    show_default=True,
    help="At once.",
)
@click.option(
    "--ordering", "orderings", type=click.Choice(ORDERINGS), multiple=True, default=ORDERINGS, show_default=True
)
@click.option("--rounds", type=click.IntRange(1, 100), default=ROUNDS, show_default=True)
@click.option("--seconds", type=click.FloatRange(0.1, 600), default=SECONDS, show_default=True, help="Length of a run.")
@click.option("--dir", "parent", type=click.Path(path_type=Path, exists=True, file_okay=False), help="A real disk.")
@click.option("--write", is_flag=True, help=f"Put the table into {RESULTS.name}.")
def main(*, sizes, levels, orderings, rounds, seconds, parent, write) -> None:
    """Measure what an operation costs in clusters of different sizes, by puts of 100-byte values."""
    systems = clusters(sizes, orderings)
    kind = files_on(parent)
    plan = Plan((VALUE_BYTES,), tuple(sorted(set(levels))), (), rounds, seconds)
    results = measure(systems, plan, parent, lambda text: click.echo(text, err=True))
    text = page_of(systems, plan, results, surroundings({"files on": kind}))
    click.echo(text)
    if write:
        write_into(RESULTS, "members", text)


if __name__ == "__main__":
    sys.exit(main())
