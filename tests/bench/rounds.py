"""Measuring several systems so that they can be compared: in turn, round after round, each on an empty disk.

In a round every system is started, warmed up, asked for every cell, and stopped; nothing else that was started here runs
meanwhile. The order turns from round to round. So what else the machine does hits all alike, and medians over the rounds
can be divided by each other.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from client.measure import Level, Load, Run, summarise
from tests.bench.programs import ProgramError
from tests.bench.systems import System
from trustlog.cli.contract import CommandError

WARM_UP_S = 1.0
WARM_UP_CONCURRENCY = 10


@dataclass(frozen=True, order=True)
class Cell:
    """What is measured: operations at a time, each with a connection (and for trustlog a key) of its own or not."""

    value_bytes: int
    own_connections: bool
    concurrency: int

    def question(self, seconds: float, pids: dict[str, int]) -> dict:
        """Return it as the load generator is asked for it."""
        return {
            "concurrency": self.concurrency,
            "connections": self.concurrency if self.own_connections else 1,
            "value_bytes": self.value_bytes,
            "seconds": seconds,
            "pids": pids,
        }


@dataclass(frozen=True)
class Plan:
    """How much is measured. `own_sizes`: the sizes at which connections of one's own are measured too."""

    sizes: tuple[int, ...]
    levels: tuple[int, ...]
    own_sizes: tuple[int, ...]
    rounds: int
    seconds: float

    @property
    def cells(self) -> list[Cell]:
        """Return all cells, the small ones first."""
        shared = [Cell(size, False, level) for size in self.sizes for level in self.levels]
        return shared + [Cell(size, True, level) for size in self.own_sizes for level in self.levels if level > 1]


@dataclass
class Results:
    """Medians by system and cell; `failures` says what went wrong in which round. A cell that never was done is absent."""

    levels: dict[tuple[str, Cell], Level]
    failures: list[str]

    def get(self, system: str, cell: Cell) -> Level | None:
        """Return the figures of a cell, if there are any."""
        return self.levels.get((system, cell))


def present(systems: Sequence[System]) -> tuple[list[System], dict[str, str]]:
    """Return the systems that can run here, and by name what the others need."""
    needs = {system.name: system.missing() for system in systems}
    missing = {name: what for name, what in needs.items() if what}
    return [system for system in systems if system.name not in missing], missing


def measure(systems: Sequence[System], plan: Plan, parent: Path | None, told: Callable[[str], None]) -> Results:
    """Measure all cells of all systems; the medians over the rounds. A system that fails is told of, and named."""
    runs: dict[tuple[str, Cell], list[Run]] = {}
    failures = []
    for number in range(plan.rounds):
        turn = number % len(systems)
        for system in [*systems[turn:], *systems[:turn]]:
            told(f"round {number + 1} of {plan.rounds}: {system.name}")
            try:
                for cell, run in visit(system, plan, parent):
                    runs.setdefault((system.name, cell), []).append(run)
            except (ProgramError, CommandError) as error:
                failures.append(f"round {number + 1}: {system.name}: {error}")
                told(f"failed: {failures[-1]}")
    levels = {
        (name, cell): summarise(Load(cell.concurrency, None, cell.value_bytes), found)
        for (name, cell), found in runs.items()
    }
    return Results(levels, failures)


def visit(system: System, plan: Plan, parent: Path | None) -> Iterator[tuple[Cell, Run]]:
    """Start a system, measure it once in all cells, and stop it."""
    with tempfile.TemporaryDirectory(prefix="trustlog-bench-", dir=parent) as folder, ExitStack() as stack:
        load, pids = system.start(Path(folder), stack)
        load.ask(Cell(min(plan.sizes), False, WARM_UP_CONCURRENCY).question(min(WARM_UP_S, plan.seconds), pids))
        for cell in plan.cells:
            if system.with_connections or not cell.own_connections:
                yield cell, Run(**load.ask(cell.question(plan.seconds, pids)))
