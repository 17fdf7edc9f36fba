"""The application's version: in force from one slot on for all, judged by what is agreed, and kept with the state."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replica.application import VERSION_MAX, Context, Right
from replica.core.clients import Allow, Permission
from replica.core.envelope import Administer, AdministerReply, Status, decode_reply
from replica.core.execution import Executor
from replica.core.layout import U64_MAX, LayoutError
from replica.core.state import BucketedMap
from replica.core.versions import Versions, decode_activation, encode_activation
from tests.replica.core.policed import G, Policed
from tests.replica.core.support import examples


class Versioned:
    """Answers with the version in force, and writes it down."""

    version = 3

    def apply(self, operation: bytes, context: Context) -> bytes:
        said = b"%d" % context.version
        context.state.put(operation, said)
        return said

    def accesses(self, operation: bytes, version: int):
        """From version 2 on an operation needs its key's area only."""
        return [(Right.WRITE, operation if version >= 2 else b"")]


class Old(Versioned):
    version = 0


def versioned() -> Policed:
    return Policed(Versioned())


def restored(w: Policed, application: object) -> Executor:
    w.executor.roots()
    maps = [BucketedMap(sorted(content.scan())) for content in (w.executor.state, w.executor.table.records)]
    return Executor.restored(application, G, w.executor.slot, w.executor.time_ms, *maps)  # type: ignore[arg-type]


# The command


def head(version: int, tag: bytes = b"trustlog/version", layout: int = 1) -> bytes:
    return struct.pack(">16sBH", tag, layout, version)


def test_the_layout_of_a_command():
    assert encode_activation(258) == b"trustlog/version" + b"\1" + b"\1\2"
    assert decode_activation(head(258)) == 258
    assert decode_activation(encode_activation(VERSION_MAX)) == 65535


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (head(1)[:-1], "wanted"),
        (head(1) + b"\0", "too many"),
        (head(1, layout=2), "this program knows"),
        (head(1, tag=b"trustlog/clients"), "this program knows"),
        (head(0), "from 1 to 65535, not 0"),
    ],
)
def test_what_is_no_command_is_an_error_that_says_why(raw: bytes, why: str):
    with pytest.raises(LayoutError, match=why):
        decode_activation(raw)
    records = BucketedMap()
    versions = Versions(records)
    reply = versions.execute(Administer(U64_MAX, raw), 5)
    versions.end_slot()
    assert reply.status is Status.ERROR
    assert why in reply.text
    assert (versions.present, versions.after) == (0, 0)
    assert not list(records.scan())


# One slot, one version


def test_a_slot_is_executed_by_the_version_before_whatever_the_commands_place():
    w = versioned()
    before = w.client.operations(b"a")
    after = w.client.operations(b"b")
    w.run(before, w.envelope(encode_activation(1)), after)
    assert [w.value(key) for key in (b"a", b"b")] == [b"0", b"0"]
    assert w.executor.versions.after == w.executor.slot
    assert w.result(b"c").value == b"1"


def test_versions_may_be_left_out_and_none_goes_back():
    w = versioned()
    w.done(encode_activation(2))
    assert w.result(b"k").value == b"2"
    root = w.executor.table.root()
    reply = w.command(encode_activation(1))
    assert reply.status is Status.ERROR
    assert reply.text == "version 2 of the application is in force, and none goes back to version 1"
    assert w.executor.table.root() == root
    w.done(encode_activation(3))
    assert w.result(b"k").value == b"3"


def test_one_command_in_a_slot():
    w = versioned()
    first, again = w.envelope(encode_activation(1)), w.envelope(encode_activation(1), void_after=U64_MAX - 1)
    replies = w.run(first, w.envelope(encode_activation(2)), first, again)
    assert replies[0] == replies[2] == replies[3], "a faulty primary may propose an envelope twice"
    other = decode_reply(replies[1], G.limits)
    assert isinstance(other, AdministerReply)
    assert (other.status, other.text[:9]) == (Status.ERROR, "version 1")
    assert (w.executor.versions.present, w.executor.versions.after) == (1, w.executor.slot)
    assert w.executor.known_reply(first) == replies[0]
    assert w.command(encode_activation(2)).status is Status.OK


def test_what_is_in_force_is_answered_again_in_the_same_bytes():
    w = versioned()
    envelope = w.envelope(encode_activation(1))
    assert w.executor.known_reply(envelope) is None
    (first,) = w.run(envelope)
    assert w.executor.known_reply(envelope) == first
    w.result(b"k")
    root = w.executor.table.root()
    assert w.run(envelope) == [first]
    assert w.executor.table.root() == root
    w.done(encode_activation(3))
    assert w.executor.known_reply(envelope) is None
    assert w.command(encode_activation(1)).status is Status.ERROR, "captured, it does nothing"


