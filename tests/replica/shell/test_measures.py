"""What a replica measures of itself: distributions as Prometheus wants them, and which requests count."""

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from replica.core.batch import make_batch
from replica.core.envelope import (
    Open,
    OpenReply,
    Operations,
    Result,
    SessionId,
    Status,
    decode_envelope,
    encode_open,
    encode_open_reply,
    encode_operations,
    encode_operations_reply,
)
from replica.core.genesis import Limits
from replica.shell.measures import RECENT_MAX, WAITING_MAX, Distribution, Measures
from replica.shell.metrics import _histogram

CLUSTER, CLIENT, OTHER = bytes(32), b"\x04" + bytes(64), b"\x05" + bytes(64)


def envelope(content, client=CLIENT):
    encode = encode_operations if isinstance(content, Operations) else encode_open
    return decode_envelope(encode(CLUSTER, client, content) + bytes(64), CLUSTER, Limits())


def test_a_distribution_is_cumulative_when_it_is_shown():
    found = Distribution((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        found.add(value)

    class One:
        def collect(self):
            yield _histogram("x", "text", found)

    registry = CollectorRegistry(auto_describe=False)
    registry.register(One())
    text = generate_latest(registry).decode()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert lines == [
        'trustlog_x_bucket{le="1.0"} 2.0',
        'trustlog_x_bucket{le="2.0"} 3.0',
        'trustlog_x_bucket{le="+Inf"} 4.0',
        "trustlog_x_count 4.0",
        "trustlog_x_sum 12.0",
    ]


def test_only_the_latest_values_are_recent():
    found = Distribution()
    assert found.recent_ms() is None
    found.add(9.0)
    for _ in range(RECENT_MAX):
        found.add(0.002)
    assert found.recent_ms() == {"median": 2.0, "max": 2.0}
    assert sum(found.counts) == RECENT_MAX + 1


def test_what_fails_is_timed_too():
    found = Distribution()
    with pytest.raises(ZeroDivisionError), found.timed():
        _ = 1 // 0
    assert sum(found.counts) == 1


def test_a_request_counts_once_whenever_it_is_answered():
    measures, session = Measures(), SessionId(7, 1)
    asked = envelope(Operations(session, 5, 5, (b"a", b"b")))
    reply = encode_operations_reply(session, 5, [Result(Status.OK, 9, b"r"), Result(Status.ERROR, 9, b"")])
    measures.replied(CLIENT, reply)  # of one that came through another replica
    assert measures.client_operations == 0
    measures.requested(asked)
    measures.requested(asked)  # repeated
    measures.replied(OTHER, reply)
    assert measures.client_operations == 0
    measures.replied(CLIENT, reply)
    measures.replied(CLIENT, reply)
    assert measures.client_operations == 2
    assert sum(measures.client_s.counts) == 1


def test_an_opening_is_a_request_without_operations():
    measures = Measures()
    measures.requested(envelope(Open(b"n" * 16, 100)))
    measures.replied(CLIENT, encode_open_reply(OpenReply(b"n" * 16, Status.BUSY, SessionId(3, 4))))
    assert (measures.client_operations, sum(measures.client_s.counts)) == (0, 1)


def test_requests_that_are_never_answered_are_forgotten():
    measures = Measures()
    for number in range(1, WAITING_MAX + 11):
        measures.requested(envelope(Operations(SessionId(1, 0), number, 0, (b"a",))))
    assert len(measures._waiting) == WAITING_MAX


def test_a_batch_counts_its_operations():
    measures = Measures()
    one = envelope(Operations(SessionId(1, 0), 1, 0, (b"a", b"b", b"c")))
    measures.executed(make_batch(1, (), [one, envelope(Open(bytes(16), 1))]))
    assert measures.batch_operations.sum == 3
