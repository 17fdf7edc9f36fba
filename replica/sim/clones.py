"""Faulty replicas with two copies of one trusted log: what the whole design assumes away.

No strategy here is ever drawn; `replica.sim.controls` scripts them, to show that the assumption carries weight. Only
stand-ins can be cloned.
"""

from replica.core.batch import encode_batch
from replica.core.entries import PRE_PREPARE, Suspect, ViewChange
from replica.sim.lies import cut_of
from replica.sim.logs import StandInLog
from replica.sim.messages import GroupMessage
from replica.sim.strategies import Strategy


class ClonedLog(Strategy):
    """Owns two copies of one trusted log, against the assumption on which all rests.

    Says one thing with each: a wish to leave the view, and a departure. Every other peer is shown the first for a
    while, then the second; the rest only the second.
    """

    name = "cloned-log"

    def __init__(self, argument: str = "") -> None:
        self._at = int(argument or 1500)
        self._other = b""

    def on_tick(self) -> None:
        """See `Strategy`."""
        if self.world.now >= self._at and not self._other:
            self._fork()
        if self._is_secret():
            for peer in self.host.peers[::2]:
                self.host.push(peer, self.host.number, self._other)

    def holds(self, to: int, message: object) -> int | None:
        """See `Strategy`."""
        is_own = isinstance(message, GroupMessage) and message.log == self.host.number
        return None if is_own and self._is_secret() and to in self.host.peers[::2] else 0

    def _is_secret(self) -> bool:
        return bool(self._other) and self.world.now < self._at + 500

    def _fork(self) -> None:
        host = self.host
        view = host.puppet.own.view
        if not isinstance(host.log, StandInLog):
            return
        self._other = host.log.clone().append((Suspect(view).encode(),))
        if host.say([ViewChange(view + 1).encode()]):
            self.did()
            host.say([Suspect(view + 1).encode()])
        else:
            self._other = b""


class TwoHistories(Strategy):
    """Owns two copies of one trusted log; shows one history to some for ever, the other one to the rest.

    Nobody is shown both: only who compares heads with the others can notice.
    """

    name = "two-histories"

    def __init__(self, argument: str = "") -> None:
        self._at = int(argument or 200)
        self._shared = 0  # up to where both are one
        self._other = b""

    def on_tick(self) -> None:
        """See `Strategy`."""
        host = self.host
        if self.world.now >= self._at and not self._other and isinstance(host.log, StandInLog):
            self._shared = host.log.last
            self._other = host.log.clone().append((Suspect(host.puppet.own.view).encode(),))
            host.say([ViewChange(host.puppet.own.view + 1).encode()])
        if self._other:
            for peer in host.peers[::2]:
                host.push(peer, host.number, self._other)

    def holds(self, to: int, message: object) -> int | None:
        """See `Strategy`."""
        if not self._other or not isinstance(message, GroupMessage) or message.log != self.host.number:
            return 0
        hidden = self.host.library.since(self.host.number, self._shared + 1, 64)
        is_hidden = to in self.host.peers[::2] and any(group.raw == message.raw for group in hidden)
        return None if is_hidden else 0


class ClonedPrimary(Strategy):
    """Owns two copies of one trusted log; as primary it proposes another batch with each, to one half of its peers."""

    name = "cloned-primary"

    def __init__(self, argument: str = "") -> None:
        self._at = int(argument or 1500)
        self._is_done = False

    def entries(self, payloads: list[bytes]) -> list[bytes]:
        """See `Strategy`."""
        host, log = self.host, self.host.log
        first = payloads[0] if payloads else b""
        if self._is_done or self.world.now < self._at or first[:1] != bytes([PRE_PREPARE]):
            return payloads
        if isinstance(log, StandInLog):
            self._is_done = True
            self.did()
            other = log.clone().append((first[:17] + encode_batch(1, cut_of(first), ()),))
            for peer in host.peers[::2]:
                host.push(peer, host.number, other)
        return payloads

    def holds(self, to: int, message: object) -> int | None:
        """See `Strategy`: half of the peers are shown nothing more of the first copy."""
        is_shown = not isinstance(message, GroupMessage) or message.log != self.host.number
        return 0 if is_shown or not self._is_done or to not in self.host.peers[::2] else None
