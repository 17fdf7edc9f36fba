"""An executor with a policy of who may be a client, and an operator who changes it."""

from __future__ import annotations

from dataclasses import replace

from replica.application import Right
from replica.apps.kv import KeyValue
from replica.core.envelope import (
    Administer,
    AdministerReply,
    Envelope,
    OpenReply,
    Status,
    decode_envelope,
    decode_reply,
    encode_administer,
)
from replica.core.execution import Executor
from replica.core.layout import U64_MAX
from replica.core.state import BucketedMap
from tests.replica.core.harness import GOOD_SIGNATURE, FakeClient, make_genesis, public_key
from tests.replica.core.test_execution import World

OPERATOR = public_key(200)
G = replace(make_genesis(), operators=(OPERATOR,))
READ, WRITE, BOTH = Right.READ, Right.WRITE, Right.READ | Right.WRITE


class Policed(World):
    """Executor, clients with open sessions, and an operator."""

    def __init__(self, application: object | None = None, clients: int = 2) -> None:
        super().__init__(application, G, clients)

    def envelope(self, command, by: bytes = OPERATOR, void_after: int = U64_MAX) -> Envelope:
        raw = command if isinstance(command, bytes) else command.encode()
        signed = encode_administer(G.cluster_id(), by, Administer(void_after, raw))
        return decode_envelope(signed + GOOD_SIGNATURE, G.cluster_id(), G.limits)

    def command(self, command, **options) -> AdministerReply:
        reply = decode_reply(self.run(self.envelope(command, **options))[0], G.limits)
        assert isinstance(reply, AdministerReply)
        return reply

    def done(self, *commands) -> None:
        for command in commands:
            reply = self.command(command)
            assert reply.status is Status.OK, reply.text

    def statuses(self, client: FakeClient, *operations: bytes) -> list[Status]:
        return [result.status for result in self.results(client.operations(*operations))]

    def opening(self, client: FakeClient, nonce: int) -> Status:
        raw = self.run(client.open(bytes([nonce]) * 16, void_after=self.executor.slot + 8))[0]
        reply = decode_reply(raw, G.limits)
        assert isinstance(reply, OpenReply)
        return reply.status

    def reopen(self, client: FakeClient, nonce: int) -> None:
        reply = decode_reply(self.run(client.open(bytes([nonce]) * 16, self.executor.slot + 8))[0], G.limits)
        assert isinstance(reply, OpenReply)
        assert reply.status is Status.OK
        client.session, client.next = reply.session, 1

    def restored(self) -> Executor:
        executor = self.executor
        executor.roots()
        maps = [BucketedMap(sorted(content.scan())) for content in (executor.state, executor.table.records)]
        return Executor.restored(KeyValue(), G, executor.slot, executor.time_ms, *maps)
