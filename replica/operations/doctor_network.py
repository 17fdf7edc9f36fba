"""Examining what a replica meets on the network: its own ports, every peer, their files, clocks and opinions."""

import hashlib
import socket
from collections.abc import Iterator
from typing import Any, Final

from replica.cluster.clusterfile import format_address, is_loopback
from replica.cluster.home import SETTINGS_NAME, ReplicaHome
from replica.operations.asking import Answer, Outcome, ask, ask_all
from replica.operations.findings import Finding, fine, problem, warning
from replica.operations.health import own_place
from replica.operations.reports import doubts, text
from replica.wire import reports
from replica.wire.dial import REMEDY
from trustlog import __version__

# What batches' times may differ by before somebody wonders; nothing that is agreed on depends on a clock.
CLOCK_S_MAX: Final = 1.0
_SAME_FILE: Final = "copy the right cluster.toml to every machine, unchanged, and start the replicas again"

_REMEDIES: Final = {
    Outcome.NO_NAME: REMEDY,
    Outcome.NOT_LISTENING: "start that replica: trustlog-replica run; if it runs, compare its address and port",
    Outcome.UNREACHABLE: "see cables, routes and firewalls between the two machines",
    Outcome.SILENT: "a firewall that drops, or a machine that hangs: try from another one; if it runs, see its log",
    Outcome.WRONG_CERTIFICATE: "that replica runs with other keys, or the cluster.toml files differ: compare the two",
    Outcome.WRONG_VERSION: "run one version of trustlog everywhere",
    Outcome.WRONG_CLUSTER: _SAME_FILE,
    Outcome.WRONG_NUMBER: "two machines have changed places: compare addresses and numbers in cluster.toml",
    Outcome.REFUSED: "do what the text says; that replica's log has it as well",
    Outcome.BROKEN_OFF: "see that replica's log: it may be stopping, or another program listens there",
}


async def examine_network(home: ReplicaHome, deadline_s: float, *, startable: bool = True) -> list[Finding]:
    """Examine the replica of this folder from its own machine. startable: nothing in the folder has to be mended."""
    own = await ask(home.cluster, own_place(home), deadline_s)
    findings = [*_own_address(home), *_own_replica(home, own, startable=startable), *_http(home)]
    if _left_with(own) is not None:
        return findings  # its peers are members of another list, and its links to them have ended
    for answer in await ask_all(home.cluster, deadline_s):
        if answer.number != home.number:
            findings += examine_peer(home, answer)
    findings += _links(home, own)
    return findings


def _own_address(home: ReplicaHome) -> Iterator[Finding]:
    host, port = home.listen_address
    where = format_address(host, port)
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(family, kind) as tried:
            tried.bind(address)
    except OSError as error:
        remedy = f"set `listen` in {home.path / SETTINGS_NAME} to an address that this machine has"
        yield problem("port", where, f"this machine cannot listen there: {error.strerror}", remedy)
    else:
        yield fine("port", where, "is an address of this machine")


def _own_replica(home: ReplicaHome, own: Answer, *, startable: bool) -> Iterator[Finding]:
    where = own.place.address
    if own.outcome is Outcome.NOT_LISTENING:
        remedy = f"start it: trustlog-replica run {home.path}"
        remedy = remedy if startable else f"mend the problems of its folder, then {remedy}"
        yield warning("replica", where, "this replica does not run", remedy)
        return
    if own.outcome is not Outcome.ANSWERED:
        text_ = f"another program listens there, or this replica is ill: {own.problem}{_shown(own)}"
        yield problem("replica", where, text_, f"see who has the port (ss -ltnp); {_REMEDIES[own.outcome]}")
        return
    report = own.report
    if text(report, "cluster_file") != home.cluster.digest.hex():
        yield problem(
            "replica",
            home.cluster_path,
            f"has SHA-256 {home.cluster.digest.hex()}, the running replica read {text(report, 'cluster_file')}",
            "stop the replica and start it again, or put the file back",
        )
    left_with = _left_with(own)
    if left_with is not None:
        found = f"is no member any more since list {left_with} of members; it runs to serve those that are late"
        remedy = "stop it for good when all others work under that list: trustlog-replica member list"
        yield warning("replica", where, found, remedy)
        return
    halted, not_ready = text(report, "halted"), text(report, "not_ready")
    if halted is not None or not_ready is not None:
        remedy = "see replica/cli/README.md, What to do when; the replica's log says more"
        yield problem("replica", where, f"runs and is not ready: {halted or not_ready}", remedy)
    else:
        yield fine("replica", where, "runs and is ready")
    for number, verdict, reason in doubts(report):
        yield _doubt(f"replica {number}", verdict, reason, "this replica")


