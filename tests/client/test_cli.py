"""The commands' contract: exit codes, JSON on stdout only, raw bytes in plain, help with examples."""

import asyncio
import base64
import io
import json
import re
import sys
import time

import pytest
from rich.console import Console

from client.api import Client
from client.cli import status_command
from client.cli.main import cli, main
from client.queries import ReplicaStatus
from client.watch import Position, WatchAhead, WatchGone
from replica.apps.kv import KEY_BYTES_MAX
from replica.core.genesis import Limits

COMMANDS = sorted(cli.commands)


@pytest.fixture
def run(served, capfdbinary):
    """Run a command against the fake fleet: (exit code, stdout, stderr)."""
    return runner(served.directory, capfdbinary)


@pytest.fixture
def dead(fleet, capfdbinary):
    """Run a command against a cluster of which nothing runs."""
    return runner(fleet.directory, capfdbinary)


def runner(directory, captured):
    def call(*arguments, deadline="5", stdin=None):
        # Bytes are arguments as a shell passes them.
        argv = [a.decode("utf-8", "surrogateescape") if isinstance(a, bytes) else a for a in arguments]
        before = sys.stdin
        if stdin is not None:
            sys.stdin = io.TextIOWrapper(io.BytesIO(stdin))
        try:
            with pytest.raises(SystemExit) as ended:
                main(["-c", str(directory), "--deadline", deadline, *argv])
        finally:
            sys.stdin = before
        out, err = captured.readouterr()
        return ended.value.code, out, err

    return call


def document(out):
    """The one JSON document on stdout."""
    (line,) = out.decode().splitlines()
    found = json.loads(line)
    assert found["schema_version"] == 1
    return found


def test_put_get_del(run):
    assert run("put", "k", "v") == (0, b"created\n", b"")
    assert run("put", "k", "w") == (0, b"replaced\n", b"")
    assert run("get", "k") == (0, b"w", b"")
    assert run("get", "k", "--stale") == (0, b"w", b"")
    code, out, _ = run("get", "k", "-o", "json")
    assert (code, document(out)["value"]) == (0, "w")
    assert run("del", "k") == (0, b"deleted\n", b"")
    assert run("del", "k") == (1, b"absent\n", b"")
    assert run("get", "k") == (1, b"", b"no such key: k\n")
    code, out, err = run("get", "k", "-o", "json")
    assert (code, document(out)["found"], err) == (1, False, b"")


def test_bytes_pass_unchanged(run, tmp_path):
    value = bytes(range(256))
    (tmp_path / "value").write_bytes(value)
    assert run("put", b"\xff\xfe", "--file", str(tmp_path / "value"))[0] == 0
    assert run("get", b"\xff\xfe", "-o", "plain") == (0, value, b"")
    _, out, _ = run("get", b"\xff\xfe", "-o", "json")
    found = document(out)
    assert base64.b64decode(found["value_base64"]) == value
    assert base64.b64decode(found["key_base64"]) == b"\xff\xfe"
    assert "value" not in found
    assert run("put", "stdin", "--file", "-", stdin=b"\x00\n")[0] == 0
    assert run("get", "stdin") == (0, b"\x00\n", b"")


def test_nothing_foreign_reaches_a_terminal(run):
    run("put", "k", b"a\x1b[2J")
    _, out, _ = run("get", "k", "-o", "table")
    assert out == b"a\x1b[2J"  # not a terminal
    for form in ("plain", "table"):
        _, out, _ = run("scan", "-o", form)
        assert b"\x1b" not in out
        assert b"\\x1b" in out


def test_cas(run):
    assert run("cas", "k", "v", "--absent") == (0, b"swapped\n", b"")
    assert run("cas", "k", "v", "--absent") == (1, b"not swapped: the value is v\n", b"")
    assert run("cas", "k", "x", "y")[0] == 1
    code, out, _ = run("cas", "k", "v", "w", "-o", "json")
    assert (code, document(out)["swapped"]) == (0, True)
    code, out, _ = run("cas", "none", "v", "w", "-o", "json")
    assert (code, document(out)["found"]) == (1, False)
    assert run("cas", "k", "v")[0] == 2


