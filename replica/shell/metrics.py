"""What Prometheus is told: the status report's numbers, and what the replica measures of itself.

Names and units follow Prometheus' conventions: seconds, `_total` for what only grows. deploy/monitoring has a dashboard
and alert rules that use them.
"""

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final

from cryptography import x509
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from replica.shell.measures import Distribution

if TYPE_CHECKING:
    from replica.shell.node import Node

# Fields of the status report that are one number each.
_GAUGES: Final = {
    "view": "Current view",
    "primary": "Number of the current view's primary",
    "executed": "Highest slot executed",
    "stable": "Highest stable checkpoint",
    "persisted": "Slot whose state is durable",
    "keys": "Keys in the application's state",
    "sessions": "Client sessions",
    "clients": "Connected clients",
    "requests_waiting": "Requests that wait to be ordered",
    "uptime_s": "Seconds since the start",
}

# What may be refused, so that each has a series before it happens first; what a peer's evidence or a group's proof is
# refused for is more, and has one from then on.
REFUSALS: Final = (
    "accept-failed",
    "bad-envelope-signature",
    "before-appraisal",
    "client-gave-way",
    "disk-behind",
    "evidence-not-judged",
    "evidence-not-made",
    "evidence-version",
    "executed-lately",
    "foreign-envelope",
    "group-dropped",
    "group-forked",
    "group-known",
    "group-own-log",
    "group-stray",
    "handshake-timeout",
    "heads-of-another-list",
    "hello-bad-signature",
    "hello-not-that-replica",
    "hello-other-cluster",
    "hello-too-many-clients",
    "hello-version",
    "http-failed",
    "idle",
    "lie",
    "malformed-envelope",
    "members-refused",
    "members-unasked",
    "notice-from-peer",
    "offer-unasked",
    "part-gone",
    "part-poisoned",
    "parts-at-once",
    "relay-answered",
    "relay-not-sent",
    "relay-queue-full",
    "replay-again",
    "reply-not-read",
    "reply-too-large",
    "request-gave-way",
    "request-over-quota",
    "request-queue-full",
    "state-refused",
    "state-unreadable",
    "tls-failed",
    "too-many-strangers",
)


class ReplicaMetrics(Collector):
    """One replica's metrics, as they are when they are asked for."""

    def __init__(self, node: "Node") -> None:
        self._node = node

    def collect(self) -> Iterator[Metric]:
        """See Collector."""
        report: dict[str, Any] = json.loads(self._node.status_json())
        yield from _of_report(report)
        yield from _of_peers(report)
        yield from self._measured()
        yield from self._kept()

    def _measured(self) -> Iterator[Metric]:
        measures = self._node.measures
        yield _histogram("fsync_seconds", "Making a group's causes and payloads durable", measures.fsync_s)
        yield _histogram("attest_seconds", "The trusted log's append and signature, per group", measures.attest_s)
        verify = HistogramMetricFamily("trustlog_verify_seconds", "Verifying a signature", labels=["of"])
        for of, distribution in measures.verify_s.items():
            verify.add_metric([of], *_shape(distribution))
        yield verify
        yield _histogram("group_entries", "Entries in a group of the own log", measures.group_entries)
        yield _histogram("batch_operations", "Operations in an executed batch", measures.batch_operations)
        yield _histogram("client_seconds", "From a client's request to this replica's reply", measures.client_s)
        yield CounterMetricFamily(
            "trustlog_client_operations", "Connected clients' operations answered", value=measures.client_operations
        )
        yield CounterMetricFamily("trustlog_view_changes", "Views entered", value=measures.view_changes)
        suspicions = CounterMetricFamily("trustlog_suspicions", "Times a log became suspected", labels=["peer"])
        exposures = CounterMetricFamily("trustlog_exposures", "Logs found to break a rule, or broken", labels=["peer"])
        for number in self._node.links:
            suspicions.add_metric([str(number)], measures.suspicions[number])
            exposures.add_metric([str(number)], measures.exposures[number])
        yield from (suspicions, exposures)

    def _kept(self) -> Iterator[Metric]:
        """Yield what must be looked after in time: the own certificate, and the disk below the folder."""
        home = self._node.home
        ends = x509.load_der_x509_certificate(home.place.certificate_der).not_valid_after_utc.timestamp()
        yield GaugeMetricFamily(
            "trustlog_certificate_expiry_timestamp_seconds", "When its certificate expires, Unix time", value=ends
        )
        with suppress(OSError):
            found = os.statvfs(home.path)
            free = found.f_bavail * found.f_frsize
            yield GaugeMetricFamily("trustlog_disk_free_bytes", "Free on the disk of the replica's folder", value=free)


