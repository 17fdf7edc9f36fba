"""What the doctor concludes from answers and figures that no cluster of this machine gives; and reports of liars."""

import datetime as dt
import json
import os
import resource
import shutil

import pytest

from replica.cluster.home import load_home
from replica.cluster.provision import assemble, init_cluster, keygen, renew_certificate
from replica.operations import doctor_folder
from replica.operations.asking import Answer, Outcome
from replica.operations.doctor_network import examine_peer
from replica.operations.findings import Severity
from replica.operations.health import health_of
from replica.operations.reports import REPORT_BYTES_MAX, doubts, median_ms, read_report, text
from replica.wire.messages import WIRE_VERSION, Challenge
from replica.wire.reports import DEPTH_MAX, number
from trustlog import __version__


@pytest.fixture
def home(tmp_path):
    init_cluster(tmp_path / "c", base_port=0)
    return load_home(tmp_path / "c" / "replica-0")


def answered(home, **changes):
    report = {"executed": 7, "not_ready": None, "halted": None, "version": __version__, "verdicts": []}
    cluster = home.cluster
    challenge = Challenge(WIRE_VERSION, cluster.cluster_id, cluster.digest, 1, bytes(32))
    fields = {"report": report | changes.pop("report", {}), "rtt_s": 0.01, "ahead_s": 0.0, "challenge": challenge}
    return Answer(cluster.replicas[1], Outcome.ANSWERED, "", **(fields | changes))


def bad(home, answer):
    return [one for one in examine_peer(home, answer) if one.severity is not Severity.OK]


def test_a_peer_that_is_well(home):
    assert bad(home, answered(home)) == []


@pytest.mark.parametrize(("ahead", "way"), [(5.0, "ahead of"), (-5.0, "behind")])
def test_a_clock_that_differs(home, ahead, way):
    (found,) = bad(home, answered(home, ahead_s=ahead))
    assert (found.check, found.severity) == ("clock", Severity.WARNING)
    assert f"5.0 s {way} ours" in found.text
    # Not when the answer took so long that nobody can tell.
    assert bad(home, answered(home, ahead_s=ahead, rtt_s=9.0)) == []


def test_another_version_and_another_file(home):
    (found,) = bad(home, answered(home, report={"version": "9.9"}))
    assert (found.check, "9.9" in found.text) == ("version", True)
    challenge = Challenge(WIRE_VERSION, home.cluster.cluster_id, b"\xaa" * 32, 1, bytes(32))
    (found,) = bad(home, answered(home, challenge=challenge))
    assert "aa" * 32 in found.text
    assert home.cluster.digest.hex() in found.text


@pytest.mark.parametrize(("verdict", "severity"), [("suspected", Severity.WARNING), ("exposed", Severity.PROBLEM)])
def test_what_a_peer_thinks_of_this_replica(home, verdict, severity):
    verdicts = [{"replica": 0, "verdict": verdict, "reason": "silent"}, {"replica": 2, "verdict": "exposed"}]
    (found,) = bad(home, answered(home, report={"verdicts": verdicts}))
    assert (found.check, found.severity, found.subject) == ("verdict", severity, "this replica")


@pytest.mark.parametrize("outcome", [outcome for outcome in Outcome if outcome is not Outcome.ANSWERED])
def test_every_outcome_has_a_remedy_and_is_no_health(home, outcome):
    answer = Answer(home.cluster.replicas[1], outcome, "in words")
    (found,) = bad(home, answer)
    assert found.severity is Severity.PROBLEM
    assert found.remedy
    assert health_of(answer).problem == "in words"
    assert not health_of(answer).live


def test_health_needs_a_word_and_not_its_absence(home):
    assert health_of(answered(home)).ready
    assert health_of(answered(home, report={"not_ready": "why"})).problem == "why"
    assert not health_of(answered(home, report={"halted": "why"})).live
    assert not health_of(Answer(home.cluster.replicas[1], Outcome.ANSWERED, "", report={"executed": 1})).ready


class Stat:
    f_frsize, f_blocks, f_files, f_favail, f_flag = 4096, 1 << 20, 100, 50, 0

    def __init__(self, free_mib, **more):
        self.f_bavail = free_mib * 256
        self.__dict__.update(more)


@pytest.mark.parametrize(
    ("found", "severity", "words"),
    [
        (Stat(2000), Severity.OK, "2000 MiB free"),
        (Stat(500), Severity.WARNING, "500 MiB free"),
        (Stat(10), Severity.PROBLEM, "10 MiB free"),
        (Stat(2000, f_favail=0), Severity.PROBLEM, "no inode"),
        (Stat(2000, f_flag=os.ST_RDONLY), Severity.PROBLEM, "read-only"),
    ],
)
def test_the_disk(home, monkeypatch, found, severity, words):
    monkeypatch.setattr(os, "statvfs", lambda _: found)
    (one,) = doctor_folder._disk(home.path)
    assert one.severity is severity
    assert words in one.text


