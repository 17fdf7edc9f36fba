"""The core's rules one by one, in virtual time."""

import pytest

from client.events import Failure, Settings
from client.pending import REPLY_BYTES_KEPT
from replica.core.envelope import Operations, Result, SessionId, Status, encode_operations_reply
from tests.client.harness import SESSION, Harness, only, open_reply, reply_to

# Sessions.


def test_an_operation_opens_a_session_and_then_leaves():
    h = Harness()
    assert not h.sent  # nothing is opened before somebody wants something
    h.submit("a")
    replicas, opening = only(h.decoded())
    assert replicas == (0,)
    assert opening.void_after == 4 * 128
    h.reply(0, open_reply(opening))
    assert h.core.session is None  # one word is not enough
    h.reply(0, open_reply(opening))
    assert h.core.session is None
    h.reply(2, open_reply(opening))
    assert h.core.session == SESSION
    replicas, envelope = only(h.decoded())
    assert (replicas, envelope) == ((0,), Operations(SESSION, 1, 1, (b"a",)))


def test_void_after_is_not_moved_by_f_liars_in_either_direction():
    for lie in (0, 2**64 - 1):
        h = Harness(f=2, connect=False)
        h.submit("a")
        h.connect(0, 1, executed=lie)
        h.connect(2, 3, 4, executed=1000)
        _, opening = only(h.decoded())
        assert opening.void_after == 1000 + 4 * 128


def test_the_opening_waits_shortly_for_all_and_without_limit_for_a_quorum():
    h = Harness(connect=False)
    h.submit("a")
    h.connect(1, executed=50)
    h.advance(1000)
    assert not h.sent
    h.connect(2, executed=60)
    h.advance(199)
    assert not h.sent
    h.advance(1)
    replicas, opening = only(h.decoded())
    assert opening.void_after == 50 + 4 * 128
    assert replicas == (1, 2)  # the primary, 0, is not there


def test_the_opening_does_not_wait_for_a_replica_that_cannot_be_reached():
    h = Harness(connect=False)
    h.disconnect(0)
    h.submit("a")
    h.connect(1, 2)
    assert len(h.sent) == 1


def test_void_is_followed_by_a_new_nonce_and_newer_slots():
    h = Harness()
    h.submit("a")
    _, first = only(h.decoded())
    for replica in (0, 1):
        h.reply(replica, open_reply(first, Status.VOID))
    assert h.asked == 1
    assert not h.sent
    for replica in range(3):
        h.take(h.core.on_report(replica, 7000 + replica, 0))
    h.flush()
    _, second = only(h.decoded())
    assert second.nonce != first.nonce
    assert second.void_after == 7001 + 4 * 128


def test_void_again_and_again_ends_at_the_deadline_as_not_sent():
    h = Harness()
    h.submit("a", deadline=h.now + 500)
    for _ in range(200):
        for _, content in h.decoded():
            for replica in (0, 1):
                h.reply(replica, open_reply(content, Status.VOID))
        for replica in range(3):
            h.take(h.core.on_report(replica, 0, 0))
        h.flush()
        h.advance(10)
    assert h.outcomes == {"a": Failure.NOT_SENT}
    assert h.core.session is None


def test_a_key_that_is_not_allowed_fails_what_waits_and_is_tried_again_with_what_comes():
    h = Harness()
    h.submit("a", "b")
    _, opening = only(h.decoded())
    h.reply(0, open_reply(opening, Status.NOT_ALLOWED))
    assert not h.outcomes, "one replica's word"
    h.reply(2, open_reply(opening, Status.NOT_ALLOWED))
    assert h.outcomes == {"a": Failure.NOT_ALLOWED, "b": Failure.NOT_ALLOWED}
    h.advance(60_000)
    assert not h.sent
    h.submit("c")
    for replica in range(3):
        h.take(h.core.on_report(replica, 10, 0))
    h.flush()
    _, again = only(h.decoded())
    assert again.nonce != opening.nonce
    for replica in (0, 1):
        h.reply(replica, open_reply(again))
    assert h.core.session == SESSION
    assert "c" not in h.outcomes


