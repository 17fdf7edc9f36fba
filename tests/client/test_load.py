"""Bulk loading: formats, malformed lines by number, later lines win, bounded memory."""

import asyncio
import io
import json
import sys

import pytest

from client import Undecided
from client.loader import BYTES_UNDER_WAY_MAX, Loader, LoadError
from client.records import LINE_BYTES_MAX, Record, RecordError, read_records
from replica.core.envelope import Result, Status
from tests.client.test_cli import document, run, runner

__all__ = ["run"]


def records(text, form="auto"):
    return [(r.line, r.key, r.value) for r in read_records(io.BytesIO(text), form)]


def test_both_formats_are_told_apart_by_the_first_line():
    assert records(b"a\tb\n\nc\td\te\r\n\xff\t") == [(1, b"a", b"b"), (3, b"c", b"d\te"), (4, b"\xff", b"")]
    lines = [{"key": "ä", "value": ""}, {"key_base64": "/w==", "value": "x"}]
    text = "\n".join(json.dumps(line) for line in lines).encode()
    assert records(text) == [(1, "ä".encode(), b""), (2, b"\xff", b"x")]
    assert records(b'{"a\tb', "tsv") == [(1, b'{"a', b"b")]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"a\tb\noops\n", "line 2: no tab"),
        (b"\tb\n", "line 1: the key is empty"),
        (b'{"key": "a"}', 'line 1: wants either "value"'),
        (b'{"key": "a", "value": "b", "value_base64": ""}', "wants either"),
        (b'{"key": 1, "value": "b"}', '"key" is not a text'),
        (b'{"key": "a", "value_base64": "?"}', "cannot be decoded"),
        (b'{"key": "\\ud800", "value": "b"}', "cannot be decoded"),
        (b'{"key": "a", "value": "b", "more": 1}', "unknown fields: more"),
        (b'{"key": "a", "value": "b"}\n[]', "line 2: not a JSON object"),
        (b'{"key": "a", "value": "b"}\n' + b"[" * 100_000, "line 2: not JSON"),
        (b"a\t" + bytes(LINE_BYTES_MAX), "line 1 is longer"),
    ],
)
def test_a_malformed_line_is_named_by_its_number(text, words):
    with pytest.raises(RecordError, match=words):
        records(text)


def test_load_reports_and_a_later_line_wins(run, tmp_path):
    path = tmp_path / "records.tsv"
    path.write_bytes(b"".join(b"key%d\tvalue %d\n" % (i % 700, i) for i in range(2000)))
    code, out, err = run("load", str(path), "-o", "json")
    found = document(out)
    assert (code, found["records"], err) == (0, 2000, b"")
    assert found["records_per_second"] > 0
    for i in range(0, 700, 50):
        assert run("get", f"key{i}")[1] == b"value %d" % max(j for j in range(2000) if j % 700 == i)


def test_a_terminal_sees_a_bar_and_stdout_does_not(run, tmp_path, monkeypatch):
    (tmp_path / "records").write_bytes(b"a\tb\n")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    code, out, err = run("load", str(tmp_path / "records"), "-o", "json")
    assert (code, document(out)["records"]) == (0, 1)
    assert b"loading" in err


def test_load_from_stdin_with_a_malformed_line_says_what_was_written(run):
    text = b"".join(b"k%d\tv\n" % i for i in range(600)) + b"oops\nlast\tone\n"
    code, out, _ = run("load", "-", "-o", "json", stdin=text)
    error = document(out)["error"]
    assert (code, error["code"]) == (2, "malformed-record")
    assert "line 601: no tab" in error["message"]
    assert "600 records were written" in error["message"]
    assert run("get", "k599") == (0, b"v", b"")
    assert run("get", "last")[0] == 1


def test_load_names_the_first_line_that_no_replica_would_accept(run):
    text = b"a\tb\n" + b"k" * 5000 + b"\tv\n" + b"c\td\n"
    code, out, _ = run("load", "-", "-o", "json", stdin=text)
    assert code == 2
    assert "line 2: a key must have 1 to 4096 bytes, not 5000; 1 records" in document(out)["error"]["message"]


def test_load_into_a_dead_cluster_is_exit_3(fleet, capfdbinary):
    code, out, _ = runner(fleet.directory, capfdbinary)("load", "-", "-o", "json", deadline="0.3", stdin=b"a\tb\n")
    assert (code, document(out)["error"]["code"]) == (3, "unreachable")


class CountingClient:
    """Keeps count of what is under way, and answers the oldest when the loader waits for room."""

    def __init__(self, answer):
        self.bytes = self.bytes_max = self.most = 0
        self.waiting = []
        self._answer = answer

    def submit(self, operation):
        outcome = asyncio.get_running_loop().create_future()
        self.waiting.append((outcome, len(operation)))
        self.bytes += len(operation)
        self.most = max(self.most, len(self.waiting))
        self.bytes_max = max(self.bytes_max, self.bytes)
        return outcome

    def answer_oldest(self):
        outcome, size = self.waiting.pop(0)
        self.bytes -= size
        self._answer(outcome)


class CountedLoader(Loader):
    async def _pause(self):
        self._client.answer_oldest()
        await super()._pause()


def succeed(outcome):
    outcome.set_result(Result(Status.OK, 1, b"\x00"))


def many(count, size):
    for line in range(1, count + 1):
        yield Record(line, b"k%d" % line, bytes(size))


@pytest.mark.asyncio
async def test_what_is_under_way_is_bounded_in_number_and_bytes():
    client = CountingClient(succeed)
    progress = await CountedLoader(client, 10, lambda _: None).run(many(1000, 10))
    assert (progress.records, client.most) == (1000, 10)
    client = CountingClient(succeed)
    await CountedLoader(client, 1000, lambda _: None).run(many(60, 2**20))
    assert BYTES_UNDER_WAY_MAX <= client.bytes_max <= BYTES_UNDER_WAY_MAX + 2**20 + 5000


@pytest.mark.asyncio
async def test_one_key_is_never_under_way_twice():
    client = CountingClient(succeed)
    records = (Record(line, b"k", b"%d" % line) for line in range(1, 10))
    progress = await CountedLoader(client, 100, lambda _: None).run(records)
    assert (progress.records, client.most) == (9, 1)


@pytest.mark.asyncio
async def test_a_failure_stops_the_load_and_the_first_line_is_named():
    client = CountingClient(lambda outcome: outcome.set_exception(Undecided("no")))
    with pytest.raises(LoadError) as stopped:
        await CountedLoader(client, 4, lambda _: None).run(many(100, 10))
    assert (stopped.value.line, stopped.value.written) == (1, 0)
    assert client.most == 4
