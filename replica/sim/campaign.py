"""Many seeds on several processors, and a summary that fails when something it is about never happened."""

import gc
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from multiprocessing import get_context

from replica.sim.cutlies import CUT_KINDS, UNCLOSED, FalseCuts
from replica.sim.disk import Damage
from replica.sim.lies import REFERENCE_KINDS
from replica.sim.mutations import MUTATIONS
from replica.sim.poison import FalseHeads, FalseHeld, FalseOffers, FalseParts
from replica.sim.repertoire import DRAWN, LATE
from replica.sim.rulebreakers import LIES
from replica.sim.run import Outcome, run_seed
from replica.sim.villains import TRICKS

# Objects made between two looks for garbage in a worker.
GARBAGE_THRESHOLD = 50_000
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
    "restarts",
    "power-cuts",
    "rollbacks",
    "rollbacks-refused",
    "writes-lost",
    *(f"damage-{damage.value}" for damage in Damage if damage is not Damage.NONE),
    "damaged-groups-noticed",
    "damaged-state-noticed",
    "milestones",
    "log-truncations",
    "transfers",
    "transfers-to-faulty",
    "away-across-checkpoints-and-views",
    "cuts-moved",
    *(f"cuts-{verdict}" for verdict in ("stands", "back", "no-end", "open")),
    "primaries-suspected-for-the-cut",
    "heads-compared",
    "refused-heads",
    "refused-offers",
    "refused-part-poisoned",
    "refused-part-gone",
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
    "exposed-malformed",
    *(f"exposed-{rule}" for rule in LIES),
    *(f"attack-rule-breaker-{rule}" for rule in LIES),
    *(f"attack-{name}" for name in (*DRAWN, *LATE)),
    *(f"attack-chosen-references-{kind}" for kind in REFERENCE_KINDS),
    *(f"attack-{FalseCuts.name}-{kind}" for kind in (*CUT_KINDS, UNCLOSED)),
    *(f"attack-{kind.name}-{what}" for kind in (FalseParts, FalseOffers, FalseHeld, FalseHeads) for what in kind.kinds),
    *(f"attack-client-{trick}" for trick in TRICKS),
    "attack-hidden-view-to-pet",
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
    is_interrupted: bool = False

    def add(self, outcome: Outcome) -> None:
        """Take in one run."""
        self.seeds += 1
        self.virtual_ms += outcome.virtual_ms
        for name, count in outcome.counts.items():
            # What ends in -max is the largest of all runs, the rest the sum.
            self.counts[name] = max(self.counts[name], count) if name.endswith("-max") else self.counts[name] + count
        if outcome.violations:
            self.failed.append(outcome)

    @property
    def is_complete(self) -> bool:
        """Say whether these are enough seeds to ask what never happened."""
        return self.seeds >= EXPECTED_FROM_SEEDS and not self.is_interrupted

    def missing(self) -> list[str]:
        """Return what should have happened and never did."""
        if not self.is_complete:
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
            "interrupted": self.is_interrupted,
            "never_happened_checked": self.is_complete,
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


def campaign(
    first: int, count: int, jobs: int = 1, progress: Callable[[Summary, Outcome], None] | None = None
) -> Summary:
    """Run `count` seeds from `first` on, in `jobs` processes; an interruption leaves the summary of what was run.

    progress: called after each run with the summary so far and what became of that run.
    """
    summary = Summary()
    seeds = range(first, first + count)

    def take(outcomes: Iterable[Outcome]) -> None:
        for outcome in outcomes:
            summary.add(outcome)
            if progress is not None:
                progress(summary, outcome)

    try:
        if jobs == 1:
            take(map(run_seed, seeds))
        else:
            with get_context("spawn").Pool(jobs, _begin_to_work) as pool:
                take(pool.imap_unordered(run_seed, seeds))
    except KeyboardInterrupt:
        summary.is_interrupted = True
    return summary


def _begin_to_work() -> None:
    """Let the parent alone be interrupted: it ends its workers. Look for garbage seldom: a run leaves little."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.freeze()
    gc.set_threshold(GARBAGE_THRESHOLD)


def show_progress(summary: Summary, outcome: Outcome) -> None:
    """Say on standard error how far a campaign is, on a terminal or every 50 seeds, and which seed failed, at once."""
    line = f"{summary.seeds} seeds, {len(summary.failed)} failed"
    if outcome.violations:
        print(f"\nseed {outcome.seed} FAILED: {outcome.violations[0].text}", file=sys.stderr, flush=True)  # noqa: T201
    if sys.stderr.isatty():
        print(f"\r{line}", end="", file=sys.stderr, flush=True)  # noqa: T201 - progress, not a result
    elif summary.seeds % 50 == 0:
        print(line, file=sys.stderr, flush=True)  # noqa: T201 - progress, not a result
