"""`make bench-keys`: what changes when 1 million keys are stored and not 10 thousand.

python -m tests.bench.keys --few 300 --many 3000 --rounds 1 --seconds 1

Two durable clusters of three, every log in a process of its own, TLS: one stores few keys, the other many. Both get the
same puts, and then, in turns, the same load on equally many keys. Then the one with many is looked at alone: its memory
while it is put to, a replica's restart, and the return of one that missed changes and must fetch the state.
"""

import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import click
import uvloop

from client.errors import ClientError
from client.loader import LoadError
from client.measure import GENERATOR, Level, Load, summarise
from client.soak import MIB
from client.workload import Recording
from replica.core.tree import BUCKETS
from tests.bench.members import BACKUP, LOG, ORDERINGS, PRIMARY, cell_of, cost
from tests.bench.programs import ProgramError
from tests.bench.report import RESULTS, files_on, others_of, surroundings, table, write_into
from tests.bench.rounds import Results
from tests.bench.stored import BURST_S, VALUE_BYTES, Loaded, Return, Size, Stored
from tests.replica.core.state_bench import CHANGES, checkpoint, filled
from trustlog.cli.contract import CommandError

FEW, MANY = 10_000, 1_000_000
TOUCHED = 10_000
AT_ONCE = 200
ROUNDS = 5
SECONDS = 5.0
RESTARTS = 3
RETAIN_MIB = 32
STEPS = 12
# What was aimed at.
WITHIN = 0.2
FLAT_MAX = 1.05
START_MAX_S = 10.0
CHANGED = 0.1
LOAD = 0.5


@dataclass(frozen=True)
class Plan:
    """How much is measured. puts: what both clusters get at first, and the large one once more."""

    few: int
    many: int
    puts: int
    rounds: int
    seconds: float
    restarts: int
    ordering: str
    retain_mib: int

    @property
    def touched(self) -> int:
        """How many keys are put to in the rounds."""
        return min(TOUCHED, self.few)


@dataclass
class Cluster:
    """What one of the two clusters came to: its size when it was new and after its first puts, and its rounds."""

    keys: int
    new: Size
    grown: Size
    loaded: Loaded = field(default_factory=Loaded)

    def level(self) -> Level:
        """Return the medians of the rounds."""
        return summarise(Load(AT_ONCE), self.loaded.runs)


@dataclass
class Figures:
    """What all came to. sizes: of the large cluster during further puts; starts: seconds each; checkpoints: (keys, changes)."""

    few: Cluster
    many: Cluster
    sizes: list[Size]
    starts: dict[str, list[float]]
    back: Return
    rate: float
    checkpoints: dict[tuple[int, int], float]


# Measuring


def told(text: str) -> None:
    click.echo(text, err=True)


async def begun(keys: int, folder: Path, plan: Plan, stack: AsyncExitStack) -> tuple[Stored, Cluster]:
    """Start a cluster and put to all its keys."""
    stored = await stack.enter_async_context(Stored(keys, folder, plan.ordering, plan.retain_mib).running())
    new = stored.size()
    began = time.monotonic()
    await stored.fill(plan.puts)
    took = time.monotonic() - began
    await stored.durable()
    view = await stored.settled()
    told(f"{keys:,} keys: {plan.puts:,} puts in {took:.0f} s, on the disk after {time.monotonic() - began:.0f} s")
    cluster = Cluster(keys, new, stored.size())
    cluster.loaded.views = -view  # those that are left from now on count
    return stored, cluster


async def take_turns(both: Sequence[tuple[Stored, Cluster]], plan: Plan) -> None:
    """Load the clusters in turns."""
    for number in range(plan.rounds):
        for stored, cluster in both if number % 2 else reversed(both):
            await stored.round(stored.chosen(plan.touched), AT_ONCE, plan.seconds, cluster.loaded)
            run = cluster.loaded.runs[-1]
            rate = run.operations / run.seconds
            told(
                f"round {number + 1} of {plan.rounds}: {cluster.keys:,} keys: {rate:,.0f} per second, p99 {run.p99_ms:.1f} ms"
            )
    for stored, cluster in both:
        cluster.loaded.views += await stored.settled()


