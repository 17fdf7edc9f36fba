"""Deliberately broken rules: planted bugs that the simulator must find.

Each is a small patch of one function of the cores, or of the shell around them, in force while a run lasts; nothing is
copied. A control names the kinds of violation that must be found, all of them, and the recorded seed with which they
are; without the patch the same seed is clean. More harm may follow from that, but nothing crashes, stops or grows that
is not named. So each is found within `seed` + 1 seeds from 0 on, at most SEARCH_SEEDS, and the tests run the recorded
ones. When the simulator has changed, `search` finds a new seed. The rules of a log have controls of their own, in
`replica.sim.rulecontrols`.

`sent-before-durable` and `causes-not-durable` patch the simulated shell (`replica.sim.replica`), not the daemon's: they
show that the checkers would notice. What holds the daemon to these rules are the tests of the real shell,
tests/replica/shell/test_outbox_order.py and test_node_order.py.

Controls in SCRIPTED fix part of the scenario, because what they need is rare or because waiting for it takes long;
the others are found in runs as they are drawn. CLONED and EQUIVOCATING break no rule but the assumption: a trusted log
with two copies of its key. There the strategy is the bug, and without it the same run is clean.
"""

from replica.core.genesis import Ordering
from replica.sim import planted
from replica.sim.clients import Habits
from replica.sim.control import SEARCH_SEEDS, Control, one_faulty, patched
from replica.sim.controls_members import MEMBERS, MEMBERS_SCRIPTED
from replica.sim.controls_recovery import RECOVERY, RECOVERY_SCRIPTED
from replica.sim.controls_versions import VERSIONS, VERSIONS_SCRIPTED
from replica.sim.scenario import STORMY
from replica.sim.world import Weather

__all__ = ["CLONED", "CONTROLS", "EQUIVOCATING", "SCRIPTED", "SEARCH_SEEDS", "Control", "patched"]

_BUSY = {"clients": 3, "habits": Habits(concurrency=4, think_ms=50), "liveness_ms": 20_000}
_PLODDING = {
    "ordering": Ordering.TWO_PHASE,
    "retained": 40,
    "milestone_intervals": 2,
    "append_ms_max": 10,
    "clients": 3,
}
_QUICK = {"liveness_ms": 60_000}
_DOUBLING = {"f": 1, "faulty": (), "strategies": (), "faulty_clients": 3, "liveness_ms": 20_000}
_SLUGGISH = {
    "f": 2,
    "faulty": (0, 1),
    "strategies": (("sluggish",), ("sluggish",)),
    "weather": STORMY,
    "patience_ms": 150,
}
# Timely, but slower than the first patience.
_SLOW = {"f": 1, "faulty": (), "strategies": (), "healed": Weather(100, 300), "patience_ms": 150, "liveness_ms": 20_000}
# One replica suspects every view at once; a request takes longer than that, and less than a patience. The bound on
# views is passed first; if nobody looked at that, no client would be answered.
_STORM_OF_VIEWS = _SLOW | {
    "faulty": (2,),
    "strategies": (("impatient:100",),),
    "ordering": Ordering.THREE_PHASE,
    "healed": Weather(20, 40),
    "patience_ms": 600,
    "storm_ms": 4000,
    "liveness_ms": 8000,
}
# A primary that stays under the time-out for ever, in a network that is no excuse for it.
_UNHURRIED = {
    **one_faulty(0, "slow-primary"),
    "weather": Weather(1, 4),
    "healed": Weather(1, 4),
    "append_ms_max": 2,
    "patience_ms": 600,
    "partitions": 0,
    "storm_ms": 0,
    "goes_on_ms": 30_000,
}