def test_incr_also_downwards(run):
    assert run("incr", "n") == (0, b"1\n", b"")
    assert run("incr", "n", "-5") == (0, b"-4\n", b"")
    code, out, _ = run("incr", "n", "10", "-o", "json")
    assert (code, document(out)["number"]) == (0, 6)
    run("put", "t", "text")
    code, out, err = run("incr", "t")
    assert (code, out) == (1, b"")
    assert b"not a whole number" in err
    code, out, err = run("incr", "t", "-o", "json")
    assert (code, document(out)["error"]["code"], err) == (1, "operation-failed", b"")


def test_scan(run):
    for i in range(5):
        run("put", f"p/{i}", str(i))
    run("put", "q", "x")
    code, out, err = run("scan", "p/")
    assert (code, out.splitlines()[0], len(out.splitlines()), err) == (0, b"p/0\t0", 5, b"")
    code, out, err = run("scan", "p/", "--limit", "2", "--after", "p/1", "-o", "json")
    assert document(out) == {
        "schema_version": 1,
        "items": [{"key": "p/2", "value": "2"}, {"key": "p/3", "value": "3"}],
        "more": True,
    }
    assert b"--after 'p/1'" in run("scan", "p/", "--limit", "2")[2]
    assert document(run("scan", "none", "-o", "json")[1])["items"] == []


def test_exec(run):
    run("put", "k", "v")
    assert run("exec", "--hex", "0200016b") == (0, b"\x01v", b"")
    assert run("exec", "--hex", "0200016b", "--stale") == (0, b"\x01v", b"")
    assert run("exec", "--hex", "xyz")[0] == 2
    code, out, _ = run("exec", "what?", "-o", "json")
    assert (code, document(out)["error"]["code"]) == (1, "operation-failed")


def test_status(run, served):
    code, out, _ = run("status", "-o", "json")
    found = document(out)
    assert (code, found["serves"], found["reachable"], found["quorum"]) == (0, True, 3, 2)
    assert found["replicas"][1]["report"]["number"] == 1
    code, out, err = run("status", "-o", "plain")
    assert (code, len(out.splitlines())) == (0, 3)
    assert b"3 of 3 replicas reachable, 2 are needed" in err
    assert max(map(len, run("status", "-o", "table")[1].decode().splitlines())) <= 80


def test_plain_status_has_the_fields_that_its_help_lists(run, capfdbinary):
    rows = [line.split("\t") for line in run("status", "-o", "plain")[1].decode().splitlines()]
    assert [row[0] for row in rows] == ["0", "1", "2"]
    assert {len(row) for row in rows} == {12}
    assert {row[1] for row in rows} <= {"*", "-"}
    assert all(row[2].startswith("127.0.0.1:") for row in rows)
    replica = ReplicaStatus(2, "h:1", True, "", {"primary": 2, "number": 2})
    assert status_command._row(replica)[:3] == ("2", "*", "h:1")
    assert status_command._row(replica)[10:] == ("", "-"), "an older replica says nothing of verdicts"


def test_status_says_what_keeps_each_log(served, run):
    out = run("status", "-o", "table")[1].decode()
    assert "log of 0, 1, 2: in process: not against this host's own program" in out
    assert "log of" not in run("status", "-o", "plain")[1].decode()


def test_a_log_that_is_away_is_remarked():
    log = {"backend": "process", "trouble": "the trusted log is away"}
    assert status_command._row(ReplicaStatus(0, "h:1", True, "", {"log": log}))[10] == "the trusted log is away"


