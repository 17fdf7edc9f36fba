"""The server's rules over real sockets, in this process: who may connect, one at a time, bounded, not killed."""

from __future__ import annotations

import os
import socket
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.waiting import wait_for
from tests.trustlog.service.support import KEY, process_log, public_folder
from tests.trustlog.support import CONTEXT, NONCE, digests_of, fixed_key
from trustlog.service import protocol, server
from trustlog.service.client import RemoteLog, ServiceBusyError, ServiceRefusedError
from trustlog.service.protocol import Protection, Why
from trustlog.service.server import Answering, Server


class Listening:
    """A server in a thread, stopped by its own flag between two turns."""

    def __init__(self, folder, client_uid=None):
        self.log = process_log(fixed_key())
        self.reports = []
        uid = os.getuid() if client_uid is None else client_uid
        self.server = Server(Answering(self.log, Protection(0), KEY), uid, self.reports.append)
        self.path = folder / "s"
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(str(self.path))
        self.listener.listen(8)
        self.listener.setblocking(False)
        self._stopping = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        while not self._stopping:
            self.server.turn(self.listener)

    def raw(self):
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(20)
        connection.connect(str(self.path))
        return connection

    def connect(self):
        return RemoteLog.connect(self.path)

    def stop(self):
        self._stopping = True
        self.raw().close()
        self._thread.join(20)
        self.server._hang_up()
        self.listener.close()


@pytest.fixture
def listening():
    with public_folder() as folder:
        running = Listening(folder)
        yield running
        running.stop()


def read_to_end(connection):
    data = b""
    while part := connection.recv(65536):
        data += part
    return data


def send_for_ever(connection, data):
    while True:
        connection.sendall(data)


def refusal(connection):
    data = read_to_end(connection)
    return protocol.decode_refusal(data[4:])


def test_a_second_client_is_refused_by_name_and_the_first_goes_on(listening):
    with listening.connect() as first:
        with pytest.raises(ServiceBusyError, match=f"process {os.getpid()} is connected"):
            listening.connect()
        first.append(digests_of("1"), context=CONTEXT)
    assert listening.log.last == 1
    assert listening.reports == [f"refused process {os.getpid()}: process {os.getpid()} is connected (busy, time 1)"]

    def free():
        try:
            return listening.connect()
        except ServiceRefusedError:
            return None

    with wait_for(free, "a free service") as second:
        assert second.last == 1


def test_another_user_is_refused_before_it_has_said_anything():
    with public_folder() as folder:
        running = Listening(folder, client_uid=os.getuid() + 1)
        try:
            for _ in range(5):
                with running.raw() as connection:
                    why, _, text = refusal(connection)
                    assert why is Why.PEER
                    assert f"you are user {os.getuid()}" in text
            assert running.server.counts == {"peer": 5}
            assert len(running.reports) == 3, "the first, the second and the fourth are reported"
        finally:
            running.stop()


@pytest.mark.parametrize(
    ("sent", "text"),
    [
        (protocol.frame(protocol.encode_end(NONCE, CONTEXT)), "first request must be HELLO"),
        (protocol.frame(protocol.encode_append(1, digests_of("1"), CONTEXT)), "first request must be HELLO"),
        (protocol.frame(b"\x01\x02" + NONCE + CONTEXT), "version 2"),
        (protocol.frame(b"\x01\x01" + NONCE), "instead of 66"),
        (b"\0\0\0\0", "request of 0 bytes"),
        (b"\xff\xff\xff\xff", "the limit is"),
        ((protocol.REQUEST_SIZE_MAX + 1).to_bytes(4, "big"), "the limit is"),
        (protocol.frame(protocol.encode_hello(NONCE, CONTEXT)) + protocol.frame(b"\x09"), "there is no request 9"),
        (2 * protocol.frame(protocol.encode_hello(NONCE, CONTEXT)), "there is no request 1"),
    ],
)
def test_what_is_no_request_ends_the_connection_and_nothing_else(listening, sent, text):
    with listening.raw() as connection:
        connection.sendall(sent)
        data = read_to_end(connection)
    assert text in data[data.index(b"\x02\x03") :].decode("utf-8", "replace")
    with listening.connect() as remote:
        assert remote.last == listening.log.last == 0
    assert listening.server.counts["malformed"] == 1


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.one_of(st.binary(max_size=200), st.binary(max_size=120).map(protocol.frame)), max_size=6), st.booleans()
)
def test_fuzz_over_the_socket(listening, pieces, greets):
    with listening.raw() as connection:
        try:
            if greets:
                connection.sendall(protocol.frame(protocol.encode_hello(NONCE, CONTEXT)))
            for piece in pieces:
                connection.sendall(piece)
        except OSError:
            pass  # it hung up already

    def free():
        try:
            return listening.connect()
        except ServiceRefusedError:
            return None

    with wait_for(free, "the service serves on") as remote:
        assert remote.last == listening.log.last == 0


def test_slow_clients_are_hung_up_on(listening, monkeypatch):
    monkeypatch.setattr(server, "PATIENCE_S", 0.05)
    hello = protocol.frame(protocol.encode_hello(NONCE, CONTEXT))
    with listening.raw() as silent:
        assert read_to_end(silent) == b""
    with listening.raw() as half:
        half.sendall(hello[:10])
        assert read_to_end(half) == b""
    with listening.raw() as greeted:
        greeted.sendall(hello + hello[:10])
        read_to_end(greeted)
    wait_for(lambda: listening.server.counts["slow"] == 3, "all three counted")
    assert len(listening.reports) == 2


def test_a_client_that_reads_no_replies_is_hung_up_on(listening, monkeypatch):
    monkeypatch.setattr(server, "PATIENCE_S", 0.05)
    with listening.raw() as connection:
        connection.sendall(protocol.frame(protocol.encode_hello(NONCE, CONTEXT)))
        with pytest.raises(OSError, match=r"Broken pipe|reset|timed out"):
            send_for_ever(connection, protocol.frame(b"\x03") * 1000)
    wait_for(lambda: listening.server.counts["slow"] == 1, "hung up")
    with listening.connect() as remote:
        assert remote.last == 0


def test_an_idle_client_may_stay(listening, monkeypatch):
    monkeypatch.setattr(server, "PATIENCE_S", 0.01)
    with listening.connect() as remote:
        # The server waits without a deadline now: another connection is what wakes it up, after the patience.
        wait_for(lambda: listening.server._patience_ms() is None, "no deadline")
        with pytest.raises(ServiceRefusedError):
            listening.connect()
        remote.append(digests_of("1"), context=CONTEXT)


def test_hello_and_silence_keep_the_place(listening, monkeypatch):
    """Named in SECURITY.md as not withstood: the one permitted user can be silent, as a replica without work is."""
    monkeypatch.setattr(server, "PATIENCE_S", 0.01)
    with listening.raw() as silent:
        silent.sendall(protocol.frame(protocol.encode_hello(NONCE, CONTEXT)))
        wait_for(lambda: silent.recv(1, socket.MSG_PEEK), "welcome")
        for number in range(1, 5):  # each wakes the server up, after its patience
            with pytest.raises(ServiceRefusedError, match=f"process {os.getpid()} is connected"):
                listening.connect()
            assert listening.server.counts == {"busy": number}

    def free():
        try:
            return listening.connect()
        except ServiceRefusedError:
            return None

    with wait_for(free, "the place is free when it hangs up") as remote:
        assert remote.last == 0
