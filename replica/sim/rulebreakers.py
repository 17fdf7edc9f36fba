"""Lies that break one rule of a log each, and no other rule: one for every rule that `replica.core.rules` names.

They end their author's influence at once, so they are not drawn but take their turn (`replica.sim.scenario`). While a
rule is switched off (`replica.sim.rulecontrols`) they go on, and show what the rule is for: where a rule guards
something, its lie is the one that does the harm.

A lie is a function that looks at what a correct replica would say now, [] between appends, and returns what is said
instead, or None if there is no occasion.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from replica.core.batch import NULL_BATCH, make_batch
from replica.core.entries import (
    NEW_VIEW,
    PRE_PREPARE,
    VIEW_CHANGE,
    Checkpoint,
    Commit,
    NewView,
    Prepare,
    PrePrepare,
    Reference,
    Suspect,
    ViewChange,
)
from replica.core.logstate import LogState
from replica.core.quorum import primary
from replica.core.rules import next_vote
from replica.sim.lies import VOTES, Rarely, references_of

if TYPE_CHECKING:
    from replica.sim.faulty import Puppet

NOISE = b"\x5a" * 32
FAR = 1000
Said = list[bytes]


class RuleBreaker(Rarely):
    """Breaks the rule that its argument names, whenever there is an occasion."""

    name = "rule-breaker"
    share = 0.3

    def __init__(self, argument: str = "") -> None:
        self._rule = argument
        self._lie = LIES[argument]
        self._is_ready = False

    def entries(self, payloads: Said) -> Said:
        """See `Strategy`."""
        lie = self._lie(self.host.puppet, payloads)
        if lie is None:
            return payloads
        if lie != payloads and self._breaks(lie, payloads):
            self._count()
        return lie

    def on_tick(self) -> None:
        """See `Strategy`."""
        if self.host.puppet.halted is None and self.now():
            lie = self._lie(self.host.puppet, [])
            if lie and self.host.say(lie):
                self._count()

    def _breaks(self, lie: Said, payloads: Said) -> bool:
        return any(payload not in payloads for payload in lie)

    def _count(self) -> None:
        self.did()
        self.host.count(f"{self.name}-{self._rule}")


# Who proposes what.


def _proposals(puppet: "Puppet", slots: range) -> Said:
    genesis, view = puppet.genesis, puppet.own.view
    interval = genesis.limits.checkpoint_interval
    cuts = (() if slot % interval else (0,) * genesis.n for slot in slots)
    return [PrePrepare(view, slot, make_batch(slot, cut, ())).encode() for slot, cut in zip(slots, cuts, strict=True)]


def _due(puppet: "Puppet") -> int | None:
    """Return the slot that this primary proposes next, or None if it is none, or its view is not open."""
    own = puppet.own
    opening = own.opened.get(own.view)
    if opening is None or primary(own.view, puppet.genesis.n) != puppet.number:
        return None
    return next_vote(own, opening.top)


def _window_end(puppet: "Puppet") -> int:
    return puppet.own.last_checkpoint + puppet.genesis.limits.window


def proposes_twice(puppet: "Puppet", payloads: Said) -> Said | None:
    """Propose something else for the last slot."""
    last = puppet.own.last_vote
    if payloads or last is None or _due(puppet) != last + 1:
        return None
    return _proposals(puppet, range(last, last + 1))


def skips_a_slot(puppet: "Puppet", payloads: Said) -> Said | None:
    """Propose for the slot after the next one."""
    due = _due(puppet)
    if payloads or due is None or due >= _window_end(puppet):
        return None
    return _proposals(puppet, range(due + 1, due + 2))


def leaves_its_window(puppet: "Puppet", payloads: Said) -> Said | None:
    """Propose for the whole window, and then for many slots more."""
    due = _due(puppet)
    if payloads or due is None:
        return None
    return _proposals(puppet, range(due, _window_end(puppet) + 4 * puppet.genesis.limits.window))


def cuts_ahead(puppet: "Puppet", payloads: Said) -> Said | None:
    """Propose up to the next cut, which names entries that its author has not written."""
    due, interval = _due(puppet), puppet.genesis.limits.checkpoint_interval
    if payloads or due is None:
        return None
    slot = due + -due % interval
    if slot > _window_end(puppet):
        return None
    cut = [0] * puppet.genesis.n
    cut[puppet.number] = puppet.own.position + FAR
    last = PrePrepare(puppet.own.view, slot, make_batch(slot, cut, ())).encode()
    return [*_proposals(puppet, range(due, slot)), last]


def proposes_unopened(puppet: "Puppet", payloads: Said) -> Said | None:
    """Propose in its view without opening it, for a slot that was voted for before."""
    said = [payload for payload in payloads if payload[0] not in {NEW_VIEW, PRE_PREPARE}]
    if not any(payload[0] == VIEW_CHANGE for payload in payloads):
        return said if said != payloads else None
    view = _view_of(next(payload for payload in payloads if payload[0] == VIEW_CHANGE))
    if primary(view, puppet.genesis.n) != puppet.number:
        return None
    slot = max(puppet.own.top, puppet.own.last_checkpoint + 1)
    cut = () if slot % puppet.genesis.limits.checkpoint_interval else (0,) * puppet.genesis.n
    return [*_up_to_change(payloads), PrePrepare(view, slot, make_batch(slot, cut, ())).encode()]


def opens_anothers_view(puppet: "Puppet", payloads: Said) -> Said | None:
    """Open a view of which it is not the primary, with the references that hold the fewest votes."""
    own = puppet.own
    departed = _departed(puppet)
    if payloads or not own.view or own.view in own.opened or len(departed) < puppet.genesis.quorum:
        return None
    if primary(own.view, puppet.genesis.n) == puppet.number:
        return None
    return [NewView(own.view, _references(puppet, departed)).encode()]


# Votes.


def votes_by_prepare(puppet: "Puppet", payloads: Said) -> Said | None:
    """Vote, as primary, for the null batch in every slot that its NEW-VIEW carries."""
    own = puppet.own
    opening = own.opened.get(own.view)
    if not own.view or primary(own.view, puppet.genesis.n) != puppet.number:
        return None
    if payloads:
        # Nothing is proposed before that, or the carried slots are passed.
        return [payload for payload in payloads if payload[0] != PRE_PREPARE] if own.last_vote is None else None
    if opening is None or own.last_vote is not None:
        return None
    first = max(opening.base, own.last_checkpoint) + 1
    return [Prepare(own.view, slot, NULL_BATCH.digest).encode() for slot in range(first, opening.top + 1)]


def votes_twice(puppet: "Puppet", payloads: Said) -> Said | None:
    """Take back, on leaving a view, every vote that it gave there."""
    own = puppet.own
    last = own.last_vote
    if not payloads or payloads[0][0] != VIEW_CHANGE or last is None:
        return None
    if primary(own.view, puppet.genesis.n) == puppet.number:
        return None
    voted = sorted(slot for slot, by_view in own.votes.items() if own.view in by_view and slot <= last)
    if not voted:
        return None
    return [*(Prepare(own.view, slot, NOISE).encode() for slot in range(voted[0], last + 1)), *payloads]


def commits_twice(puppet: "Puppet", payloads: Said) -> Said | None:
    """Commit the last slot again."""
    own = puppet.own
    if payloads or own.last_commit is None:
        return None
    return [Commit(own.view, own.last_commit, NOISE).encode()]


def commits_without_vote(puppet: "Puppet", payloads: Said) -> Said | None:
    """Commit the slot after the last one that it voted for."""
    own = puppet.own
    if payloads or own.last_commit is None or max(own.last_commit, own.last_checkpoint) != own.last_vote:
        return None
    return [Commit(own.view, own.last_vote + 1, NOISE).encode()]


# Checkpoints.


def misplaces_a_checkpoint(puppet: "Puppet", payloads: Said) -> Said | None:
    """Say a checkpoint between two right places."""
    executed = puppet.knowledge.executed
    slot = executed if executed % puppet.genesis.limits.checkpoint_interval else executed - 1
    return None if payloads or slot <= puppet.own.last_checkpoint else [Checkpoint(slot, NOISE).encode()]


def goes_back_to_a_checkpoint(puppet: "Puppet", payloads: Said) -> Said | None:
    """Say an old checkpoint again, with another digest."""
    interval = puppet.genesis.limits.checkpoint_interval
    slot = puppet.own.last_checkpoint
    return None if payloads or not slot else [Checkpoint(max(slot - interval, interval), NOISE).encode()]


# Changing views.


def suspects_another_view(puppet: "Puppet", payloads: Said) -> Said | None:
    """Suspect the view after its own."""
    return None if payloads else [Suspect(puppet.own.view + 1).encode()]


def suspects_twice(puppet: "Puppet", payloads: Said) -> Said | None:
    """Suspect a view again."""
    own = puppet.own
    return None if payloads else [Suspect(own.view).encode()] * (1 if own.suspected else 2)


def goes_back(puppet: "Puppet", payloads: Said) -> Said | None:
    """Vote for nothing; when it has left a view, return to it, and vote and commit there after all."""
    own, known = puppet.own, puppet.knowledge
    if not any(payload[0] == VIEW_CHANGE for payload in payloads):
        return [payload for payload in payloads if payload[0] not in VOTES] if payloads else None
    if _view_of(_up_to_change(payloads)[-1]) in own.view_change_at:
        return None  # once is enough
    said = [*_up_to_change(payloads), ViewChange(own.view).encode()]
    opening = known.states[primary(own.view, puppet.genesis.n)].opened.get(own.view)
    slot = max(opening.base if opening else 0, own.last_checkpoint) + 1
    while opening and (digest := known.slots.proposed(own.view, slot)) is not None:
        said += [kind(own.view, slot, digest).encode() for kind in (Prepare, Commit)]
        slot += 1
    return said


def opens_twice(puppet: "Puppet", payloads: Said) -> Said | None:
    """Open its view again, with the references that hold the fewest votes, once there is a choice."""
    own = puppet.own
    departed = _departed(puppet)
    if not own.view or own.view not in own.opened or len(departed) <= puppet.genesis.quorum:
        return None
    return [NewView(own.view, _references(puppet, departed)).encode(), *payloads]


def refers_ahead(puppet: "Puppet", payloads: Said) -> Said | None:
    """Name an entry of its own that it has not written."""
    own = Reference(puppet.number, puppet.own.position + FAR)

    def choose(refs: list[Reference], _: int) -> list[Reference]:
        return [*[reference for reference in refs if reference.replica != puppet.number][: len(refs) - 1], own]

    return _with_references(payloads, choose)


def refers_to_something_else(puppet: "Puppet", payloads: Said) -> Said | None:
    """Name the last entry of a replica that has not left for this view, or else not its VIEW-CHANGE."""

    def choose(refs: list[Reference], view: int) -> list[Reference]:
        states = puppet.knowledge.states
        named = {reference.replica for reference in refs}
        staying = [s for s in states if s.author not in named and s.position and view not in s.view_change_at]
        own = [reference for reference in refs if reference.replica == puppet.number] or refs[:1]
        others = [reference for reference in refs if reference not in own]
        if staying:
            return [*own, *others[1:], Reference(staying[0].author, staying[0].position)]
        return [*own, *others[1:], *(Reference(r.replica, max(1, r.index - 1)) for r in others[:1])]

    return _with_references(payloads, choose)


def _with_references(payloads: Said, choose: Callable[[list[Reference], int], list[Reference]]) -> Said | None:
    for place, payload in enumerate(payloads):
        if payload[0] == NEW_VIEW:
            chosen = NewView(_view_of(payload), tuple(choose(references_of(payload), _view_of(payload)))).encode()
            return [*payloads[:place], chosen, *payloads[place + 1 :]]
    return None


def _departed(puppet: "Puppet") -> list[LogState]:
    """Return the logs that have left for the present view, those with the fewest votes first."""
    view = puppet.own.view
    departed = [state for state in puppet.knowledge.states if view in state.view_change_at]
    return sorted(departed, key=lambda state: (state.view_change_at[view].top, state.author))


def _references(puppet: "Puppet", departed: list[LogState]) -> tuple[Reference, ...]:
    view = puppet.own.view
    return tuple(Reference(s.author, s.view_change_at[view].index) for s in departed[: puppet.genesis.quorum])


def _up_to_change(payloads: Said) -> Said:
    place = next(place for place, payload in enumerate(payloads) if payload[0] == VIEW_CHANGE)
    return payloads[: place + 1]


def _view_of(payload: bytes) -> int:
    return int.from_bytes(payload[1:9], "big")


LIES: dict[str, Callable[["Puppet", Said], Said | None]] = {
    "opened-twice": opens_twice,
    "wrong-reference": refers_to_something_else,
    "reference-ahead": refers_ahead,
    "not-primary": opens_anothers_view,
    "view-not-open": proposes_unopened,
    "primary-prepared": votes_by_prepare,
    "view-backwards": goes_back,
    "voted-twice": votes_twice,
    "proposed-twice": proposes_twice,
    "slot-skipped": skips_a_slot,
    "beyond-window": leaves_its_window,
    "cut-ahead": cuts_ahead,
    "commit-without-vote": commits_without_vote,
    "committed-twice": commits_twice,
    "checkpoint-misplaced": misplaces_a_checkpoint,
    "checkpoint-backwards": goes_back_to_a_checkpoint,
    "wrong-view": suspects_another_view,
    "suspected-twice": suspects_twice,
}
# Said by the first primary; those of replica 1 are said when it leaves for, or opens, a view.
BY_PROPOSERS = ("proposed-twice", "slot-skipped", "beyond-window", "cut-ahead")
AT_CHANGES = (
    "not-primary",
    "view-not-open",
    "primary-prepared",
    "voted-twice",
    "view-backwards",
    "opened-twice",
    "reference-ahead",
    "wrong-reference",
)
