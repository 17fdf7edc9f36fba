"""Comparing with peers: the table and its ratios, what is missing, what is sent to etcd; trustlog itself for a moment."""

import json
import re
import shutil
import tempfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from client.measure import Load, Run, summarise
from tests.bench import peers, report, trust
from tests.bench.programs import Program, ProgramError, module
from tests.bench.report import MissingPlaceError, rate_and_ratio, ratio, table, write_into
from tests.bench.rounds import Cell, Plan, Results, measure
from tests.bench.signatures import SignatureCosts
from tests.bench.sinks import put_request, varint
from tests.bench.systems import SYSTEMS, Guarantee, System


def level_of(rate, busy=0.5, cpu=10.0):
    return summarise(Load(1), [Run(int(rate), 1.0, 2.0, 9.0, {"client": cpu}, generator_cpus=busy, others_cpus=0.25)])


class Fake(System):
    guarantee = Guarantee(3, "1 crash", "in memory", "none")

    def __init__(self, name, with_connections=True, rate=100):
        self.name, self.with_connections, self.rate = name, with_connections, rate
        self.asked, self.running = [], False

    def missing(self):
        return ""

    def version(self):
        return "1"

    def start(self, folder, stack):
        assert not any(folder.iterdir())
        self.running = True
        stack.callback(self.stop)
        return self, {"server": 1}

    def stop(self):
        self.running = False

    def ask(self, question):
        assert self.running
        self.asked.append(question)
        run = Run(self.rate * question["concurrency"], 1.0, 2.0, 9.0, {"client": 1.0})
        return {name: getattr(run, name) for name in Run.__slots__}


def test_requests_to_etcd_are_protocol_buffers():
    assert [varint(n) for n in (0, 127, 128, 16384)] == [b"\x00", b"\x7f", b"\x80\x01", b"\x80\x80\x01"]
    assert put_request(b"key", b"v" * 200) == b"\x0a\x03key\x12\xc8\x01" + b"v" * 200


def test_systems_take_turns_and_each_round_begins_with_another(tmp_path):
    first, second = Fake("first"), Fake("second", with_connections=False)
    order = []
    plan = Plan(sizes=(100, 1024), levels=(1, 5), own_sizes=(100,), rounds=2, seconds=0.5)
    results = measure([first, second], plan, tmp_path, order.append)
    assert order == [
        f"round {r} of 2: {name}" for r, name in ((1, "first"), (1, "second"), (2, "second"), (2, "first"))
    ]
    assert set(results.levels) == {
        *((name, Cell(size, False, level)) for name in ("first", "second") for size in (100, 1024) for level in (1, 5)),
        ("first", Cell(100, True, 5)),
    }
    assert results.levels["first", Cell(100, True, 5)].runs == 2
    assert {(q["concurrency"], q["connections"]) for q in first.asked} == {(10, 1), (1, 1), (5, 1), (5, 5)}
    assert not first.running
    assert list(tmp_path.iterdir()) == []


def test_a_system_that_fails_is_named_and_the_others_are_measured(tmp_path):
    class Failing(Fake):
        def ask(self, question):
            if question["concurrency"] == 5:
                raise ProgramError("failing ended with code 1: why")
            return super().ask(question)

    told = []
    plan = Plan(sizes=(100,), levels=(1, 5), own_sizes=(), rounds=2, seconds=0.5)
    results = measure([Failing("failing"), Fake("other")], plan, tmp_path, told.append)
    assert results.get("failing", Cell(100, False, 1)).runs == 2
    assert results.get("failing", Cell(100, False, 5)) is None
    assert results.get("other", Cell(100, False, 5)).runs == 2
    assert results.failures == [f"round {number}: failing: failing ended with code 1: why" for number in (1, 2)]
    assert f"failed: {results.failures[0]}" in told
    page = peers.page_of([Fake("failing")], {}, plan, results, {})
    assert "| failing | 3; 1 crash; in memory | 100 | - |" in page
    assert "- failed in round 2: failing" in page


def test_the_table_shows_ratios_to_etcd_and_what_is_missing_and_who_was_the_limit():
    etcd, other, gone = peers.ETCD, Fake("other"), Fake("gone")
    plan = Plan(sizes=(100,), levels=(1, 50), own_sizes=(), rounds=3, seconds=2.0)
    levels = {
        ("etcd", Cell(100, False, 1)): level_of(200),
        ("etcd", Cell(100, False, 50)): level_of(1000),
        ("other", Cell(100, False, 1)): level_of(100),
        ("other", Cell(100, False, 50)): level_of(12_345, busy=0.97),
    }
    results = Results(levels, ["round 2: other: it ended\nat once"])
    page = peers.page_of([etcd, other, gone], {"gone": "apt-get install gone"}, plan, results, {"files on": "ext4"})
    rows = [line for line in page.splitlines() if line.startswith("| 100 B")]
    assert "| 200 (1.0x) | 1,000 (1.0x) | 2.00 | 9.00 | 0.50 |" in rows[0]
    assert "| 3; 1 crash; in memory | 100 (0.50x) | 12,345 (12x) | 2.00 | 9.00 | 0.97 (limit?) |" in rows[1]
    assert "| gone | 3; 1 crash; in memory | not installed | not installed |" in rows[2]
    assert "| gone | 3 | 1 crash | in memory | none | apt-get install gone |" in page
    assert "files on ext4" in page
    assert "Programs outside the measurement kept 0.25 processors busy (median; at most 0.25)." in page
    assert "- failed in round 2: other: it ended\n" in page
    without = peers.page_of([other], {}, plan, results, {})
    assert "etcd was not measured, so there are no ratios" in without
    assert "| 100 | 12,345 |" in without