def test_a_key_that_is_revoked_ends_the_session():
    h = Harness().ready()
    h.submit("a")
    _, envelope = only(h.decoded())
    for replica in (0, 1):
        h.reply(replica, reply_to(envelope, Status.NOT_ALLOWED))
    assert h.outcomes["a"].status is Status.NOT_ALLOWED
    assert h.core.session is None


def test_an_operation_that_is_not_permitted_ends_no_session():
    h = Harness().ready()
    h.submit("a")
    _, envelope = only(h.decoded())
    for replica in (0, 1):
        h.reply(replica, reply_to(envelope, Status.NOT_PERMITTED))
    assert h.outcomes["a"].status is Status.NOT_PERMITTED
    assert h.core.session == SESSION


def test_busy_pauses_longer_each_time():
    h = Harness()
    h.submit("a", deadline=h.now + 60_000)
    pauses = []
    for _ in range(3):
        _, opening = only(h.decoded())
        for replica in (0, 1):
            h.reply(replica, open_reply(opening, Status.BUSY))
        for replica in range(3):
            h.take(h.core.on_report(replica, 0, 0))
        asked = h.now
        while not h.sent:
            h.advance(1)
        pauses.append(h.now - asked)
    assert pauses == [250, 500, 1000]


def test_an_opening_is_sent_to_all_when_patience_ends_and_with_the_same_bytes():
    h = Harness()
    h.submit("a")
    first = h.sent[0][1]
    h.advance(499)
    assert len(h.sent) == 1
    h.advance(1)
    assert h.sent[1] == ((0, 1, 2), first)


def test_an_expired_session_is_an_unknown_outcome_and_the_next_operation_opens_another():
    h = Harness().ready()
    h.submit("a")
    _, envelope = only(h.decoded())
    for replica in (0, 1):
        h.reply(replica, reply_to(envelope, Status.EXPIRED))
    assert h.outcomes["a"].status is Status.EXPIRED
    assert h.core.session is None
    h.submit("b")
    for replica in range(3):
        h.take(h.core.on_report(replica, 5, 0))
    h.flush()
    h.open(SessionId(99, 0))
    _, envelope = only(h.decoded())
    assert envelope == Operations(SessionId(99, 0), 1, 1, (b"b",))


def test_one_replica_cannot_end_a_session():
    h = Harness().ready()
    h.submit("a")
    _, envelope = only(h.decoded())
    h.reply(1, reply_to(envelope, Status.EXPIRED))
    assert h.core.session == SESSION
    assert not h.outcomes


def test_what_is_in_flight_in_a_lost_session_still_gets_its_own_answer():
    h = Harness().ready()
    h.submit("a")
    h.submit("b")
    (_, first), (_, second) = h.decoded()
    for replica in (0, 1):
        h.reply(replica, reply_to(first, Status.EXPIRED))
    for replica in (0, 1):
        h.reply(replica, reply_to(second, Status.OK))
    assert h.outcomes["b"].status is Status.OK


# Replies (R1).


def test_f_plus_1_equal_replies_complete_every_ticket():
    h = Harness().ready()
    h.submit("a", "b")
    _, envelope = only(h.decoded())
    h.reply(2, reply_to(envelope))
    assert not h.outcomes
    h.reply(1, reply_to(envelope))
    assert h.outcomes == {"a": Result(Status.OK, 9, b"a"), "b": Result(Status.OK, 9, b"b")}
    h.reply(0, reply_to(envelope))  # the third comes late and changes nothing
    assert len(h.outcomes) == 2


def test_one_replica_answering_twice_counts_once():
    h = Harness().ready()
    h.submit("a")
    _, envelope = only(h.decoded())
    for _ in range(10):
        h.reply(1, reply_to(envelope))
    assert not h.outcomes


