"""Whether a replica is of use to clients now: in a view, connected to a quorum, and caught up.

Caught up means: what enough peers held two seconds ago or more, as they say it of themselves now and then, was read
here. Enough is f: with this replica they are a quorum, and f faulty peers that claim too much do not keep it unready.
An opinion, for probes and people; nothing that replicas agree on rests on it.
"""

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

from replica.core.heads import Heads

if TYPE_CHECKING:
    from replica.shell.node import Node


class Readiness:
    """One replica's judgement of itself."""

    def __init__(self, node: "Node") -> None:
        self._node = node
        # By peer, the last two that it said: the older one is old enough to have been read.
        self._heads: dict[int, deque[Heads]] = {}

    def heard(self, peer: int, heads: Heads) -> None:
        """Take in up to where a peer says that it holds every log."""
        self._heads.setdefault(peer, deque(maxlen=2)).append(heads)

    def problem(self) -> str | None:
        """Say why this replica is not ready; None if it is."""
        node, core = self._node, self._node.core
        others = core.genesis.f
        left_with = node.lists.left_with
        if left_with is not None:
            return (
                f"it is no member any more since list {left_with} of members; it serves those that are late, and may "
                "be stopped when all others work under that list (trustlog-replica member list)"
            )
        if node.why_mute is not None:
            return f"it may not speak: {node.why_mute}"
        if core.halted is not None:
            return f"halted: {core.halted}"
        if core.transfer is not None:
            return f"fetching the state after slot {core.transfer.slot}"
        if not core.is_open:
            return f"view {core.view} is not open"
        connected = [number for number, link in node.links.items() if link.is_up]
        if len(connected) < others:
            return f"{len(connected)} other replicas are connected, {others} are needed"
        level = sum(1 for number in connected if number in self._heads and not any(self._lacking(number)))
        if level < others:
            return f"caught up with {level} other replicas, {others} are needed"
        return None

    def _lacking(self, peer: int) -> Iterator[bool]:
        core = self._node.core
        return (
            log not in core.exposed and core.read(log) < index for log, (index, _) in enumerate(self._heads[peer][0])
        )
