"""Groups wait until they can be read: in order, without gaps, within bounds; nothing is forgotten silently."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replica.core import inbox as module
from replica.core.group import VerifiedGroup
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


def test_another_history_of_what_was_taken_is_a_fork():
    groups, inbox = groups_of(1, 1, 1)
    for group in groups:
        inbox.arrive(group)
    other = fork(1, 1, 1)
    assert inbox.arrive(groups[1]) is Arrival.KNOWN
    assert inbox.arrive(other[1]) is Arrival.FORKED
    assert inbox.contradiction == other[1]
    assert inbox.received == 3


@pytest.mark.parametrize("first", [1, 2, 3])
def test_a_group_with_other_bounds_within_what_was_taken_is_a_fork(first: int):
    groups, inbox = groups_of(2, 2, 2)
    for group in groups:
        inbox.arrive(group)
    last = {1: 1, 2: 2, 3: 5}[first]
    odd = dataclasses.replace(groups[0], first=first, last=last)
    assert inbox.arrive(odd) is Arrival.FORKED


def test_what_is_too_long_ago_is_neither_known_nor_a_fork(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "REMEMBERED_GROUPS_MAX", 2)
    groups, inbox = groups_of(1, 1, 1, 1)
    for group in groups:
        inbox.arrive(group)
    other = fork(1, 1, 1, 1)
    assert inbox.arrive(other[1]) is Arrival.KNOWN, "nobody can say any more"
    assert inbox.arrive(other[2]) is Arrival.FORKED
    assert [inbox.head_at(index) for index in range(1, 5)] == [None, None, groups[2].head_after, groups[3].head_after]


def test_what_lies_below_a_beginning_in_the_middle_is_too_long_ago():
    groups, _ = groups_of(1, 2, 1)
    inbox = Inbox(groups[1].head_after, received=3, seen=3)
    assert inbox.arrive(fork(1)[0]) is Arrival.KNOWN
    assert inbox.arrive(dataclasses.replace(groups[2], first=3)) is Arrival.FORKED, "it reaches back over the beginning"
    assert inbox.arrive(groups[2]) is Arrival.TAKEN
    assert (inbox.head_at(3), inbox.head_at(4)) == (None, groups[2].head_after)


def test_groups_are_collected_once_and_in_order():
    groups, inbox = groups_of(1, 2, 1)
    assert inbox.collect() == []
    inbox.arrive(groups[2])
    assert inbox.collect() == [], "not before the gap is filled"
    inbox.arrive(groups[0])
    inbox.arrive(groups[1])
    inbox.arrive(groups[1])
    assert inbox.collect() == groups
    assert inbox.collect() == []


def test_a_head_is_known_only_where_a_group_ends():
    groups, inbox = groups_of(2, 2)
    assert inbox.head_at(0) == inbox.head
    for group in groups:
        inbox.arrive(group)
    assert [inbox.head_at(index) for index in range(6)] == [None, None, groups[0].head_after, None, inbox.head, None]


def test_another_head_at_a_known_index_differs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "REMEMBERED_GROUPS_MAX", 2)
    groups, inbox = groups_of(1, 1, 2, 1)
    assert not inbox.differs(1, groups[0].head_after), "it has not arrived"
    for group in groups:
        inbox.arrive(group)
    heads = {index: group.head_after for group in groups for index in (group.last,)}
    assert not any(inbox.differs(index, head) for index, head in heads.items())
    assert [inbox.differs(index, b"x" * 32) for index in range(1, 8)] == [False, False, False, True, True, False, False]
    groups, inbox = groups_of(1, 2, 2)
    for group in groups:
        inbox.arrive(group)
    assert inbox.differs(4, b"x" * 32), "no group of this history ends there"


# Logs that do not count their indexes themselves (TPMs): their host can have any group attested, at any index.


def uncounted(group: VerifiedGroup, **changes: object) -> VerifiedGroup:
    return dataclasses.replace(group, counted=False, **changes)


def taken_by_tpm(*sizes: int) -> tuple[list[VerifiedGroup], Inbox]:
    groups, inbox = groups_of(*sizes)
    groups = [uncounted(group) for group in groups]
    for group in groups:
        assert inbox.arrive(group) is Arrival.TAKEN
    return groups, inbox


def test_what_a_lying_host_had_attested_is_passed_over_and_frames_nobody():
    groups, inbox = taken_by_tpm(1, 2, 1)
    nowhere, after = b"?" * 32, b"!" * 32
    strays = [
        uncounted(groups[1], head_before=nowhere, head_after=after),  # an index a second time
        uncounted(groups[0], head_before=nowhere, head_after=after, last=3),
        uncounted(groups[2], first=5, last=5, head_before=nowhere, head_after=after),  # the next index, from nowhere
        uncounted(groups[2], first=3, last=6, head_before=nowhere, head_after=after),  # reaches over the end
    ]
    for stray in strays:
        assert inbox.arrive(stray) is Arrival.STRAY
    assert inbox.contradiction is None
    assert (inbox.received, inbox.head) == (4, groups[2].head_after)
    following = uncounted(groups[2], first=5, last=5, head_before=inbox.head, head_after=after)
    assert inbox.arrive(following) is Arrival.TAKEN
    for stray in strays:
        counted = dataclasses.replace(stray, counted=True)
        _, other = taken_by_tpm(1, 2, 1)
        assert other.arrive(stray) is Arrival.STRAY
        assert other.arrive(counted) is Arrival.FORKED, "a log that counts its indexes cannot have said this"


def test_one_head_that_goes_on_in_two_ways_is_a_broken_tpm():
    for place in range(3):
        groups, inbox = taken_by_tpm(1, 2, 1)
        other = uncounted(groups[place], head_after=b"!" * 32)
        assert inbox.arrive(other) is Arrival.FORKED
        assert inbox.contradiction is other
    groups, inbox = taken_by_tpm(1, 2, 1)
    renumbered = uncounted(groups[1], first=9, last=9, head_after=b"!" * 32)
    assert inbox.arrive(renumbered) is Arrival.EARLY, "held: what it claims to follow has not come"


def test_a_stray_that_came_early_does_not_stop_what_continues():
    groups, inbox = groups_of(1, 1, 1)
    first, second, third = (uncounted(group) for group in groups)
    assert inbox.arrive(uncounted(second, head_before=b"?" * 32, head_after=b"!" * 32)) is Arrival.EARLY
    assert inbox.arrive(first) is Arrival.TAKEN
    assert (inbox.received, inbox.wanting, inbox.contradiction) == (1, True, None)
    assert [inbox.arrive(group) for group in (second, third)] == [Arrival.TAKEN, Arrival.TAKEN]


def test_an_early_group_that_forks_is_noticed_when_the_gap_closes():
    groups, inbox = taken_by_tpm(1)
    log = FakeLog(1)
    log.append((b"0 0",))
    two, three = (uncounted(log.append((payload,))) for payload in (b"two", b"three"))
    assert inbox.arrive(uncounted(three, head_before=groups[0].head_before)) is Arrival.EARLY
    assert inbox.arrive(two) is Arrival.FORKED
    assert inbox.contradiction is not None
