import errno
import socket

import pytest

from replica.cluster import ports
from replica.cluster.ports import NoPortError, free_ports, servers_ports
from replica.cluster.provision import plan_addresses

HOST = "127.0.0.1"


@pytest.fixture
def system(monkeypatch, tmp_path):
    """Let a system say from which port on it serves outgoing connections."""

    def say(text):
        file = tmp_path / "range"
        if text is not None:
            file.write_text(text)
        monkeypatch.setattr(ports, "RANGE_FILE", file)

    return say


@pytest.fixture
def few(monkeypatch):
    """Three ports, the first of which somebody has."""
    with socket.create_server((HOST, 0)) as taken:
        first = taken.getsockname()[1]
        monkeypatch.setattr(ports, "servers_ports", lambda: range(first, first + 1))
        yield first


def test_distinct_free_and_of_no_outgoing_connection():
    places = plan_addresses(10, [HOST], 0)
    found = [port for _, port in places]
    assert len(set(found)) == 21
    assert set(found) <= set(ports.servers_ports())
    for port in found:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((HOST, port))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("32768\t60999\n", range(20000, 32768)),
        ("21000 60999", range(20000, 21000)),
        ("20999 60999", range(0)),
        ("1024 65535", range(0)),
        ("", range(20000, 49152)),
        ("what", range(20000, 49152)),
        (None, range(20000, 49152)),
    ],
)
def test_what_the_system_keeps_for_outgoing_connections(system, text, expected):
    system(text)
    assert servers_ports() == expected


def test_two_searches_begin_at_different_places():
    assert len({free_ports([HOST])[0] for _ in range(10)}) > 1


def test_a_taken_port_is_passed_over(few):
    (port,) = free_ports([HOST])
    assert port not in {0, few}


def test_all_sockets_stay_open_until_every_port_is_chosen(monkeypatch):
    monkeypatch.setattr(ports, "servers_ports", lambda: range(0))
    taken = set()

    class Unlucky(socket.socket):
        """A system that hands out the same port again as soon as it is free."""

        def bind(self, address):
            self.port = next(p for p in range(100, 200) if p not in taken)
            taken.add(self.port)

        def getsockname(self):
            return (HOST, self.port)

        def close(self):
            taken.discard(self.port)
            super().close()

    monkeypatch.setattr(socket, "socket", Unlucky)
    assert free_ports([HOST] * 3) == [100, 101, 102]
    assert not taken


def test_a_host_of_another_machine():
    with pytest.raises(NoPortError, match=r"no free port of 192\.0\.2\.1 can be found from here \(Cannot assign"):
        free_ports(["192.0.2.1"])


def test_every_port_is_taken(monkeypatch):
    def bind(self, address):
        raise OSError(errno.EADDRINUSE, "in use")

    monkeypatch.setattr(ports, "servers_ports", lambda: range(100, 103))
    monkeypatch.setattr(socket, "socket", type("Full", (socket.socket,), {"bind": bind}))
    with pytest.raises(NoPortError, match="all are taken"):
        free_ports([HOST])
