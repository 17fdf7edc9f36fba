"""Dialling a peer by the name or number in the cluster file.

A name is resolved here, before the connection is made. uvloop resolves names within `create_connection` in a future of
its own; when a time limit ends the attempt first, nobody asks for that future's error, and it is printed as "Future
exception was never retrieved" with a traceback, at every attempt. Here it is awaited, or cancelled with the attempt.
"""

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

# Of one name; a cluster file names a machine, which has one or two.
ADDRESSES_MAX: Final = 8
REMEDY: Final = "see that this machine knows the name (DNS, /etc/hosts), or write an address into cluster.toml"

_Protocol = TypeVar("_Protocol", bound=asyncio.BaseProtocol)


class UnknownNameError(OSError):
    """A peer's name cannot be resolved; `why` says which and why, the text also what to do."""

    def __init__(self, host: str, reason: str) -> None:
        self.why = f"the name {host} cannot be resolved: {reason}"
        super().__init__(f"{self.why}; {REMEDY}")


async def resolve(host: str, port: int, patience_s: float) -> list[str]:
    """Return the addresses of a host, in the resolver's order; UnknownNameError if there are none to be had in time."""
    try:
        return [str(ipaddress.ip_address(host))]
    except ValueError:
        pass  # a name
    try:
        async with asyncio.timeout(patience_s):
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except TimeoutError:
        raise UnknownNameError(host, f"no answer within {patience_s:g} s") from None
    except (socket.gaierror, UnicodeError) as error:
        why = error.strerror if isinstance(error, socket.gaierror) else None
        raise UnknownNameError(host, why or str(error)) from None
    return list(dict.fromkeys(str(address[0]) for _, _, _, _, address in found))[:ADDRESSES_MAX]


async def dial(
    protocol: Callable[[], _Protocol], addresses: Sequence[str], port: int, tls: ssl.SSLContext
) -> tuple[asyncio.Transport, _Protocol]:
    """Return a connection whose TLS handshake is done, to the first of the addresses that takes one.

    OSError of the last address; ssl.SSLError at once, as that address is the peer's, or nobody's.
    """
    loop = asyncio.get_running_loop()
    for address in addresses[:-1]:
        try:
            return await loop.create_connection(protocol, address, port, ssl=tls, server_hostname="")
        except ssl.SSLError:
            raise
        except OSError:
            continue
    return await loop.create_connection(protocol, addresses[-1], port, ssl=tls, server_hostname="")