def test_who_is_no_operator_and_what_comes_too_late():
    w = versioned()
    reply = w.command(encode_activation(1), by=w.client.key)
    assert reply.status is Status.ERROR
    assert "no operator's" in reply.text
    late = w.command(encode_activation(1), void_after=w.executor.slot)
    assert (late.status, late.text) == (Status.VOID, "its time is over")
    assert w.result(b"k").value == b"0"
    assert not list(w.executor.table.records.scan(b"v"))


def test_a_code_without_versions_does_not_notice():
    class Plain:
        def apply(self, operation: bytes, context: Context) -> bytes:
            return operation

    w = Policed(Plain())
    assert w.result(b"k").value == b"k"
    assert w.executor.knows_version == 0


# What is said out of order, and what is permitted


def test_reads_that_are_not_ordered_have_the_version_in_force():
    w = versioned()
    assert w.executor.peek(b"k", w.client.key).value == b"0"
    w.done(encode_activation(2))
    assert w.executor.peek(b"k", w.client.key).value == b"2"
    assert w.value(b"k") is None


def test_an_application_cannot_leave_another_version_behind():
    class Careless(Versioned):
        def apply(self, operation: bytes, context: Context) -> bytes:
            said = super().apply(operation, context)
            context.version = 7
            return said

    w = Policed(Careless())
    w.executor.peek(b"k", w.client.key)
    assert w.result(b"k").value == b"0"
    assert w.executor.peek(b"k", w.client.key).value == b"0"


def test_which_keys_are_used_is_asked_for_the_version_in_force():
    w = versioned()
    w.done(Allow(1, w.client.key, "", (Permission(Right.WRITE, b"a"),)))
    assert w.result(b"a1").status is Status.NOT_PERMITTED
    assert w.executor.peek(b"a1", w.client.key).status is Status.NOT_PERMITTED
    w.done(encode_activation(2))
    assert w.executor.peek(b"a1", w.client.key).status is Status.OK
    assert w.result(b"a1").status is Status.OK
    assert w.result(b"b1").status is Status.NOT_PERMITTED


# Code that is too old


def test_code_that_does_not_know_the_version_in_force_executes_nothing():
    w = Policed(Old())
    w.done(encode_activation(2))
    why = w.executor.outdated
    assert why is not None
    for part in (G.application, "version 2", f"after slot {w.executor.slot}", "no version above 0", "nothing is lost"):
        assert part in why
    digest = w.executor.digest()
    with pytest.raises(RuntimeError, match="too old"):
        w.run(w.client.operations(b"k"))
    asked = w.executor.peek(b"k", w.client.key)
    assert asked.status is Status.ERROR
    assert b"install the code" in asked.value
    assert w.executor.digest() == digest


def test_the_version_is_part_of_the_agreed_state():
    w, other = versioned(), versioned()
    w.done(encode_activation(1))
    other.run()
    assert w.executor.digest() != other.executor.digest()


def test_restored_it_is_as_it_was_and_old_code_says_that_it_is_too_old():
    w = versioned()
    w.done(encode_activation(2))
    new, old = restored(w, Versioned()), restored(w, Old())
    assert (new.versions.present, new.versions.after, new.outdated) == (2, w.executor.slot, None)
    assert old.outdated == w.executor.outdated or "no version above 0" in str(old.outdated)
    assert new.peek(b"k", w.client.key).value == b"2"
    batch = w.batch(w.client.operations(b"k"), w.envelope(encode_activation(3)))
    assert new.execute(new.slot + 1, batch) == w.executor.execute(w.executor.slot + 1, batch)
    assert new.digest() == w.executor.digest()


@pytest.mark.parametrize(("key", "value"), [(b"vx", bytes(10)), (b"vc", bytes(9)), (b"vcc", bytes(10)), (b"v", b"")])
def test_records_that_no_version_has(key: bytes, value: bytes):
    with pytest.raises(LayoutError, match="nothing about the application's version"):
        Versions.restored(BucketedMap([(key, value)]))


@given(st.lists(st.lists(st.integers(0, 3) | st.just("ask"), max_size=4), max_size=8), st.integers(0, 8))
@examples(100)
def test_in_any_course_it_only_grows_and_goes_on_alike_from_anywhere(slots: list, restored_at: int):
    w, twin = versioned(), None
    for number, acts in enumerate(slots):
        if number == restored_at:
            twin = restored(w, Versioned())
        before = w.executor.versions.present
        batch = w.batch(
            *(
                w.client.operations(b"%d" % place) if act == "ask" else w.envelope(encode_activation(act))
                for place, act in enumerate(acts)
            )
        )
        executed = w.executor.execute(w.executor.slot + 1, batch)
        wanted = [act for act in acts if act != "ask" and act > before]
        assert w.executor.versions.present == (wanted[0] if wanted else before)
        for place, act in enumerate(acts):
            if act == "ask":
                assert w.value(b"%d" % place) == b"%d" % before
        if twin is not None:
            assert twin.execute(twin.slot + 1, batch) == executed
            assert twin.digest() == w.executor.digest()
