"""What the faulty replica of a scenario does, in every system the same as far as the system lets it."""

from collections.abc import Collection
from typing import TYPE_CHECKING

from replica.core.batch import decode_batch, make_batch
from replica.core.entries import COMMIT, PRE_PREPARE, PREPARE, Commit, Prepare, PrePrepare
from replica.core.envelope import Envelope, Operations, Result, Status, encode_operations_reply
from replica.core.genesis import Ordering
from replica.core.layout import LayoutError
from replica.lab.recorder import Recorder
from replica.sim.lies import view_and_slot
from replica.sim.logs import StandInLog
from replica.sim.messages import GroupMessage, Reply
from replica.sim.strategies import Strategy

if TYPE_CHECKING:
    from replica.sim.faulty import FaultyReplica

# When the second client is told what it waits for.
REPLY_MS = 20


def send_reply(host: "FaultyReplica", proposal: PrePrepare) -> None:
    """Tell the client of a proposal's request that it was executed there; all that these clients do is put new keys."""
    for envelope in proposal.batch.envelopes:
        client = host.setting.clients.get(envelope.client)
        if client is not None and isinstance(envelope.content, Operations):
            results = [Result(Status.OK, proposal.slot, b"\0") for _ in envelope.content.operations]
            reply = encode_operations_reply(envelope.content.session, envelope.content.first, results)
            host.send(client, Reply(reply), "reply")


class Equivocate(Strategy):
    """As primary, proposes one client's request to some and another client's to the others, for the same slot.

    from_ms: when it begins; two requests must have come by then. second: who is shown the second proposal, the
    others are shown the first.
    replies: whether it also tells the second client that its request was executed.
    twice: whether it can say two things at one place, because its messages are attested by nothing, or its log is
    cloned. If not, it can only append one proposal after the other, and show each to some.
    """

    name = "equivocate"

    def __init__(self, from_ms: int, second: Collection[int], *, twice: bool, replies: bool = False) -> None:
        super().__init__()
        self._replies = replies
        self._from_ms, self._second, self._twice = from_ms, frozenset(second), twice
        self._requests: dict[bytes, Envelope] = {}
        self.is_done = False
        self.second: PrePrepare | None = None
        self._hidden: dict[int, frozenset[int]] = {}

    def on_request(self, raw: bytes) -> None:
        """See `Strategy`."""
        try:
            envelope = self.host.setting.decode(raw)
        except LayoutError:
            return
        if self.world.now >= self._from_ms and isinstance(envelope.content, Operations):
            self._requests.setdefault(envelope.client, envelope)

    def entries(self, payloads: list[bytes]) -> list[bytes]:
        """See `Strategy`."""
        if self.is_done or self.world.now < self._from_ms or payloads[0][0] != PRE_PREPARE:
            return payloads
        if len(self._requests) < 2:
            return []  # not before it has two to choose from
        view, slot = view_and_slot(payloads[0])
        ordered = [self._requests[client] for client in self.host.setting.clients if client in self._requests]
        first, second = (self._proposal(view, slot, envelope) for envelope in ordered[:2])
        self.is_done = True
        self.did()
        if self._twice:
            self._say_twice(second)
            return first
        self._say_in_turn(first, second)
        return []

    def _proposal(self, view: int, slot: int, envelope: Envelope) -> list[bytes]:
        proposal = self.second = PrePrepare(view, slot, make_batch(1, (), (envelope,)))
        said = [proposal.encode()]
        if self.host.setting.genesis.ordering is Ordering.THREE_PHASE:
            # Nobody can tell that it has not seen a quorum yet.
            said.append(Commit(view, slot, proposal.batch.digest).encode())
        return said

    def _say_twice(self, second: list[bytes]) -> None:
        host = self.host
        if not isinstance(host.log, StandInLog):
            raise TypeError("only a stand-in can be cloned")
        raw = host.log.clone().append(tuple(second))
        _say_besides(host, raw, self._second)
        if self._replies and self.second is not None:
            proposal = self.second
            host.world.after(REPLY_MS, lambda: send_reply(host, proposal))

    def _say_in_turn(self, first: list[bytes], second: list[bytes]) -> None:
        host = self.host
        others = frozenset(peer for peer in host.peers if peer not in self._second)
        host.world.after(1, lambda: self._append(first, self._second))
        host.world.after(2, lambda: self._append(second, others))

    def _append(self, payloads: list[bytes], hidden_from: frozenset[int]) -> None:
        self._hidden[self.host.log.last + 1] = hidden_from
        self.host.say(payloads)

    def holds(self, to: int, message: object) -> int | None:
        """See `Strategy`: who is shown the second proposal is shown nothing of the first, and the other way round."""
        host = self.host
        if not self.is_done or not isinstance(message, GroupMessage) or message.log != host.number:
            return 0
        group = host.setting.verifier.group(message.log, message.raw)
        if group is None:
            return 0
        if self._twice:
            return None if to in self._second else 0
        return None if to in self._hidden.get(group.first, ()) else 0


