"""A replica's log in a process of its own: away, back, settled, refused. Services here are threads or real children."""

import os
import signal
import threading
from pathlib import Path

import pytest
import structlog

from replica.shell.processlog import ContraryLogError, ProcessLog, StartedService
from tests.support.waiting import wait_for
from tests.trustlog.service.support import Forgetful, process_log, serve_in_thread
from tests.trustlog.support import CONTEXT, digests_of, fixed_key, identity_of
from trustlog import BackendKind, LogInUseError, MisuseError, SealedStateError, create, open_log, verify_append
from trustlog.service.client import RemoteLog, ServiceLostError

REMEDY = "start it again"


class Switch:
    """Connects to services of one log, as long as it is on; keeps the connections to break them."""

    def __init__(self, log):
        self.log = log
        self.on = True
        self.made: list[RemoteLog] = []

    def __call__(self):
        if not self.on:
            raise ServiceLostError("it is off")
        self.made.append(serve_in_thread(self.log))
        return self.made[-1]

    def cut(self):
        self.on = False
        self.made[-1]._socket.shutdown(2)


@pytest.fixture
def switch():
    return Switch(process_log(fixed_key()))


@pytest.fixture
def log(switch):
    opened = ProcessLog(switch, REMEDY, structlog.get_logger())
    yield opened
    opened.close()


def in_background(action):
    done = []
    thread = threading.Thread(target=lambda: done.append(action()))
    thread.start()
    return thread, done


def test_away_it_waits_and_says_so_and_goes_on_when_it_is_back(switch, log):
    log.append(digests_of("1"), context=CONTEXT)
    assert log.trouble is None
    switch.cut()
    wait_for(lambda: log.trouble, "noticed although nobody asked anything")
    assert REMEDY in log.trouble
    thread, done = in_background(lambda: log.append(digests_of("2"), context=CONTEXT))
    thread.join(0.05)
    assert thread.is_alive()
    assert (log.last, switch.log.last) == (1, 1)
    switch.on = True
    thread.join(20)
    verify_append(identity_of(log), done[0], digests_of("2"), context=CONTEXT)
    assert (log.last, log.head, log.trouble) == (2, switch.log.head, None)


@pytest.mark.parametrize("appended", [False, True])
def test_lost_between_request_and_reply_it_is_appended_once(switch, log, appended):
    """The service dies with a request in hand: before the append, or after it with the reply still unsent."""
    log.append(digests_of("1"), context=CONTEXT)
    remote = switch.made[-1]

    def dies(digests, context):
        if appended:
            switch.log.append(digests, context=context)
        switch.cut()
        switch.on = True
        raise ServiceLostError("it died")

    remote.append = dies
    attestation = log.append(digests_of("2", "3"), context=CONTEXT)
    statement = verify_append(identity_of(log), attestation, digests_of("2", "3"), context=CONTEXT)
    assert (statement.first, statement.last) == (2, 3)
    assert switch.log.last == log.last == 3
    assert len(switch.made) == 2
    log.append(digests_of("4"), context=CONTEXT)
    assert log.last == 4


def test_truncate_is_asked_again(switch, log):
    log.append(digests_of("1", "2"), context=CONTEXT)

    def dies(index, context):
        switch.log.truncate(index, context=context)
        switch.cut()
        switch.on = True
        raise ServiceLostError("it died")

    switch.made[-1].truncate = dies
    log.truncate(2, context=CONTEXT)
    assert log.low == switch.log.low == 2


@pytest.mark.parametrize("how", ["rolled back", "appended by another", "another history", "forgotten less"])
def test_back_with_another_end_it_is_never_used_again(switch, log, how):
    key = fixed_key()
    log.append(digests_of("1"), context=CONTEXT)
    log.append(digests_of("2"), context=CONTEXT)
    log.truncate(2, context=CONTEXT)
    if how == "rolled back":
        switch.log = process_log(key)
        switch.log.append(digests_of("1"), context=CONTEXT)
    elif how == "another history":
        switch.log = process_log(key)
        switch.log.append(digests_of("1", "other"), context=CONTEXT)
        switch.log.truncate(2, context=CONTEXT)
    elif how == "forgotten less":
        switch.log = process_log(key)
        switch.log.append(digests_of("1"), context=CONTEXT)
        switch.log.append(digests_of("2"), context=CONTEXT)
    else:
        switch.log.append(digests_of("3"), context=CONTEXT)
    switch.cut()
    switch.on = True
    wait_for(lambda: log.trouble and "never be used again" in log.trouble, "refused")
    with pytest.raises(ContraryLogError, match="rolled back"):
        log.append(digests_of("3"), context=CONTEXT)
    assert len(switch.made) == 2, "it is not even asked again"


