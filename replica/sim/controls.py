"""Deliberately broken rules: planted bugs that the simulator must find.

Each is a small patch of one function of the cores, or of the shell around them, in force while a run lasts; nothing is
copied. A control names the kinds of violation that must be found and the recorded seed with which they are; without the
patch the same seed is clean. `scripted` controls fix part of the scenario, because what they need is rare; the table
says so by its overrides. `search` finds a new seed when the simulator has changed.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from replica.core.genesis import Ordering
from replica.sim import planted
from replica.sim.clients import Habits
from replica.sim.planted import Patch
from replica.sim.run import Outcome, run_seed
from replica.sim.scenario import LIMITS, STORMY
from replica.sim.world import Weather

SEARCH_SEEDS = 300
SAFETY = ("agreement", "state", "durability", "linearizability", "exactly-once")


@contextmanager
def patched(*patches: Patch) -> Iterator[None]:
    """Replace attributes, and put them back."""
    saved = [(owner, name, getattr(owner, name)) for owner, name, _ in patches]
    try:
        for owner, name, value in patches:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in saved:
            setattr(owner, name, value)


@dataclass(frozen=True, slots=True)
class Control:
    """One planted bug. kinds: any of these violations shows it. seed: with which it is found."""

    name: str
    breaks: str
    kinds: tuple[str, ...]
    patches: Callable[[], list[Patch]]
    seed: int
    overrides: dict[str, Any] = field(default_factory=dict)

    def run(self, seed: int | None = None) -> Outcome:
        """Run a seed with the bug."""
        with patched(*self.patches()):
            return run_seed(self.seed if seed is None else seed, overrides=self.overrides)

    def run_without(self) -> Outcome:
        """Run the recorded seed without the bug."""
        return run_seed(self.seed, overrides=self.overrides)

    def is_found(self, outcome: Outcome) -> bool:
        """Say whether a violation of a named kind was found."""
        return any(violation.kind in self.kinds for violation in outcome.violations)

    def search(self, first: int = 0, count: int = SEARCH_SEEDS) -> int | None:
        """Return the first seed that finds it, or None."""
        return next((seed for seed in range(first, first + count) if self.is_found(self.run(seed))), None)


def _one_faulty(number: int, *strategies: str) -> dict[str, Any]:
    """Script the scenario: three replicas, one of them faulty in this way, and a network that changes views."""
    faulty = {"f": 1, "faulty": (number,), "strategies": (strategies,)}
    return {**faulty, "weather": STORMY, "patience_ms": 150, "partitions": 8, "crashes": 0, "limits": LIMITS}


_BUSY = {"clients": 3, "habits": Habits(concurrency=4, think_ms=50), "liveness_ms": 20_000}
# Timely, but slower than the first patience.
_SLOW = {"f": 1, "faulty": (), "strategies": (), "healed": Weather(100, 300), "patience_ms": 150, "liveness_ms": 60_000}

CONTROLS: tuple[Control, ...] = (
    Control("quorum-one-short", "f votes decide", SAFETY, planted.quorum_one_short, 0),
    Control(
        "stable-one-short",
        "f checkpoints are stable",
        ("halted", "state", "exception"),
        planted.stable_one_short,
        0,
        _one_faulty(2, "checkpoint-lie"),
    ),
    Control("one-counts-twice", "a replica's votes count twice", SAFETY, planted.one_counts_twice, 0),
    Control(
        "differing-vote-counts",
        "a vote for something else counts",
        (*SAFETY, "accuracy"),
        planted.differing_vote_counts,
        0,
        {**_one_faulty(1, "lying-vote:100", "impatient:20", "chosen-references:own"), "ordering": Ordering.TWO_PHASE},
    ),
    Control("no-quorum-to-execute", "a proposal is executed at once", SAFETY, planted.no_quorum_to_execute, 0),
    Control("carry-lowest-view", "the lowest view's vote is carried", SAFETY, planted.carry_lowest_view, 0),
    Control("carry-forgets", "nothing is carried", SAFETY, planted.carry_forgets, 0),
    Control(
        "carry-unproposed",
        "votes for what was not proposed are carried",
        (*SAFETY, "exception"),
        planted.carry_what_was_not_proposed,
        0,
        _one_faulty(2, "lying-vote"),
    ),
    Control(
        "few-references",
        "NEW-VIEW may name fewer than q",
        SAFETY,
        planted.few_references,
        0,
        _one_faulty(1, "abstain", "impatient:20", "chosen-references:few"),
    ),
    Control(
        "votes-after-change",
        "votes after VIEW-CHANGE count",
        SAFETY,
        planted.votes_after_change,
        0,
        {**_one_faulty(2, "abstain", "vote-after-change"), "ordering": Ordering.TWO_PHASE},
    ),
    Control("no-wait-for-causes", "votes do not wait for the proposal", ("accuracy",), planted.no_wait_for_causes, 0),
    Control(
        "gap-by-arithmetic", "a gap in a log is passed over", ("accuracy", "exception"), planted.gap_by_arithmetic, 0
    ),
    Control(
        "second-proposal",
        "a second proposal for a slot counts",
        (*SAFETY, "accuracy"),
        planted.second_proposal_accepted,
        0,
        _one_faulty(0, "second-proposal"),
    ),
    Control("change-without-quorum", "one wish moves the view", ("liveness",), planted.change_without_quorum, 0),
    Control(
        "any-progress-restores",
        "any execution restores patience",
        ("liveness",),
        planted.any_progress_restores,
        0,
        _BUSY | _one_faulty(0, "censor"),
    ),
    Control(
        "fetched-from-author-only",
        "missing entries are asked of their author only",
        ("liveness",),
        planted.fetched_from_author_only,
        0,
    ),
    Control("never-impatient", "patience never ends", ("liveness",), planted.never_impatient, 0),
    Control("patience-never-grows", "patience does not double", ("liveness",), planted.patience_never_grows, 0, _SLOW),
    Control(
        "missing-not-fetched", "missing causes are not asked for", ("liveness",), planted.missing_never_asked_for, 0
    ),
    Control("executed-not-voted", "no votes for executed slots", ("liveness",), planted.no_votes_for_the_executed, 0),
    Control(
        "sent-before-durable", "entries are sent before durable", ("log-conflict",), planted.sent_before_durable, 0
    ),
    Control("causes-not-durable", "an entry's causes may get lost", ("halted",), planted.causes_not_durable, 0),
    Control("client-accepts-f", "f equal replies satisfy a client", SAFETY, planted.client_accepts_f, 0),
    Control("replies-twice", "one replica's replies count twice", SAFETY, planted.replies_counted_twice, 0),
    Control("sessions-unchecked", "a request is executed again", ("exactly-once",), planted.sessions_not_checked, 0),
    Control("answered-kept", "answered requests are waited for", ("liveness",), planted.answered_requests_kept, 0),
    Control(
        "opening-stuck", "executed openings are proposed", ("liveness",), planted.openings_answered_by_order_only, 0
    ),
)
