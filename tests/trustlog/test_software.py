from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.trustlog.support import CONTEXT, ForgetfulFiles, add, identity_of
from trustlog import BackendKind, LogState, MisuseError, SealedStateError, create, in_memory, open_log, verify_append
from trustlog.sealed import Files, SealedJournal


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "a log"


def descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


def modes(directory):
    return {path.name: path.stat().st_mode & 0o777 for path in [directory, *directory.iterdir()]}


def test_create_and_open_again(directory):
    with create(directory) as log:
        assert log.durability == "disk"
        group, digests = add(log, "1", "2")
        public_key = log.public_key
    assert modes(directory) == {"a log": 0o700, "log.state": 0o600, "seal.key": 0o600, "log.pub": 0o644}
    assert (directory / "log.pub").read_text() == public_key.hex() + "\n"
    with open_log(directory) as log:
        assert (log.public_key, log.last, log.last_group) == (public_key, 2, (1, 2))
        assert log.reissue().statement == group.statement
        verify_append(identity_of(log), log.reissue(), digests, context=CONTEXT)
        log.truncate(2, context=CONTEXT)
    with open_log(directory) as log:
        assert log.low == 2


def test_many_appends_and_restarts(directory):
    create(directory).close()
    for turn in range(1, 4):
        with open_log(directory) as log:
            for _ in range(130):
                add(log, "x")
            assert log.last == turn * 130


def test_an_existing_directory_is_refused(directory):
    directory.mkdir()
    with pytest.raises(MisuseError, match="exists already"):
        create(directory)


def test_one_owner_at_a_time(directory):
    log = create(directory)
    with pytest.raises(MisuseError, match="in use") as caught:
        open_log(directory)
    assert str(directory) in str(caught.value)
    script = "import sys, pathlib, trustlog\ntrustlog.open_log(pathlib.Path(sys.argv[1]))"
    result = subprocess.run([sys.executable, "-c", script, directory], capture_output=True, text=True, check=False)
    assert "LogInUseError" in result.stderr
    assert "in use" in result.stderr
    log.close()
    open_log(directory).close()


def test_the_lock_is_given_back_after_a_refusal(directory):
    create(directory).close()
    (directory / "log.pub").write_text("")
    for _ in range(2):
        with pytest.raises(SealedStateError):
            open_log(directory)


@pytest.mark.parametrize("missing", ["log.state", "seal.key"])
def test_missing_files(directory, missing):
    create(directory).close()
    (directory / missing).unlink()
    with pytest.raises(MisuseError, match=missing):
        open_log(directory)


@pytest.mark.parametrize(("missing", "remedy"), [("seal.key", "from a copy"), ("log.state", "an older copy")])
def test_nobody_is_told_to_remove_a_used_log(directory, missing, remedy):
    with create(directory) as log:
        add(log, "1")
    (directory / "entries.jsonl").write_text("")
    (directory / missing).unlink()
    with pytest.raises(MisuseError, match="Do not remove the directory: restore the missing file") as caught:
        open_log(directory)
    assert "create the log again" not in str(caught.value)
    assert remedy in str(caught.value)
    assert "a new log is a new identity" in str(caught.value)


def test_an_interrupted_creation_may_be_repeated_but_only_of_an_unused_log(directory):
    create(directory).close()
    (directory / "log.state").rename(directory / "log.state.new")
    with pytest.raises(MisuseError, match="remove the directory and create the log again") as caught:
        open_log(directory)
    assert "If this log was ever used, do not remove it" in str(caught.value)


def test_no_directory(directory, tmp_path):
    with pytest.raises(MisuseError, match="no log in"):
        open_log(directory)
    (tmp_path / "file").write_text("")
    with pytest.raises(MisuseError, match="no log in"):
        open_log(tmp_path / "file")
    with pytest.raises(FileNotFoundError):
        create(tmp_path / "no" / "parent")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601, 0o777])
