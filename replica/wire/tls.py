"""TLS with pinned self-signed certificates: there is no authority to guard, and no name to check.

A replica's certificate stands in the cluster file. A dialler trusts exactly the one certificate of the
replica that it means to reach. An accepting replica trusts exactly the members' certificates, and also takes
connections that present none: those are clients, who prove their key as `replica.wire.handshake` says. Every
certificate is an end entity's (CA: false), so none can vouch for another; `pinned` and `member_of` compare
the bytes all the same, and must be called on every connection.

TLS 1.3 only, on both sides. No session tickets: a key taken out of use cannot live on in a resumed session.

In TLS 1.3 the dialler's side is up before the other side has judged the dialler's certificate. A dialler that
is refused sees its connection close when it first reads, with an alert or without, and no error of its handshake.
"""

import asyncio
import ssl
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from replica.cluster.clusterfile import ClusterFile
from replica.wire.dial import dial, resolve


class WrongCertificate(Exception):  # noqa: N818 - it names what was found
    """The other side's certificate is not the one in the cluster file; the text says whose and what to do."""


TlsObject = ssl.SSLObject | ssl.SSLSocket


def server_context(
    certificate: Path, key: Path, member_certificates: Iterable[bytes], passphrase: bytes | None = None
) -> ssl.SSLContext:
    """Return the context of an accepting replica.

    certificate, key: this replica's PEM files. member_certificates: DER of every member's. passphrase: the key's, if
    it is encrypted. A connection that presents another certificate fails in the handshake; one that presents none
    succeeds (a client).
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _restrict(context, member_certificates)
    context.num_tickets = 0
    context.verify_mode = ssl.CERT_OPTIONAL
    _load_own(context, certificate, key, passphrase)
    return context


def client_context(
    expected_certificate_der: bytes,
    certificate: Path | None = None,
    key: Path | None = None,
    passphrase: bytes | None = None,
) -> ssl.SSLContext:
    """Return the context of a dialler that means to reach the replica with exactly this certificate (DER).

    certificate, key: the dialler's own PEM files if it is a replica; a client has none. passphrase: the key's.
    """
    if (certificate is None) != (key is None):
        raise ValueError("a certificate needs its key, and a key its certificate: give both or neither")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # the pinned certificate says who it is; names prove nothing here
    context.verify_mode = ssl.CERT_REQUIRED
    _restrict(context, [expected_certificate_der])
    if certificate is not None and key is not None:
        _load_own(context, certificate, key, passphrase)
    return context


def pinned(ssl_object: TlsObject, expected_certificate_der: bytes) -> None:
    """Raise WrongCertificate unless the other side presented exactly this certificate (DER)."""
    if ssl_object.getpeercert(binary_form=True) != expected_certificate_der:
        raise WrongCertificate(
            "the replica's TLS certificate is not the one in cluster.toml; compare that file on both sides"
        )


async def presented_certificate(host: str, port: int, deadline_s: float) -> bytes | None:
    """Return the certificate (DER) that is presented at an address, None if there is none to be had in time.

    For telling people which one it is: nothing is verified, and nothing is said or believed on that connection.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        addresses = await resolve(host, port, deadline_s)
        async with asyncio.timeout(deadline_s):
            transport, _ = await dial(asyncio.Protocol, addresses, port, context)
    except (OSError, ssl.SSLError):
        return None
    try:
        shown: bytes | None = transport.get_extra_info("ssl_object").getpeercert(binary_form=True)
        return shown
    finally:
        transport.abort()


def member_of(ssl_object: TlsObject, cluster: ClusterFile) -> int | None:
    """Return the number of the member that presented its certificate, None if none was presented.

    WrongCertificate for any other certificate.
    """
    presented = ssl_object.getpeercert(binary_form=True)
    if presented is None:
        return None
    for member in cluster.replicas:
        if member.certificate_der == presented:
            return member.number
    raise WrongCertificate("the TLS certificate belongs to no replica in the cluster file; the connection is refused")


def _load_own(context: ssl.SSLContext, certificate: Path, key: Path, passphrase: bytes | None) -> None:
    # Given no password at all, OpenSSL would ask for it on the terminal, in its own words, and wait.
    context.load_cert_chain(certificate, key, passphrase or b"")


def _restrict(context: ssl.SSLContext, trusted: Iterable[bytes]) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # The anchors are these and no others: the system's authorities are never loaded.
    for certificate in trusted:
        # An agreed list of members may hold one that is none (`replica.core.places`): nobody is met by it.
        with suppress(ssl.SSLError):
            context.load_verify_locations(cadata=certificate)
