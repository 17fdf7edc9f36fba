"""Commands about clients among whatever else comes, in any order: restored anywhere, ordered or not, all goes on alike."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from replica.apps import kv
from replica.core.clients import Allow, Mode, Permission, Revoke, SetMode
from replica.core.envelope import Envelope, Open, OpenReply, Status, decode_reply
from tests.replica.core.policed import BOTH, OPERATOR, READ, G, Policed
from tests.replica.core.support import examples

who = st.integers(0, 2)
commands = st.one_of(
    st.tuples(st.just("mode"), st.sampled_from(Mode)),
    st.tuples(st.just("allow"), who, st.sampled_from([(), (Permission(READ, b"a"),), (Permission(BOTH, b"b"),)])),
    st.tuples(st.just("revoke"), who),
)
acts = st.one_of(
    st.tuples(st.just("open"), who, st.integers(0, 5)),
    st.tuples(st.just("ask"), who, st.integers(1, 6), st.sampled_from([b"a", b"b"]), st.booleans()),
    # Of the next number or another one; by the operator or somebody else.
    st.tuples(
        st.just("command"), commands, st.sampled_from([1, 1, 1, 1, 0, 2]), st.sampled_from([True, True, True, False])
    ),
    st.tuples(st.just("again"), st.integers(0, 30)),
)


class Course:
    """Makes envelopes of drawn acts; sessions are those that were opened last."""

    def __init__(self) -> None:
        self.w = Policed(clients=3)
        self.sent: list[Envelope] = []
        self.number = 0  # of the next batch's first command

    def envelope(self, act: tuple) -> Envelope:
        made = self._made(*act)
        self.sent.append(made)
        return made

    def _made(self, kind: str, *rest) -> Envelope:
        if kind == "again":
            return self.sent[rest[0] % len(self.sent)] if self.sent else self.w.client.operations(kv.get(b"a"), first=1)
        if kind == "command":
            (what, *about), ahead, by_operator = rest
            number = self.number + ahead
            self.number += ahead == 1
            made = {"mode": SetMode, "allow": self._allow, "revoke": self._revoke}[what](number, *about)
            return self.w.envelope(made, by=OPERATOR if by_operator else self.w.client.key)
        client = self.w.clients[rest[0]]
        if kind == "open":
            return client.open(b"%016d" % len(self.sent), self.w.executor.slot + rest[1])
        _, first, key, writes = rest
        return client.operations(kv.incr(key) if writes else kv.get(key), first=first)

    def _allow(self, number: int, who: int, permissions: tuple) -> Allow:
        return Allow(number, self.w.clients[who].key, f"{who}", permissions)

    def _revoke(self, number: int, who: int) -> Revoke:
        return Revoke(number, self.w.clients[who].key)

    def learn(self, replies: list[bytes]) -> None:
        """Go on in the sessions that were opened."""
        for envelope, raw in zip(self.sent[-len(replies) :], replies, strict=True):
            reply = decode_reply(raw, G.limits)
            for client in self.w.clients:
                if isinstance(reply, OpenReply) and reply.status is Status.OK and client.key == envelope.client:
                    client.session = reply.session


@given(st.lists(st.lists(acts, min_size=1, max_size=4), min_size=2, max_size=12), st.integers(0, 10))
@examples(150)
def test_it_goes_on_alike_from_anywhere_and_answers_alike_ordered_or_not(batches: list, restored_at: int):
    course = Course()
    w, twin = course.w, None
    for number, batch in enumerate(batches):
        course.number = w.executor.clients.number
        envelopes = [course.envelope(act) for act in batch]
        known = w.executor.known_reply(envelopes[0])
        root = w.executor.table.root(), w.executor.state.root()
        if known is not None:
            probe = w.restored()
            (executed,) = probe.execute(probe.slot + 1, w.batch(envelopes[0]))
            content = envelopes[0].content
            # In the next slot an opening may be void, and forgotten.
            if not isinstance(content, Open) or content.void_after > w.executor.slot:
                assert executed.raw == known, "what has nothing left to be executed is answered alike"
            assert probe.state.root() == root[1]
            assert probe.clients.number == w.executor.clients.number
        if number == restored_at:
            twin = w.restored()
        slot = w.executor.slot + 1
        executed = w.executor.execute(slot, w.batch(*envelopes))
        course.learn([one.raw for one in executed])
        for session in w.executor.table._sessions.values():
            assert w.executor.clients.is_allowed(session.client), "a key that is refused has no session"
        if twin is not None:
            assert twin.execute(slot, w.batch(*envelopes)) == executed
            assert twin.digest() == w.executor.digest()
