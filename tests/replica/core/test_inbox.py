"""Groups wait until they can be read: in order, without gaps, within bounds; nothing is forgotten silently."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replica.core import inbox as module
from replica.core.events import VerifiedGroup
from replica.core.inbox import EARLY_GROUPS_MAX, Arrival, Inbox
from tests.replica.core.harness import FakeLog
from tests.replica.core.support import examples


def groups_of(*sizes: int) -> tuple[list[VerifiedGroup], Inbox]:
    log = FakeLog(1)
    head = log.head
    return [log.append(tuple(b"%d %d" % (n, i) for i in range(size))) for n, size in enumerate(sizes)], Inbox(head)


def read(inbox: Inbox) -> list[bytes]:
    return [payload for _, payload, _ in inbox.unread]


def expected(groups: list[VerifiedGroup]) -> list[bytes]:
    return [payload for group in groups for payload in group.payloads]


def test_in_order():
    groups, inbox = groups_of(2, 1)
    assert [inbox.arrive(g) for g in groups] == [Arrival.TAKEN, Arrival.TAKEN]
    assert (inbox.received, inbox.head, inbox.wanting) == (3, groups[1].head_after, False)
    assert [index for index, _, _ in inbox.unread] == [1, 2, 3]
    assert [inbox.arrive(g) for g in groups] == [Arrival.KNOWN, Arrival.KNOWN]
    assert inbox.unread_bytes == sum(map(len, expected(groups)))
    while inbox.unread:
        inbox.pop()
    assert inbox.unread_bytes == 0


def test_a_gap_is_noticed_and_waited_for():
    groups, inbox = groups_of(1, 1, 1, 1)
    assert inbox.arrive(groups[3]) is Arrival.EARLY
    assert inbox.wanting
    assert inbox.arrive(groups[3]) is Arrival.KNOWN
    assert inbox.arrive(groups[0]) is Arrival.TAKEN
    assert inbox.wanting, "2 and 3 are still missing"
    assert inbox.arrive(groups[1]) is Arrival.TAKEN
    assert read(inbox) == expected(groups[:2])
    assert inbox.arrive(groups[2]) is Arrival.TAKEN
    assert (read(inbox), inbox.wanting) == (expected(groups), False)


def test_a_gap_is_not_closed_by_counting():
    """ATTACKS 3: indexes 1, 2, 2, 4 are four groups up to four, and still lack 3."""
    groups, inbox = groups_of(1, 1, 1, 1)
    for group in (groups[0], groups[1], groups[1], groups[3]):
        inbox.arrive(group)
    assert inbox.received == 2
    assert read(inbox) == expected(groups[:2])
    assert inbox.wanting


def test_what_did_not_fit_is_still_wanted_after_the_gap_is_filled():
    """ATTACKS 6: a buffer that drops future messages must know that it did."""
    groups, inbox = groups_of(*[1] * (EARLY_GROUPS_MAX + 10))
    arrivals = [inbox.arrive(g) for g in groups[1:]]
    assert arrivals.count(Arrival.EARLY) == EARLY_GROUPS_MAX
    assert arrivals[-9:] == [Arrival.DROPPED] * 9
    assert inbox.arrive(groups[0]) is Arrival.TAKEN
    assert inbox.received == EARLY_GROUPS_MAX + 1
    assert inbox.wanting, "the nine that did not fit"
    for group in groups:
        inbox.arrive(group)
    assert (read(inbox), inbox.wanting) == (expected(groups), False)


def test_early_bytes_are_bounded(monkeypatch: pytest.MonkeyPatch):
    groups, inbox = groups_of(*[1] * 5)
    monkeypatch.setattr(module, "EARLY_BYTES_MAX", 2 * len(groups[1].raw))
    assert [inbox.arrive(g) for g in groups[1:]] == [Arrival.EARLY, Arrival.EARLY, Arrival.DROPPED, Arrival.DROPPED]
    inbox.arrive(groups[0])
    assert (inbox.received, inbox.wanting) == (3, True)
    assert inbox.arrive(groups[4]) is Arrival.EARLY, "the room is there again"
    assert inbox.arrive(groups[3]) is Arrival.TAKEN
    assert (inbox.received, inbox.wanting) == (5, False)


@pytest.mark.parametrize("bound", ["WAITING_ENTRIES_MAX", "WAITING_BYTES_MAX"])
def test_unread_entries_are_bounded_and_asked_for_again(bound: str, monkeypatch: pytest.MonkeyPatch):
    groups, inbox = groups_of(2, 2, 2)
    monkeypatch.setattr(module, bound, 4 if bound == "WAITING_ENTRIES_MAX" else 4 * 3)
    assert [inbox.arrive(g) for g in groups] == [Arrival.TAKEN, Arrival.TAKEN, Arrival.DROPPED]
    assert not inbox.wanting, "asking now would be for nothing"
    inbox.pop()
    assert inbox.wanting
    assert inbox.arrive(groups[2]) is Arrival.TAKEN
    assert (inbox.received, inbox.wanting) == (6, False)


def fork(*sizes: int) -> list[VerifiedGroup]:
    """Another history of the same log."""
    log = FakeLog(1)
    return [log.append(tuple(b"other %d %d" % (n, i) for i in range(size))) for n, size in enumerate(sizes)]


def test_another_history_is_a_fork():
    groups, inbox = groups_of(1, 1)
    other = fork(1, 1, 1)
    inbox.arrive(groups[0])
    assert inbox.arrive(other[1]) is Arrival.FORKED, "it continues from a head that this log never had"


def test_a_group_that_reaches_back_is_a_fork():
    groups, inbox = groups_of(1, 1)
    inbox.arrive(groups[0])
    assert inbox.arrive(fork(2)[0]) is Arrival.FORKED


def test_a_fork_that_waited_behind_a_gap_is_found_when_the_gap_is_filled():
    groups, inbox = groups_of(1, 1)
    other = fork(1, 1, 1)
    assert inbox.arrive(other[1]) is Arrival.EARLY
    assert inbox.arrive(groups[0]) is Arrival.FORKED
    assert read(inbox) == expected(groups[:1])


def test_an_overtaken_early_group_is_dropped():
    groups, inbox = groups_of(1, 1, 1)
    odd = dataclasses.replace(fork(2, 1)[1], first=2, last=2)
    assert inbox.arrive(odd) is Arrival.EARLY
    assert inbox.arrive(groups[2]) is Arrival.EARLY
    both = dataclasses.replace(
        groups[0],
        last=2,
        payloads=(*groups[0].payloads, *groups[1].payloads),
        head_after=groups[1].head_after,
    )
    assert inbox.arrive(both) is Arrival.TAKEN, "a group over both: what it overtook is gone, the rest follows"
    assert (inbox.received, inbox.wanting) == (3, False)
    assert (inbox._early, inbox._early_bytes) == ({}, 0)


@examples(150)
@given(sizes=st.lists(st.integers(1, 3), min_size=1, max_size=12), data=st.data())
def test_any_order_with_duplicates_reads_the_same(sizes: list[int], data: st.DataObject):
    groups, inbox = groups_of(*sizes)
    order = data.draw(st.permutations([*groups, *data.draw(st.lists(st.sampled_from(groups), max_size=6))]))
    for group in order:
        assert inbox.arrive(group) in {Arrival.TAKEN, Arrival.EARLY, Arrival.KNOWN}
    assert read(inbox) == expected(groups)
    assert (inbox.head, inbox.wanting) == (groups[-1].head_after, False)


@examples(100)
@given(order=st.lists(st.integers(0, 11), max_size=30))
def test_whatever_is_missing_is_wanted(order: list[int]):
    """wanting is exactly: an index is known to exist and did not arrive in order."""
    groups, inbox = groups_of(*[1] * 12)
    arrived: set[int] = set()
    for number in order:
        inbox.arrive(groups[number])
        arrived.add(number + 1)
        assert inbox.wanting == any(index not in arrived for index in range(1, max(arrived)))
