"""What a replica knows from the logs that it has read: durable, attested, in order. Nothing else is counted."""

from collections.abc import Callable
from dataclasses import dataclass, field

from replica.core.genesis import Genesis
from replica.core.logstate import LogState, founding_states, initial_states
from replica.core.requests import RequestQueue
from replica.core.results import ResultBook
from replica.core.slots import SlotBook
from replica.core.snapshot import Snapshot


@dataclass(slots=True)
class Knowledge:
    """The reader's side of a replica, which its pen looks at.

    own_digests: D of checkpoints executed here, by slot, from the stable one on.
    blind: logs that are read no further, because their authors broke a rule or their trusted part is broken.
    cut_lags: the present view's primary leaves the agreed cut too far behind. cut_offered: returns the cut that a
    proposal made now carries. ends: the last slot of this list of members, once that is known.
    """

    genesis: Genesis
    states: list[LogState]
    slots: SlotBook
    requests: RequestQueue
    results: ResultBook
    own_digests: dict[int, bytes] = field(default_factory=dict)
    blind: set[int] = field(default_factory=set)
    cut_lags: bool = False
    cut_offered: Callable[[], tuple[int, ...]] = tuple
    stable: int = 0
    executed: int = 0
    ends: int | None = None
    now_ms: int = 0
    wall_ms: int = 0


def beginning(genesis: Genesis) -> list[LogState]:
    """Return the reduced state of every log before its first entry.

    Under a later list what a log said before it joined is skipped, so it may be read from its first entry on.
    """
    if genesis.list_number:
        return founding_states([0] * genesis.n, genesis.base)
    return initial_states(genesis.n, genesis.base)


def initial_knowledge(genesis: Genesis) -> Knowledge:
    """Return what is known before anything was read."""
    return Knowledge(
        genesis,
        beginning(genesis),
        SlotBook(genesis.ordering, genesis.f),
        RequestQueue(genesis.limits, genesis.operators),
        ResultBook(genesis),
    )


def knowledge_from(genesis: Genesis, snapshot: Snapshot) -> Knowledge:
    """Return what is known to a replica that begins with a snapshot: as if it had read every log up to the cut."""
    slots = SlotBook(genesis.ordering, genesis.f)
    slots.resume(snapshot.states, snapshot.batches)
    states = [state.copy() for state in snapshot.states]
    slot = snapshot.header.slot
    queue = RequestQueue(genesis.limits, genesis.operators)
    # What this replica did not execute itself it has no results of.
    return Knowledge(genesis, states, slots, queue, ResultBook(genesis), stable=slot, executed=slot)