def _left_with(own: Answer) -> int | None:
    """Return the list of members with which the replica became none, None if it does not say so."""
    return reports.number(own.report, "members", "no_member_since")


def _http(home: ReplicaHome) -> Iterator[Finding]:
    if home.settings.http is None:
        return
    where = format_address(*home.settings.http)
    if is_loopback(home.settings.http[0]):
        yield fine("port", where, "HTTP is open to this machine only")
    else:
        remedy = "let only Prometheus reach it (a firewall), or set http to a loopback address"
        yield warning("port", where, "HTTP without protection: whoever reaches it reads keys and values", remedy)


def examine_peer(home: ReplicaHome, answer: Answer) -> Iterator[Finding]:
    """Say what was found at one peer."""
    who = f"replica {answer.number} ({answer.place.address})"
    if answer.outcome is not Outcome.ANSWERED:
        yield problem("peer", who, f"{answer.problem}{_shown(answer)}", _REMEDIES[answer.outcome])
    else:
        yield fine("peer", who, f"answers within {answer.rtt_s * 1000:.0f} ms")
    theirs = None if answer.challenge is None else answer.challenge.cluster_file_digest
    if theirs is not None and theirs != home.cluster.digest:
        found = f"its cluster.toml has SHA-256 {theirs.hex()}, ours ({home.cluster_path}) {home.cluster.digest.hex()}"
        yield problem("cluster-file", who, found, _SAME_FILE)
    elif theirs is not None:
        yield fine("cluster-file", who, "has the same cluster.toml")
    if answer.outcome is Outcome.ANSWERED:
        yield from _of_report(who, answer, home.number)


def _of_report(who: str, answer: Answer, number: int) -> Iterator[Finding]:
    ahead, unsure = answer.ahead_s, answer.rtt_s / 2
    if ahead is not None and abs(ahead) > CLOCK_S_MAX + unsure:
        way = "ahead of" if ahead > 0 else "behind"
        remedy = "have both machines follow one clock (NTP: chronyc tracking, timedatectl)"
        yield warning("clock", who, f"its clock is {abs(ahead):.1f} s {way} ours", remedy)
    elif ahead is not None:
        yield fine("clock", who, f"its clock agrees with ours to {abs(ahead) + unsure:.3f} s")
    version = text(answer.report, "version")
    if version is not None and version != __version__:
        yield warning("version", who, f"runs trustlog {version}, this is {__version__}", "finish the upgrade")
    for doubted, verdict, reason in doubts(answer.report):
        if doubted == number:
            yield _doubt("this replica", verdict, reason, who)


def _links(home: ReplicaHome, own: Answer) -> Iterator[Finding]:
    """Say what the running replica itself has against its connections: it presents a certificate, a doctor does not."""
    peers: Any = own.report.get("peers")
    for peer in peers if isinstance(peers, list) else []:
        if isinstance(peer, dict) and peer.get("connected") is False:
            where = f"replica {peer.get('replica')} ({text(peer, 'address')})"
            why = text(peer, "trouble") or "it does not say why"
            yield problem(
                "link", where, f"replica {home.number} does not read its log: {why}", "see the findings about that peer"
            )


def _doubt(whom: str, verdict: str, reason: str, by: str) -> Finding:
    if verdict == "suspected":
        remedy = "see that it runs, and its disk and network; the suspicion ends by itself"
        return warning("verdict", whom, f"{by} suspects it: {reason}", remedy)
    remedy = "keep the evidence; its log can never be trusted again: replace that replica with one that has a new log"
    return problem("verdict", whom, f"{by} holds it for {verdict}: {reason}", remedy)


def _shown(answer: Answer) -> str:
    """Return both certificates' digests, where they differ."""
    if answer.presented is None or answer.presented == answer.place.certificate_der:
        return ""
    shown = hashlib.sha256(answer.presented).hexdigest()
    return f"; it presents a certificate with SHA-256 {shown}, cluster.toml lists {answer.place.fingerprint.hex()}"
