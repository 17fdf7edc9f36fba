"""Who may be a client: every refusal, what execution makes of it, and that it is restored."""

from __future__ import annotations

import struct

import pytest

from replica.application import Context
from replica.apps import kv
from replica.apps.kv import KeyValue
from replica.core import clients as module
from replica.core.clients import (
    KEYS_MAX,
    PAGE_BYTES_MAX,
    PERMISSIONS_MAX,
    PREFIX_BYTES_MAX,
    Allow,
    Clients,
    Listing,
    Mode,
    Permission,
    Revoke,
    SetMode,
    SetQuota,
    Show,
    decode_command,
    decode_listing,
    decode_page,
)
from replica.core.envelope import (
    Administer,
    Status,
)
from replica.core.execution import Executor
from replica.core.genesis import MIB, TEXT_SIZE_MAX
from replica.core.layout import U64_MAX, LayoutError
from replica.core.members import MEMBERS_TAG
from replica.core.quotas import NO_QUOTA, Quota
from replica.core.state import BucketedMap
from tests.replica.core.harness import public_key
from tests.replica.core.policed import BOTH, READ, G, Policed

EXAMPLES = [
    SetMode(1, Mode.LISTED),
    Allow(2, public_key(1), "Ödön", (Permission(READ, b"a/"), Permission(BOTH, b""))),
    Allow(U64_MAX, public_key(1)),
    Revoke(3, public_key(2)),
    Show(bytes(16)),
    Show(b"n" * 16, public_key(3)),
    SetQuota(4, b"", Quota(1, 2, 3)),
    SetQuota(5, public_key(1), NO_QUOTA),
]


class Plain:
    """An application that does not say which keys it uses."""

    def apply(self, operation: bytes, context: Context) -> bytes:
        return operation


# Layouts


@pytest.mark.parametrize("command", EXAMPLES)
def test_commands_are_decoded_strictly(command):
    raw = command.encode()
    assert decode_command(raw) == command
    for size in range(len(raw)):
        with pytest.raises(LayoutError):
            decode_command(raw[:size])
    with pytest.raises(LayoutError):
        decode_command(raw + b"\0")


def head(kind: int, number: int = 1, tag: bytes = b"trustlog/clients", version: int = 1) -> bytes:
    return struct.pack(">16sBBQ", tag, version, kind, number)


def allow(name: bytes = b"", permissions: list[tuple[int, bytes]] = [], count: int | None = None) -> bytes:  # noqa: B006
    parts = [struct.pack(">BH", right, len(prefix)) + prefix for right, prefix in permissions]
    number = len(parts) if count is None else count
    text = struct.pack(">H", len(name)) + name
    return head(2) + public_key(1) + text + struct.pack(">H", number) + b"".join(parts)


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"", "wanted"),
        (head(1, tag=b"trustlog/members") + b"\0", "version"),
        (head(1, version=2) + b"\0", "version"),
        (head(1) + b"\2", "unknown mode 2"),
        (head(0), "unknown kind of command 0"),
        (head(6), "unknown kind of command 6"),
        (head(4, number=1) + bytes(18), "unknown kind of command 4"),
        (head(4, number=0) + bytes(16) + b"\0\1x", "a key has 65 bytes"),
        (allow(name=b"\xff"), "not UTF-8"),
        (allow(name=b"x" * (TEXT_SIZE_MAX + 1)), "the limit is 200"),
        (allow(permissions=[(0, b"a")]), "unknown rights 0"),
        (allow(permissions=[(4, b"a")]), "unknown rights 4"),
        (allow(permissions=[(1, b"a"), (2, b"a")]), "named twice"),
        (allow(permissions=[(1, b"x" * (PREFIX_BYTES_MAX + 1))]), "the limit is 256"),
        (allow(permissions=[(1, b"%d" % i) for i in range(PERMISSIONS_MAX + 1)]), "17 permissions"),
        (allow(count=65535), "65535 permissions"),
        (head(5) + b"\0\1x" + bytes(12), "a key has 65 bytes"),
        (head(5) + bytes(2) + Quota(257).encode(), "257 envelopes, the limit is 256"),
        (head(5) + bytes(2) + Quota(0, 16 * MIB + 1).encode(), "bytes, the limit is 16777216"),
        (head(5) + bytes(2) + Quota(0, 0, 1_000_001).encode(), "per second, the limit is 1000000"),
    ],
)
def test_what_is_no_command_is_an_error_that_says_why(raw: bytes, why: str):
    with pytest.raises(LayoutError, match=why):
        decode_command(raw)
    records = BucketedMap()
    reply = Clients(records, by_prefix=True).execute(Administer(U64_MAX, raw), 5)
    assert reply.status is Status.ERROR
    assert why in reply.text
    assert not list(records.scan())