def test_too_few_open_files(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 1024))
    (one,) = doctor_folder._limits()
    assert one.severity is Severity.WARNING
    assert "ulimit -n" in one.remedy


def test_certificates_by_the_clock(home):
    at = lambda year: list(doctor_folder.certificates(home.cluster, dt.datetime(year, 1, 1, tzinfo=dt.UTC)))  # noqa: E731
    assert {one.severity for one in at(2026)} == {Severity.OK}
    soon = dt.datetime(9999, 12, 20, tzinfo=dt.UTC)
    assert {one.severity for one in doctor_folder.certificates(home.cluster, soon)} == {Severity.WARNING}
    assert {one.severity for one in at(1960)} == {Severity.PROBLEM}


def test_a_cluster_that_nobody_can_change(home, tmp_path):
    assert list(doctor_folder.operators(home)) == []
    publics = []
    for i in range(3):
        shutil.rmtree(tmp_path / "c" / f"replica-{i}")
        publics.append(keygen(tmp_path / "c" / f"replica-{i}", i, "127.0.0.1", 7100 + i))
    (tmp_path / "c" / "cluster.toml").unlink()
    assemble(publics, tmp_path / "c" / "cluster.toml")
    found, _ = doctor_folder.examine_folder(home.path, dt.datetime.now(dt.UTC))
    assert [(one.check, one.severity, "refound" in one.remedy) for one in found if one.check == "operator"] == [
        ("operator", Severity.WARNING, True)
    ]


def problems(home):
    now = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    return [one for one in doctor_folder.examine_folder(home.path, now)[0] if one.severity is Severity.PROBLEM]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_files_of_another_user_than_the_folders(home):
    log_names = {"log/log.state", "log/seal.key"}
    before = {one.subject for one in problems(home)}
    for name in ("tls.crt", *log_names):
        os.chown(home.path / name, 65534, -1)
    found = [one for one in problems(home) if one.subject not in before]
    assert {one.text.partition(":")[0] for one in found} == {"tls.crt", "log.state, seal.key"}
    assert all("of another user (65534) than" in one.text and "chown -R 0 " in one.remedy for one in found)


def test_a_waiting_certificate_that_is_of_no_use(home):
    renew_certificate(home)
    (home.path / "tls.next.key").write_text("half a key")
    (found,) = [one for one in problems(home) if one.check == "certificate"]
    assert found.subject == str(home.path / "tls.next.crt")
    assert "tls.next.key: not a private key in PEM" in found.text


# Reports are what somebody else says


@pytest.mark.parametrize(
    "raw",
    [b"", b"[]", b"nonsense", b"1", b"null", b'"x"', b"[" * 100_000, b'{"a":' * 5000, b" " * (REPORT_BYTES_MAX + 1)],
)
def test_what_is_no_report_is_empty(raw):
    assert read_report(raw) == {}


def test_a_report_is_made_harmless():
    deep = "x"
    for _ in range(DEPTH_MAX + 3):
        deep = [deep]
    report = read_report(
        json.dumps({"a\x1b[2J": "b\nc", "long": "y" * 10_000, "deep": deep, "n": float("inf")}).encode()
    )
    assert all(ord(char) >= 32 for char in json.dumps(report))
    assert "\\x1b" in str(report.keys()) or "\\\\x1b" in str(report.keys())
    assert len(report["long"]) < 1000
    assert report["n"] is None
    assert "…" in json.dumps(report["deep"], ensure_ascii=False)


@pytest.mark.parametrize("value", [None, True, -1, 1 << 64, 1.5, "7", [7], {"x": 7}])
def test_what_is_no_number_is_none(value):
    assert number({"a": {"b": value}}, "a", "b") is None
    assert number({"a": value}, "a", "b") is None
    assert median_ms({"latency_ms": {"fsync": {"median": "7"}}}, "fsync") is None
    assert text({"a": value}, "a") == (value if isinstance(value, str) else None)


@pytest.mark.parametrize("value", [None, 7, {"verdict": "x"}, [None, 3, "x"], [[]]])
def test_verdicts_of_any_shape(value):
    assert doubts({"verdicts": value}) == []
    assert doubts({"verdicts": [{"verdict": "exposed"}, {"verdict": 3}, {"verdict": "trusted"}]}) == [
        (0, "exposed", "-"),
        (0, "-", "-"),
    ]
