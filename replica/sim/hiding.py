"""A view that is hidden until the next one is open: what was said in it lies inside later cuts, ahead of them."""

from replica.core.entries import NEW_VIEW, NewView, Reference
from replica.core.quorum import primary
from replica.sim.messages import GroupMessage
from replica.sim.strategies import Strategy

# Of so many ticks, one begins to hide the view.
BEGINS_ONCE_IN = 15


class HiddenView(Strategy):
    """Hides, with the rest of the cabal, all that they say in a view of their own, until the next view is open.

    Meanwhile they propose and vote on, ahead of everybody. When the next primary is theirs too, it opens its view with
    the departures of the others only, so that nothing of that is carried. Then all is shown: votes for slots to come
    lie inside the next cut, and the batches that they name are in flight there.

    At times the pet is shown everything, and votes as well: then slots can be decided that the next view must carry.
    alone: never that.
    """

    name = "hidden-view"

    def __init__(self, argument: str = "") -> None:
        self._is_alone = argument == "alone"

    def on_tick(self) -> None:
        """See `Strategy`."""
        cabal, states = self.host.cabal, self.host.puppet.knowledge.states
        if cabal.hidden is None:
            view = self.host.puppet.own.view
            proposer = primary(view, len(states))
            # Not before there is something to do.
            is_busy = self.host.puppet.own.last_checkpoint > 0
            is_open = is_busy and proposer == self.host.number and view in states[proposer].opened
            if is_open and not self.chance.randrange(BEGINS_ONCE_IN):
                self.did()
                cabal.hidden = view
                cabal.confides = not self._is_alone and self.chance.random() < 0.5
                if cabal.confides:
                    self.host.count(f"{self.name}-to-pet")
                cabal.shown = {member.number: member.library.last(member.number) for member in cabal.members}
        elif any(view > cabal.hidden for state in states for view in state.opened):
            self._show()

    def _show(self) -> None:
        cabal = self.host.cabal
        cabal.hidden = None
        for member in cabal.members:
            for group in member.library.since(member.number, cabal.shown.get(member.number, 0) + 1, 64):
                for peer in member.peers:
                    member.push(peer, member.number, group.raw)

    def holds(self, to: int, message: object) -> int | None:
        """See `Strategy`."""
        cabal = self.host.cabal
        if cabal.hidden is None or not isinstance(message, GroupMessage) or message.log not in cabal.shown:
            return 0
        if cabal.confides and to == cabal.pet:
            return 0
        shown = cabal.shown[message.log]
        hidden = self.host.library.since(message.log, shown + 1, 64)
        return None if any(group.raw == message.raw for group in hidden) else 0

    def entries(self, payloads: list[bytes]) -> list[bytes]:
        """See `Strategy`."""
        hidden = self.host.cabal.hidden
        for place, payload in enumerate(payloads):
            if hidden is not None and payload[0] == NEW_VIEW and _view(payload) > hidden:
                opening = self._open(_view(payload))
                return [*payloads[:place], *([opening] if opening else [])]
        return payloads

    def _open(self, view: int) -> bytes:
        """Return a NEW-VIEW that names none of the cabal; b"" if it is too early for that."""
        members = {member.number for member in self.host.cabal.members}
        states = self.host.puppet.knowledge.states
        others = [s for s in states if s.author not in members and view in s.view_change_at]
        quorum = self.host.genesis.quorum
        if len(others) < quorum:
            return b""
        # Nothing of what waits is carried, so all of it is to be proposed.
        self.host.puppet.knowledge.requests.begin_view(())
        return NewView(view, tuple(Reference(s.author, s.view_change_at[view].index) for s in others[:quorum])).encode()


def _view(payload: bytes) -> int:
    return int.from_bytes(payload[1:9], "big")