def test_the_largest_that_is_allowed():
    made = Allow(
        1,
        public_key(1),
        "x" * TEXT_SIZE_MAX,
        tuple(Permission(READ, b"%03d" % i + b"x" * (PREFIX_BYTES_MAX - 3)) for i in range(PERMISSIONS_MAX)),
    )
    assert decode_command(made.encode()) == made
    assert len(Listing(1, 1, False, made.name, made.permissions).encode()) + 65 + 2 + 12 < PAGE_BYTES_MAX


@pytest.mark.parametrize("state", [0, 3])
def test_a_record_that_is_neither_allowed_nor_revoked(state: int):
    raw = struct.pack(">QQB", 1, 1, state) + bytes(4)
    with pytest.raises(LayoutError, match="allowed or revoked"):
        decode_listing(raw)


# Commands


def test_who_is_no_operator_changes_nothing_and_has_nothing_ordered():
    w = Policed()
    before = w.executor.table.root()
    for command in (SetMode(1, Mode.LISTED), MEMBERS_TAG, b"anything"):
        envelope = w.envelope(command, by=w.client.key)
        known = w.executor.known_reply(envelope)
        assert known is not None, "answered at once"
        reply = w.command(command, by=w.client.key)
        assert w.run(envelope) == [known], "in the same bytes as when it is executed"
        assert (reply.status, reply.slot) == (Status.ERROR, 0)
        assert "no operator's" in reply.text
    assert w.executor.table.root() == before
    assert w.executor.clients.mode is Mode.OPEN


def test_the_next_number_only():
    w = Policed()
    for number in (0, 2, U64_MAX):
        reply = w.command(SetMode(number, Mode.LISTED))
        assert reply.status is Status.ERROR
        assert reply.text == f"command {number} of clients is given, the next one is 1"
    w.done(SetMode(1, Mode.LISTED), Revoke(2, public_key(1)))
    assert "the next one is 3" in w.command(SetMode(2, Mode.OPEN)).text
    assert w.executor.clients.mode is Mode.LISTED


def test_a_command_whose_time_is_over():
    w = Policed()
    reply = w.command(SetMode(1, Mode.LISTED), void_after=w.executor.slot)
    assert (reply.status, reply.text) == (Status.VOID, "its time is over")
    assert w.executor.clients.number == 0
    assert w.command(SetMode(1, Mode.LISTED), void_after=w.executor.slot + 1).status is Status.OK


@pytest.mark.parametrize(
    "command",
    [
        SetMode(1, Mode.LISTED),
        Allow(1, public_key(5), "x"),
        Revoke(1, public_key(5)),
        SetQuota(1, b"", Quota(1)),
        SetQuota(1, b"", NO_QUOTA),
    ],
)
def test_what_is_in_force_is_answered_again_in_the_same_bytes(command):
    w = Policed()
    envelope = w.envelope(command)
    assert w.executor.known_reply(envelope) is None
    first = w.run(envelope)[0]
    assert w.executor.known_reply(envelope) == first
    w.done(Allow(2, public_key(6)))
    root = w.executor.table.root()
    assert w.run(envelope)[0] == first
    assert w.executor.known_reply(envelope) == first
    assert w.executor.table.root() == root
    # The same number with another content is something else.
    other = SetMode(1, Mode.OPEN) if isinstance(command, SetMode) else Allow(1, public_key(5), "y")
    assert w.command(other).status is Status.ERROR


