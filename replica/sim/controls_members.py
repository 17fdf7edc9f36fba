"""Planted bugs about changes of the members; see `replica.sim.controls`. Their seeds' scenarios get a change each."""

from typing import Any

from replica.sim import planted_members as planted
from replica.sim.control import Control
from replica.sim.controls_recovery import AWAY
from replica.sim.disk import Damage
from replica.sim.operator import Change
from replica.sim.scenario import FORGETFUL, LIMITS, STORMY

# Replica 2, which is faulty, is replaced; it goes on with its old log.
_REPLACED: dict[str, Any] = {
    "rolled_back": None,
    "changes": (Change("replace", 800, 2),),
    "f": 1,
    "faulty": (2,),
    "strategies": ((),),
    "liveness_ms": 20_000,
    "limits": LIMITS,
}
# Others are away, and asked for a state by whom nobody but replica 1 answers with a list of its own.
_FORGED: dict[str, Any] = {**AWAY, "faulty": (1,), "strategies": (("forged-list",),)}

MEMBERS: tuple[Control, ...] = (
    Control(
        "no-barrier",
        "slots above the last one of a list are voted for under it",
        ("agreement",),
        planted.no_barrier,
        38,
        {**_REPLACED, "weather": STORMY},
    ),
    Control(
        "list-ends-early",
        "a list ends less than a window above the slot that says so",
        ("agreement",),
        planted.early_end,
        57,
        {**_REPLACED, "weather": STORMY},
    ),
    Control(
        "old-entries-not-skipped",
        "what a log said under the old list is judged under the new one",
        ("accuracy",),
        planted.old_entries_not_skipped,
        0,
        _REPLACED,
    ),
    Control(
        "removed-log-counted",
        "a log that was replaced is read on",
        ("halted",),
        planted.removed_log_counted,
        0,
        _REPLACED,
    ),
    Control(
        "forged-list",
        "a list that no quorum attested is believed",
        ("liveness",),
        planted.forged_list_believed,
        0,
        _FORGED,
    ),
    Control(
        "jump-to-any-offer",
        "a list is left for one whose state nobody is known to have",
        ("liveness",),
        planted.jump_to_any_offer,
        7,
        {**_REPLACED, **FORGETFUL, "damages": (Damage.NONE,) * 3},
    ),
)
MEMBERS_SCRIPTED = {control.name: "a change of the members" for control in MEMBERS} | {
    "forged-list": "a faulty replica that makes up lists of members, and others that are away"
}
