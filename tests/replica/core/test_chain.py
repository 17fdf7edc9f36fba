"""The chain of member lists: a link proves the next list to whoever knows the one before, and nothing else does."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from replica.apps.kv import KeyValue
from replica.core.chain import LINK_BYTES_MAX, Link, Proven, check_link, decode_link, earlier_list, found, header_under
from replica.core.checkpoint import Header, encode_certificate
from replica.core.entries import Checkpoint
from replica.core.execution import Executor
from replica.core.genesis import Genesis
from replica.core.layout import LayoutError
from replica.core.logstate import LogState, Opening
from replica.core.members import MemberList, Seat
from replica.core.proof import prove
from replica.core.snapshot import Snapshot
from tests.replica.core.signed import SignedCluster, SignedLog
from tests.replica.core.test_members import OPERATOR, World, listed, place, replaced

E = 12


class Ending:
    """A cluster whose list 0 ends with slot 12; replica 2 is replaced by a log with a key of its own."""

    def __init__(self, f: int = 1) -> None:
        self.cluster = SignedCluster(f)
        self.genesis: Genesis = replace(self.cluster.genesis, operators=(OPERATOR,))
        self.cluster.genesis, self.cluster.context = self.genesis, self.genesis.context()
        self.new = SignedLog(77)
        members = list(self.genesis.members)
        members[2] = replaced(2, self.new.public_key)
        self.members = MemberList(1, E, tuple(Seat(member, place(member.number)) for member in members))
        n = self.genesis.n
        cut, heads, logs = tuple(range(10, 10 + n)), (b"h" * 32,) * n, (b"l" * 32,) * n
        self.header = Header(E, 5, b"a" * 32, b"t" * 32, cut, heads, logs, 0, self.members.digest)

    def certificate(self, header: Header, *authors: int) -> bytes:
        entry = Checkpoint(header.slot, header.digest).encode()
        groups = {author: self.cluster.say(author, entry) for author in authors}
        return encode_certificate({author: prove(group, group.first) for author, group in groups.items()})

    def link(self, **changed) -> Link:
        header = replace(self.header, **changed)
        return Link(header.encode(), self.certificate(header, 0, 1), self.members.encode())

    def check(self, link: Link) -> Proven:
        return check_link(link, self.genesis, self.cluster.verify)


def test_a_link_proves_the_next_list():
    ending = Ending()
    proven = ending.check(decode_link(ending.link().encode()))
    assert (proven.header, proven.members) == (ending.header, ending.members)
    assert (proven.genesis.list_number, proven.genesis.base, proven.genesis.n) == (1, E, 3)
    assert proven.genesis.cluster_id() == ending.genesis.cluster_id()
    assert proven.genesis.members[2].log_public_key == ending.new.public_key


def test_headers_of_an_earlier_list_are_told_from_damage():
    ending = Ending()
    lists = (ending.genesis, ending.check(ending.link()).genesis)
    before = replace(ending.header, slot=E - 4, members=b"").encode()
    assert earlier_list(before, lists) == 0
    assert earlier_list(before, lists[:1]) is None, "it is of the present list"
    assert earlier_list(ending.header.encode(), lists) is None, "the present list begins with it"
    assert earlier_list(replace(ending.header, slot=E + 4, list_number=1).encode(), lists) is None
    assert earlier_list(replace(ending.header, list_number=7).encode(), lists) is None
    assert earlier_list(b"no header", lists) is None


def test_links_that_prove_nothing():
    ending = Ending()
    good = ending.link()
    other = replace(ending.members, seats=(*ending.members.seats[:2], Seat(replaced(2, b"\4" + b"x" * 64), place(2))))
    wrong = {
        "few": replace(good, certificate=ending.certificate(ending.header, 0)),
        "another list": replace(good, members=other.encode()),
        "another slot": ending.link(slot=E + 4),
        "said under another list": ending.link(list_number=1),
        "of another header": replace(good, header=replace(ending.header, time_ms=6).encode()),
        "no list named": ending.link(members=b""),
        "the same list again": ending.link(members=replace(ending.members, number=2).digest),
    }
    for name, link in wrong.items():
        with pytest.raises(LayoutError):
            pytest.fail(f"{name}: {ending.check(link)}")
    # By the new list's own log, which is no log of the list before.
    group = ending.new.say(ending.genesis.context(), Checkpoint(E, ending.header.digest).encode())
    mine = ending.cluster.say(0, group.payloads[0])
    proofs = {0: prove(mine, mine.first), 2: prove(group, group.first)}
    with pytest.raises(LayoutError, match="log 2 did not attest"):
        ending.check(replace(good, certificate=encode_certificate(proofs)))


def test_no_altered_byte_is_accepted():
    ending = Ending()
    raw = ending.link().encode()
    chance = random.Random(1)
    for at in chance.sample(range(len(raw)), 300):
        changed = raw[:at] + bytes([raw[at] ^ 1 << chance.randrange(8)]) + raw[at + 1 :]
        with pytest.raises(LayoutError):
            pytest.fail(f"byte {at}: {ending.check(decode_link(changed))}")


def test_links_are_decoded_strictly():
    raw = Ending().link().encode()
    for size in [*range(60), *range(60, len(raw), 7)]:
        with pytest.raises(LayoutError):
            decode_link(raw[:size])
    with pytest.raises(LayoutError):
        decode_link(raw + b"\0")
    with pytest.raises(LayoutError, match="the limit is"):
        decode_link(bytes(LINK_BYTES_MAX + 1))


def ended(genesis: Genesis) -> Snapshot:
    """Return the last state of list 0 after a real execution: slot 12, replica 2 replaced."""
    world = World(genesis)
    assert world.order(listed(genesis, m2=replaced())).slot == E
    world.go_on(E)
    executor: Executor = world.executor
    n = genesis.n
    cut, heads = tuple(range(10, 10 + n)), tuple(bytes([i]) * 32 for i in range(n))
    states = tuple(LogState(i, position, view=3, last_checkpoint=8) for i, position in enumerate(cut))
    roots = executor.roots()
    header = Header(E, 0, *roots, cut, heads, (bytes(32),) * n, 0, executor.membership.digest)
    return Snapshot(header, b"certificate", states, (), executor)


def test_a_list_begins_where_the_one_before_ended():
    from tests.replica.core.test_members import G

    last = ended(G)
    genesis = last.executor.membership.genesis
    first = found(last, genesis, [b"i" * 32] * 3)
    assert (first.digest, first.header.slot) == (last.header.digest, E)
    assert first.header.cut == (10, 11, 0)
    assert first.header.heads == (bytes([0]) * 32, bytes([1]) * 32, b"i" * 32)
    assert [(state.position, state.view, state.last_checkpoint, state.top, state.joined) for state in first.states] == [
        (10, 0, E, E, False),
        (11, 0, E, E, False),
        (0, 0, E, E, False),
    ]
    assert first.states[0].opened == {0: Opening(E, E)}
    assert LogState.decode(first.states[0].encode()) == first.states[0]
    assert header_under(last.header.encode(), genesis, G).cut == (10, 11, 0)
    assert header_under(replace(last.header, list_number=1).encode(), genesis, G).cut == (10, 11, 12)
    with pytest.raises(LayoutError):
        found(replace(last, header=replace(last.header, slot=8)), genesis, [bytes(32)] * 3)
    with pytest.raises(LayoutError):
        header_under(replace(last.header, slot=8).encode(), genesis, G)
    assert isinstance(first.executor._application, KeyValue)
