"""Where a member is reached, and by which certificate it is known: its place in a list (`replica.core.members`).

Ordering does not need it, but whoever goes over to a list does. So what going over takes is judged here, from the bytes
alone, when the list is executed: the layout, and that no two members are met in one name. Whether a host can be found,
or the certificate be read, is no business of the agreed state: a member of which that is not so is reached by nobody,
and the others go on.

Layout (integers big-endian):

    u16 length, address "host:port" in ASCII, a host with colons in brackets; the port without leading zeros
    u16 length, TLS certificate (DER), of which only the bytes count here
    u8 1 if its log's enrolment was shown, else 0
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from replica.core.layout import LayoutError, Reader

PLACE_BYTES_MAX = 4096
HOST_SIZE_MAX = 253
LABEL_SIZE_MAX = 63
PORT_MAX = 65535

_LABEL = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_")
_IN_BRACKETS = _LABEL | frozenset(":%")


@dataclass(frozen=True, slots=True)
class Place:
    """One member's place. host: an IPv6 host without its brackets."""

    host: str
    port: int
    certificate: bytes
    enrolled: bool = False

    @property
    def address(self) -> str:
        """Return "host:port", a host with colons in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def encode(self) -> bytes:
        """Return the documented layout."""
        address = self.address.encode()
        parts = [struct.pack(">H", len(address)), address]
        parts += [struct.pack(">H", len(self.certificate)), self.certificate, bytes([self.enrolled])]
        return b"".join(parts)


def decode_places(raws: Sequence[bytes]) -> tuple[Place, ...]:
    """Decode the places of members 0 to n-1; LayoutError says which is none, or which two are one."""
    places = tuple(_decode(number, raw) for number, raw in enumerate(raws))
    addresses: dict[str, int] = {}
    certificates: dict[bytes, int] = {}
    for number, place in enumerate(places):
        same_address = addresses.setdefault(place.address.lower(), number)
        same_certificate = certificates.setdefault(place.certificate, number)
        for what, first in (("address", same_address), ("TLS certificate", same_certificate)):
            if first != number:
                raise LayoutError(f"replicas {first} and {number} have one {what}; give each its own")
    return places


def _decode(number: int, raw: bytes) -> Place:
    try:
        return _read(Reader(raw))
    except LayoutError as error:
        raise LayoutError(f"the place of replica {number}: {error}") from error


def _read(reader: Reader) -> Place:
    address, certificate, enrolled = reader.take(reader.u16()), reader.take(reader.u16()), reader.u8()
    reader.finish()
    if not certificate or enrolled > 1:
        raise LayoutError("it has no certificate, or neither says that its log was enrolled nor that it was not")
    host, port = _split(address)
    return Place(host, port, certificate, bool(enrolled))


def _split(address: bytes) -> tuple[str, int]:
    text = address.decode("latin-1")
    host, _, port = text.rpartition(":")
    is_bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if is_bracketed else host
    allowed = _IN_BRACKETS if is_bracketed else _LABEL
    labels = host.removesuffix(".").split(".")
    if (
        len(host) > HOST_SIZE_MAX
        or is_bracketed != (":" in host)
        or any(not 1 <= len(label) <= LABEL_SIZE_MAX or not allowed.issuperset(label) for label in labels)
    ):
        raise LayoutError("its address is not of the form host:port, or no host has that name")
    # One way to write each number, or two addresses could be one.
    if len(port) > len(str(PORT_MAX)) or not port.isdecimal() or not 1 <= int(port) <= PORT_MAX or port[0] == "0":
        raise LayoutError(f"its port is not a number from 1 to {PORT_MAX}")
    return host, int(port)
