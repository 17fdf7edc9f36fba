"""`make profile`: where a replica's processor time goes, by stage, while it is loaded. Needs py-spy (the extra `bench`).

python -m tests.bench.profiling --level 1 --level 200 --seconds 5

py-spy samples the stacks of the primary and then of a backup; what fraction of the samples fell into a stage, times the
CPU time per operation that the operating system counted for that process, is the stage's. Only threads that run are
sampled, and the process is not stopped for it; a stack that changes meanwhile is dropped. Reading another process's
memory takes root, or ptrace rights.
"""

import math
import subprocess
import sys
import sysconfig
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import click

from client.measure import Run
from tests.bench.programs import Program, package_missing
from tests.bench.report import RESULTS, ROOT, surroundings, table, write_into
from tests.bench.rounds import Cell
from tests.bench.stages import STAGES, Sample, hottest, parse, shares
from tests.bench.systems import Trustlog

LEVELS = (1, 200)
SECONDS = 5.0
RATE_HZ = 250
WARM_UP_S = 1.0
# py-spy needs this long to begin and to end.
SPY_EXTRA_S = 30.0
PROCESSES = {"primary": "replica 0", "backup": "replica 1"}
HOTTEST = 12


@dataclass(frozen=True)
class Profile:
    """One process under one load."""

    process: str
    level: int
    run: Run
    samples: list[Sample]

    @property
    def cpu_us(self) -> float:
        """CPU microseconds per operation of this process."""
        return self.run.cpu_us[PROCESSES[self.process]]


@click.command()
@click.option("--level", "levels", type=int, multiple=True, default=LEVELS, show_default=True)
@click.option("--value-bytes", type=int, default=100, show_default=True)
@click.option("--own-connections", is_flag=True, help="A client with its own key for every operation at a time.")
@click.option("--ordering", type=click.Choice(["three-phase", "two-phase"]), default="three-phase", show_default=True)
@click.option("--seconds", type=click.FloatRange(1, 600), default=SECONDS, show_default=True, help="Length of a run.")
@click.option("--dir", "parent", type=click.Path(path_type=Path, exists=True, file_okay=False), help="A real disk.")
@click.option("--write", is_flag=True, help=f"Put the tables into {RESULTS.name}.")
def main(*, levels, value_bytes, own_connections, ordering, seconds, parent, write) -> None:
    """Profile the primary and a backup of a durable cluster with logs in processes of their own."""
    need = package_missing("py_spy", "py-spy") if spy_path() is None else ""
    if need:
        raise click.ClickException(f"py-spy is not installed: {need}")
    profiles = []
    with tempfile.TemporaryDirectory(prefix="trustlog-bench-", dir=parent) as folder, ExitStack() as stack:
        load, pids = Trustlog(f"trustlog {ordering}", ordering).start(Path(folder), stack)
        for level in levels:
            cell = Cell(value_bytes, own_connections, level)
            load.ask(cell.question(WARM_UP_S, pids))
            for process in PROCESSES:
                click.echo(f"{level} at once: {process}", err=True)
                profiles.append(profile(load, cell, seconds, pids, process, Path(folder)))
    about = f"{ordering}, process log, disk, TLS, {value_bytes}-byte values"
    about += ", a client with its own key for each" if own_connections else ", one client"
    text = page_of(profiles, about)
    click.echo(text)
    if write:
        write_into(RESULTS, "profile", text)


def spy_path() -> Path | None:
    """Return the program py-spy that stands beside this Python, if it is there."""
    path = Path(sysconfig.get_path("scripts")) / "py-spy"
    return path if path.exists() else None


def profile(load: Program, cell: Cell, seconds: float, pids: dict[str, int], process: str, folder: Path) -> Profile:
    """Load the cluster while py-spy samples one of its processes."""
    out = folder / "stacks"
    command = [str(spy_path()), "record", "--pid", str(pids[PROCESSES[process]]), "--output", str(out)]
    command += ["--format", "raw", "--rate", str(RATE_HZ), "--duration", str(math.ceil(seconds)), "--full-filenames"]
    # Stopping the process for every sample would make threads that wait look busy: they wake up from being stopped.
    command.append("--nonblocking")
    with (folder / "py-spy.log").open("w+b") as log:
        spy = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            answer = load.ask(cell.question(seconds, pids))
            code = spy.wait(SPY_EXTRA_S)
        finally:
            if spy.poll() is None:
                spy.kill()
                spy.wait()
        if code != 0:
            log.seek(0)
            words = log.read().decode(errors="replace").strip()
            raise click.ClickException(f"py-spy ended with code {code}: {words}")
    with out.open() as lines:
        return Profile(process, cell.concurrency, Run(**answer), parse(lines))


def page_of(profiles: list[Profile], about: str) -> str:
    """Return the tables: CPU time per operation by stage, and the functions in which most of it was spent."""
    headings = ["stage", *(f"{one.process}, {one.level} at once" for one in profiles)]
    found = [shares(one.samples) for one in profiles]
    rows = [
        [stage, *(f"{share[stage] * one.cpu_us:.1f}" for share, one in zip(found, profiles, strict=True))]
        for stage in STAGES
    ]
    rows.append(["all", *(f"{one.cpu_us:.1f}" for one in profiles)])
    rates = ", ".join(f"{one.run.operations / one.run.seconds:,.0f}" for one in profiles)
    samples = ", ".join(str(sum(sample.count for sample in one.samples)) for one in profiles)
    lines = [
        f"CPU µs per operation by stage; {about}; operations per second: {rates}; samples: {samples}.",
        "`Runner.run` is the event loop, with its sockets and TLS; `_flush` is writing to them.",
        "",
        table(headings, rows),
    ]
    for one in profiles:
        lines += ["", f"Functions of the {one.process} at {one.level} at once, by time spent in themselves:", ""]
        hot = [(f"`{name}`", f"{share:.1%}") for name, share in places(one)]
        lines.append(table(["function", "share"], [list(row) for row in hot]))
    others = max(one.run.others_cpus for one in profiles)
    lines += ["", f"Programs outside the measurement kept up to {others:.2f} processors busy. {surroundings({})}"]
    return "\n".join(lines)


def places(one: Profile) -> list[tuple[str, float]]:
    """Return the hottest functions with the parts of their files' names that say something."""
    return [(shortened(name), share) for name, share in hottest(one.samples, HOTTEST)]


def shortened(frame: str) -> str:
    """Return a frame with its file named from the package on."""
    name, _, path = frame.rpartition(" (")
    inside = path.rpartition("/lib/python")[2].partition("/")[2] if "/lib/python" in path else path
    return f"{name} ({inside.removeprefix('site-packages/').removeprefix(f'{ROOT}/')}"


if __name__ == "__main__":
    sys.exit(main())