def test_a_table_of_80_columns_is_readable(dead):
    """Addresses are whole, whatever else is long; remarks stand below, one for each replica."""
    report = {"view": 12345, "executed": 123_456_789, "stable": 123_456_000, "durability": "milestones", "primary": 1}
    log = {"last": 123_456_789, "head": "0123456789abcdef", "backend": "process"}
    addresses = [f"127.0.0.1:6553{number}" for number in range(3)]
    found = [
        ReplicaStatus(number, address, True, "", {**report, "log": log}) for number, address in enumerate(addresses)
    ]
    shown = io.StringIO()
    Console(file=shown, width=80).print(status_command._table([status_command._row(one) for one in found]))
    lines = shown.getvalue().splitlines()
    assert [[word for word in line.split() if ":" in word] for line in lines[1:] if ":" in line] == [
        [address] for address in addresses
    ]
    assert max(map(len, lines)) <= 80
    out = dead("status", "-o", "table")[1].decode()
    for number in range(3):
        assert f"\nreplica-{number}: not reachable: " in out
    rows = out.splitlines()[:4]
    assert [bool(re.search(r" 127\.0\.0\.1:\d{4,5} ", line)) for line in rows] == [False, True, True, True]
    assert "remark" not in rows[0]


def test_status_shows_verdicts():
    verdicts = [
        {"replica": 0, "verdict": "trusted", "reason": None, "for_s": None},
        {"replica": 1, "verdict": "exposed", "reason": "wrong-view", "for_s": 80},
        {"replica": 2, "verdict": "suspected", "reason": "silent", "for_s": 12},
        {"replica": 3, "verdict": "broken", "reason": "forked", "for_s": 0},
    ]
    row = status_command._row(ReplicaStatus(0, "h:1", True, "", {"verdicts": verdicts}))
    assert row[11] == "1:exposed:wrong-view:80,2:suspected:silent:12,3:broken:forked:0"
    assert row[10] == "exposes 1 (wrong-view); suspects 2 (silent 12 s); trusted part broken: 3 (forked)"
    row = status_command._row(ReplicaStatus(0, "h:1", True, "", {"verdicts": verdicts[:1]}))
    assert row[10:] == ("", "trusted")
    for odd in ([None, 5, {}], "x", {"verdict": 1}, [{"verdict": ["\x1b"], "replica": "x", "for_s": -1}]):
        assert len(status_command._row(ReplicaStatus(0, "h:1", True, "", {"verdicts": odd}))) == 12


# Limits.


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("put", "", "v"), "1 to 4096 bytes, not 0"),
        (("get", "k" * 4097), "1 to 4096 bytes, not 4097"),
        (("put", "k", "--file", "-"), "the cluster's limit is 1048576"),
    ],
)
def test_limits_are_named_with_the_commands_own_help(run, arguments, words):
    code, out, _ = run(*arguments, "-o", "json", stdin=bytes(1024 * 1024))
    error = document(out)["error"]
    assert (code, error["code"]) == (2, "usage")
    assert words in error["message"]
    assert "1 to 4096 bytes" in error["hint"]
    assert "1 MiB" in error["hint"]
    assert error["hint"].endswith(f"see: trustlog-client {arguments[0]} --help")


def test_the_limits_in_the_texts_are_the_limits():
    assert (KEY_BYTES_MAX, Limits().operation_bytes_max, Limits().result_bytes_max) == (4096, 2**20, 2**20)
    assert all("4096 bytes" in cli.commands[name].help for name in ("put", "get", "del", "cas", "incr"))


@pytest.mark.parametrize("line", [b"k\t" + bytes(1024 * 1024) + b"\n", b"k" * 4097 + b"\tv\n"])
def test_load_names_an_oversized_record_as_it_names_other_bad_lines(run, line):
    code, out, _ = run("load", "-", "-o", "json", stdin=b"a\tb\n\n" + line + b"c\td\n")
    error = document(out)["error"]
    assert (code, error["code"]) == (2, "malformed-record")
    assert error["message"].startswith("line 3: ")
    assert "1 records were written" in error["message"]


@pytest.mark.parametrize("mend", [lambda key: key.chmod(0o644), lambda key: key.write_text("broken")])
def test_a_broken_client_key_is_not_blamed_on_the_directory(dead, fleet, mend):
    mend(fleet.directory / "client" / "client.key")
    code, out, _ = dead("get", "k", "-o", "json")
    error = document(out)["error"]
    assert (code, error["code"], error["hint"]) == (2, "config", "")
    assert "client.key" in error["message"]
    (fleet.directory / "client" / "client.key").unlink()
    assert "trustlog-replica init" in document(dead("get", "k", "-o", "json")[1])["error"]["hint"]


