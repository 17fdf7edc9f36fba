"""One trace follows a request through client, primary, votes, execution and reply: in one process, and stage by stage."""

import logging
import math
import os
import random
import subprocess
import sys

import pytest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import TraceIdRatioBased
from opentelemetry.trace import SpanKind

import client.tracing
from replica.core.batch import make_batch
from replica.core.entries import Commit, Prepare, PrePrepare
from replica.core.envelope import (
    Operations,
    Result,
    SessionId,
    Status,
    decode_envelope,
    encode_operations,
    encode_operations_reply,
)
from replica.core.genesis import Limits, Ordering
from replica.shell import tracing
from replica.wire import spans
from replica.wire.spans import CLIENT, Spans, open_spans, span_id
from tests.support.cluster import ROOT
from tests.support.nodes import Nodes
from tests.support.waiting import on_loop, until

SESSION = SessionId(3, 0)
CLUSTER = bytes(32)
KEY = b"\4" + bytes(64)


class Kept(InMemorySpanExporter):
    """Goes on when one of its users is closed: here they have it in common."""

    def shutdown(self):
        pass


@pytest.fixture
def exported(monkeypatch):
    """Spans are kept here; the endpoint is one that nobody asks."""
    exporter = Kept()
    monkeypatch.setattr(
        spans, "_exporting", lambda attributes: (SimpleSpanProcessor(exporter), Resource(dict(attributes)))
    )
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    return exporter


def request(first=1, operations=(b"one",), signature=b"s" * 64):
    raw = encode_operations(CLUSTER, KEY, Operations(SESSION, first, 0, tuple(operations))) + signature
    return decode_envelope(raw, CLUSTER, Limits())


def reply_to(envelope):
    results = [Result(Status.OK, 5, b"") for _ in envelope.content.operations]
    return encode_operations_reply(envelope.content.session, envelope.content.first, results)


def by_stage(exported):
    """Name and place -> span, of a trace in which no stage comes twice."""
    found = {}
    for span in exported.get_finished_spans():
        place = (span.attributes or {}).get("trustlog.replica", CLIENT)
        key = span.name.removeprefix("trustlog "), place
        assert key not in found, key
        found[key] = span
    return found


@pytest.mark.parametrize("ordering", [Ordering.THREE_PHASE, Ordering.TWO_PHASE])
def test_the_spans_of_one_request_in_one_process(tmp_path, exported, ordering):
    @on_loop
    async def work():
        async with Nodes(tmp_path / "c", ordering=ordering) as nodes:
            nodes.start()
            await nodes.wait_ready()
            async with nodes.client() as one:
                await one.put("a", "b")
                votes = 2 if ordering is Ordering.THREE_PHASE else 1
                await until(lambda: len(exported.get_finished_spans()) == 1 + 3 * 3 + 3 * votes, "all spans")

    work()
    found = by_stage(exported)
    three = ordering is Ordering.THREE_PHASE
    # The PRE-PREPARE is the primary's vote of the first phase, and where there is no second one, its only one.
    votes = {("propose", 0), ("prepare", 1), ("prepare", 2)} | {("commit", place) for place in range(3) if three}
    stages = {(stage, place) for stage in ("replica", "execute", "reply") for place in range(3)}
    assert set(found) == {("request", CLIENT)} | stages | votes
    (trace,) = {span.context.trace_id for span in found.values()}
    root = found["request", CLIENT]
    assert (root.parent, root.kind, root.attributes["trustlog.answered"]) == (None, SpanKind.CLIENT, True)
    for (stage, place), span in found.items():
        assert span.parent is None or span.parent.trace_id == trace
        if stage == "replica":
            assert (span.parent.span_id, span.kind) == (root.context.span_id, SpanKind.SERVER)
        elif stage != "request":
            assert span.parent.span_id == found["replica", place].context.span_id
            assert span.start_time >= found["replica", place].start_time
        assert span.start_time <= span.end_time
    for stage, place in (("propose", 0), ("prepare", 1), ("prepare", 2)):  # since the request, or the proposal, came
        assert found[stage, place].start_time < found[stage, place].end_time
    assert found["propose", 0].end_time <= found["execute", 0].end_time <= found["reply", 0].end_time
    assert found["reply", 0].end_time <= root.end_time or found["reply", 1].end_time <= root.end_time
    assert len({span.attributes["trustlog.slot"] for (stage, _), span in found.items() if stage == "execute"}) == 1
    assert {span.resource.attributes["service.name"] for span in found.values()} == {
        "trustlog-client",
        "trustlog-replica",
    }


def traced(exported, number=1, fraction=1.0):
    clock = iter(range(1000, 100_000, 1000))
    return tracing.RequestTracing(
        number, Spans(SimpleSpanProcessor(exported), Resource({}), fraction), lambda: next(clock)
    )


def times(exported):
    return {
        (span.name.removeprefix("trustlog "), span.attributes.get("trustlog.view")): (span.start_time, span.end_time)
        for span in exported.get_finished_spans()
    }


def test_each_stage_begins_where_the_one_before_it_ended(exported):
    one, envelope = traced(exported), request()
    batch = make_batch(0, (), [envelope])
    one.received(envelope)  # 1000
    one.received(envelope)  # 2000: sent again, known since it came first
    one.heard([PrePrepare(0, 5, batch).encode()])  # 3000
    one.said([Prepare(0, 5, batch.digest).encode()])  # 4000
    one.executed(5, batch)  # 5000
    one.said([Commit(0, 5, batch.digest).encode()])  # 6000: after others' sufficed
    one.replied(KEY, reply_to(envelope))  # 7000
    one.replied(KEY, reply_to(envelope))  # the same again is no news
    assert times(exported) == {
        ("prepare", 0): (3000, 4000),
        ("execute", None): (4000, 5000),
        ("commit", 0): (5000, 6000),
        ("reply", None): (5000, 7000),
        ("replica", None): (1000, 7000),
    }


