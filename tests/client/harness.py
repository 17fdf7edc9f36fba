"""Drives the pure core in virtual time: keeps what it sends, and every ticket's outcome, of which there must be one."""

from client.core import ClientCore
from client.events import AskReports, Complete, Fail, Send, Settings, WakeAt
from replica.core.envelope import (
    Open,
    OpenReply,
    Operations,
    Result,
    SessionId,
    Status,
    decode_envelope,
    encode_open_reply,
    encode_operations_reply,
)
from replica.core.genesis import Genesis, Limits, Member, Ordering

KEY = b"\x04" + bytes(range(64))
SESSION = SessionId(7, 1)


def make_genesis(f=1, **limits) -> Genesis:
    members = tuple(Member(i, 1, bytes([4, i]) + bytes(63)) for i in range(2 * f + 1))
    return Genesis("test", bytes(32), f, Ordering.THREE_PHASE, "a:B", Limits(**limits), members)


class Harness:
    def __init__(self, f=1, settings=None, connect=True, **limits):
        self.genesis = make_genesis(f, **limits)
        self.cluster_id = self.genesis.cluster_id()
        self.signed = 0
        self.nonces = 0
        self.core = ClientCore(
            self.genesis,
            self.cluster_id,
            KEY,
            sign=self._sign,
            nonce=self._nonce,
            settings=settings or Settings(),
        )
        self.now = 1000
        self.wake = None
        self.sent: list[tuple[tuple[int, ...], bytes]] = []
        self.asked = 0
        self.outcomes: dict[object, object] = {}
        if connect:
            self.connect(*range(self.genesis.n))

    def _sign(self, signed):
        self.signed += 1
        return bytes(64)

    def _nonce(self):
        self.nonces += 1
        return self.nonces.to_bytes(16, "big")

    def take(self, effects):
        for effect in effects:
            if isinstance(effect, Send):
                assert effect.replicas
                assert set(effect.replicas) <= self.core.connected
                self.sent.append((effect.replicas, effect.envelope))
            elif isinstance(effect, Complete):
                assert len(effect.tickets) == len(effect.results)
                for ticket, result in zip(effect.tickets, effect.results, strict=True):
                    self._settle(ticket, result)
            elif isinstance(effect, Fail):
                for ticket in effect.tickets:
                    self._settle(ticket, effect.reason)
            elif isinstance(effect, WakeAt):
                self.wake = effect.at_ms
            elif isinstance(effect, AskReports):
                self.asked += 1
        self.core.check()

    def _settle(self, ticket, outcome):
        assert ticket not in self.outcomes, f"{ticket} has two outcomes"
        self.outcomes[ticket] = outcome

    def connect(self, *replicas, executed=0, view=0):
        for replica in replicas:
            self.take(self.core.on_connected(replica, executed, view))
        self.flush()

    def disconnect(self, *replicas):
        for replica in replicas:
            self.take(self.core.on_disconnected(replica))
        self.flush()

    def submit(self, *tickets, deadline=None, flush=True):
        """Submit an operation per ticket; the operation is the ticket's text."""
        for ticket in tickets:
            refusal = self.core.submit(ticket, str(ticket).encode(), deadline or self.now + 10_000)
            if refusal is not None:
                self._settle(ticket, refusal)
        if flush:
            self.flush()

    def flush(self):
        self.take(self.core.flush(self.now))

    def advance(self, ms):
        """Let time pass, waking the core whenever it wants to be woken."""
        end = self.now + ms
        while self.wake is not None and self.wake <= end:
            self.now, self.wake = max(self.now, self.wake), None
            self.take(self.core.tick(self.now))
        self.now = end

    def reply(self, replica, raw):
        self.take(self.core.on_reply(replica, raw))
        self.flush()

    def decoded(self):
        """What was sent and not looked at yet: (replicas, content) each; forgets it."""
        sent, self.sent = self.sent, []
        return [(replicas, self.decode(raw)) for replicas, raw in sent]

    def decode(self, raw):
        return decode_envelope(raw, self.cluster_id, self.genesis.limits).content

    def open(self, session=SESSION):
        """Answer the opening that was sent last, as f+1 replicas."""
        opening = [content for _, content in self.decoded() if isinstance(content, Open)][-1]
        for replica in range(self.genesis.quorum):
            self.reply(replica, open_reply(opening, session=session))

    def ready(self):
        """Open a session by an operation, answer it, and forget about it."""
        self.submit("first")
        self.open()
        ((_, envelope),) = self.decoded()
        for replica in range(self.genesis.quorum):
            self.reply(replica, reply_to(envelope))
        assert self.outcomes.pop("first").value == b"first"
        return self


def open_reply(opening, status=Status.OK, session=SESSION):
    return encode_open_reply(OpenReply(opening.nonce, status, session))


def reply_to(envelope: Operations, status=Status.OK, slot=9, prefix=b""):
    """A reply whose results are the operations themselves."""
    results = [Result(status, slot, prefix + operation) for operation in envelope.operations]
    return encode_operations_reply(envelope.session, envelope.first, results)


def only(items):
    (item,) = items
    return item