def test_readable_seal_keys_are_refused(directory, mode):
    create(directory).close()
    (directory / "seal.key").chmod(mode)
    with pytest.raises(MisuseError, match="chmod 600"):
        open_log(directory)
    (directory / "seal.key").chmod(0o400)
    open_log(directory).close()


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_seal_key_of_another_length(directory, size):
    create(directory).close()
    (directory / "seal.key").write_bytes(bytes(size))
    with pytest.raises(SealedStateError, match=r"seal\.key"):
        open_log(directory)


def test_every_bit_of_the_seal_key_matters(directory):
    create(directory).close()
    key = (directory / "seal.key").read_bytes()
    for bit in range(256):
        (directory / "seal.key").write_bytes((int.from_bytes(key, "big") ^ 1 << bit).to_bytes(32, "big"))
        with pytest.raises(SealedStateError, match="authenticate"):
            open_log(directory)


def test_every_byte_of_the_public_key_file_matters(directory):
    create(directory).close()
    path = directory / "log.pub"
    data = path.read_bytes()
    for offset in range(len(data)):
        path.write_bytes(data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :])
        with pytest.raises(SealedStateError, match=r"log\.pub") as caught:
            open_log(directory)
    assert data.decode().strip() in str(caught.value)
    path.unlink()
    with pytest.raises(SealedStateError, match=r"log\.pub"):
        open_log(directory)


def test_a_kind_is_for_ever(directory):
    with create(directory, kind=BackendKind.PROCESS) as log:
        assert log.kind is BackendKind.PROCESS
    with pytest.raises(MisuseError, match="process backend"):
        open_log(directory)
    with open_log(directory, kind=BackendKind.PROCESS) as log:
        assert log.kind is BackendKind.PROCESS


def forged(directory, *states):
    """Write a journal that authenticates, with the log's own key, and says ``states``."""
    seal_key = (directory / "seal.key").read_bytes()
    journal = SealedJournal.open(directory / "log.state", seal_key, Files())
    for state in states:
        journal.save(state.encode() if isinstance(state, LogState) else state)
    journal.close()


def test_states_that_do_not_follow(directory):
    with create(directory) as log:
        add(log, "1", "2")
        old = log._state
        add(log, "3")
    forged(directory, old)
    with pytest.raises(SealedStateError, match="record 4 does not follow"):
        open_log(directory)


def test_states_that_are_none(tmp_path):
    for number, bad in enumerate((b"", bytes(127), LogState(0, 9, 1, 1, bytes(32), bytes(32), CONTEXT))):
        directory = tmp_path / f"{number}"
        create(directory).close()
        forged(directory, bad)
        with pytest.raises(SealedStateError) as caught:
            open_log(directory)
        assert "log.state: record 2" in str(caught.value)


def test_a_disk_that_fails_stops_the_log_and_opening_it_again_goes_on(directory):
    files = ForgetfulFiles(directory)
    log = create(directory, files=files)
    add(log, "1")
    files.failing = {"sync"}
    with pytest.raises(OSError, match="Input/output"):
        add(log, "2")
    files.failing = set()
    with pytest.raises(MisuseError, match="stopped"):
        add(log, "2")
    log.close()
    with open_log(directory, files=files) as log:
        assert log.last == 2
        add(log, "3")


def test_a_failing_creation_gives_everything_back(tmp_path):
    for number, operation in enumerate(("open", "write", "sync", "replace", "sync_directory")):
        directory = tmp_path / f"{number}"
        files = ForgetfulFiles(directory)
        files.failing = {operation}
        before = descriptors()
        with pytest.raises(OSError, match="Input/output"):
            create(directory, files=files)
        assert descriptors() == before


def test_opening_and_closing_leaks_no_descriptor(directory):
    create(directory).close()
    before = descriptors()
    for _ in range(3):
        with open_log(directory) as log:
            for _ in range(300):  # more than one file holds: a replaced one is closed as well
                add(log, "x")
    assert descriptors() == before


def test_memory_logs_differ():
    assert in_memory().log_id != in_memory().log_id
    assert replace(in_memory()._state, head=bytes(32)).last == 0
