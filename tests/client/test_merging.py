"""Chains of links merged: order, f+1 equal, nothing missed or repeated, liars, bounds."""

import random

import pytest

from client.merging import LINK_BYTES_ACCEPTED, Merge, Part
from replica.wire.changes import WINDOW_LINKS, Link, Position


def links(count, start=10, mark=b"c"):
    return [Link(Position(start + i), Position(start + i + 1), mark + b"%d" % i) for i in range(count)]


def begun(n=3, quorum=2, asked=None):
    merge = Merge(n, quorum, Position(10))
    for replica in range(n) if asked is None else asked:
        merge.asked(replica)
        assert merge.told(replica, Link(Position(10), Position(10), b"")) == []
    return merge


def test_a_link_is_taken_when_f_plus_1_told_it():
    merge = begun()
    one, two = links(2)
    assert merge.told(0, one) == []
    assert merge.told(0, two) == []
    assert merge.told(1, one) == [one]
    assert merge.told(2, one) == []
    assert merge.told(2, two) == [two]
    assert merge.position == two.end
    assert merge.told(1, two) == []
    assert not merge.refused


def test_one_replica_alone_is_never_believed_however_often_it_says_so():
    merge = begun()
    (one,) = links(1)
    assert merge.told(0, one) == []
    merge.lost(0)
    merge.asked(0)
    assert merge.told(0, one) == []
    assert merge.position == Position(10)


@pytest.mark.parametrize("seed", range(60))
def test_whatever_happens_the_truth_comes_once_and_in_order(seed):
    """Replicas disconnect, are slow, and one of three lies in any way; the owner gets a prefix of the truth."""
    chance = random.Random(seed)
    truth = links(60)
    by_start = {link.start: link for link in truth}
    merge = Merge(3, 2, Position(10))
    liar = chance.choice([None, 0, 1, 2])
    at: dict[int, Position] = {}
    taken = []
    for _ in range(1500):
        replica = chance.randrange(3)
        if replica not in at:
            at[replica] = merge.position
            merge.asked(replica)
            continue
        if chance.random() < 0.02:
            del at[replica]
            merge.lost(replica)
            continue
        link = by_start.get(at[replica])
        if replica == liar and chance.random() < 0.5:
            start = Position(max(0, at[replica].slot + chance.randint(-2, 2)))
            end = Position(max(0, at[replica].slot + chance.randint(-2, 4)))
            link = Link(start, end, chance.choice([b"", b"lie", b"c1"]))
        if link is None or (link.end.slot - merge.position.slot > WINDOW_LINKS and replica != liar):
            continue
        at[replica] = link.end
        taken += merge.told(replica, link)
        assert taken == truth[: len(taken)]
        assert merge.position == (taken[-1].end if taken else Position(10))
    assert len(taken) > 20
    assert all(merge.parts[replica] is not Part.REFUSED for replica in range(3) if replica != liar)


def test_a_replica_that_differs_is_not_listened_to_again():
    merge = begun()
    one, two = links(2)
    lie = Link(one.start, one.end, b"lie")
    merge.told(0, lie)
    merge.told(1, one)
    assert merge.told(2, one) == [one]
    assert merge.parts[0] is Part.REFUSED
    assert merge.refused == {"differs": 1}
    assert merge.told(0, two) == []
    assert merge.told(1, two) == []
    assert merge.told(2, two) == [two]


@pytest.mark.parametrize(
    "bad",
    [
        Link(Position(11), Position(12), b""),
        Link(Position(10), Position(9), b""),
        Link(Position(10), Position(10), b"x"),
        Link(Position(10), Position(11), bytes(LINK_BYTES_ACCEPTED + 1)),
    ],
    ids=["a gap", "backwards", "nowhere", "too large"],
)
def test_a_broken_chain_is_not_listened_to(bad):
    merge = begun()
    assert merge.told(0, bad) == []
    assert merge.parts[0] is Part.REFUSED
    assert merge.refused == {"broken-chain": 1}