def test_incr_takes_whole_numbers_only(fleet):
    client = Client.from_dir(fleet.directory)
    with pytest.raises(TypeError, match="int, not float"):
        asyncio.run(client.incr("k", 1.5))


# Dead clusters.


@pytest.mark.parametrize(
    "arguments",
    [
        ("put", "k", "v"),
        ("get", "k"),
        ("get", "k", "--stale"),
        ("del", "k"),
        ("cas", "k", "a", "b"),
        ("incr", "k"),
        ("scan",),
        ("exec", "x"),
        ("bench", "--runs", "1"),
    ],
)
def test_a_dead_cluster_is_exit_3_within_the_deadline(dead, arguments):
    began = time.monotonic()
    code, out, err = dead(*arguments, "-o", "json", deadline="0.3")
    assert time.monotonic() - began < 10
    error = document(out)["error"]
    assert (code, error["exit"], error["code"]) == (3, 3, "unreachable")
    assert "replica 2 (127.0.0.1:" in error["message"]
    assert err == b""
    code, out, err = dead(*arguments, deadline="0.3")
    assert (code, out) == (3, b"")
    assert err.startswith(b"error: ")
    assert b"\nhint: " in err


def test_a_dead_cluster_has_a_status_and_exit_3(dead):
    code, out, _ = dead("status", "-o", "json")
    found = document(out)
    assert (code, found["serves"], found["reachable"]) == (3, False, 0)
    code, out, err = dead("status")
    assert (code, len(out.splitlines())) == (3, 3)
    assert b"not reachable" in out
    assert b"0 of 3 replicas reachable" in err


def test_silent_replicas_are_exit_3_and_an_unknown_outcome(run, served):
    run("put", "k", "v")
    for number in (1, 2):
        served.replicas[number].manners.add("silent")
    # A new process opens a session first; that this stays open is known to be "not sent".
    code, out, _ = run("put", "k", "w", "-o", "json", deadline="0.4")
    assert (code, document(out)["error"]["code"]) == (3, "unreachable")


def test_who_is_over_its_quota_is_not_asked_whether_replicas_run(run, served):
    for replica in served.replicas:
        replica.manners.add("busy")
    code, out, _ = run("put", "k", "w", "-o", "json", deadline="2")
    error = document(out)["error"]
    assert (code, error["code"]) == (3, "busy")
    assert "5 operations per second" in error["message"]
    assert "quota" in error["hint"]
    assert "running" not in error["hint"]


# Use.


@pytest.mark.parametrize(
    "arguments",
    [("put", "k"), ("put", "k", "v", "--file", "-"), ("get",), ("get", "k", "--what"), ("nothing",), ("put", "", "v")],
)
def test_wrong_use_is_exit_2(run, arguments):
    code, out, err = run(*arguments)
    assert (code, out) == (2, b"")
    assert err.startswith(b"error: ")
    code, out, err = run(*arguments, "-o", "json")
    assert (code, document(out)["error"]["exit"], err) == (2, 2, b"")


@pytest.mark.parametrize("arguments", [("--deadline", "nan", "get", "k"), ("bench", "--seconds", "nan")])
def test_nan_is_no_number_of_seconds(arguments, capfdbinary):
    with pytest.raises(SystemExit) as ended:
        main(["-c", "c", *arguments, "-o", "json"])
    assert ended.value.code == 2
    assert document(capfdbinary.readouterr().out)["error"]["code"] == "usage"


def test_a_cluster_must_be_named_and_be_there(capfdbinary, tmp_path, monkeypatch):
    monkeypatch.delenv("TRUSTLOG_CLUSTER", raising=False)
    with pytest.raises(SystemExit) as ended:
        main(["get", "k", "-o", "json"])
    assert ended.value.code == 2
    assert "TRUSTLOG_CLUSTER" in document(capfdbinary.readouterr().out)["error"]["hint"]
    monkeypatch.setenv("TRUSTLOG_CLUSTER", str(tmp_path / "nothing"))
    with pytest.raises(SystemExit) as ended:
        main(["get", "k", "-o", "json"])
    assert ended.value.code == 2
    assert document(capfdbinary.readouterr().out)["error"]["code"] == "config"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_has_an_example(command, capfdbinary):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    out = capfdbinary.readouterr().out.decode()
    calls = (f"trustlog-client -c my-cluster {command}", f"trustlog-client {command} ", f"{command} -")
    assert any(call in out.split("Example:")[1] for call in calls)