def _of_report(report: dict[str, Any]) -> Iterator[Metric]:
    for name, text in _GAUGES.items():
        yield GaugeMetricFamily(f"trustlog_{name.replace('uptime_s', 'uptime_seconds')}", text, value=report[name])
    yield InfoMetricFamily(
        "trustlog_replica",
        "What this replica is",
        value={
            "replica": str(report["replica"]),
            "version": report["version"],
            "cluster_id": report["cluster_id"],
            "cluster_file": report["cluster_file"],
            "ordering": report["ordering"],
            "backend": report["log"]["backend"],
            "durability": report["durability"],
        },
    )
    yield GaugeMetricFamily("trustlog_ready", "1 if ready", value=int(report["not_ready"] is None))
    left = report["members"]["no_member_since"] is not None
    yield GaugeMetricFamily(
        "trustlog_member", "0 if no member any more, so that it may be stopped", value=int(not left)
    )
    yield GaugeMetricFamily("trustlog_mute", "1 if this replica may not speak", value=int(report["mute"] is not None))
    yield GaugeMetricFamily("trustlog_log_last", "Last index of the own log", value=report["log"]["last"])
    turn = report["loop"]["longest_turn_ms"] / 1000
    yield GaugeMetricFamily("trustlog_longest_turn_seconds", "Longest turn of the last ten seconds", value=turn)
    yield GaugeMetricFamily("trustlog_evidence_files", "Files of evidence kept", value=len(report["evidence"]))
    yield CounterMetricFamily("trustlog_operations", "Operations executed", value=report["operations"])
    refused = CounterMetricFamily("trustlog_refused", "What was refused, by reason", labels=["reason"])
    for reason, count in {**dict.fromkeys(REFUSALS, 0), **report["refused"]}.items():
        refused.add_metric([reason], count)
    yield refused


def _of_peers(report: dict[str, Any]) -> Iterator[Metric]:
    connected = GaugeMetricFamily("trustlog_peer_connected", "1 if connected", labels=["peer"])
    read = GaugeMetricFamily("trustlog_peer_log_read", "Index up to which the log was read", labels=["peer"])
    same = GaugeMetricFamily("trustlog_peer_same_cluster_file", "0 if its cluster.toml differs", labels=["peer"])
    for peer in report["peers"]:
        connected.add_metric([str(peer["replica"])], int(peer["connected"]))
        read.add_metric([str(peer["replica"])], peer["read"])
        if peer["cluster_file"] is not None:
            same.add_metric([str(peer["replica"])], int(peer["cluster_file"] == report["cluster_file"]))
    trusted = GaugeMetricFamily("trustlog_log_trusted", "1 if trusted, else 0", labels=["log", "verdict"])
    for one in report["verdicts"]:
        trusted.add_metric([str(one["replica"]), one["verdict"]], int(one["verdict"] == "trusted"))
    yield from (connected, read, same, trusted)


def _histogram(name: str, text: str, distribution: Distribution) -> Metric:
    buckets, total = _shape(distribution)
    return HistogramMetricFamily(f"trustlog_{name}", text, buckets=buckets, sum_value=total)


def _shape(distribution: Distribution) -> tuple[list[tuple[str, float]], float]:
    bounds = [*(str(bound) for bound in distribution.bounds), "+Inf"]
    return list(zip(bounds, map(float, accumulate(distribution.counts)), strict=True)), distribution.sum
