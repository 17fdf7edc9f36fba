"""Real processes that trace: each exports its part of a request's trace to a collector on loopback, which puts it together."""

import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.support.cluster import Processes, environment
from tests.support.waiting import wait_for

pytestmark = pytest.mark.cluster


class Collector:
    """Takes OTLP over HTTP, and keeps every span with the name of the process that it came from."""

    def __init__(self):
        collector = self
        self.spans, self.lock = [], threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                assert self.path == "/v1/traces"
                body = self.rfile.read(int(self.headers["Content-Length"]))
                collector.take(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def take(self, request):
        with self.lock:
            for group in request.resource_spans:
                resource = {one.key: one.value.string_value for one in group.resource.attributes}
                instance = resource["service.name"], resource["service.instance.id"]
                self.spans += [(instance, span) for scope in group.scope_spans for span in scope.spans]

    @property
    def traces(self):
        """Trace id -> its spans, with who sent each."""
        found = defaultdict(list)
        with self.lock:
            for instance, span in self.spans:
                found[span.trace_id].append((instance, span))
        return found

    @property
    def variables(self):
        return {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{self.server.server_port}",
            "OTEL_BSP_SCHEDULE_DELAY": "100",
        }


@contextlib.contextmanager
def collecting():
    collector = Collector()
    thread = threading.Thread(target=collector.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield collector
    finally:
        collector.server.shutdown()
        thread.join()
        collector.server.server_close()


def put(cluster, key, **variables):
    command = [
        sys.executable,
        "-m",
        "client.cli.main",
        "-c",
        str(cluster.directory),
        "--deadline",
        "30",
        "put",
        key,
        "v",
    ]
    done = subprocess.run(command, env=environment(**variables), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "created\n", ""), done.stderr


def test_every_process_sends_its_part_of_one_trace(tmp_path):
    with collecting() as collector, Processes(tmp_path / "c", extra_environment=collector.variables) as cluster:
        cluster.start_and_wait()
        for number in range(3):
            put(cluster, f"k{number}", **collector.variables)

        def complete():
            return sum(len(spans) == 16 for spans in collector.traces.values()) == 3

        wait_for(complete, "three whole traces", 30)
        # The helper that waited for the cluster traced nothing: it has no endpoint.
        assert len(collector.traces) == 3
        for spans in collector.traces.values():
            named = Counter((span.name.removeprefix("trustlog "), instance[0]) for instance, span in spans)
            assert named == {
                ("request", "trustlog-client"): 1,
                ("replica", "trustlog-replica"): 3,
                ("propose", "trustlog-replica"): 1,
                ("prepare", "trustlog-replica"): 2,
                ("commit", "trustlog-replica"): 3,
                ("execute", "trustlog-replica"): 3,
                ("reply", "trustlog-replica"): 3,
            }
            ids = {span.span_id for _, span in spans}
            assert len(ids) == 16
            roots = [span.name for _, span in spans if not span.parent_span_id]
            assert roots == ["trustlog request"]
            assert all(span.parent_span_id in ids for _, span in spans if span.parent_span_id)
            by_name = defaultdict(list)
            for (_, instance), span in spans:
                by_name[span.name.removeprefix("trustlog ")].append(instance)
            assert by_name["propose"] == ["replica-0"]
            assert sorted(by_name["prepare"]) == ["replica-1", "replica-2"]
            assert sorted(by_name["execute"]) == ["replica-0", "replica-1", "replica-2"]


def test_nothing_is_traced_of_a_fraction_of_nothing(tmp_path):
    with collecting() as collector:
        variables = collector.variables | {"OTEL_TRACES_SAMPLER_ARG": "0"}
        with Processes(tmp_path / "c", extra_environment=variables) as cluster:
            cluster.start_and_wait()
            put(cluster, "a", **variables)
            for number in range(3):
                cluster.kill(number, signal.SIGTERM)  # what waits is exported at the end
        assert collector.spans == []


@pytest.mark.parametrize("collector", ["away", "silent"])
def test_a_collector_that_is_away_or_silent_keeps_nobody(tmp_path, collector):
    """Requests are served, the replica says once what is wrong, and everybody ends long before the exporter gives up."""
    # Never served: it only takes connections.
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as silent:
        port = 1 if collector == "away" else silent.server_port
        variables = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}",
            "OTEL_EXPORTER_OTLP_TIMEOUT": "60",
            "OTEL_BSP_SCHEDULE_DELAY": "50",
        }
        with Processes(tmp_path / "c", extra_environment=variables) as cluster:
            cluster.start_and_wait()
            ends = time.monotonic() + 25
            put(cluster, "a", **variables)
            if collector == "away":
                cluster.wait_logged(0, '"event": "tracing"')
            for number in range(3):
                cluster.kill(number, signal.SIGTERM)
            assert time.monotonic() < ends
            logged = cluster.log_path(0).read_text()
            assert "Traceback" not in logged
            assert logged.count('"event": "tracing"') <= 4
            assert '"event": "stopped"' in logged


def test_a_fraction_that_is_none_is_named_and_the_replica_runs(tmp_path):
    variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_TRACES_SAMPLER_ARG": "all"}
    with Processes(tmp_path / "c", extra_environment=variables) as cluster:
        cluster.start(0)
        cluster.wait_logged(0, "listening")
        assert "no traces: OTEL_TRACES_SAMPLER_ARG must be a number from 0 to 1" in cluster.log_path(0).read_text()