def test_bench_measures_a_running_cluster(run):
    code, out, err = run("bench", "--runs", "1", "--seconds", "0.1", "--concurrency", "5", "-o", "json")
    found = document(out)
    (level,) = found["levels"]
    assert (code, level["concurrency"], err) == (0, 5, b"")
    assert level["ops_per_second"] > 0
    assert found["cluster"]["replicas"] == 3
    assert found["machine"]["cpus"] >= 1
    for form in ("plain", "table"):
        code, out, _ = run("bench", "--runs", "1", "--seconds", "0.1", "--concurrency", "1", "-o", form)
        assert code == 0
        assert b"p99 ms" in out
        assert b"load_average=" in out


def test_bench_in_an_open_loop_with_clients_of_their_own_and_a_plot(run, tmp_path):
    plot = tmp_path / "latency.svg"
    loads = ("--rate", "100", "--rate", "50", "--value-bytes", "10", "--value-bytes", "2000", "--clients", "3")
    code, out, err = run("bench", "--runs", "1", "--seconds", "0.2", *loads, "--plot", str(plot), "-o", "json")
    found = document(out)
    assert (code, found["cluster"]["clients"], err) == (0, 3, b"")
    asked = [(level["rate"], level["value_bytes"], level["concurrency"]) for level in found["levels"]]
    assert asked == [(100.0, 10, None), (50.0, 10, None), (100.0, 2000, None), (50.0, 2000, None)]
    assert all(level["not_started"] == 0 and level["p999_ms"] >= level["p50_ms"] > 0 for level in found["levels"])
    assert "put, open loop" in plot.read_text()
    code, out, _ = run("bench", "--runs", "1", "--seconds", "0.1", "--rate", "20", "-o", "table")
    assert code == 0
    assert b"latency counts from the intended start" in out


def test_bench_is_either_open_or_closed(run):
    code, out, _ = run("bench", "--rate", "10", "--concurrency", "5", "-o", "json")
    assert code == 2
    assert "either --concurrency" in document(out)["error"]["message"]
    code, out, _ = run("bench", "--plot", "no/such/folder/x.svg", "-o", "json")
    assert (code, document(out)["error"]["exit"]) == (2, 2)


def test_a_watch_that_lost_something_is_exit_1_and_says_what_to_do(run, monkeypatch):
    class Gone:
        async def __aenter__(self):
            raise WatchGone(Position(5), Position(90))

        async def __aexit__(self, *_):
            pass

    monkeypatch.setattr(Client, "watch", lambda *_, **__: Gone())
    code, out, _ = run("watch", "k", "--after", "5", "-o", "json")
    found = document(out)["error"]
    assert (code, found["code"], found["exit"]) == (1, "gone", 1)
    assert "only those after 90" in found["message"]
    assert "scan" in found["hint"]
    code, out, err = run("watch", "k", "--after", "5")
    assert (code, out) == (1, b"")
    assert b"error: gone: the changes after 5 are no longer kept" in err


def test_a_watch_from_a_position_that_does_not_exist_is_exit_1(run, monkeypatch):
    class Ahead:
        async def __aenter__(self):
            raise WatchAhead(Position(999), 90)

        async def __aexit__(self, *_):
            pass

    monkeypatch.setattr(Client, "watch", lambda *_, **__: Ahead())
    code, out, _ = run("watch", "k", "--after", "999", "-o", "json")
    found = document(out)["error"]
    assert (code, found["code"], found["exit"]) == (1, "ahead", 1)
    assert "999 does not exist, 90 is the last slot executed" in found["message"]


@pytest.mark.parametrize("position", ["x", "1.2.3", "-1", "9999999999999999999999"])
def test_what_is_no_position_is_wrong_use(run, position):
    code, _, err = run("watch", f"--after={position}")
    assert code == 2
    assert b"is no position" in err