def test_a_slot_that_was_proposed_in_two_views_has_votes_in_both(exported):
    one, envelope = traced(exported), request()
    batch = make_batch(0, (), [envelope])
    for view in (0, 1):
        one.heard([PrePrepare(view, 5, batch).encode()])
        one.said([Prepare(view, 5, batch.digest).encode()])
    one.executed(5, batch)
    assert {key for key in times(exported) if key[0] == "prepare"} == {("prepare", 0), ("prepare", 1)}
    assert len({span.context.span_id for span in exported.get_finished_spans()}) == 3


def test_what_is_remembered_is_bounded(exported, monkeypatch):
    monkeypatch.setattr(tracing, "REQUESTS_MAX", 4)
    monkeypatch.setattr(tracing, "SLOTS_MAX", 4)
    one = traced(exported)
    one._now_ns = lambda: 1
    for number in range(1, 100):
        envelope = request(number)
        batch = make_batch(0, (), [envelope])
        one.received(request(1000 + number))
        one.heard([PrePrepare(0, number, batch).encode(), b"", b"\1", b"\4" * 30])
        one.executed(number, batch)
    assert (len(one._received), len(one._slots), len(one._unanswered)) == (4, 4, 4)
    monkeypatch.setattr(client.tracing, "WAITING_MAX", 4)
    two = client.tracing.RequestTracing(CLUSTER, Limits(), one._spans)
    for number in range(1, 100, 2):
        two.sent(request(number, (b"x", b"y")).raw)
    assert (len(two._waiting), len(two._first)) == (4, 8)


def test_a_client_whose_first_operation_was_given_up_and_one_without_answer(exported):
    one = client.tracing.RequestTracing(
        CLUSTER, Limits(), Spans(SimpleSpanProcessor(exported), Resource({})), lambda: 7
    )
    one.sent(request(1, (b"x", b"y", b"z")).raw)
    one.sent(request(4, (b"x",)).raw)
    one.completed(SESSION, [2, 3])
    one.completed(SessionId(9, 9), [4])
    one.completed(SESSION, [])
    assert [span.attributes["trustlog.operations"] for span in exported.get_finished_spans()] == [3]
    one.close()
    assert [span.attributes["trustlog.answered"] for span in exported.get_finished_spans()] == [True, False]


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.5, 1.0])
def test_a_fraction_is_sampled_and_everybody_takes_the_same(exported, fraction):
    digests = [random.Random(number).randbytes(32) for number in range(4000)]
    one, sampler = Spans(None, None, fraction), TraceIdRatioBased(fraction)
    kept = [one.is_sampled(digest) for digest in digests]
    decisions = [sampler.should_sample(None, int.from_bytes(digest[:16], "big"), "x") for digest in digests]
    assert kept == [decision.decision.is_sampled() for decision in decisions]
    assert math.isclose(sum(kept) / len(kept), fraction, abs_tol=0.03)
    envelopes = [request(number) for number in range(1, 200)]
    replica = traced(exported, fraction=fraction)
    for slot, envelope in enumerate(envelopes, 1):
        replica._now_ns = lambda: 1
        replica.executed(slot, make_batch(0, (), [envelope]))
    wanted = sum(one.is_sampled(envelope.digest()) for envelope in envelopes)
    assert len(exported.get_finished_spans()) == wanted
    assert not one.is_sampled(bytes(32)), "no trace has the id 0"


def test_span_ids_are_of_digest_stage_and_place():
    digest = bytes(range(32))
    ids = {
        span_id(digest, stage, place) for stage in ("replica", "execute", "commit/0", "commit/1") for place in (0, 1)
    }
    assert len(ids) == 8
    assert span_id(digest, "replica", 0) == 0x4ECDF83311AB5753
    assert span_id(bytes(32), "replica", 0) != span_id(digest, "replica", 0)


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_SDK_DISABLED": "True"}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_TRACES_SAMPLER_ARG": "2"}, "from 0 to 1"),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:1", "OTEL_TRACES_SAMPLER_ARG": "x"}, "from 0 to 1"),
    ],
)
def test_no_traces(environ, words):
    told = []
    assert open_spans("s", "i", told.append, environ) is None
    assert len(told) == (words is not None)
    assert words is None or words in told[0]


def test_without_the_extra_it_is_said_and_nothing_else_changes(monkeypatch):
    def missing(_):
        raise ModuleNotFoundError("No module named 'opentelemetry'")

    monkeypatch.setattr(spans, "_exporting", missing)
    told = []
    assert open_spans("s", "i", told.append, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}) is None
    assert "pip install 'trustlog[tracing]'" in told[0]


def test_what_goes_wrong_is_told_once(exported):
    told = []
    opened = open_spans("s", "i", told.append)
    for place in (1, 2):
        logging.getLogger("opentelemetry.exporter").warning("cannot reach %s", place)
    logging.getLogger("opentelemetry.exporter").info("fine")
    opened.close()
    logging.getLogger("opentelemetry.exporter").addHandler(logging.NullHandler())
    logging.getLogger("opentelemetry.exporter").warning("closed")
    assert told == ["traces: cannot reach 1"]


@pytest.mark.parametrize("names", ["replica.shell.node, replica.cli.main", "client.api, client.cli.main"])
def test_without_an_endpoint_nothing_of_it_is_imported(names):
    script = f"import sys, {names}, replica.wire.spans as s\n"
    script += "assert s.open_spans('a', 'b') is None\n"
    script += "print([m for m in sys.modules if m.split('.')[0] in ('opentelemetry', 'requests', 'google')])"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OTEL_")} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
