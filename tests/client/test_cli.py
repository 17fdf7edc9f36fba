"""The commands' contract: exit codes, JSON on stdout only, raw bytes in plain, help with examples."""

import asyncio
import base64
import io
import json
import sys
import time

import pytest

from client.api import Client
from client.cli import status_command
from client.cli.main import cli, main
from client.queries import ReplicaStatus
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
    assert {len(row) for row in rows} == {11}
    assert {row[1] for row in rows} <= {"*", "-"}
    assert all(row[2].startswith("127.0.0.1:") for row in rows)
    replica = ReplicaStatus(2, "h:1", True, "", {"primary": 2, "number": 2})
    assert status_command._row(replica)[:3] == ("2", "*", "h:1")


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
    assert f"trustlog-client -c my-cluster {command}" in out or f"{command} -" in out.split("Example:")[1]


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
