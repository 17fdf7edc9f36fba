"""Pinned TLS over real loopback sockets, under asyncio's loop and uvloop's."""

import asyncio
import ssl
from contextlib import asynccontextmanager

import pytest
import uvloop

from replica.cluster.home import load_home
from replica.wire.tls import WrongCertificate, client_context, member_of, pinned, server_context
from tests.replica.cluster.support import make_cluster

DEADLINE = 20


@pytest.fixture(scope="module")
def homes(tmp_path_factory):
    directory = make_cluster(tmp_path_factory.mktemp("tls") / "c")
    return [load_home(directory / f"replica-{i}") for i in range(3)]


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """Replica 0 of another cluster: same subject name, another key."""
    return load_home(make_cluster(tmp_path_factory.mktemp("tls") / "other") / "replica-0")


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request):
    def run_with_deadline(main):
        with asyncio.Runner(loop_factory=request.param) as runner:
            return runner.run(asyncio.wait_for(main, DEADLINE))

    return run_with_deadline


def server_of(home):
    members = [place.certificate_der for place in home.cluster.replicas]
    return server_context(home.certificate_path, home.key_path, members)


@asynccontextmanager
async def serving(home, context=None):
    """A replica's server; yields its port and the queue of who came: a number, None, or the error."""
    came = asyncio.Queue()

    async def accept(reader, writer):
        try:
            came.put_nowait(member_of(writer.get_extra_info("ssl_object"), home.cluster))
            writer.write(b"welcome")
            await writer.drain()
        except WrongCertificate as error:
            came.put_nowait(error)
        finally:
            writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=context or server_of(home))
    async with server:
        yield server.sockets[0].getsockname()[1], came


async def dial(port, context):
    """Connect and read to the end: what a refused dialler notices only then is noticed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    try:
        return await reader.read(), writer.get_extra_info("ssl_object")
    finally:
        writer.close()


def test_replica_is_known_by_its_certificate(run, homes):
    async def main():
        async with serving(homes[0]) as (port, came):
            for home in homes:
                expected = homes[0].place.certificate_der
                context = client_context(expected, home.certificate_path, home.key_path)
                greeting, ssl_object = await dial(port, context)
                assert greeting == b"welcome"
                pinned(ssl_object, expected)
                assert ssl_object.version() == "TLSv1.3"
                assert await came.get() == home.number

    run(main())


def test_client_without_certificate_is_nobody(run, homes):
    async def main():
        async with serving(homes[1]) as (port, came):
            greeting, ssl_object = await dial(port, client_context(homes[1].place.certificate_der))
            assert greeting == b"welcome"
            pinned(ssl_object, homes[1].place.certificate_der)
            assert await came.get() is None

    run(main())


def test_server_with_another_certificate_is_refused(run, homes, stranger):
    """A member's certificate is as wrong as a stranger's: exactly one replica was meant."""

    async def main():
        for other in (homes[1], stranger):
            async with serving(other) as (port, came):
                with pytest.raises(ssl.SSLCertVerificationError):
                    await dial(port, client_context(homes[0].place.certificate_der))
                assert came.empty()

    run(main())


def test_dialler_with_a_strangers_certificate_is_refused(run, homes, stranger):
    async def main():
        async with serving(homes[0]) as (port, came):
            context = client_context(homes[0].place.certificate_der, stranger.certificate_path, stranger.key_path)
            try:
                greeting, _ = await dial(port, context)
            except (ssl.SSLError, ConnectionError):
                greeting = b""
            assert greeting == b""
            # The server still serves, and the stranger never got as far as a connection.
            await dial(port, client_context(homes[0].place.certificate_der))
            assert await came.get() is None
            assert came.empty()

    run(main())


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_tls_1_2_is_refused_both_ways(run, homes):
    async def main():
        expected = homes[0].place.certificate_der
        old = client_context(expected)
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_2
        async with serving(homes[0]) as (port, came):
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await dial(port, old)
            assert came.empty()
        old = server_of(homes[0])
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_2
        async with serving(homes[0], old) as (port, came):
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await dial(port, client_context(expected))
            assert came.empty()

    run(main())


def test_plain_text_is_refused(run, homes):
    async def main():
        async with serving(homes[0]) as (port, came):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET / HTTP/1.1\r\n\r\n")
            await reader.read()
            writer.close()
            assert came.empty()

    run(main())


class Presenting:
    """A TLS object whose other side presented `der`."""

    def __init__(self, der):
        self.der = der

    def getpeercert(self, binary_form=False):
        assert binary_form
        return self.der


def test_the_bytes_are_compared_whatever_the_handshake_let_through(homes, stranger):
    cluster, own = homes[0].cluster, homes[0].place.certificate_der
    pinned(Presenting(own), own)
    for other in (None, b"", stranger.place.certificate_der, homes[1].place.certificate_der, own[:-1]):
        with pytest.raises(WrongCertificate, match=r"cluster.toml"):
            pinned(Presenting(other), own)
    assert [member_of(Presenting(home.place.certificate_der), cluster) for home in homes] == [0, 1, 2]
    assert member_of(Presenting(None), cluster) is None
    for other in (stranger.place.certificate_der, own + b"\0"):
        with pytest.raises(WrongCertificate, match="no replica"):
            member_of(Presenting(other), cluster)


def test_who_has_a_certificate_that_is_none_is_met_by_nobody_and_stops_nobody(run, homes):
    """A list of members may say so (replica.core.places): the others must be able to go over to it."""
    members = [homes[0].place.certificate_der, b"none", homes[2].place.certificate_der]
    context = server_context(homes[0].certificate_path, homes[0].key_path, members)

    async def main():
        async with serving(homes[0], context) as (port, came):
            own = (homes[2].certificate_path, homes[2].key_path)
            await dial(port, client_context(homes[0].place.certificate_der, *own))
            assert await came.get() == 2
            with pytest.raises(ssl.SSLCertVerificationError):
                await dial(port, client_context(b"none"))

    run(main())


def test_contexts_trust_nothing_else(homes):
    server, client = server_of(homes[0]), client_context(homes[0].place.certificate_der)
    assert len(server.get_ca_certs(binary_form=True)) <= 3
    assert server.cert_store_stats()["x509"] == 3
    assert client.cert_store_stats()["x509"] == 1
    assert server.num_tickets == 0
    for context in (server, client):
        assert context.minimum_version is ssl.TLSVersion.TLSv1_3


def test_certificate_and_key_belong_together(homes):
    with pytest.raises(ValueError, match="both or neither"):
        client_context(homes[0].place.certificate_der, homes[0].certificate_path)