CONTROLS: tuple[Control, ...] = (
    Control("quorum-one-short", "f votes decide", ("agreement",), planted.quorum_one_short, 1),
    Control(
        "stable-one-short",
        "f checkpoints are stable",
        ("halted",),
        planted.stable_one_short,
        3,
        one_faulty(2, "checkpoint-lie"),
    ),
    Control("one-counts-twice", "a replica's votes count twice", ("agreement",), planted.one_counts_twice, 1),
    Control(
        "differing-vote-counts",
        "a vote for something else counts",
        ("agreement",),
        planted.differing_vote_counts,
        75,
        {**one_faulty(1, "lying-vote:100", "impatient:30"), **_PLODDING, "weather": STORMY},
    ),
    Control("no-quorum-to-execute", "a proposal is executed at once", ("agreement",), planted.no_quorum_to_execute, 1),
    Control(
        "carry-lowest-view",
        "the lowest view's vote is carried",
        ("agreement",),
        planted.carry_lowest_view,
        98,
        {**one_faulty(1, "abstain", "impatient:30", "chosen-references:fewest"), **_PLODDING},
    ),
    Control("carry-forgets", "nothing is carried", ("agreement",), planted.carry_forgets, 7),
    Control(
        "carry-unproposed",
        "votes for what was not proposed are carried",
        ("agreement",),
        planted.carry_what_was_not_proposed,
        60,
        one_faulty(2, "null-vote:50", "impatient:20"),
    ),
    Control(
        "few-references",
        "NEW-VIEW may name fewer than q",
        ("agreement",),
        planted.few_references,
        2,
        one_faulty(1, "abstain", "impatient:20", "chosen-references:few"),
    ),
    Control(
        "votes-after-change",
        "votes after VIEW-CHANGE count",
        ("agreement",),
        planted.votes_after_change,
        3,
        {**one_faulty(2, "abstain", "vote-after-change"), "ordering": Ordering.TWO_PHASE},
    ),
    Control("no-wait-for-causes", "votes do not wait for the proposal", ("accuracy",), planted.no_wait_for_causes, 0),
    Control("gap-by-arithmetic", "a gap in a log is passed over", ("accuracy",), planted.gap_by_arithmetic, 0),
    Control(
        "second-proposal",
        "a second proposal for a slot counts",
        ("accuracy",),
        planted.second_proposal_accepted,
        1,
        one_faulty(0, "second-proposal"),
    ),
    Control(
        "change-without-quorum",
        "one wish moves the view",
        ("bounds",),
        planted.change_without_quorum,
        0,
        _STORM_OF_VIEWS,
    ),
    Control(
        "any-progress-restores",
        "any execution restores patience",
        ("liveness",),
        planted.any_progress_restores,
        0,
        _BUSY | one_faulty(0, "censor"),
    ),
    Control(
        "fetched-from-author-only",
        "missing entries are asked of their author only",
        ("liveness",),
        planted.fetched_from_author_only,
        0,
        _QUICK,
    ),
    Control("never-impatient", "patience never ends", ("liveness",), planted.never_impatient, 29, _QUICK),
    Control("patience-never-grows", "patience does not double", ("liveness",), planted.patience_never_grows, 1, _SLOW),
    Control(
        "slowness-kept",
        "nobody suspects a slow primary",
        ("slow",),
        planted.slowness_never_suspected,
        0,
        _UNHURRIED,
    ),
    Control(
        "expectation-never-raised",
        "what is expected of a primary never rises",
        ("slow",),
        planted.expectation_never_raised,
        0,
        _UNHURRIED,
    ),
    Control(
        "missing-not-fetched",
        "missing causes are not asked for",
        ("liveness",),
        planted.missing_never_asked_for,
        0,
        {**_QUICK, "patience_ms": 150},
    ),
    Control(
        "executed-not-voted", "no votes for executed slots", ("liveness",), planted.no_votes_for_the_executed, 1, _QUICK
    ),
    Control("client-accepts-f", "f equal replies satisfy a client", ("durability",), planted.client_accepts_f, 40),
    Control(
        "replies-twice",
        "one replica's replies count twice",
        ("durability",),
        planted.replies_counted_twice,
        0,
    ),
    Control("sessions-unchecked", "a request is executed again", ("exactly-once",), planted.sessions_not_checked, 1),
    Control(
        "answered-kept", "answered requests are waited for", ("liveness",), planted.answered_requests_kept, 2, _DOUBLING
    ),
    Control(
        "opening-stuck",
        "executed openings are proposed",
        ("liveness",),
        planted.openings_answered_by_order_only,
        54,
        _QUICK | _SLUGGISH,
    ),
    Control("nothing-pruned", "votes are kept for ever", ("exception",), planted.nothing_pruned, 0),
    *RECOVERY,
    *MEMBERS,
    *VERSIONS,
)

# What is fixed in which control, and why.
_CHANGE = "a faulty replica that must lie at a change of views"
_WAITING = "a shorter wait for what never comes"
SCRIPTED: dict[str, str] = {
    "stable-one-short": "a faulty replica that lies about checkpoints",
    "differing-vote-counts": _CHANGE,
    "carry-lowest-view": _CHANGE,
    "carry-unproposed": _CHANGE,
    "few-references": _CHANGE,
    "votes-after-change": _CHANGE,
    "second-proposal": "a primary that proposes twice",
    "any-progress-restores": "a primary that ignores one of many busy clients",
    "patience-never-grows": "a healed network that is slower than the first patience",
    "opening-stuck": "slow primaries, and " + _WAITING,
    "change-without-quorum": "a storm of view changes: one replica suspects every view at once",
    "slowness-kept": "a slow primary, and a calm network",
    "expectation-never-raised": "a slow primary, and a calm network",
    "fetched-from-author-only": _WAITING,
    "never-impatient": _WAITING,
    "missing-not-fetched": "a short first patience, and " + _WAITING,
    "executed-not-voted": _WAITING,
    "answered-kept": "faulty clients that sign two requests with one number, and " + _WAITING,
    **RECOVERY_SCRIPTED,
    **MEMBERS_SCRIPTED,
    **VERSIONS_SCRIPTED,
}


def _cloned(name: str, breaks: str, kind: str, seed: int, number: int) -> Control:
    """Return a control with a cloned log, in a network that does not hide it; only stand-ins can be cloned."""
    overrides = {"f": 1, "faulty": (number,), "strategies": ((name,),), "ordering": Ordering.TWO_PHASE}
    overrides |= {"real_signatures": False, "partitions": 0, "crashes": 0}
    return Control(name, breaks, (kind,), list, seed, overrides, {"strategies": ((),)})


CLONED = _cloned("cloned-log", "a key has two copies, and both are shown", "forked", 2, 1)
EQUIVOCATING = _cloned("cloned-primary", "a primary with two copies proposes two batches", "agreement", 3, 0)