async def measure(plan: Plan, place: Path) -> Figures:
    """Do all of it but for checkpoints."""
    starts = {}
    async with AsyncExitStack() as large:
        async with AsyncExitStack() as small:
            few = await begun(plan.few, place / "few", plan, small)
            many = await begun(plan.many, place / "many", plan, large)
            await take_turns([few, many], plan)
            told("restarts")
            starts[f"{plan.few:,} keys, no load"] = await few[0].restarts(plan.restarts)
        stored, cluster = many
        rate = LOAD * cluster.level().ops_per_second
        told(f"{plan.puts:,} more puts")
        sizes = await stored.sizes(plan.puts, STEPS)
        told("restarts, and beside a load")
        load = (stored.chosen(plan.touched), rate)
        starts[f"{plan.many:,} keys, no load"] = await stored.restarts(plan.restarts)
        starts[f"{plan.many:,} keys, {rate:,.0f} puts per second"] = await stored.restarts(plan.restarts, load)
        back = await stored.come_back(round(CHANGED * plan.many), rate, plan.seconds, told)
    return Figures(few[1], cluster, sizes, starts, back, rate, {})


def checkpoints(plan: Plan) -> dict[tuple[int, int], float]:
    """Return what the digest and the changes of a checkpoint take in one process, in µs per key that changed."""
    found = {}
    for stored in (plan.few, plan.many):
        state = filled(stored)
        for changed in sorted({min(changes, plan.few) for changes in CHANGES}):
            found[stored, changed] = 1e6 * sum(checkpoint(state, stored, changed)) / changed
    return found


# What it says


def within(name: str, ratio: float, low: float, high: float) -> str:
    """Say whether a ratio lies within bounds."""
    return f"{name} within {WITHIN:.0%}: {'yes' if low <= ratio <= high else 'no'} ({ratio:.2f}x)"


def growth(sizes: Sequence[Size]) -> float:
    """Return how many times the memory of the middle third is that of the last third: the first one is warm-up."""
    third = len(sizes) // 3
    middle, last = (median(size.memory for size in part) for part in (sizes[third:-third], sizes[-third:]))
    return last / middle


def load_row(cluster: Cluster) -> list[float]:
    """Return the figures of one cluster's rounds."""
    level, loaded = cluster.level(), cluster.loaded
    costs = [cost(level, role) for role in (PRIMARY, BACKUP, LOG, GENERATOR)]
    return [level.ops_per_second, level.p50_ms, level.p99_ms, *costs, median(loaded.written), median(loaded.turns_ms)]


def load_lines(figures: Figures, plan: Plan) -> list[str]:
    """Say what the same load came to with few and with many keys."""
    headings = ["keys stored", "puts per second", "p50 ms", "p99 ms", f"CPU µs per put: {PRIMARY}", f"a {BACKUP}"]
    headings += [
        "a log's process",
        GENERATOR,
        "bytes per put that a backup writes",
        "longest turn of an event loop, ms",
    ]
    few, many = (load_row(cluster) for cluster in (figures.few, figures.many))
    forms = [",.0f", ".1f", ".1f", ".1f", ".1f", ".1f", ".1f", ",.0f", ".0f"]
    ratios = [now / before if before else 0.0 for now, before in zip(many, few, strict=True)]
    rows = [
        [f"{cluster.keys:,}", *(format(one, form) for one, form in zip(row, forms, strict=True))]
        for cluster, row in ((figures.few, few), (figures.many, many))
    ]
    rows.append(["ratio", *(f"{ratio:.2f}x" for ratio in ratios)])
    each = [
        f"{one.operations / one.seconds / (base.operations / base.seconds):.2f}"
        for one, base in zip(figures.many.loaded.runs, figures.few.loaded.runs, strict=True)
    ]
    rate, p99 = ratios[0], ratios[2]
    said = f"{within('throughput', rate, 1 - WITHIN, 100)}; {within('p99', p99, 0, 1 + WITHIN)}"
    left = figures.few.loaded.views + figures.many.loaded.views
    return [
        (
            f"Puts of 16-byte keys and {VALUE_BYTES}-byte values, {AT_ONCE} under way through one client, always to the same "
            f"{plan.touched:,} keys, {plan.ordering}; medians of {plan.rounds} rounds of {plan.seconds:g} s, in which two "
            f"clusters take turns; before, both had got {plan.puts:,} puts. Disk: what the system counts for the process."
        ),
        "",
        table(headings, rows),
        "",
        f"- With {plan.many:,} keys against {plan.few:,}: {said}. Throughput in each round: {', '.join(each)} times.",
        *checkpoint_lines(figures, plan),
        *([f"- {left} views were left meanwhile, which mixes up primary and backups."] if left else []),
    ]


