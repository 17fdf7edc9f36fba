"""What a restarted replica must know before its first word, and what forbids it for ever."""

from __future__ import annotations

import itertools

import pytest

from replica.core.events import Fetch
from replica.core.group import VerifiedGroup
from replica.core.homecoming import ASK_AGAIN_MS, ASK_AGAIN_MS_MAX, Homecoming
from replica.core.inbox import Arrival, Inbox
from tests.replica.core.harness import FakeLog

HEARD = "peers must say what they hold of its log"


class Home:
    """Replica 1 of five (f = 2), whose trusted log has three groups of two entries; its store holds the first ones."""

    def __init__(self, stored: int, *, begun: bool = True) -> None:
        self.log = FakeLog(1)
        self.groups = [self.log.say(b"%d" % number, b"and more") for number in range(3)]
        self.inbox = Inbox(FakeLog(1).head)
        self.homecoming = Homecoming(1, 5, 2)
        for group in self.groups[:stored]:
            self.arrive(group)
        if begun:
            self.homecoming.begin(self.log.last, self.log.head)

    def arrive(self, group: VerifiedGroup, *, read: bool = True) -> Arrival:
        arrival = self.inbox.arrive(group)
        while read and self.inbox.unread:
            self.inbox.pop()
        return arrival

    def heard(self, *peers: int, last: int = 6) -> None:
        for peer in peers:
            self.homecoming.heard(peer, last)

    @property
    def missing(self) -> str | None:
        return self.homecoming.missing(self.inbox)

    @property
    def contradiction(self) -> str | None:
        return self.homecoming.contradiction(self.inbox)

    def asked(self, ms: int) -> list[Fetch]:
        return self.homecoming.due(ms, self.inbox)


def test_nothing_is_said_while_the_store_is_read():
    home = Home(3, begun=False)
    home.heard(0, 2)
    assert (home.missing, home.contradiction, home.homecoming.last) == ("its store is being read", None, None)
    assert home.asked(10_000) == []
    home.homecoming.begin(6, home.log.head)
    assert home.homecoming.last == 6
    assert home.missing == f"2 {HEARD}, 0 did", "what was said before nobody asked for"


def test_f_peers_must_have_said_what_they_hold():
    home = Home(3)
    assert home.missing == f"2 {HEARD}, 0 did"
    home.heard(0)
    home.heard(0)
    assert home.missing == f"2 {HEARD}, 1 did", "each counts once"
    home.heard(3, last=7)
    assert home.missing == f"2 {HEARD}, 1 did", "more than there is must be shown, not said"
    assert home.contradiction is None
    home.heard(3, last=6)
    assert (home.missing, home.contradiction) == (None, None)


def test_a_peer_that_holds_less_counts():
    home = Home(3)
    home.heard(0, last=0)
    home.heard(4, last=5)
    assert home.missing is None


def test_those_who_did_not_answer_are_asked_again_and_less_and_less():
    home = Home(3)
    assert home.asked(0) == [Fetch(1, 7, peer) for peer in (0, 2, 3, 4)]
    home.heard(2)
    times = [ms for ms in range(0, 60_000, 50) if home.asked(ms)]
    pauses = [later - sooner for sooner, later in itertools.pairwise([0, *times])]
    assert pauses[:5] == [ASK_AGAIN_MS * 2**i for i in range(5)]
    assert set(pauses[5:]) == {ASK_AGAIN_MS_MAX}
    home.heard(0)
    assert home.missing is None
    assert home.asked(10**9) == [], "nothing is missing any more"


def test_those_who_answered_are_not_asked_again():
    home = Home(3)
    home.heard(2)
    assert home.asked(0) == [Fetch(1, 7, peer) for peer in (0, 3, 4)]


def test_what_the_store_lost_is_asked_of_all():
    home = Home(1)
    home.heard(0, 2)
    assert home.missing == "entries 3 to 6 of its own log are not here; peers are asked for them"
    assert home.asked(0) == [Fetch(1, 3, peer) for peer in (0, 2, 3, 4)], "also of those who said what they hold"
    assert home.arrive(home.groups[2]) is Arrival.EARLY
    assert home.missing == "entries 3 to 6 of its own log are not here; peers are asked for them"
    assert home.arrive(home.groups[1]) is Arrival.TAKEN
    assert (home.missing, home.contradiction) == (None, None)


def test_its_entries_must_be_read_again():
    home = Home(2)
    home.heard(0, 2)
    home.arrive(home.groups[2], read=False)
    assert home.missing == "entry 5 of its own log cannot be read again yet"
    home.inbox.pop()
    assert home.missing == "entry 6 of its own log cannot be read again yet"
    home.inbox.pop()
    assert home.missing is None


@pytest.mark.parametrize("early", [False, True])
def test_a_group_beyond_the_end_proves_a_rollback(early: bool):
    home = Home(3)
    home.heard(0, 2)
    more = [home.log.say(b"said before the disk was restored"), home.log.say(b"and this")]
    arrival = home.arrive(more[1] if early else more[0])
    assert arrival is (Arrival.EARLY if early else Arrival.TAKEN)
    why = home.contradiction
    assert why is not None
    assert f"entry {8 if early else 7} of this replica's own log exists, and its trusted log ends at 6" in why
    assert "rolled back" in why
    assert "replace this replica with a new log" in why


def test_a_rollback_shows_before_the_own_log_is_whole():
    home = Home(1)
    home.arrive(home.log.say(b"said before the disk was restored"))
    assert "rolled back" in str(home.contradiction)


def test_a_trusted_log_and_a_store_that_do_not_belong_together():
    home = Home(3, begun=False)
    other = FakeLog(1)
    other.say(*[b"another history"] * 6)
    home.homecoming.begin(other.last, other.head)
    assert "its trusted log differ at entry 6: they do not belong together" in str(home.contradiction)
    assert "restore the right files" in str(home.contradiction)


def test_heads_are_compared_only_where_both_are_known():
    home = Home(2)
    assert home.contradiction is None


def test_an_empty_log_is_home_as_soon_as_f_peers_say_that_they_hold_nothing():
    homecoming, inbox = Homecoming(0, 3, 1), Inbox(FakeLog(0).head)
    homecoming.begin(0, FakeLog(0).head)
    assert homecoming.contradiction(inbox) is None
    assert homecoming.due(0, inbox) == [Fetch(0, 1, 1), Fetch(0, 1, 2)]
    homecoming.heard(2, 0)
    assert homecoming.missing(inbox) is None