def test_cells():
    assert [ratio(n) for n in (0.123, 0.5, 1.04, 9.96, 12.4)] == ["0.12x", "0.50x", "1.0x", "10.0x", "12x"]
    assert rate_and_ratio(None, level_of(1)) == "-"
    assert rate_and_ratio(level_of(1), level_of(0)) == "1"
    assert table(["a|b"], [["c"]]) == "| a\\|b |\n| --- |\n| c |"


def test_what_signatures_allow():
    assert SignatureCosts(30e-6, 90e-6, 2).bound_per_second == pytest.approx(2 / 300e-6)


def test_results_go_to_their_place_and_nowhere_else(tmp_path):
    page = tmp_path / "RESULTS.md"
    page.write_text("before\n<!-- a -->\nold\n<!-- end of a -->\nafter\n")
    write_into(page, "a", "new\n")
    write_into(page, "a", "newer")
    assert page.read_text() == "before\n<!-- a -->\n\nnewer\n\n<!-- end of a -->\nafter\n"
    with pytest.raises(MissingPlaceError, match="no place for these results"):
        write_into(page, "b", "x")
    for name in ("peers", "trust", "profile"):
        text = report.RESULTS.read_text()
        assert all(text.count(mark) == 1 for mark in report.marks(name))


def test_a_program_that_ends_is_named_with_its_last_words(tmp_path):
    program = Program("generator", module("tests.bench.generator", "trustlog", str(tmp_path)), tmp_path, talks=True)
    try:
        with pytest.raises(ProgramError, match=r"generator ended with code 1: (?s:.)*cluster\.toml"):
            program.ask(Cell(100, False, 1).question(0.1, {}))
    finally:
        program.stop()


def test_peers_that_are_not_installed_are_skipped_loudly_and_named(monkeypatch, tmp_path):
    """And trustlog is measured for a moment, through real processes."""
    monkeypatch.setattr(shutil, "which", lambda _: None)
    options = ["--only", "etcd", "--only", "Redis", "--only", "two-phase", "--rounds", "1", "--seconds", "0.2"]
    options += ["--size", "100", "--level", "1", "--level", "3", "--dir", str(tmp_path)]
    options += ["--json", str(tmp_path / "out"), "--plot", str(tmp_path / "svg")]
    done = CliRunner().invoke(peers.main, options)
    assert done.exit_code == 0, done.output
    assert "skipped: etcd: apt-get install etcd-server" in done.stderr
    assert "skipped: Redis: apt-get install redis-server" in done.stderr
    assert re.search(r"\| trustlog two-phase \| 3; 1 of any kind.* \| [\d,]+ \| [\d,]+ \| \d", done.stdout)
    assert "| Redis | 1; none; on disk (appendfsync always) | not installed |" in done.stdout
    figures = json.loads((tmp_path / "out").read_text())
    assert {(one["concurrency"], one["own_connections"]) for one in figures} == {(1, False), (3, False), (3, True)}
    assert all(one["ops_per_second"] > 0 and one["cpu_us_per_operation"]["log 0"] >= 0 for one in figures)
    assert "trustlog two-phase" in (tmp_path / "svg").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"out", "svg"}


def test_nothing_installed_is_an_error_and_no_empty_table(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    done = CliRunner().invoke(peers.main, ["--only", "Redis"])
    assert done.exit_code == 1
    assert "nothing of what was asked for is installed" in done.output


def test_the_cost_of_trust_is_shown_against_the_first_that_was_measured():
    wanted = [(Fake("gone"), "x"), (Fake("cheap"), "nothing"), (Fake("safe"), "a log")]
    plan = Plan((100,), (1, 50), (), 1, 1.0)
    levels = {
        (name, Cell(100, False, level)): level_of(rate, cpu=cpu)
        for name, level, rate, cpu in (
            ("cheap", 1, 100, 9),
            ("cheap", 50, 1000, 9),
            ("safe", 1, 50, 30),
            ("safe", 50, 900, 30),
        )
    }
    page = trust.page_of(wanted, {"gone": "apt-get install gone"}, plan, Results(levels, []), "here")
    assert "| gone | x | not installed | not installed | - | - | - | - |" in page
    assert "| safe | a log | 50 (0.50x) | 900 (0.90x) | 2.00 | 9.00 | 30 | 0.50 |" in page


def test_every_system_says_what_it_guarantees():
    names = [system.name for system in SYSTEMS]
    assert len(set(names)) == len(names) == 7
    for system in SYSTEMS:
        assert system.guarantee.n >= 1
        assert system.guarantee.durable
    assert Path(report.ROOT / "tests" / "bench" / "RESULTS.md") == report.RESULTS


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_files_in_memory_are_told_of(tmp_path, monkeypatch, capsys, kind):
    asked = []
    monkeypatch.setattr(report, "file_system_of", lambda path: asked.append(path) or kind)
    assert report.files_on(tmp_path) == report.files_on(None) == kind
    assert asked == [tmp_path, Path(tempfile.gettempdir())]
    assert capsys.readouterr().err.count("nothing is durable; name a disk with --dir") == (2 if kind == "tmpfs" else 0)
