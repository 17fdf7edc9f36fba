"""Planted bugs about durability, checkpoints, the cut, transfers and coming back; see `replica.sim.controls`.

What random runs hardly ever need, the wait at CHECKPOINT, the closure of a cut and the votes in flight at one, has
scripted runs (`replica.sim.stories_recovery`), which go wrong without it.
"""

from typing import Any

from replica.sim import planted_recovery as planted
from replica.sim.control import Control
from replica.sim.disk import Damage
from replica.sim.scenario import FORGETFUL, LIMITS, NARROW
from replica.sim.world import Weather

# Three correct replicas that forget their logs soon, and one or the other is away for long.
AWAY: dict[str, Any] = {
    **FORGETFUL,
    "f": 1,
    "faulty": (),
    "strategies": (),
    "limits": LIMITS,
    "crashes": 0,
    "partitions": 2,
    "power_cuts": 0,
    "rolled_back": None,
    "damages": (Damage.NONE,) * 4,
    "liveness_ms": 20_000,
}
_CRASHING = {"crashes": 8, "append_ms_max": 10, "liveness_ms": 20_000}


def _liar(number: int, strategy: str) -> dict[str, Any]:
    away = (Damage.NONE, Damage.DISK, Damage.MILESTONE, Damage.NONE)
    return {**AWAY, "faulty": (number,), "strategies": ((strategy,),), "damages": away}


RECOVERY: tuple[Control, ...] = (
    Control(
        "sent-before-durable",
        "entries are sent before durable",
        ("halted",),
        planted.sent_before_durable,
        6,
    ),
    Control(
        "causes-not-durable",
        "an entry's causes may get lost",
        ("liveness",),
        planted.causes_not_durable,
        10,
        _CRASHING,
    ),
    Control(
        "attested-group-forgotten",
        "the trusted part's last group is not asked for after a crash",
        ("liveness",),
        planted.attested_group_forgotten,
        19,
        _CRASHING,
    ),
    Control(
        "truncated-before-durable",
        "logs are dropped before the milestone is durable",
        ("liveness",),
        planted.truncated_before_durable,
        6,
        {**AWAY, "damages": (), "power_cuts": 6, "append_ms_max": 10},
    ),
    Control(
        "trusted-log-forgets-too-early",
        "the trusted log is truncated before the milestone is durable",
        ("durability",),
        planted.trusted_log_forgets_too_early,
        6,
        {**AWAY, "damages": (), "power_cuts": 6, "append_ms_max": 10},
    ),
    Control(
        "milestones-out-of-order", "milestones are stored in any order", ("state",), planted.milestones_out_of_order, 7
    ),
    Control(
        "passed-milestones-lost",
        "the changes of a milestone that was passed over are lost",
        ("state",),
        planted.passed_milestones_lost,
        28,
        {**_liar(1, "checkpoint-lie:skip"), "storm_ms": 12_000},
    ),
    Control(
        "damaged-milestone",
        "a damaged milestone is begun with",
        ("state", "halted", "accuracy"),
        planted.damaged_milestone_begun_with,
        1,
        {**AWAY, "damages": (Damage.STATE,) * 4},
    ),
    Control(
        "rolled-back-accepted",
        "an older trusted state is gone on with",
        ("log-conflict", "halted"),
        planted.rolled_back_accepted,
        3,
    ),
    Control(
        "rollback-not-said",
        "a replica that was rolled back waits for ever",
        ("rollback",),
        planted.rollback_not_said,
        3,
    ),
    Control(
        "speaks-too-early",
        "a replica speaks before its own log is whole",
        ("accuracy", "halted"),
        planted.speaks_before_its_log_is_whole,
        1,
        {**AWAY, "damages": (Damage.OWN_LOG,) * 4},
    ),
    Control(
        "skipped-without-cut",
        "what is gone of a log is skipped",
        ("accuracy",),
        planted.skipped_without_cut,
        0,
        AWAY,
    ),
    Control(
        "cut-moves-back", "the cut may move back", ("accuracy",), planted.cut_moves_back, 0, _liar(0, "false-cut:back")
    ),
    Control(
        "lag-never-suspected",
        "a primary may leave the cut where it is",
        ("bounds",),
        planted.lag_never_suspected,
        7,
        {**_liar(0, "false-cut:agreed"), "damages": (), "partitions": 0, "weather": Weather()},
    ),
    Control(
        "parts-not-verified",
        "parts are installed as they come",
        ("state",),
        planted.parts_not_verified,
        8,
        _liar(1, "false-part:flipped"),
    ),
    Control(
        "certificate-one-short",
        "f checkpoints certify a state",
        ("state",),
        planted.certificate_one_short,
        3,
        _liar(1, "forged-state"),
    ),
    Control(
        "certificate-not-checked",
        "an offered state needs no certificate",
        ("state",),
        planted.certificate_not_checked,
        3,
        _liar(1, "forged-state"),
    ),
    Control(
        "passed-milestones-pile-up",
        "nothing takes the place of a milestone that was passed over",
        ("bounds",),
        planted.passed_milestones_pile_up,
        7,
        {**_liar(0, "forged-state"), "milestone_intervals": 2, "partitions": 8, "limits": NARROW},
    ),
)

_GONE = "replicas that forget soon and are away for long"
RECOVERY_SCRIPTED: dict[str, str] = {
    "causes-not-durable": "many crashes, and a shorter wait",
    "attested-group-forgotten": "many crashes, and a shorter wait",
    "truncated-before-durable": "power cuts, and a shorter wait",
    "trusted-log-forgets-too-early": "power cuts, and a shorter wait",
    "passed-milestones-lost": "a faulty replica that passes checkpoints over",
    "passed-milestones-pile-up": "a faulty replica that lies about milestones only, while another is cut off",
    "damaged-milestone": "damaged milestones",
    "speaks-too-early": "damaged groups of the own log",
    "skipped-without-cut": _GONE,
    "cut-moves-back": "a primary that proposes such cuts",
    "lag-never-suspected": "a primary that never moves the cut",
    "parts-not-verified": _GONE + ", and a source that alters what it sends",
    "certificate-one-short": _GONE + ", and a source that makes up a state",
    "certificate-not-checked": _GONE + ", and a source that makes up a state",
}
