"""Whatever f replicas say, in whatever order anything happens: properties of the core, found by hypothesis."""

from hypothesis import given, settings
from hypothesis import strategies as st

from client.events import Failure, Settings
from replica.core.envelope import Open, Result, SessionId, Status, encode_operations_reply
from tests.client.harness import SESSION, Harness, open_reply, reply_to

SLOW = settings(max_examples=150, deadline=None)


@st.composite
def lies(draw):
    """What a liar may send about an envelope: anything from the truth with a flipped bit to noise."""
    kind = draw(st.sampled_from(["bits", "status", "value", "cut", "noise", "count", "session", "open"]))
    return kind, draw(st.integers(0, 2**16)), draw(st.binary(max_size=40))


def tell(lie, envelope):
    kind, number, noise = lie
    truth = reply_to(envelope)
    if kind == "bits":
        position = number % (8 * len(truth))
        changed = bytearray(truth)
        changed[position // 8] ^= 1 << position % 8
        return bytes(changed)
    if kind == "status":
        return reply_to(envelope, list(Status)[1 + number % (len(Status) - 1)])
    if kind == "value":
        return reply_to(envelope, prefix=b"x" + noise)
    if kind == "cut":
        return truth[: number % len(truth)]
    if kind == "noise":
        return noise
    if kind == "count":
        return encode_operations_reply(envelope.session, envelope.first, [Result(Status.OK, 1, noise)] * 9)
    if kind == "session":
        return encode_operations_reply(SessionId(number, 0), envelope.first, [Result(Status.OK, 1, noise)])
    return b"\x02" + noise


@SLOW
@given(st.integers(1, 3), st.lists(st.tuples(st.integers(0, 2), lies()), max_size=40))
def test_f_liars_never_complete_anything_whatever_they_say(f, said):
    h = Harness(f=f).ready()
    h.submit("a", "b", deadline=h.now + 2000)
    _, envelope = h.decoded()[0]
    for liar, lie in said:
        h.reply(liar % f, tell(lie, envelope))
    assert not h.outcomes
    assert h.core.session == SESSION
    h.advance(2000)
    assert h.outcomes == dict.fromkeys(("a", "b"), Failure.UNDECIDED)


@SLOW
@given(
    st.integers(1, 3),
    st.lists(st.tuples(st.integers(0, 2), lies()), max_size=20),
    st.randoms(use_true_random=False),
)
def test_f_liars_cannot_keep_the_truth_away(f, said, random):
    h = Harness(f=f).ready()
    h.submit("a")
    _, envelope = h.decoded()[0]
    events = [(liar % f, tell(lie, envelope)) for liar, lie in said]
    events += [(honest, reply_to(envelope)) for honest in range(f, 2 * f + 1)]
    random.shuffle(events)
    for replica, raw in events:
        h.reply(replica, raw)
    assert h.outcomes == {"a": Result(Status.OK, 9, b"a")}


@SLOW
@given(st.lists(st.tuples(st.integers(0, 1), st.sampled_from(list(Status)), st.integers(0, 9)), max_size=30))
def test_f_liars_open_no_session_and_refuse_none(said):
    h = Harness(f=2)
    h.submit("a")
    _, opening = h.decoded()[0]
    for liar, status, slot in said:
        h.reply(liar, open_reply(opening, status, SessionId(slot, slot)))
    assert h.core.session is None
    assert h.core.waiting == 1
    for honest in (2, 3, 4):
        h.reply(honest, open_reply(opening))
    assert h.core.session == SESSION


@SLOW
@given(st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=2), st.permutations(range(5)))
def test_void_after_lies_between_what_correct_replicas_said_and_the_horizon(values, order):
    """With all five heard, two lies cannot push it out of what replicas accept: slot to slot + 8 K."""
    h = Harness(f=2, connect=False)
    h.submit("a")
    said = {0: values[0], 1: values[1], 2: 5000, 3: 5003, 4: 5007}
    for replica in order:
        h.take(h.core.on_connected(replica, said[replica], 0))
    h.flush()
    _, opening = h.decoded()[0]
    assert 5000 <= opening.void_after - 4 * 128 <= 5007


events = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(1, 4), st.integers(1, 3000)),
        st.tuples(st.just("pass"), st.integers(0, 1500), st.none()),
        st.tuples(st.just("answer"), st.integers(0, 40), st.sampled_from(list(Status))),
        st.tuples(st.just("drop"), st.integers(0, 2), st.none()),
        st.tuples(st.just("connect"), st.integers(0, 2), st.integers(0, 9)),
        st.tuples(st.just("report"), st.integers(0, 2), st.integers(0, 9)),
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(events)
def test_every_operation_ends_once_and_by_its_deadline_and_the_numbers_hold(happening):  # noqa: PLR0912
    """Any mixture of submitting, answers, time and connections: invariants after each event, one outcome each."""
    h = Harness(
        settings=Settings(envelopes_in_flight_max=3, queue_operations_max=8),
        session_window=16,
        envelope_operations_max=4,
    )
    deadlines, known = {}, []
    sessions = 0
    for what, number, extra in happening:
        if what == "submit":
            for _ in range(number):
                ticket = len(deadlines)
                deadlines[ticket] = h.now + extra
                h.submit(ticket, deadline=h.now + extra, flush=False)
            h.flush()
        elif what == "pass":
            h.advance(number)
        elif what == "answer" and known:
            content = known[number % len(known)]
            sessions += 1
            for replica in (1, 2):
                if isinstance(content, Open):
                    h.reply(replica, open_reply(content, extra, SessionId(sessions, 0)))
                else:
                    h.reply(replica, reply_to(content, extra))
        elif what == "drop":
            h.disconnect(number)
        elif what == "connect":
            h.connect(number, executed=extra, view=extra)
        elif what == "report":
            h.take(h.core.on_report(number, extra, extra))
            h.flush()
        for _, content in h.decoded():
            if content not in known:
                known.append(content)
        for ticket, deadline in deadlines.items():
            assert ticket in h.outcomes or deadline > h.now
    check_numbers([content for content in known if not isinstance(content, Open)])
    h.advance(3001)
    assert h.outcomes.keys() == deadlines.keys()
    assert h.core.waiting == h.core.in_flight == 0


def check_numbers(envelopes):
    """Within a session: consecutive from 1, acknowledged never above `first` nor going back, all in the window."""
    by_session = {}
    for envelope in envelopes:
        by_session.setdefault(envelope.session, []).append(envelope)
    for sent in by_session.values():
        following, acknowledged = 1, 1
        for envelope in sent:
            assert envelope.first == following
            assert acknowledged <= envelope.acknowledged <= envelope.first
            following, acknowledged = envelope.first + len(envelope.operations), envelope.acknowledged
            assert following <= acknowledged + 16