def checkpoint_lines(figures: Figures, plan: Plan) -> list[str]:
    """Say what a checkpoint costs in one process by itself."""
    found = figures.checkpoints
    shown = [f"{keys:,} keys stored and {changed:,} changed: {us:.1f}" for (keys, changed), us in found.items()]
    times = max(us / found[plan.few, changed] for (keys, changed), us in found.items() if keys == plan.many)
    return [
        (
            f"- A checkpoint's digests and changes, in one process alone, µs per changed key: {'; '.join(shown)}. So the cost "
            f"of a changed key is at most {times:.2f} times that with {plan.few:,} keys, for {plan.many / plan.few:g} times "
            "the keys."
        )
    ]


def size_lines(figures: Figures, plan: Plan) -> list[str]:
    """Say what keys take, and whether memory stays flat."""
    few, many, more = figures.few, figures.many, figures.many.keys - figures.few.keys
    headings = ["keys stored", "MiB of memory, new", f"after {plan.puts:,} puts", "MiB on the disk, new", "after"]
    rows = []
    for one in (few, many):
        sizes = (one.new.memory, one.grown.memory, one.new.disk, one.grown.disk)
        rows.append([f"{one.keys:,}", *(f"{size / MIB:,.0f}" for size in sizes)])
    memory, disk = (many.grown.memory - few.grown.memory) / more, (many.grown.disk - few.grown.disk) / more
    times, each = growth(figures.sizes), ", ".join(f"{size.memory / MIB:.0f}" for size in figures.sizes)
    return [
        (
            f"A replica's own process, without its log's; the median of three. retain_mib = {plan.retain_mib}. Both clusters "
            "got as many puts and have them on the disk, so what they differ in is the keys."
        ),
        "",
        table(headings, rows),
        "",
        f"- A key of 16 bytes with {VALUE_BYTES} bytes takes {memory:,.0f} bytes of memory and {disk:,.0f} on the disk.",
        (
            f"- {plan.puts:,} more puts to all {many.keys:,} keys: memory flat after warm-up: "
            f"{'yes' if times <= FLAT_MAX else 'no'} (last third {times:.2f} times the middle third, at most {FLAT_MAX:g}). "
            f"MiB, from the start of them to the end: {each}."
        ),
    ]


def start_lines(figures: Figures, plan: Plan) -> list[str]:
    """Say how long a start takes."""
    rows = []
    for name, took in figures.starts.items():
        kept = "yes" if max(took) <= START_MAX_S else "no"
        rows.append([name, f"{median(took):.1f}", ", ".join(f"{one:.1f}" for one in took), kept])
    return [
        "A backup is ended (SIGTERM) and started again; seconds from the start of its process until `/readyz` says so.",
        "",
        table(["cluster", "median s", "each", f"at most {START_MAX_S:g} s"], rows),
    ]


def recording_row(name: str, found: Recording) -> list[str]:
    ms = [f"{1000 * found.latencies.percentile(share):.1f}" for share in (0.5, 0.99, 1)]
    return [name, f"{found.seconds:.1f}", f"{found.operations:,}", *ms]


def moved_line(back: Return, plan: Plan) -> str:
    """Say what was fetched."""
    if not back.transfers:
        return "- It fetched no state: the others still had the logs. So this says nothing of a transfer."
    moved = sum(one["part_bytes"] for one in back.transfers)
    each = [
        f"{one['part_bytes'] / MIB:.1f} MiB, {one['buckets']:,} of {BUCKETS:,} buckets with {one['bucket_keys']:,} keys "
        f"(the other {plan.many - one['bucket_keys']:,} were kept)"
        for one in back.transfers
    ]
    return (
        f"- Fetched in {len(back.transfers)} transfer(s): {'; '.join(each)}. {moved / back.changed:,.0f} bytes per changed key. "
        "Bytes: the parts of the state as the replica's log counts them, without frames and TLS, and without what it read of "
        "the logs after."
    )


