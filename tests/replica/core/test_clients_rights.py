"""What a policy of clients means for sessions, operations, reads and watches."""

from __future__ import annotations

import pytest

from replica.apps import kv, kv_groups
from replica.apps.kv import KeyValue
from replica.core.clients import (
    Allow,
    Mode,
    Permission,
    Revoke,
    SetMode,
)
from replica.core.envelope import (
    OperationsReply,
    Status,
    decode_reply,
)
from tests.replica.core.harness import FakeClient
from tests.replica.core.policed import BOTH, OPERATOR, READ, WRITE, G, Policed


def test_listed_mode_refuses_whoever_is_not_allowed_and_ends_their_sessions():
    w = Policed()
    mine, other = w.clients
    w.done(Allow(1, mine.key), SetMode(2, Mode.LISTED))
    assert w.statuses(mine, kv.put(b"k", b"v")) == [Status.OK]
    envelope = other.operations(kv.put(b"k", b"other"), kv.get(b"k"))
    assert [r.status for r in w.results(envelope)] == [Status.NOT_ALLOWED] * 2
    assert w.opening(other, 9) is Status.NOT_ALLOWED
    assert len(w.executor.table) == 1
    assert w.value(b"k") == b"v"
    # Whoever is let in later does not find there what was refused.
    w.done(SetMode(3, Mode.OPEN))
    assert [r.status for r in w.results(envelope)] == [Status.EXPIRED] * 2
    w.reopen(other, 10)
    assert w.statuses(other, kv.get(b"k")) == [Status.OK]


def test_what_is_refused_is_answered_at_once_in_the_bytes_of_its_execution():
    """No replica waits for it, and those that are not equally far answer alike."""
    w = Policed()
    client = w.client
    envelopes = [client.operations(kv.incr(b"n")), client.open(b"z" * 16, void_after=20)]
    assert [w.executor.known_reply(envelope) for envelope in envelopes] == [None, None]
    w.done(Revoke(1, client.key))
    known = [w.executor.known_reply(envelope) for envelope in envelopes]
    assert w.run(*envelopes) == known
    assert w.run(*envelopes) == known
    assert w.value(b"n") is None


def test_in_the_batch_of_its_revocation_a_key_is_refused_from_then_on():
    w = Policed()
    mine, other = w.clients
    before, after = mine.operations(kv.incr(b"n")), mine.operations(kv.incr(b"n"))
    replies = w.run(before, w.envelope(Revoke(1, mine.key)), after, other.operations(kv.incr(b"n")))
    decoded = [decode_reply(raw, G.limits) for raw in replies]
    assert [r.results[0].status for r in decoded if isinstance(r, OperationsReply)] == [
        Status.OK,
        Status.NOT_ALLOWED,
        Status.OK,
    ]
    assert w.value(b"n") == b"2"
    assert w.executor.clients_changed
    w.run()
    assert not w.executor.clients_changed


def test_a_revoked_key_that_is_allowed_again_begins_anew():
    w = Policed()
    client = w.client
    done = client.operations(kv.incr(b"n"))
    w.run(done)
    w.done(Revoke(1, client.key), Allow(2, client.key))
    assert [r.status for r in w.results(done)] == [Status.EXPIRED], "not executed a second time"
    w.reopen(client, 7)
    assert w.statuses(client, kv.incr(b"n")) == [Status.OK]
    assert w.value(b"n") == b"2"


def test_an_operator_whose_key_is_revoked_still_administers():
    w = Policed()
    w.done(Revoke(1, OPERATOR), SetMode(2, Mode.LISTED), Allow(3, w.client.key))
    assert w.executor.clients.is_allowed(w.client.key)
    assert not w.executor.clients.is_allowed(OPERATOR)


def restricted(*permissions: Permission) -> tuple[Policed, FakeClient, FakeClient]:
    w = Policed()
    mine, other = w.clients
    assert w.statuses(other, kv.put(b"a/1", b"5"), kv.put(b"b/1", b"6")) == [Status.OK] * 2
    w.done(Allow(1, mine.key, "", permissions))
    return w, mine, other


