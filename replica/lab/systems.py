"""The systems that the lab compares. Each but PBFT is the product's core with a few of its functions replaced.

What is replaced stands here, whole, and nowhere else; `differs` says it in words. PBFT is `replica.pbft.machine`.
"""
# ruff: noqa: ANN401, SLF001 - patches reach into what they replace, as those of the simulator's controls do

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from replica.core import checkpoints, machine, quorum, slots
from replica.core.events import Taken
from replica.core.genesis import Ordering
from replica.core.inbox import Arrival, Inbox
from replica.core.slots import SlotBook
from replica.sim.planted import Patch


@dataclass(frozen=True, slots=True)
class System:
    """One system. differs: from the product, in words. patches: what is replaced. attested: whether messages are.

    outcomes: every replica attests what it executed, in a log of its own. cloned: the primary owns its log twice.
    in_order: whether logs are read in order, or a gap is passed over. members: n for f.
    """

    name: str
    title: str
    differs: str
    ordering: Ordering = Ordering.THREE_PHASE
    patches: Callable[[], list[Patch]] = list
    attested: bool = True
    outcomes: bool = False
    cloned: bool = False
    in_order: bool = True
    members: str = "2f+1"

    def n(self, f: int) -> int:
        """Return how many replicas it has."""
        return 3 * f + 1 if self.members == "3f+1" else 2 * f + 1


def only_the_outcome() -> list[Patch]:
    """Read messages as they come from their author, who may say one thing to some and another to others.

    The author's messages are numbered and signed, and attested by nothing: what another reader was shown proves
    nothing, and a vote for something else is no lie about anybody.
    """
    vote, commit = SlotBook.vote, SlotBook.commit

    def voted(book: Any, author: int, view: int, slot: int, digest: bytes) -> bool:
        vote(book, author, view, slot, digest)
        return True

    def committed(book: Any, author: int, view: int, slot: int, digest: bytes) -> bool:
        commit(book, author, view, slot, digest)
        return True

    return [
        (Inbox, "_misfit", lambda *_: Arrival.STRAY),
        (Inbox, "differs", lambda *_: False),
        (SlotBook, "vote", voted),
        (SlotBook, "commit", committed),
    ]


def three_f_plus_one() -> list[Patch]:
    """Let n = 3f + 1 replicas be a cluster, and 2f + 1 of them a quorum."""

    def is_quorum(voters: int, f: int) -> bool:
        return voters.bit_count() > 2 * f

    return [
        (quorum, "replica_count", lambda f: 3 * f + 1),
        (quorum, "quorum", lambda f: 2 * f + 1),
        (slots, "is_quorum", is_quorum),
        (checkpoints, "is_quorum", is_quorum),
    ]


def outcome_at_three_f_plus_one() -> list[Patch]:
    """Both of the above."""
    return [*only_the_outcome(), *three_f_plus_one()]


# So long a gap is waited for, so that what the network merely reorders is read in order.
GAP_MS = 150


def order_not_insisted_upon() -> list[Patch]:
    """Wait for a gap in a log for a moment only, then read on behind it; what comes late is passed over."""
    on_tick, read_next, compare = machine.ReplicaCore._on_tick, machine.ReplicaCore._read_next, Inbox._compare
    gaps: dict[tuple[Any, int], tuple[int, int]] = {}  # where a log has a gap, and since when

    def tick(core: Any, event: Any) -> None:
        on_tick(core, event)
        for log, inbox in enumerate(core._inboxes):
            if not inbox._early or log == core.number:
                gaps.pop((core, log), None)
                continue
            received, since = gaps.setdefault((core, log), (inbox.received, event.now_ms))
            if received != inbox.received:
                gaps[core, log] = (inbox.received, event.now_ms)
            elif event.now_ms - since >= GAP_MS:
                inbox._take(inbox._early.pop(min(inbox._early)))
                core._effects.extend(Taken(group) for group in inbox.collect())
                core._read_logs()

    def late(inbox: Any, group: Any) -> Arrival:
        return Arrival.KNOWN if group.first not in inbox._ends else compare(inbox, group)

    def read(core: Any, log: int) -> bool:
        index, _, _ = core._inboxes[log].unread[0]
        state = core._known.states[log]
        state.position = max(state.position, index - 1)
        return read_next(core, log)

    return [
        (machine.ReplicaCore, "_on_tick", tick),
        (Inbox, "_compare", late),
        (machine.ReplicaCore, "_read_next", read),
    ]


THREE_PHASE = System(
    "three-phase", "Ours, three-phase", "nothing: every message logged, and each log read in order (A2M-PBFT-EA)"
)
TWO_PHASE = System(
    "two-phase",
    "Ours, two-phase",
    "nothing: q votes decide, without a third phase (MinBFT; its COMMIT is our PREPARE)",
    Ordering.TWO_PHASE,
)
OUTCOME = System(
    "outcome",
    "Attempt 1: only the outcome attested",
    "messages are signed but attested by nothing; each replica attests what it executed",
    patches=only_the_outcome,
    attested=False,
    outcomes=True,
)
OUTCOME_3F1 = System(
    "outcome-3f1",
    "Attempt 1 with 3f+1 (A2M-PBFT-E)",
    "as attempt 1, with n = 3f+1 and quorums of 2f+1; a client waits for 2f+1 replies",
    patches=outcome_at_three_f_plus_one,
    attested=False,
    outcomes=True,
    members="3f+1",
)
UNORDERED = System(
    "unordered",
    "Attempt 2: every message logged, order not insisted upon",
    "a reader waits for a gap in a log for 150 ms only, and then reads on behind it",
    patches=order_not_insisted_upon,
    in_order=False,
)
CLONED = System(
    "cloned",
    "Ours with a cloned trusted log",
    "nothing in the rules: the assumption is broken, the faulty replica owns its trusted log twice",
    cloned=True,
)
ROLLED_BACK = System(
    "rolled-back",
    "Ours with a software log that its host rolls back",
    "nothing in the rules: the faulty replica's host puts an old copy of its software log back, and hides that",
    cloned=True,
)
SYSTEMS = {s.name: s for s in (THREE_PHASE, TWO_PHASE, OUTCOME, OUTCOME_3F1, UNORDERED, CLONED, ROLLED_BACK)}