def back_lines(figures: Figures, plan: Plan) -> list[str]:
    """Say how a late replica came back."""
    back = figures.back
    rows = [recording_row(name, found) for name, found in back.loads.items()]
    installed = "never" if back.installed_s is None else f"after {back.installed_s:.1f} s"
    *_, alone, while_back, _, last = back.loads.values()
    p99 = [1000 * found.latencies.percentile(0.99) for found in (alone, while_back)]
    return [
        (
            f"A backup is stopped, {back.changed:,} of {plan.many:,} keys are changed until the others have forgotten the logs that "
            f"it lacks, and it is started beside puts to the changed keys at a steady {figures.rate:,.0f} per second "
            f"({LOAD:.0%} of the closed loop's), in bursts {1000 * BURST_S:.0f} ms apart. Latency counts from when a put was due."
        ),
        "",
        table(["meanwhile", "s", "puts", "p50 ms", "p99 ms", "worst ms"], rows),
        "",
        (
            f"- {back.behind:,} slots behind, it was ready and level with the others (it had executed what they had at the last "
            f"look) {back.level_s:.1f} s after its start; the state was installed {installed}."
        ),
        moved_line(back, plan),
        f"- Its memory then: {back.memory / MIB:,.0f} MiB; the most since its start: {back.memory_most / MIB:,.0f} MiB.",
        f"- Clients' p99 was {p99[1]:.1f} ms while it came back, {p99[1] / p99[0]:.1f} times that while it was stopped.",
        f"- With another replica stopped, so that nothing is decided without its vote, {last.operations:,} puts were done.",
    ]


def page_of(figures: Figures, plan: Plan, where: str) -> str:
    """Return the tables, what they say, and where they were taken."""
    parts = {
        "The same load": load_lines(figures, plan),
        "Memory and disk": size_lines(figures, plan),
        "Start": start_lines(figures, plan),
        "A late replica": back_lines(figures, plan),
    }
    lines = [line for name, said in parts.items() for line in (f"### {name}", "", *said, "")]
    rounds = {(f"{one.keys}", cell_of(AT_ONCE)): one.level() for one in (figures.few, figures.many)}
    return "\n".join(
        [*lines, f"{others_of(Results(rounds, []))} The cluster that waits for its turn is among them. {where}"]
    )


@click.command()
@click.option("--few", type=click.IntRange(1, 10**7), default=FEW, show_default=True, help="Keys of one cluster.")
@click.option("--many", type=click.IntRange(2, 10**7), default=MANY, show_default=True, help="Keys of the other.")
@click.option("--puts", type=click.IntRange(1, 10**8), help="To each at first.  [default: as many as keys]")
@click.option("--rounds", type=click.IntRange(1, 100), default=ROUNDS, show_default=True)
@click.option("--seconds", type=click.FloatRange(0.1, 600), default=SECONDS, show_default=True, help="Length of a run.")
@click.option("--restarts", type=click.IntRange(1, 100), default=RESTARTS, show_default=True, help="Of each kind.")
@click.option("--ordering", type=click.Choice(ORDERINGS), default="three-phase", show_default=True)
@click.option("--retain-mib", type=click.IntRange(0, 10**6), default=RETAIN_MIB, show_default=True, help="Of logs.")
@click.option("--dir", "parent", type=click.Path(path_type=Path, exists=True, file_okay=False), help="A real disk.")
@click.option("--write", is_flag=True, help=f"Put the tables into {RESULTS.name}.")
def main(*, parent, write, few, many, puts, **options) -> None:
    """Measure what changes with the number of keys stored."""
    if few >= many:
        raise click.BadParameter(f"{few:,} are not fewer than {many:,}", param_hint="--few")
    kind = files_on(parent)
    plan = Plan(few=few, many=many, puts=max(many, puts or 0), **options)
    try:
        with tempfile.TemporaryDirectory(prefix="trustlog-keys-", dir=parent) as place:
            figures = uvloop.run(measure(plan, Path(place)))
    except (ProgramError, CommandError, ClientError, LoadError) as error:
        raise click.ClickException(f"{error} {error.__cause__ or ''}".strip()) from error
    figures.checkpoints = checkpoints(plan)
    text = page_of(figures, plan, surroundings({"files on": kind}))
    click.echo(text)
    if write:
        write_into(RESULTS, "keys", text)


if __name__ == "__main__":
    sys.exit(main())
