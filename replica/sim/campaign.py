"""Many seeds on several processors, and a summary that fails when something it is about never happened."""

import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from multiprocessing import get_context

from replica.sim.lies import REFERENCE_KINDS
from replica.sim.mutations import MUTATIONS
from replica.sim.repertoire import DRAWN
from replica.sim.run import Outcome, run_seed
from replica.sim.villains import TRICKS

# From this many seeds on, everything in EXPECTED must have happened.
EXPECTED_FROM_SEEDS = 200
EXPECTED = (
    "net-lost",
    "net-duplicated",
    "net-straggled",
    "net-stall",
    "net-partition-one-way",
    "net-partition-two-way",
    "net-partition-bridged",
    "crashes",
    "fetches",
    "views-entered",
    "views-opened",
    "stable",
    "runs-n3",
    "runs-n5",
    "runs-n7",
    "runs-two-phase",
    "runs-three-phase",
    "runs-real-signatures",
    "client-undecided",
    "slots-null",
    "views-left-unopened",
    "consecutive-faulty-primaries",
    "carried-none",
    "carried-vote",
    "carried-null",
    "lies",
    "refused-groups",
    "refused-envelopes",
    *(f"exposed-{rule}" for rule in ("malformed", "proposed-twice", "slot-skipped", "wrong-view", "wrong-reference")),
    *(f"attack-{name}" for name in DRAWN),
    *(f"attack-chosen-references-{kind}" for kind in REFERENCE_KINDS),
    *(f"attack-client-{trick}" for trick in TRICKS),
    *(f"attack-{kind}-groups" for kind in ("altered", "borrowed", "cut")),
    *(f"malformed-{name}" for name in MUTATIONS),
)


@dataclass(slots=True)
class Summary:
    """What a campaign found."""

    seeds: int = 0
    virtual_ms: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    failed: list[Outcome] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        """Take in one run."""
        self.seeds += 1
        self.virtual_ms += outcome.virtual_ms
        for name, count in outcome.counts.items():
            # What ends in -max is the largest of all runs, the rest the sum.
            self.counts[name] = max(self.counts[name], count) if name.endswith("-max") else self.counts[name] + count
        if outcome.violations:
            self.failed.append(outcome)

    def missing(self) -> list[str]:
        """Return what should have happened and never did."""
        if self.seeds < EXPECTED_FROM_SEEDS:
            return []
        return [name for name in EXPECTED if not self.counts[name]]

    @property
    def is_good(self) -> bool:
        """Say whether nothing was violated and nothing is missing."""
        return not self.failed and not self.missing()

    def as_data(self) -> dict[str, object]:
        """Return the summary for programs."""
        return {
            "seeds": self.seeds,
            "simulated_hours": round(self.virtual_ms / 3_600_000, 3),
            "counts": dict(sorted(self.counts.items())),
            "never_happened": self.missing(),
            "failed": [outcome_as_data(outcome) for outcome in sorted(self.failed, key=lambda o: o.seed)],
        }


def outcome_as_data(outcome: Outcome) -> dict[str, object]:
    """Return one run for programs."""
    return {
        "seed": outcome.seed,
        "trace_hash": outcome.trace_hash,
        "simulated_ms": outcome.virtual_ms,
        "violations": [{"kind": v.kind, "at_ms": v.at_ms, "text": v.text} for v in outcome.violations],
        "replay": f"trustlog-replica sim --seed {outcome.seed} --trace",
    }


def campaign(first: int, count: int, jobs: int = 1, progress: Callable[[Summary], None] | None = None) -> Summary:
    """Run `count` seeds from `first` on, in `jobs` processes."""
    summary = Summary()
    seeds = range(first, first + count)

    def take(outcomes: Iterable[Outcome]) -> None:
        for outcome in outcomes:
            summary.add(outcome)
            if progress is not None:
                progress(summary)

    if jobs == 1:
        take(map(run_seed, seeds))
    else:
        with get_context("spawn").Pool(jobs) as pool:
            take(pool.imap_unordered(run_seed, seeds))
    return summary


def show_progress(summary: Summary) -> None:
    """Say on standard error how far a campaign is, on a terminal or every 50 seeds."""
    line = f"{summary.seeds} seeds, {len(summary.failed)} failed"
    if sys.stderr.isatty():
        print(f"\r{line}", end="", file=sys.stderr, flush=True)  # noqa: T201 - progress, not a result
    elif summary.seeds % 50 == 0:
        print(line, file=sys.stderr, flush=True)  # noqa: T201 - progress, not a result
