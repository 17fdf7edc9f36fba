"""Planted bugs about changes of the members; see `replica.sim.planted`, `replica.sim.controls_members`."""
# ruff: noqa: ANN401, SLF001

from dataclasses import replace
from typing import Any

from replica.core import chain, knowledge, logstate
from replica.core.genesis import Genesis
from replica.core.machine import ReplicaCore
from replica.core.members import Membership
from replica.core.pen import Pen
from replica.core.rules import Reading
from replica.sim.host import Host
from replica.sim.planted import Patch
from replica.sim.setting import Setting


def no_barrier() -> list[Patch]:
    """Vote, and count votes, above the last slot of a list."""
    right = Pen._next

    def next_entry(pen: Any, size: int) -> Any:
        ends, pen._known.ends = pen._known.ends, None
        try:
            return right(pen, size)
        finally:
            pen._known.ends = ends

    def reading(core: Any) -> Reading:
        return Reading(core.genesis, core._known.states, core.executed, core.stable, None)

    def is_readable(core: Any, log: int) -> bool:
        return bool(core._inboxes[log].unread) and log not in core.exposed

    return [(Pen, "_next", next_entry), (ReplicaCore, "_reading", reading), (ReplicaCore, "_is_readable", is_readable)]


def old_entries_not_skipped() -> list[Patch]:
    """Read under a new list what a log said under the old one."""

    def joined(positions: Any, base: int) -> Any:
        states = right(positions, base)
        for state in states:
            state.joined = True
        return states

    right = logstate.founding_states
    return [(chain, "founding_states", joined), (knowledge, "founding_states", joined)]


def removed_log_counted() -> list[Patch]:
    """Go on with the log that was replaced, in its place."""
    right_found, right_verifier = chain.found, Setting.verifier_of

    def verifier_of(setting: Any, genesis: Genesis) -> Any:
        before = setting.genesis
        if not genesis.list_number or genesis.n != before.n:
            return right_verifier(setting, genesis)
        members = tuple(replace(member, since=0) for member in before.members)
        return right_verifier(setting, replace(genesis, members=members))

    def found(snapshot: Any, genesis: Genesis, heads: Any) -> Any:
        members = tuple(replace(member, since=0) for member in genesis.members)
        return right_found(snapshot, replace(genesis, members=members), heads)

    from replica.sim import host, replica  # noqa: PLC0415 - what is patched

    return [
        (Setting, "verifier_of", verifier_of),
        (chain, "found", found),
        (host, "found", found),
        (replica, "found", found),
    ]


def forged_list_believed() -> list[Patch]:
    """Take a list of members from whoever offers it."""
    return [(chain, "check_certificate", lambda *_: None)]


def jump_to_any_offer() -> list[Patch]:
    """Leave a list for a later one whose state nobody is known to have."""

    def is_certified(host: Any, offer: Any, genesis: Genesis) -> bool:  # noqa: ARG001
        return genesis is not host.genesis

    return [(Host, "_is_certified", is_certified)]


def early_end() -> list[Patch]:
    """Let the next list be in force at once, not a window later: who judges a vote need not know of it yet."""
    right = Membership._judge

    def judge(membership: Any, content: Any, slot: int) -> Any:
        interval = membership._genesis.limits.checkpoint_interval
        return replace(right(membership, content, slot), after=-(-slot // interval) * interval)

    return [(Membership, "_judge", judge)]