def test_only_the_latest_reply_of_a_replica_counts():
    h = Harness().ready()
    h.submit("a")
    _, envelope = only(h.decoded())
    lie = reply_to(envelope, prefix=b"lie")
    h.reply(1, lie)
    h.reply(1, reply_to(envelope))
    h.reply(2, lie)
    assert not h.outcomes
    h.reply(0, reply_to(envelope))
    assert h.outcomes["a"].value == b"a"


def test_long_replies_are_compared_by_digest_and_not_kept():
    h = Harness().ready()
    h.submit("a")
    _, envelope = only(h.decoded())
    big = b"x" * (REPLY_BYTES_KEPT + 1)
    h.reply(1, reply_to(envelope, prefix=big))
    (pending,) = h.core._in_flight.values()
    assert all(len(kept) <= REPLY_BYTES_KEPT for kept in pending.tally._latest.values())
    h.reply(2, reply_to(envelope, prefix=big[:-1] + b"y"))
    assert not h.outcomes
    h.reply(0, reply_to(envelope, prefix=big))
    assert h.outcomes["a"].value == big + b"a"


def test_replies_to_nothing_and_of_another_count_are_refused_and_counted():
    h = Harness().ready()
    h.submit("a")
    _, envelope = only(h.decoded())
    before = h.core.refused.copy()
    other = Operations(SessionId(1, 1), 1, 1, (b"a",))
    two = encode_operations_reply(
        envelope.session, envelope.first, [Result(Status.OK, 9, b"a"), Result(Status.OK, 9, b"")]
    )
    for replica in range(3):
        h.reply(replica, reply_to(other))
        h.reply(replica, two)
        h.reply(replica, b"")
        h.reply(replica, b"\x02" + bytes(29))
    refused = h.core.refused - before
    assert refused == {"reply-to-nothing": 9, "reply-with-other-count": 3}
    assert not h.outcomes


def test_equal_malformed_replies_are_refused():
    h = Harness().ready()
    h.submit("a")
    _, envelope = only(h.decoded())
    for replica in range(3):
        h.reply(replica, reply_to(envelope) + b"too much")
    assert not h.outcomes
    assert h.core.refused["malformed-reply"] == 2


def test_a_reply_from_a_replica_that_does_not_exist_is_a_misuse():
    with pytest.raises(ValueError, match="no replica 3"):
        Harness().core.on_reply(3, b"")


def test_out_of_order_replies_complete_their_own_envelopes():
    h = Harness().ready()
    for ticket in "abc":
        h.submit(ticket)
    envelopes = [envelope for _, envelope in h.decoded()]
    for envelope in reversed(envelopes):
        for replica in (2, 0):
            h.reply(replica, reply_to(envelope))
    assert {ticket: result.value for ticket, result in h.outcomes.items()} == {
        "a": b"a",
        "b": b"b",
        "c": b"c",
    }


# Grouping, numbers, window (R3, R4).


def test_what_is_submitted_in_one_turn_shares_one_signature():
    h = Harness().ready()
    signed = h.signed
    h.submit(*range(300))
    _, envelope = only(h.decoded())
    assert len(envelope.operations) == 300
    assert h.signed == signed + 1


def test_envelopes_keep_to_the_agreed_limits_of_count_and_bytes():
    h = Harness(envelope_operations_max=10).ready()
    h.submit(*range(25))
    envelopes = [envelope for _, envelope in h.decoded()]
    assert [len(envelope.operations) for envelope in envelopes] == [10, 10, 5]
    assert [envelope.first for envelope in envelopes] == [2, 12, 22]

    h = Harness(operation_bytes_max=4000, envelope_bytes_max=8000).ready()
    for ticket in range(5):
        h.core.submit(ticket, bytes(3000), h.now + 1000)
    h.flush()
    assert all(len(raw) <= 8000 for _, raw in h.sent)
    assert [len(envelope.operations) for _, envelope in h.decoded()] == [2, 2, 1]

    h = Harness(operation_bytes_max=1000, envelope_bytes_max=2024).ready()
    for ticket in range(900):
        h.core.submit(ticket, b"x", h.now + 1000)
    h.flush()
    assert [len(raw) for _, raw in h.sent] == [2024, 2024, 145 + 64 + 5 * (900 - 2 * 363)]


