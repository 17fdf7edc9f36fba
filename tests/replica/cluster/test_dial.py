"""Names that are resolved, or not, and addresses that are tried in turn."""

import asyncio
import socket
import ssl

import pytest
import uvloop

from replica.cluster.home import load_home
from replica.cluster.provision import init_cluster
from replica.wire.dial import ADDRESSES_MAX, REMEDY, UnknownNameError, dial, resolve
from replica.wire.tls import client_context, server_context
from tests.support.waiting import on_loop


class ToldLoop(asyncio.SelectorEventLoop):
    """Resolves as it is told: raises the answer, lists its addresses, or hangs if it is None."""

    answer = None

    async def getaddrinfo(self, host, port, **_):
        if isinstance(self.answer, BaseException):
            raise self.answer
        if self.answer is None:
            await self.create_future()
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in self.answer]


def resolved(answer, host="a.invalid", patience_s=5.0):
    async def work():
        asyncio.get_running_loop().answer = answer
        return await resolve(host, 7100, patience_s)

    with asyncio.Runner(loop_factory=ToldLoop) as runner:
        return runner.run(work())


@pytest.mark.parametrize(
    ("answer", "patience_s", "words"),
    [
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), 5.0, "Name or service not known"),
        (UnicodeError("label empty or too long"), 5.0, "label empty or too long"),
        (None, 0.01, "no answer within 0.01 s"),
    ],
)
def test_a_name_that_is_not_known_is_named_with_what_to_do(answer, patience_s, words):
    with pytest.raises(UnknownNameError) as caught:
        resolved(answer, patience_s=patience_s)
    assert caught.value.why == f"the name a.invalid cannot be resolved: {words}"
    assert str(caught.value) == f"{caught.value.why}; {REMEDY}"


def test_addresses_are_taken_once_in_their_order_and_not_without_end():
    many = [f"192.0.2.{number}" for number in range(200)]
    assert resolved(["192.0.2.9", "192.0.2.9", "192.0.2.1"]) == ["192.0.2.9", "192.0.2.1"]
    assert resolved(many) == many[:ADDRESSES_MAX]


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_a_number_is_not_asked_for(address):
    assert resolved(AssertionError("asked"), address) == [address]


def test_a_name_on_the_daemons_loop():
    assert "127.0.0.1" in uvloop.run(resolve("localhost", 7100, 5.0))
    with pytest.raises(UnknownNameError):
        uvloop.run(resolve("no-such-host.invalid", 7100, 5.0))


@on_loop
async def test_the_next_address_is_tried_unless_the_handshake_fails(tmp_path):
    init_cluster(tmp_path / "c", base_port=0)
    home, other = (load_home(tmp_path / "c" / f"replica-{number}") for number in (0, 1))
    members = [place.certificate_der for place in home.cluster.replicas]
    tls = server_context(home.certificate_path, home.key_path, members)
    server = await asyncio.get_running_loop().create_server(asyncio.Protocol, "127.0.0.1", 0, ssl=tls)
    port = server.sockets[0].getsockname()[1]
    good, bad = client_context(members[0]), client_context(other.place.certificate_der)
    try:
        transport, _ = await dial(asyncio.Protocol, ["127.0.0.3", "127.0.0.2", "127.0.0.1"], port, good)
        assert transport.get_extra_info("peername")[0] == "127.0.0.1"
        transport.abort()
        with pytest.raises(ssl.SSLCertVerificationError):
            await dial(asyncio.Protocol, ["127.0.0.1", "127.0.0.2"], port, bad)
        with pytest.raises(ConnectionRefusedError):
            await dial(asyncio.Protocol, ["127.0.0.3", "127.0.0.2"], port, good)
    finally:
        server.close()