@pytest.mark.parametrize(
    ("operation", "read", "write"),
    [
        (kv.get(b"a/1"), True, False),
        (kv.scan(b"a/"), True, False),
        (kv_groups.get_many([b"a/1", b"a/2"]), True, False),
        (kv.put(b"a/1", b"x"), False, True),
        (kv.delete(b"a/1"), False, True),
        (kv.incr(b"a/1"), False, False),
        (kv_groups.group([kv.get(b"a/1"), kv.scan(b"a/")]), True, False),
        (kv_groups.group([kv.get(b"a/1"), kv.put(b"a/1", b"x")]), False, False),
    ],
)
def test_rights_are_read_and_write(operation: bytes, read: bool, write: bool):
    for rights, permitted in ((READ, read), (WRITE, write), (BOTH, True)):
        w, mine, _ = restricted(Permission(rights, b"a/"))
        root = w.executor.state.root()
        (result,) = w.results(mine.operations(operation))
        assert result.status is (Status.OK if permitted else Status.NOT_PERMITTED), (rights, result)
        if not permitted:
            assert result.value.startswith(b"this key may not ")
            assert w.executor.state.root() == root


@pytest.mark.parametrize(
    "operation",
    [
        kv.get(b"b/1"),
        kv.get(b"a"),
        kv.scan(b""),
        kv.scan(b"a"),
        kv.scan(b"b/"),
        kv_groups.size(),
        kv_groups.get_many([b"a/1", b"b/1"]),
        kv_groups.put_many([(b"a/2", b"x"), (b"b/2", b"x")]),
        kv_groups.group([kv.get(b"a/1"), kv.get(b"b/1")]),
        kv_groups.group([kv.put(b"a/1", b"x")], [(b"b/1", 1)]),
    ],
)
def test_what_one_key_may_not_the_operation_may_not(operation: bytes):
    w, mine, other = restricted(Permission(BOTH, b"a/"), Permission(READ, b"c"))
    root = w.executor.state.root()
    (result,) = w.results(mine.operations(operation))
    assert result.status is Status.NOT_PERMITTED
    assert w.executor.state.root() == root
    assert w.executor.peek(operation, mine.key).status is Status.NOT_PERMITTED
    assert w.statuses(other, operation)[0] is Status.OK


def test_a_refused_operation_is_kept_as_refused():
    """A replay after the permission came would otherwise execute what its client was told was not."""
    w, mine, _ = restricted(Permission(BOTH, b"a/"))
    envelope = mine.operations(kv.put(b"b/1", b"x"))
    first = w.run(envelope)
    w.done(Allow(2, mine.key))
    assert w.executor.known_reply(envelope) == first[0]
    assert w.run(envelope) == first
    assert w.value(b"b/1") == b"6"
    assert w.statuses(mine, kv.put(b"b/1", b"x")) == [Status.OK]


def test_malformed_operations_of_a_restricted_client_are_errors():
    w, mine, _ = restricted(Permission(BOTH, b"a/"))
    assert w.statuses(mine, b"", b"\xff\xff", b"\x63\x00\x01k") == [Status.ERROR] * 3
    # What comes behind it in a group was not looked at, so the group is refused as a whole.
    group = kv_groups.group([b"\x63\x00\x01k", kv.get(b"b/1")])
    assert w.statuses(mine, group) == [Status.ERROR]
    assert w.executor.peek(group, mine.key).status is Status.ERROR


class Careless(KeyValue):
    """An application that fails where it is asked for its keys."""

    def accesses(self, operation: bytes):
        return {b"raise": [(READ,)], b"none": None}.get(operation) or 1 // 0


def test_an_application_that_cannot_say_which_keys_executes_nothing():
    w = Policed(Careless())
    w.done(Allow(1, w.client.key, "", (Permission(BOTH, b""),)))
    results = w.results(w.client.operations(b"raise", b"none", kv.put(b"k", b"v")))
    assert [result.status for result in results] == [Status.ERROR] * 3
    assert results[2].value == b"operation failed: ZeroDivisionError"
    assert w.value(b"k") is None


def test_stale_reads_and_watches_respect_the_policy():
    w, mine, other = restricted(Permission(READ, b"a/"), Permission(WRITE, b"b/"))
    executor = w.executor
    assert executor.peek(kv.get(b"a/1"), mine.key).value == b"\x015"
    assert executor.peek(kv.get(b"b/1"), mine.key).status is Status.NOT_PERMITTED
    assert executor.peek(kv.get(b"b/1"), other.key).value == b"\x016"
    assert executor.may_watch(mine.key, b"a/")
    assert not executor.may_watch(mine.key, b"a")
    assert not executor.may_watch(mine.key, b"b/")
    assert executor.may_watch(other.key, b"")
    w.done(Revoke(2, mine.key))
    assert executor.peek(kv.get(b"a/1"), mine.key).status is Status.NOT_ALLOWED
    assert not executor.may_watch(mine.key, b"a/")
