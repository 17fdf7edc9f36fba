"""The core's rules when replicas are silent, lost or replaced, in virtual time: deadlines (R2), whom to send to (R5, R6)."""

from itertools import pairwise

import pytest

from client.events import Failure, Settings
from client.pace import GROWTH
from replica.core.envelope import Open
from tests.client.harness import Harness, only, open_reply, reply_to

# Deadlines and failures (R2).


def test_nothing_connected_fails_at_the_deadline_as_not_sent():
    h = Harness(connect=False)
    h.submit("a", deadline=h.now + 700)
    h.advance(699)
    assert not h.outcomes
    h.advance(1)
    assert h.outcomes == {"a": Failure.NOT_SENT}


def test_fewer_than_a_quorum_gets_nothing_so_that_the_outcome_stays_certain():
    h = Harness().ready()
    h.disconnect(0, 1)
    h.submit("a", deadline=h.now + 700)
    h.advance(1000)
    assert not h.sent
    assert h.outcomes == {"a": Failure.NOT_SENT}


def test_n_minus_f_silent_replicas_end_in_undecided_at_the_deadline():
    h = Harness().ready()
    h.submit("a", deadline=h.now + 3000)
    _, envelope = only(h.decoded())
    h.reply(2, reply_to(envelope))
    h.advance(2999)
    assert not h.outcomes
    h.advance(1)
    assert h.outcomes == {"a": Failure.UNDECIDED}
    assert h.core.in_flight == 0


def test_deadlines_within_an_envelope_are_each_operations_own():
    h = Harness().ready()
    for i in range(1, 6):
        h.submit(i, deadline=h.now + 100 * i, flush=False)
    h.flush()
    h.advance(350)
    assert h.outcomes == dict.fromkeys((1, 2, 3), Failure.UNDECIDED)
    _, envelope = h.decoded()[0]
    for replica in (0, 1):
        h.reply(replica, reply_to(envelope))
    assert (h.outcomes[4].value, h.outcomes[5].value) == (b"4", b"5")


def test_closing_ends_everything():
    h = Harness(settings=Settings(envelopes_in_flight_max=1)).ready()
    h.submit("sent")
    h.submit("waiting")
    h.take(h.core.close())
    assert h.outcomes == {"sent": Failure.UNDECIDED, "waiting": Failure.CLOSED}


# Whom to send to (R5, R6).


def test_when_patience_ends_all_get_the_same_bytes_and_patience_doubles_to_a_limit():
    h = Harness().ready()
    h.submit("a", deadline=h.now + 60_000)
    ((replicas, raw),) = h.sent
    assert replicas == (0,)
    times = []
    start = h.now
    while len(h.sent) < 8:
        before = len(h.sent)
        h.advance(1)
        times += [h.now - start] * (len(h.sent) - before)
    assert set(h.sent[1:]) == {((0, 1, 2), raw)}
    assert times == [500, 1500, 3500, 7500, 15500, 23500, 31500]


def test_a_lost_primary_connection_sends_what_waits_to_all():
    h = Harness().ready()
    h.submit("a")
    raw = h.sent[0][1]
    h.disconnect(0)
    assert h.sent[1:] == [((1, 2), raw)]
    h.submit("b")
    assert h.decoded()[-1][0] == (1, 2)


def test_a_reconnected_replica_gets_what_it_should_have():
    h = Harness().ready()
    h.disconnect(2)
    h.submit("a")
    raw = h.sent[0][1]
    h.connect(2)
    assert len(h.sent) == 1  # nobody is impatient: the primary has it
    h.advance(500)
    h.disconnect(2)
    h.connect(2)
    assert h.sent[-1] == ((2,), raw)
    h.disconnect(0)
    h.connect(0)
    assert h.sent[-1] == ((0,), raw)


def test_the_primary_is_what_f_plus_1_replicas_support():
    h = Harness(f=2, connect=False)
    h.connect(0, 1, view=7)  # two liars
    h.connect(2, view=3)
    assert h.core.primary == 3
    h.connect(3, 4, view=3)
    assert h.core.primary == 3
    h.submit("a")
    assert h.sent[0][0] == (3,)