def test_the_first_command_is_not_known_before_it_came():
    """A cluster without commands is in mode open and has no quota, which no command has set."""
    w = Policed()
    for command in (SetMode(0, Mode.OPEN), SetQuota(0, b"", NO_QUOTA)):
        assert w.executor.known_reply(w.envelope(command)) is None
        assert w.command(command).status is Status.ERROR


def test_a_captured_command_does_nothing_when_it_comes_again():
    w = Policed()
    client = w.client
    captured = Allow(1, client.key, "shop")
    w.done(captured, Revoke(2, client.key))
    root = w.executor.table.root()
    assert w.executor.known_reply(w.envelope(captured)) is None
    reply = w.command(captured)
    assert (reply.status, reply.text) == (Status.ERROR, "command 1 of clients is given, the next one is 3")
    assert w.executor.table.root() == root
    assert not w.executor.clients.is_allowed(client.key)


def test_a_key_has_its_own_quota_or_the_default():
    w = Policed()
    mine, other = (client.key for client in w.clients)
    quota_of = w.executor.clients.quota_of
    assert quota_of(mine) is NO_QUOTA
    assert "allow it first" in w.command(SetQuota(1, mine, Quota(1))).text
    before = w.executor.digest()
    w.done(SetQuota(1, b"", Quota(2)))
    assert w.executor.digest() != before
    w.done(Allow(2, mine), SetQuota(3, mine, Quota(0, 3)))
    assert (quota_of(mine), quota_of(other)) == (Quota(0, 3), Quota(2))
    w.done(Allow(4, mine, "again"))
    assert quota_of(mine) == Quota(0, 3), "what else is agreed about the key does not change it"
    w.done(SetQuota(5, mine, NO_QUOTA))
    assert quota_of(mine) == Quota(2)
    w.done(SetQuota(6, b"", NO_QUOTA))
    assert quota_of(mine) is NO_QUOTA
    command = w.envelope(SetQuota(7, b"", Quota(1)))
    w.done(SetQuota(7, b"", Quota(1)))
    assert w.executor.quota_of(command) is NO_QUOTA, "an operator's commands count for none"
    assert w.executor.quota_of(w.client.operations(b"x")) == Quota(1)


def test_two_quotas_are_two_states():
    digests = set()
    for command in (SetQuota(1, b"", Quota(1)), SetQuota(1, b"", Quota(2)), SetQuota(1, b"", Quota(1, 1))):
        w = Policed()
        w.done(command)
        digests.add(w.executor.digest())
    assert len(digests) == 3


def test_only_what_is_executed_anew_is_counted():
    w = Policed()
    client = w.client
    first = client.operations(kv.put(b"k", b"v"), kv.get(b"k"))
    w.run(first)
    assert w.executor.fresh == [2]
    w.executor.execute(w.executor.slot + 1, w.batch(first, client.operations(kv.get(b"k"))))
    assert w.executor.fresh == [0, 1]


def test_no_more_keys_than_there_is_room_for(monkeypatch):
    monkeypatch.setattr(module, "KEYS_MAX", 2)
    w = Policed()
    w.done(Allow(1, public_key(1)), Revoke(2, public_key(2)))
    for command in (Allow(3, public_key(3)), Revoke(3, public_key(3))):
        assert "no room for more" in w.command(command).text
    w.done(Revoke(3, public_key(1)), SetMode(4, Mode.LISTED))
    assert len(w.executor.clients) == 2
    assert KEYS_MAX == 8192


def test_prefixes_need_an_application_that_names_its_keys():
    w = Policed(Plain())
    reply = w.command(Allow(1, w.client.key, "", (Permission(READ, b"a"),)))
    assert reply.status is Status.ERROR
    assert "application does not say which keys" in reply.text
    w.done(Allow(1, w.client.key))
    assert w.statuses(w.client, b"anything") == [Status.OK]


def test_where_the_application_no_longer_names_its_keys_who_is_restricted_can_do_nothing():
    w = Policed()
    w.done(Allow(1, w.client.key, "", (Permission(BOTH, b""),)))
    assert w.statuses(w.client, kv.put(b"k", b"v")) == [Status.OK]
    w.executor._accesses = None
    assert w.statuses(w.client, kv.get(b"k")) == [Status.NOT_PERMITTED]


