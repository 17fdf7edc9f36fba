from __future__ import annotations

import json

import pytest

from tests.trustlog.support import NONCE, Crash, identity_of
from trustlog import Outcome, create, open_log, verify_lookup
from trustlog.cli import hostlog
from trustlog.cli.contract import CommandError
from trustlog.cli.hostlog import ENTRIES_FILE, GROUPS_FILE, STANDALONE_CONTEXT, HostLog


@pytest.fixture
def directory(tmp_path):
    directory = tmp_path / "a log"
    with create(directory) as log:
        host = HostLog(directory, log)
        host.append([b"one"])
        host.append([b"two", b"three"])
    return directory


def check(directory, payloads):
    """Every entry is there, proven by the log; and the log goes on."""
    with open_log(directory) as log:
        host = HostLog(directory, log)
        for index, expected in enumerate(payloads, 1):
            answer, payload = host.lookup(index, NONCE)
            statement = verify_lookup(identity_of(log), answer, context=STANDALONE_CONTEXT, nonce=NONCE, index=index)
            assert statement.outcome is Outcome.ASSIGNED
            assert payload == expected
        assert log.last == len(payloads)
        host.append([b"more"])


def test_survives_restarts(directory):
    check(directory, [b"one", b"two", b"three"])
    check(directory, [b"one", b"two", b"three", b"more"])


@pytest.mark.parametrize(
    ("moment", "kept"), [("entries", False), ("log", False), ("attestation", True), ("torn", True)]
)
def test_a_crash_between_any_two_steps(directory, monkeypatch, moment, kept):
    def die(*_args, **_kwargs):
        raise Crash

    append_lines = hostlog._append_lines

    def torn(path, lines):
        append_lines(path, lines)
        if path.name == GROUPS_FILE:
            path.write_bytes(path.read_bytes()[:-5])
            raise Crash

    with open_log(directory) as log:
        host = HostLog(directory, log)
        if moment == "entries":
            monkeypatch.setattr(hostlog, "_append_lines", die)
        elif moment == "log":
            monkeypatch.setattr(log, "append", die)
        elif moment == "attestation":
            monkeypatch.setattr(host, "_store_group", die)
        else:
            monkeypatch.setattr(hostlog, "_append_lines", torn)
        with pytest.raises(Crash):
            host.append([b"four", b"five"])
    monkeypatch.undo()
    check(directory, [b"one", b"two", b"three"] + [b"four", b"five"] * kept)


def test_torn_payloads_of_an_append_that_never_was(directory):
    path = directory / ENTRIES_FILE
    for tail in (
        b'{"index": 4, "pay',
        b'{"index": 4, "payload": "00"}\n{"ind',
        b"\xff\xff\n",
        b"[]\n",
        b'{"index": 4}\n',
    ):
        with path.open("ab") as stream:
            stream.write(tail)
        with open_log(directory) as log:
            HostLog(directory, log)
        assert path.read_bytes().count(b"\n") == 3
    check(directory, [b"one", b"two", b"three"])


@pytest.mark.parametrize("name", [ENTRIES_FILE, GROUPS_FILE])
def test_damage_is_named(directory, name):
    path = directory / name
    lines = path.read_bytes().splitlines(keepends=True)
    for content, line in (
        ([b"junk\n", *lines[1:]], 1),
        ([lines[0].replace(b'"', b"'"), *lines[1:]], 1),
        ([lines[0].replace(b"}", b', "x": 1}'), *lines[1:]], 1),
        ([b"{}\n", *lines[1:]], 1),
        ([b"5\n", *lines[1:]], 1),
        ([], 1),
    ):
        path.write_bytes(b"".join(content))
        with open_log(directory) as log, pytest.raises(CommandError, match=f"{name}: line {line} ") as caught:
            HostLog(directory, log)
        assert caught.value.code == "damaged"
    path.write_bytes(b"".join(lines))
    check(directory, [b"one", b"two", b"three"])


def test_a_changed_payload_is_refused_by_the_trusted_part(directory):
    path = directory / ENTRIES_FILE
    path.write_text(path.read_text().replace(b"one".hex(), b"two".hex(), 1))
    with open_log(directory) as log:
        host = HostLog(directory, log)
        with pytest.raises(Exception, match="do not lead to the attested head"):
            host.lookup(1, NONCE)


def test_an_old_trusted_state_is_noticed(directory):
    state = directory / "log.state"
    old = state.read_bytes()
    with open_log(directory) as log:
        HostLog(directory, log).append([b"four"])
    state.write_bytes(old)
    with open_log(directory) as log, pytest.raises(CommandError, match="old copy") as caught:
        HostLog(directory, log)
    assert caught.value.code == "rolled-back"


def test_lines_are_readable(directory):
    entries = [json.loads(line) for line in (directory / ENTRIES_FILE).read_text().splitlines()]
    assert [entry["index"] for entry in entries] == [1, 2, 3]
    groups = [json.loads(line) for line in (directory / GROUPS_FILE).read_text().splitlines()]
    assert [(group["first"], group["last"]) for group in groups] == [(1, 1), (2, 3)]