def _say_besides(host: "FaultyReplica", raw: bytes, to: Collection[int]) -> None:
    """Show some what contradicts the own log, and the recorder too."""
    group = host.setting.verifier.group(host.number, raw)
    if group is not None and isinstance(host.setting.audience, Recorder):
        host.setting.audience.appended(group, copy=1)
    for peer in sorted(to):
        host.push(peer, host.number, raw)


class Collude(Strategy):
    """Votes for both proposals of an equivocating primary: for the first one openly, for the second one to its victim.

    Its messages are attested by nothing, so it can. It also sends the second client the reply that it wants to see.
    """

    name = "collude"

    def __init__(self, primary: Equivocate, victim: int) -> None:
        super().__init__()
        self._primary, self._victim, self._is_done = primary, victim, False

    def entries(self, payloads: list[bytes]) -> list[bytes]:
        """See `Strategy`."""
        second = self._primary.second
        if second is not None and not self._is_done and payloads[0][0] == PREPARE:
            host, view, slot = self.host, second.view, second.slot
            votes = tuple(kind(view, slot, second.batch.digest).encode() for kind in (Prepare, Commit))
            if isinstance(host.log, StandInLog) and view_and_slot(payloads[0]) == (view, slot):
                self._is_done = True
                self.did()
                _say_besides(host, host.log.clone().append(votes), (self._victim,))
                host.world.after(REPLY_MS, self._reply)
        return payloads

    def _reply(self) -> None:
        if self._primary.second is not None:
            send_reply(self.host, self._primary.second)

    def holds(self, to: int, message: object) -> int | None:
        """See `Strategy`."""
        is_own = isinstance(message, GroupMessage) and message.log == self.host.number
        return None if self._is_done and is_own and to == self._victim else 0


class Mute(Strategy):
    """Answers no client."""

    name = "mute"

    def instead(self, to: int, message: object) -> object:  # noqa: ARG002
        """See `Strategy`."""
        return None if isinstance(message, Reply) else message


class SkipVotes(Strategy):
    """Hides from one replica that it voted for a slot, and as the next primary proposes something else there.

    A log that is read in order cannot do that: whoever lacks the vote reads nothing that comes after it.
    """

    name = "skip-votes"

    def __init__(self, from_ms: int, victim: int) -> None:
        super().__init__()
        self._from_ms, self._victim = from_ms, victim
        self.slot: int | None = None

    def entries(self, payloads: list[bytes]) -> list[bytes]:
        """See `Strategy`."""
        said: list[bytes] = []
        for payload in payloads:
            kind = payload[0]
            if kind in {PREPARE, COMMIT} and view_and_slot(payload)[0] == 0 and self.world.now >= self._from_ms:
                self.slot = self.slot or view_and_slot(payload)[1]
            if kind == PRE_PREPARE and view_and_slot(payload)[0] == 1 and self.slot is not None:
                said += self._instead(payload)
            elif kind != COMMIT or view_and_slot(payload)[0] == 0:
                said.append(payload)
        return said

    def _instead(self, payload: bytes) -> list[bytes]:
        """Return a proposal of the same batch for the slot of the hidden vote."""
        self.did()
        batch = decode_batch(payload[17:], self.host.setting.cluster_id, self.host.setting.genesis.limits)
        slot = self.slot or 0
        said = [payload[:9] + slot.to_bytes(8, "big") + payload[17:]]
        if self.host.setting.genesis.ordering is Ordering.THREE_PHASE:
            # COMMITs are said in turn, from the first slot that the view carries.
            proposed = self.host.puppet.knowledge.slots.proposed
            before = [(at, proposed(0, at)) for at in range(1, slot)]
            said += [Commit(1, at, digest).encode() for at, digest in before if digest is not None]
            said.append(Commit(1, slot, batch.digest).encode())
        return said

    def holds(self, to: int, message: object) -> int | None:
        """See `Strategy`."""
        if self.slot is None or to != self._victim or not isinstance(message, GroupMessage):
            return 0
        group = self.host.setting.verifier.group(message.log, message.raw)
        if group is None or group.author != self.host.number:
            return 0
        return None if any(self._is_vote(payload) for payload in group.payloads) else 0

    def _is_vote(self, payload: bytes) -> bool:
        return payload[0] in {PREPARE, COMMIT} and view_and_slot(payload) == (0, self.slot)