def test_a_new_primary_gets_what_only_the_old_one_has():
    h = Harness().ready()
    h.submit("a")
    raw = h.sent[0][1]
    h.take(h.core.on_report(1, 9, 1))
    assert h.core.primary == 0
    h.take(h.core.on_report(2, 9, 1))
    assert h.core.primary == 1
    assert h.sent[1:] == [((1,), raw)]


def test_impatience_asks_for_reports():
    h = Harness().ready()
    h.submit("a")
    asked = h.asked
    h.advance(500)
    assert h.asked == asked + 1


def test_an_opening_that_nobody_waits_for_is_not_repeated_but_its_answer_is_taken():
    h = Harness()
    h.submit("a", deadline=h.now + 100)
    _, opening = only(h.decoded())
    h.advance(10_000)
    h.take(h.core.tick(h.now))
    assert h.outcomes == {"a": Failure.NOT_SENT}
    assert not h.sent
    for replica in (0, 1):
        h.reply(replica, open_reply(opening))
    h.submit("b")
    assert not isinstance(only(h.decoded())[1], Open)


def test_notices_are_kept_one_per_replica_and_bounded():
    h = Harness()
    for i in range(100):
        h.core.on_notice(1, "busy", f"{i}" * 5000)
    assert list(h.core.notices) == [1]
    assert len(h.core.notices[1][1]) == 200


def busy(h, *replicas):
    for replica in replicas:
        h.core.on_notice(replica, "busy", "over its quota")


def test_while_f_plus_1_replicas_take_no_more_nothing_new_leaves_and_what_left_is_repeated_evenly():
    h = Harness(settings=Settings(envelopes_in_flight_max=4)).ready()
    h.submit("a", deadline=h.now + 60_000)
    busy(h, 0, 1)
    h.decoded()
    h.submit("b")
    assert not h.sent, "nothing new"
    h.advance(249)
    assert not h.sent
    h.advance(1)
    (_, late) = only(h.decoded())
    assert late.operations == (b"b",)
    for replica in (0, 1):
        h.reply(replica, reply_to(late))
    rounds = []
    for _ in range(12_000 // 50):
        h.advance(50)
        for replicas, envelope in h.decoded():
            assert (replicas, envelope.operations) == ((0, 1, 2), (b"a",))
            rounds.append(h.now)
            busy(h, 0, 1, 2)
    assert {after - before for before, after in pairwise(rounds)} == {1000}, rounds


def test_who_was_told_to_be_over_its_quota_has_less_in_flight():
    h = Harness(settings=Settings(envelopes_in_flight_max=4)).ready()

    def in_flight(*tickets):
        """Submit these one by one, answer what left, and return how many that were at once."""
        for ticket in tickets:
            h.submit(ticket, deadline=h.now + 60_000)
        asked = [envelope for _, envelope in h.decoded()]
        for envelope in asked:
            for replica in (0, 1):
                h.reply(replica, reply_to(envelope))
        return len(asked)

    for ticket in "abcd":
        h.submit(ticket, deadline=h.now + 60_000)
    envelopes = [envelope for _, envelope in h.decoded()]
    assert len(envelopes) == 4
    busy(h, 0, 1)
    h.advance(500)
    assert len(h.decoded()) == 4, "everybody is asked"
    for envelope in envelopes:
        for replica in (0, 1):
            h.reply(replica, reply_to(envelope))
    assert in_flight("e", "f", "g") == 2
    assert in_flight() == 1
    for number in range(GROWTH):
        in_flight(number)
    assert in_flight("h", "i", "j", "k") == 3


def test_what_f_replicas_say_of_being_busy_holds_nobody_back():
    h = Harness().ready()
    for _ in range(3):
        busy(h, 1)
    h.submit("a")
    assert len(h.decoded()) == 1
    h.core.on_notice(0, "something else", "")
    h.submit("b")
    assert len(h.decoded()) == 1


def test_settings_must_be_positive():
    with pytest.raises(ValueError, match="patience_ms must be at least 1"):
        Settings(patience_ms=0)