def test_the_largest_operation_fits_an_envelope_and_a_larger_one_is_a_misuse():
    h = Harness(operation_bytes_max=4000, envelope_bytes_max=5024).ready()
    h.core.submit("a", bytes(4000), h.now + 1000)
    h.flush()
    assert len(only(h.sent)[1]) == 4000 + 4 + 145 + 64
    with pytest.raises(ValueError, match="limit is 4000"):
        h.core.submit("b", bytes(4001), h.now + 1000)


def test_acknowledged_is_the_lowest_unfinished_number():
    h = Harness().ready()
    h.submit("a", "b")
    h.submit("c")
    h.submit("d")
    (_, first), (_, second), (_, third) = h.decoded()
    assert [(e.first, e.acknowledged) for e in (first, second, third)] == [(2, 2), (4, 2), (5, 2)]
    for replica in (0, 1):
        h.reply(replica, reply_to(second))
    h.submit("e")
    assert only(h.decoded())[1].acknowledged == 2  # the first is still out
    for replica in (0, 1):
        h.reply(replica, reply_to(first))
    h.submit("f")
    assert only(h.decoded())[1].acknowledged == 5


def test_a_given_up_envelope_is_acknowledged():
    h = Harness().ready()
    h.submit("a", deadline=h.now + 100)
    h.advance(100)
    assert h.outcomes == {"a": Failure.UNDECIDED}
    h.sent.clear()
    h.submit("b")
    assert only(h.decoded())[1].acknowledged == 3


def test_an_envelope_that_somebody_still_waits_for_is_not_acknowledged():
    h = Harness().ready()
    h.submit("a", deadline=h.now + 100, flush=False)
    h.submit("b")
    _, envelope = only(h.decoded())
    h.advance(100)
    assert h.outcomes == {"a": Failure.UNDECIDED}
    h.submit("c")
    assert only(h.decoded())[1].acknowledged == envelope.first
    for replica in (0, 1):
        h.reply(replica, reply_to(envelope))
    assert h.outcomes["b"].value == b"b"


def test_nothing_reaches_beyond_the_session_window():
    h = Harness(session_window=10, envelope_operations_max=4).ready()
    h.submit(*range(20))
    envelopes = [envelope for _, envelope in h.decoded()]
    assert [(e.first, len(e.operations)) for e in envelopes] == [(2, 4), (6, 4), (10, 2)]
    assert h.core.waiting == 10
    # The middle one does not move the window, the lowest one does.
    for replica in (0, 1):
        h.reply(replica, reply_to(envelopes[1]))
    assert not h.sent
    for replica in (0, 1):
        h.reply(replica, reply_to(envelopes[0]))
    envelope = h.decoded()[0][1]
    assert (envelope.first, envelope.acknowledged, len(envelope.operations)) == (12, 10, 4)


def test_envelopes_in_flight_are_bounded_in_number_and_bytes():
    h = Harness(settings=Settings(envelopes_in_flight_max=3)).ready()
    for ticket in range(5):
        h.submit(ticket)
    assert (h.core.in_flight, h.core.waiting) == (3, 2)
    _, envelope = h.decoded()[1]
    for replica in (0, 1):
        h.reply(replica, reply_to(envelope))
    assert h.core.in_flight == 3
    assert only(h.decoded())[1].operations == (b"3", b"4")

    h = Harness(settings=Settings(bytes_in_flight_max=1)).ready()
    h.submit("a")
    h.submit("b")
    assert h.core.in_flight == 1


def test_a_full_queue_refuses_at_once_by_count_and_by_bytes():
    h = Harness(connect=False, settings=Settings(queue_operations_max=2))
    h.submit("a", "b", "c")
    assert h.outcomes == {"c": Failure.QUEUE_FULL}
    h = Harness(connect=False, settings=Settings(queue_bytes_max=10))
    h.submit("12345", "67890", "x")
    assert h.outcomes == {"x": Failure.QUEUE_FULL}
