r"""The kernel's list of measured programs and files: IMA, the Integrity Measurement Architecture of Linux.

Source: Linux, security/integrity/ima and Documentation/security/IMA-templates.rst. The kernel shows the list as
/sys/kernel/security/ima/binary_runtime_measurements. Integers are in the machine's order, here little-endian:

    4 PCR   20 SHA-1 template digest   4 size   template's name   4 size (not with "ima")   template data

    ima-ng, ima-sig   data: fields, each 4 size ‖ content: "algorithm:\0" ‖ digest, then the path and a final zero;
                      ima-sig has a third field, the file's signature, which may be empty
    others            data: fields; if the first two are a digest and a path, they are read like those
    ima               data: 20 digest, 4 size, path. The template digest is over the digest and the path padded to 256.

Each entry extends PCR 10: with the template digest in the SHA-1 bank; in other banks with that bank's own digest of the
template data, or, before Linux 5.8, with the SHA-1 digest and zeros. A *violation* (a file that was written while it
was read) has a digest of zeros, and extends 0xFF….

Replaying the list proves its digests and paths, in their order: the template data holds both. The template's *name* is
in no digest: a host may change it, so the fields are read by their form: as a digest and a path if they are that, and
else, if they are 276 bytes, as those of "ima". A changed name hides nothing. That the
digest is the file's is the kernel's word; the firmware's event log says which kernel it was. The list grows while it is
read: what is beyond the quoted PCR is cut off.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from trustlog.appraisal.bytesreader import BytesReader
from trustlog.errors import VerificationError

REASON = "ima-list-malformed"
IMA_PCR = 10
ENTRIES_MAX = 128 * 1024
NAME_BYTES_MAX = 64
DATA_BYTES_MAX = 64 * 1024
PATH_BYTES_MAX = 4096

_PATH_PADDED = 256
_SHA1_BYTES = 20
_ZERO_SHA1 = bytes(_SHA1_BYTES)


@dataclass(frozen=True, slots=True)
class ImaEntry:
    """One measured file. path and digest are empty in entries that are no digest and path.

    algorithm: of ``digest`` ("sha256"). template_digest: SHA-1 as the list has it. hashed: what the template's digest
    is taken over. is_violation: nothing can be said of the file.
    """

    pcr: int
    template: str
    template_digest: bytes
    hashed: bytes
    algorithm: str
    digest: bytes
    path: str
    is_violation: bool


def parse_ima_list(data: bytes) -> list[ImaEntry]:
    """Read a list; VerificationError("ima-list-malformed") if it is none, or its template digests are wrong."""
    reader = BytesReader(data, "IMA list", REASON)
    entries: list[ImaEntry] = []
    while not reader.is_at_end:
        if len(entries) >= ENTRIES_MAX:
            raise reader.error(f"has more than {ENTRIES_MAX} entries")
        entries.append(_entry(reader))
    return entries


def proven_entries(entries: Sequence[ImaEntry], quoted: bytes, *, padded: bool = False) -> int | None:
    """Return how many entries, from the first, lead PCR 10 (SHA-256 bank) to its ``quoted`` value; None if none do.

    padded: as kernels before 5.8 extended it, with padded SHA-1 digests. That is worth what SHA-1 is.
    """
    value = bytes(32)
    if value == quoted:
        return 0
    for count, entry in enumerate(entries, 1):
        if entry.pcr != IMA_PCR:
            continue
        value = hashlib.sha256(value + _extended(entry, padded=padded)).digest()
        if value == quoted:
            return count
    return None


def proven_entries_sha1(entries: Sequence[ImaEntry], quoted: bytes) -> int | None:
    """Return the same for the SHA-1 bank (20 bytes)."""
    value = bytes(20)
    if value == quoted:
        return 0
    for count, entry in enumerate(entries, 1):
        if entry.pcr != IMA_PCR:
            continue
        extended = b"\xff" * 20 if entry.is_violation else entry.template_digest
        value = hashlib.sha1(value + extended, usedforsecurity=False).digest()
        if value == quoted:
            return count
    return None


def _extended(entry: ImaEntry, *, padded: bool) -> bytes:
    if entry.is_violation:
        return b"\xff" * 32
    return entry.template_digest + bytes(12) if padded else hashlib.sha256(entry.hashed).digest()


def _entry(reader: BytesReader) -> ImaEntry:
    pcr = reader.bounded(4, 23, "PCR")
    template_digest = reader.take(20)
    name = reader.take(reader.bounded(4, NAME_BYTES_MAX, "a template's name of size")).decode("ascii", "replace")
    if name == "ima":
        digest = reader.take(20)
        path = reader.take(reader.bounded(4, _PATH_PADDED - 1, "a path of size"))
        hashed = digest + path + bytes(_PATH_PADDED - len(path))
    else:
        hashed = reader.take(reader.bounded(4, DATA_BYTES_MAX, "template data of size"))
    algorithm, digest, raw_path = _read(hashed, name)
    is_violation = template_digest == _ZERO_SHA1
    if not is_violation and hashlib.sha1(hashed, usedforsecurity=False).digest() != template_digest:
        raise reader.error(f"has an entry before byte {reader.position} whose digest is not that of its content")
    shown = raw_path.decode("utf-8", "backslashreplace")
    return ImaEntry(pcr, name, template_digest, hashed, algorithm, digest, shown, is_violation)


def _read(hashed: bytes, name: str) -> tuple[str, bytes, bytes]:
    """Return algorithm, digest and path of what a template's digest is taken over, whatever it is called."""
    try:
        return _fields(hashed)
    except VerificationError:
        if len(hashed) == _SHA1_BYTES + _PATH_PADDED:
            return "sha1", hashed[:_SHA1_BYTES], hashed[_SHA1_BYTES:].rstrip(b"\0")
        if name in {"ima-ng", "ima-sig"}:
            raise
        return "", b"", b""


def _fields(data: bytes) -> tuple[str, bytes, bytes]:
    """Return algorithm, digest and path of the fields d-ng and n-ng, which come first; others may follow."""
    reader = BytesReader(data, "IMA list", REASON)
    first = reader.take(reader.bounded(4, 256, "a digest field of size"))
    path = reader.take(reader.bounded(4, PATH_BYTES_MAX, "a path of size"))
    while not reader.is_at_end:
        reader.take(reader.number(4))  # ima-sig: the file's signature
    algorithm, separator, digest = first.partition(b":\0")
    if not separator or not path.endswith(b"\0"):
        raise reader.error("has template data that is not a digest and a path")
    return algorithm.decode("ascii", "replace").removeprefix("ima:"), digest, path[:-1]


def check_little_endian(data: bytes) -> None:
    """Refuse a list of a big-endian machine in words that say so, rather than as nonsense."""
    if data[:4] == IMA_PCR.to_bytes(4, "big"):
        raise VerificationError(REASON, "the IMA list is of a big-endian machine; add ima_canonical_fmt to its kernel")