def test_nobody_fills_the_memory():
    merge = begun()
    for link in links(WINDOW_LINKS + 5):
        merge.told(0, link)
    assert merge.parts[0] is Part.REFUSED
    assert merge.refused == {"too-far-ahead": 1}
    assert not any(merge._links)
    merge = begun()
    at = Position(10)
    while merge.parts[0] is Part.TELLING:
        link = Link(at, Position(at.slot + 1), bytes(1024 * 1024))
        merge.told(0, link)
        at = link.end
        assert merge._sizes[0] <= 8 * 1024 * 1024


def test_gone_needs_f_plus_1_and_says_from_where():
    merge = begun(5, 3)
    merge.ended(0, "gone", 50)
    merge.ended(1, "gone", 2**62)  # a liar may say anything
    assert not merge.is_gone
    (one,) = links(1)
    for replica in (2, 3):
        assert merge.told(replica, one) == []
    assert merge.told(4, one) == [one]
    merge.ended(2, "gone", 40)
    assert merge.is_gone
    assert merge.kept_from() == 2**62
    merge.ended(3, "gone", 45)
    assert merge.kept_from() == 50


def test_who_may_not_watch_is_told_so_by_f_plus_1():
    merge = begun(asked=())
    for replica in range(3):
        merge.asked(replica)
    merge.ended(0, "not-allowed", 11)
    assert not merge.is_denied
    # One that was behind, or lied, says otherwise when it is asked again.
    assert merge.to_ask_again() == [0]
    merge.asked(0)
    merge.told(0, Link(Position(10), Position(10), b""))
    merge.ended(1, "not-allowed", 11)
    assert not merge.is_denied
    merge.ended(2, "not-allowed", 12)
    assert merge.is_denied
    merge.lost(2)
    assert not merge.is_denied


def test_ahead_needs_f_plus_1_and_a_watch_that_was_never_told_anything():
    merge = begun(5, 3)
    merge.ended(0, "ahead", 5)
    merge.ended(1, "ahead", 2**62)  # a liar may say anything
    assert not merge.is_ahead
    assert merge.to_ask_again() == [0, 1]
    merge.asked(0)  # and waits: what it said is so until it says something else
    merge.ended(2, "ahead", 7)
    assert merge.is_ahead
    assert merge.executed() == 5
    merge.told(0, Link(merge.position, merge.position, b""))
    assert not merge.is_ahead
    merge.lost(1)
    merge.ended(3, "ahead", 6)
    assert not merge.is_ahead
    (one,) = links(1)
    merge = begun(5, 3)
    for replica in (0, 1, 2):
        merge.told(replica, one)
    assert merge.position == one.end
    for replica in (2, 3, 4):
        merge.ended(replica, "ahead", 3)
    assert not merge.is_ahead


def test_who_is_asked_again():
    merge = begun()
    merge.ended(0, "gone", 11)
    merge.ended(2, "busy", 0)
    assert merge.to_ask_again() == [2]
    merge.asked(2)
    one, two = links(2)
    merge.told(1, one)
    assert merge.told(2, one) == [one]
    assert merge.to_ask_again() == [0]
    merge.asked(0)
    assert merge.told(0, two) == []
    assert merge.told(1, two) == [two]


def test_among_other_replicas_a_watch_stands_where_it_stood():
    merge = begun()
    one, two = links(2)
    for replica in (0, 1):
        merge.told(replica, one)
    merge.told(0, two)
    renewed = merge.renewed(5, 3)
    assert renewed.position == one.end
    assert renewed.telling == 0
    for replica in range(5):
        renewed.asked(replica)
    for replica in (1, 2, 3):
        renewed.ended(replica, "ahead", 3)
    assert not renewed.is_ahead, "f+1 were here once"
    assert renewed.told(0, two) == []
    renewed.asked(1)
    assert renewed.told(1, two) == [], "what a former member told counts no more"
    assert renewed.told(4, two) == [two]