# Showing and restoring


def test_showing_page_by_page():
    w = Policed()
    wide = tuple(Permission(READ, bytes([i]) * PREFIX_BYTES_MAX) for i in range(PERMISSIONS_MAX))
    for number in range(1, 13):
        w.done(Allow(number, public_key(number), f"client {number}", wide))
    w.done(Revoke(13, public_key(3)), SetMode(14, Mode.LISTED))
    w.done(SetQuota(15, b"", Quota(7)), SetQuota(16, public_key(4), Quota(0, 8)), SetQuota(17, public_key(5), NO_QUOTA))
    found: list[tuple[bytes, Quota, Listing]] = []
    pages = 0
    more = True
    while more:
        root = w.executor.table.root()
        reply = w.command(Show(bytes(16), found[-1][0] if found else b""))
        assert w.executor.table.root() == root
        page = decode_page(reply.text)
        assert (page.number, page.mode, page.quota) == (17, Mode.LISTED, Quota(7))
        found += page.listings
        more = page.more
        pages += 1
    assert pages == 2
    assert [key for key, _, _ in found] == sorted(public_key(number) for number in range(1, 13))
    listed = {key: listing for key, _, listing in found}
    assert listed[public_key(3)] == Listing(13, 14, True, "client 3")
    assert listed[public_key(4)].permissions == wide
    assert [(key, quota) for key, quota, _ in found if quota != NO_QUOTA] == [(public_key(4), Quota(0, 8))]
    for bad in ("", "zz", reply.text[:-2], reply.text + "00"):
        with pytest.raises(LayoutError):
            decode_page(bad)


def test_what_is_restored_goes_on_alike():
    w = Policed()
    mine, other = w.clients
    before = w.envelope(SetMode(1, Mode.LISTED))
    w.run(before)
    w.done(Allow(2, mine.key, "m", (Permission(BOTH, b"a/"),)), Allow(3, other.key), Revoke(4, other.key))
    w.done(SetQuota(5, b"", Quota(9)), SetQuota(6, mine.key, Quota(0, 0, 5)))
    w.reopen(mine, 5)
    restored = w.restored()
    assert restored.digest() == w.executor.digest()
    assert restored.known_reply(before) == w.executor.known_reply(before) is not None
    batches = [
        w.batch(mine.operations(kv.put(b"a/1", b"x"), kv.put(b"b/1", b"x")), other.open(b"q" * 16, 20)),
        w.batch(w.envelope(Allow(3, other.key)), w.envelope(Allow(7, other.key)), other.open(b"r" * 16, 20)),
    ]
    for batch in batches:
        slot = w.executor.slot + 1
        assert restored.execute(slot, batch) == w.executor.execute(slot, batch)
        assert restored.digest() == w.executor.digest()
    assert restored.clients.is_allowed(other.key)
    assert [restored.clients.quota_of(client.key) for client in (mine, other)] == [Quota(0, 0, 5), Quota(9)]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (b"c", b""),
        (b"cp", b""),
        (b"cp", struct.pack(">QBQQ", 1, 2, 1, 1)),
        (b"ck", bytes(21)),
        (b"ck" + bytes(64), Listing(1, 1, False).encode()),
        (b"ck" + bytes(65), b""),
        (b"ck" + bytes(65), Listing(1, 1, False).encode() + b"\0"),
        (b"cq", bytes(27)),
        (b"cq", bytes(29)),
        (b"cq", bytes(16) + Quota(257).encode()),
        (b"cq" + bytes(64), bytes(28)),
        (b"cx" + bytes(65), Listing(1, 1, False).encode()),
    ],
)
def test_records_that_no_policy_has(key: bytes, value: bytes):
    with pytest.raises(LayoutError):
        Clients.restored(BucketedMap([(key, value)]), by_prefix=True)
    with pytest.raises(LayoutError):
        Executor.restored(KeyValue(), G, 1, 0, BucketedMap(), BucketedMap([(key, value)]))
