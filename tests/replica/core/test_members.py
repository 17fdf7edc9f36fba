"""Lists of members: what may follow what, judged by what is agreed alone; and that a retired log never comes back."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest

from replica.apps.kv import KeyValue
from replica.cluster.identities import identity_of
from replica.core.batch import make_batch
from replica.core.envelope import (
    Administer,
    AdministerReply,
    Envelope,
    Status,
    decode_envelope,
    decode_reply,
    encode_administer,
)
from replica.core.execution import Executor
from replica.core.genesis import Genesis, Member
from replica.core.layout import LayoutError
from replica.core.members import LISTS_MAX, MemberList, RefusedError, Seat, check_change, decode_members
from replica.core.places import PLACE_BYTES_MAX, Place, decode_places
from replica.core.points import PRIME, is_point, squared_y
from replica.core.quorum import FAULTS_MAX
from replica.core.state import BucketedMap
from replica.sim.logs import stand_in_key
from tests.replica.core.harness import GOOD_SIGNATURE, make_genesis, public_key
from trustlog import VerificationError, VerifyingKey, in_memory

OPERATOR, STRANGER = public_key(200), public_key(201)
G = replace(make_genesis(), operators=(OPERATOR,))
NEW, OTHER = stand_in_key(50), stand_in_key(51)


def listed(genesis: Genesis, number: int = 1, **changed: Member) -> MemberList:
    """Return the list that follows, with other members in these places ("m2")."""
    members = [changed.get(f"m{i}", member) for i, member in enumerate(genesis.members)]
    members += [changed[f"m{i}"] for i in range(genesis.n, genesis.n + 2) if f"m{i}" in changed]
    return MemberList(number, 0, tuple(Seat(member, place(member.number)) for member in members), "why")


def place(number: int, **changed) -> bytes:
    return replace(Place(f"host-{number}", 7100, b"certificate %d" % number), **changed).encode()


def replaced(number: int = 2, key: bytes = NEW, since: int = 1) -> Member:
    return Member(number, 1, key, b"", since)


def envelope(command: bytes, key: bytes = OPERATOR, void_after: int = 1000) -> Envelope:
    raw = encode_administer(G.cluster_id(), key, Administer(void_after, command)) + GOOD_SIGNATURE
    return decode_envelope(raw, G.cluster_id(), G.limits)


class World:
    def __init__(self, genesis: Genesis = G) -> None:
        self.executor = Executor(KeyValue(), genesis)

    def order(self, wanted: MemberList | bytes, **options) -> AdministerReply:
        """Execute a command at the next slot."""
        command = wanted if isinstance(wanted, bytes) else wanted.encode()
        slot = self.executor.slot + 1
        (reply,) = self.executor.execute(slot, make_batch(0, (), [envelope(command, **options)]))
        said = decode_reply(reply.raw, G.limits)
        assert isinstance(said, AdministerReply)
        assert said.command == hashlib.sha256(command).digest()
        return said

    def go_on(self, slot: int) -> None:
        for next_slot in range(self.executor.slot + 1, slot + 1):
            self.executor.execute(next_slot, make_batch(0, (), []))


def test_a_list_is_in_force_a_window_after_it_was_executed():
    """K = 4, L = 8: executed at slot 2, it is in force after the first multiple of 4 at or above 10."""
    world = World()
    world.go_on(1)
    before = world.executor.digest()
    said = world.order(listed(G, m2=replaced()))
    assert (said.status, said.slot) == (Status.OK, 12)
    membership = world.executor.membership
    assert (membership.number, membership.ends, membership.digest) == (0, 12, b"")
    assert world.executor.digest() != before
    world.go_on(11)
    assert (membership.number, membership.genesis) == (0, G)
    world.go_on(12)
    assert (membership.number, membership.ends, membership.next) == (1, None, None)
    after = membership.genesis
    assert (after.list_number, after.base, after.members[2]) == (1, 12, replaced())
    assert after.cluster_id() == G.cluster_id()
    assert membership.current is not None
    assert membership.digest == hashlib.sha256(membership.current.encode()).digest()
    assert membership.current.reason == "why"


def test_one_change_at_a_time():
    world = World()
    assert world.order(listed(G, m2=replaced())).status is Status.OK
    other = world.order(listed(G, m1=replaced(1)))
    assert (other.status, "wait for it, or if nothing" in other.text) == (Status.ERROR, True)
    assert "repeat the command that made it" in other.text
    world.go_on(12)
    assert world.order(listed(G, m1=replaced(1))).text.startswith("list 1 of members is asked for, the next one is 2")
    genesis = world.executor.membership.genesis
    assert world.order(listed(genesis, 2, m1=replaced(1, OTHER, 2))).status is Status.OK


def test_the_same_command_again_is_answered_again_and_does_nothing():
    world = World()
    wanted = listed(G, m2=replaced())
    first = world.order(wanted)
    asked = world.executor.membership.next
    assert world.order(wanted) == first
    known = world.executor.known_reply(envelope(wanted.encode()))
    assert known is not None
    assert decode_reply(known, G.limits) == first
    assert world.executor.membership.next is asked
    world.go_on(12)
    assert world.order(wanted) == first


def test_who_is_no_operator_changes_nothing():
    world = World()
    said = world.order(listed(G, m2=replaced()), key=STRANGER)
    assert (said.status, said.text) == (Status.ERROR, "this key is no operator's of this cluster")
    assert world.executor.membership.next is None
    nobody = World(make_genesis())
    (reply,) = nobody.executor.execute(1, make_batch(0, (), [envelope(listed(G, m2=replaced()).encode())]))
    assert b"no operator" in reply.raw


def test_a_command_that_comes_too_late_does_nothing():
    world = World()
    world.go_on(4)
    assert world.order(listed(G, m2=replaced()), void_after=4).status is Status.VOID
    assert world.executor.membership.next is None
    assert world.order(listed(G, m2=replaced()), void_after=6).status is Status.OK


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"m1": replaced(1), "m2": replaced(2, OTHER)}, "1 logs stay, 2 must"),
        ({"m2": replaced(since=0)}, "comes in with list 1, not 0"),
        ({"m2": replaced(since=2)}, "comes in with list 1, not 2"),
        ({"m2": replaced(key=public_key(0))}, "two members have the same log key"),
        ({"m0": replaced(0, public_key(1)), "m1": replaced(1, public_key(0))}, "stays as it is"),
        ({"m1": replace(G.members[1], since=1)}, "stays as it is"),
        ({"m1": replace(G.members[1], log_kind=2)}, "stays as it is"),
        ({"m2": replaced(3)}, "f = 1 needs members 0 to 2"),
        ({"m3": replaced(3)}, "2f + 1"),
        ({"m2": replace(replaced(), log_kind=9)}, "is of kind 9"),
        ({"m2": replaced(key=public_key(50))}, "not a point of P-256"),
        ({"m2": Member(2, 3, NEW, b"\x10" + bytes(74), 1)}, "is in PCR 16"),
    ],
)
def test_what_may_not_follow(changed, why):
    world = World()
    said = world.order(listed(G, **changed))
    assert (said.status, why in said.text) == (Status.ERROR, True), said.text
    assert world.executor.membership.next is None


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (b"", "the place of replica 2"),
        (b"somewhere", "the place of replica 2"),
        (place(2) + b"\0", "too many"),
        (place(2)[:-1] + b"\2", "neither says"),
        (place(2, certificate=b""), "has no certificate"),
        (place(2, certificate=b"certificate 0"), "replicas 0 and 2 have one TLS certificate"),
        (place(2, host="host-1"), "replicas 1 and 2 have one address"),
        (place(2, host="HOST-1"), "replicas 1 and 2 have one address"),
        (place(2, host=""), "no host has that name"),
        (place(2, host="a..b"), "no host has that name"),
        (place(2, host="a" * 64), "no host has that name"),
        (place(2, host="a." * 127), "no host has that name"),
        (place(2, host="[a]"), "no host has that name"),
        (place(2, host="a b"), "no host has that name"),
        (place(2, port=0), "its port"),
        (place(2, port=65536), "its port"),
        (place(2).replace(b":7100", b":0710"), "its port"),
        (place(2).replace(b":7100", b":\xb2100"), "its port"),
    ],
)
def test_what_nobody_could_go_over_to_is_never_agreed(wrong, why):
    """Whatever is refused here would be found out after the last slot of the list, and stop every replica."""
    world = World()
    wanted = listed(G, m2=replaced())
    said = world.order(replace(wanted, seats=(*wanted.seats[:2], Seat(replaced(), wrong))))
    assert (said.status, why in said.text) == (Status.ERROR, True), said.text
    assert world.executor.membership.next is None


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "::1", "fe80::1%eth0", "a_b.example.", "a" * 63, ".".join(["a" * 61] * 4)]
)
def test_places_are_decoded_as_they_were_encoded(host):
    made = Place(host, 65535, b"\0" * 2000, enrolled=True)
    assert decode_places([made.encode()]) == (made,)


def point(x: int, y: int) -> bytes:
    return b"\x04" + x.to_bytes(32, "big") + y.to_bytes(32, "big")


def test_a_key_is_a_point_exactly_if_logs_can_be_verified_with_it():
    good = [in_memory().public_key for _ in range(8)] + [stand_in_key(number) for number in range(8)]
    # One point with a small x and one with a small y: the same numbers and p more are other bytes, and no key.
    small_y = 0xD7325D7646CD60D80A92738CEB345F844CFFAF35841022CAB176F692DE8DE1D7
    small = ((5, pow(squared_y(5), (PRIME + 1) // 4, PRIME)), (small_y, 5))
    good += [point(*at) for at in small]
    bad = [point(5 + PRIME, small[0][1]), point(small_y, 5 + PRIME)]
    bad += [public_key(3), good[0][:-1], good[0] + b"\0", b"\x03" + good[0][1:], good[0][:33] + good[1][33:]]
    for key in (*good, *bad):
        try:
            VerifyingKey.from_bytes(key)
        except VerificationError:
            assert not is_point(key)
        else:
            assert is_point(key)
    assert all(map(is_point, good))
    assert not any(map(is_point, bad))


def test_a_tpms_pins_are_accepted_exactly_if_logs_can_be_verified_with_them():
    for pcr in range(256):
        member = Member(2, 3, NEW, bytes([pcr]) + bytes(74), 1)
        accepted = World().order(listed(G, m2=member)).status is Status.OK
        try:
            identity_of(member)
        except VerificationError:
            assert not accepted
        else:
            assert accepted


def test_no_more_lists_than_their_links_can_be_kept():
    last = listed(replace(G, list_number=LISTS_MAX - 1, origin=G.cluster_id()), LISTS_MAX, m2=replaced(since=LISTS_MAX))
    check_change(G, last, {})
    with pytest.raises(RefusedError, match="no more can"):
        check_change(G, replace(last, number=LISTS_MAX + 1), {})


def test_two_more_and_two_less_at_the_most():
    five = replace(make_genesis(2), operators=(OPERATOR,))
    more = listed(G, m3=replaced(3), m4=replaced(4, OTHER))
    check_change(G, more, {})
    seats = listed(make_genesis(3)).seats[:7]
    with pytest.raises(RefusedError, match="at most two"):
        check_change(G, MemberList(1, 8, seats), {})
    check_change(five, MemberList(1, 8, listed(five).seats[:3]), {})
    with pytest.raises(RefusedError, match="at most two"):
        check_change(replace(make_genesis(3), operators=(OPERATOR,)), MemberList(1, 8, listed(five).seats[:3]), {})
    # From five to three, three of the five stay; a new one among three leaves two.
    seats = (*listed(five).seats[:2], Seat(replaced(2), place(2)))
    with pytest.raises(RefusedError, match="2 logs stay, 3 must"):
        check_change(five, MemberList(1, 8, seats), {})


def test_no_more_than_the_program_can_have_and_no_less_than_bear_a_fault():
    most = replace(make_genesis(FAULTS_MAX), operators=(OPERATOR,))
    assert most.n == 21
    check_change(replace(make_genesis(FAULTS_MAX - 1), operators=(OPERATOR,)), grown(FAULTS_MAX - 1), {})
    for before, made, count in ((most, grown(FAULTS_MAX), 23), (G, MemberList(1, 8, listed(G).seats[:1]), 1)):
        with pytest.raises(RefusedError, match=f"3 to 21, not {count}"):
            check_change(before, made, {})
    with pytest.raises(LayoutError, match="a list of 23 members"):
        decode_members(grown(FAULTS_MAX).encode())


def grown(f: int) -> MemberList:
    """Return the list with two more than 2f + 1."""
    n = 2 * f + 1
    return replace(listed(make_genesis(f), **{f"m{n}": replaced(n), f"m{n + 1}": replaced(n + 1, OTHER)}), after=8)


def test_a_log_that_went_cannot_come_back():
    world = World()
    assert world.order(listed(G, m2=replaced())).status is Status.OK
    world.go_on(12)
    genesis = world.executor.membership.genesis
    said = world.order(listed(genesis, 2, m2=replaced(key=public_key(2), since=2)))
    assert said.text == "the log of replica 2 went with list 1: it cannot come back"


def restored(world: World) -> Executor:
    before = world.executor
    before.roots()
    maps = (BucketedMap(before.state.scan()), BucketedMap(before.table.records.scan()))
    return Executor.restored(KeyValue(), G, before.slot, before.time_ms, *maps)


@pytest.mark.parametrize("slot", [2, 11, 12, 13])
def test_what_is_restored_goes_on_alike(slot):
    world = World()
    world.order(listed(G, m2=replaced()))
    world.go_on(slot)
    twin = World()
    twin.executor = restored(world)
    for one in (world, twin):
        one.go_on(14)
        one.order(listed(G, m2=replaced()))
        one.order(listed(one.executor.membership.genesis, 2, m2=replaced(key=public_key(2), since=2)))
    assert twin.executor.digest() == world.executor.digest()
    assert twin.executor.membership.genesis == world.executor.membership.genesis


def test_records_that_no_membership_has():
    world = World()
    world.order(listed(G, m2=replaced()))
    items = dict(world.executor.table.records.scan())
    for key, value in ((b"mz", b""), (b"mr" + bytes(64), bytes(8)), (b"mc", b"x"), (b"mp", b"")):
        with pytest.raises(LayoutError):
            Executor.restored(KeyValue(), G, 1, 0, BucketedMap(), BucketedMap(sorted({**items, key: value}.items())))


def test_lists_are_decoded_strictly():
    raw = listed(G, m2=replaced()).encode()
    assert decode_members(raw).encode() == raw
    for size in range(len(raw)):
        with pytest.raises(LayoutError):
            decode_members(raw[:size])
    with pytest.raises(LayoutError):
        decode_members(raw + b"\0")
    far = Seat(G.members[0], bytes(PLACE_BYTES_MAX + 1))
    with pytest.raises(LayoutError, match="a place of"):
        decode_members(MemberList(1, 0, (far,)).encode())
    with pytest.raises(LayoutError, match="a reason of"):
        decode_members(MemberList(1, 0, listed(G).seats, "x" * 201).encode())
    with pytest.raises(LayoutError, match="UTF-8"):
        decode_members(raw[:-3] + b"\xff\xff\xff")
    with pytest.raises(LayoutError, match="version"):
        decode_members(raw[:16] + b"\2" + raw[17:])


def test_a_command_of_rubbish_is_an_error_everywhere_and_changes_nothing():
    world = World()
    twin = World()
    twin.go_on(1)
    assert world.order(b"go on").status is Status.ERROR
    assert world.executor.digest() == twin.executor.digest()