def test_nobody_waits_when_the_replica_stops(switch, log):
    switch.cut()

    def fails():
        with pytest.raises(ServiceLostError):
            log.append(digests_of("1"), context=CONTEXT)
        return True

    thread, done = in_background(fails)
    wait_for(lambda: log.trouble, "away")
    log.stop_waiting()
    thread.join(20)
    assert done
    assert switch.log.last == 0


def test_a_service_that_cannot_save_is_away(switch, log):
    store = Forgetful()
    switch.log = process_log(fixed_key(), store)
    switch.cut()
    switch.on = True
    wait_for(lambda: len(switch.made) == 2 and log.trouble is None, "back")
    store.error = OSError(28, "No space left on device")
    thread, done = in_background(lambda: log.append(digests_of("1"), context=CONTEXT))
    wait_for(lambda: log.trouble, "away")
    # It was started again, on a disk with room.
    switch.log = process_log(fixed_key())
    thread.join(20)
    assert done
    assert (log.last, switch.log.last) == (1, 1)


def test_the_started_service_is_started_again_after_kill_9(tmp_path):
    with create(tmp_path / "log", kind=BackendKind.PROCESS) as made:
        key = made.public_key
    log = ProcessLog(StartedService(tmp_path / "log", key), REMEDY, structlog.get_logger())
    try:
        pids = set()
        for number in range(3):
            for entry in "ab":
                log.append(digests_of(f"{number} {entry}"), context=CONTEXT)
            pids.add(log.pid)
            os.kill(log.pid, signal.SIGKILL)
        log.append(digests_of("last"), context=CONTEXT)
        assert (log.last, len(pids)) == (7, 3)
        last_pid = log.pid
    finally:
        log.close()
    log.close()
    wait_for(lambda: not Path(f"/proc/{last_pid}").exists(), "the service ended with its replica")
    with open_log(tmp_path / "log", kind=BackendKind.PROCESS) as opened:
        assert opened.last == 7


def test_signals_to_the_group_do_not_end_the_started_service(tmp_path):
    with create(tmp_path / "log", kind=BackendKind.PROCESS) as made:
        key = made.public_key
    log = ProcessLog(StartedService(tmp_path / "log", key), REMEDY, structlog.get_logger())
    try:
        pid = log.pid
        for how in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(pid, how)
        log.append(digests_of("1"), context=CONTEXT)
        assert log.pid == pid
    finally:
        log.close()


def test_what_keeps_the_started_service_from_opening_its_log_is_said(tmp_path, monkeypatch):
    state = tmp_path / "log"

    def start(key=bytes(65)):
        return ProcessLog(StartedService(state, key), REMEDY, structlog.get_logger())

    with pytest.raises(MisuseError, match="there is no log"):
        start()
    with create(state, kind=BackendKind.PROCESS) as made, pytest.raises(LogInUseError, match="in use"):
        start(made.public_key)
    raw = bytearray((state / "log.state").read_bytes())
    raw[600] ^= 1
    (state / "log.state").write_bytes(raw)
    with pytest.raises(SealedStateError, match="damaged at offset 512"):
        start()


def test_a_log_that_never_comes_is_given_up(switch):
    switch.on = False
    with pytest.raises(ServiceLostError, match=f"it is off; {REMEDY}"):
        ProcessLog(switch, REMEDY, structlog.get_logger(), open_s=0)


def test_what_it_protects_against(switch, log):
    process = switch.made[-1].process
    for uid, client, text in (
        (0, 0, "replica is root"),
        (64001, 0, "replica is root"),
        (1000, 1000, "process, same user"),
        (64001, 64002, "process, user 64001"),
        (0, 64002, "process, user root"),
    ):
        switch.made[-1].process = type(process)(1, uid, client, process.protections)
        assert text in log.protects
