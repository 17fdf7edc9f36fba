"""What a replica knows from the logs that it has read: durable, attested, in order. Nothing else is counted."""

from dataclasses import dataclass, field

from replica.core.genesis import Genesis
from replica.core.logstate import LogState, initial_states
from replica.core.requests import RequestQueue
from replica.core.slots import SlotBook


@dataclass(slots=True)
class Knowledge:
    """The reader's side of a replica, which its pen looks at.

    own_digests: D of checkpoints executed here, by slot, from the stable one on.
    blind: logs that are read no further, because their authors broke a rule or their trusted part is broken.
    """

    genesis: Genesis
    states: list[LogState]
    slots: SlotBook
    requests: RequestQueue
    own_digests: dict[int, bytes] = field(default_factory=dict)
    blind: set[int] = field(default_factory=set)
    stable: int = 0
    executed: int = 0
    now_ms: int = 0
    wall_ms: int = 0


def initial_knowledge(genesis: Genesis) -> Knowledge:
    """Return what is known before anything was read."""
    return Knowledge(
        genesis,
        initial_states(genesis.n),
        SlotBook(genesis.ordering, genesis.f),
        RequestQueue(genesis.limits),
    )
