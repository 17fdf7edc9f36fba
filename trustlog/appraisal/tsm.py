r"""Reports of confidential virtual machines, by Linux' tsm interface (Documentation/ABI/testing/configfs-tsm-report).

A directory made in /sys/kernel/config/tsm/report is a request: writing ``inblob`` (64 bytes of the guest's choice) has
the platform sign it, reading ``outblob`` gives the report, ``provider`` names its kind, ``auxblob`` may hold
certificates and ``generation`` counts the writes, so that another program's interference is noticed.

    inblob = SHA-512("trustlog/tsm\0\0\0\0" 16 ‖ nonce 32 ‖ public key 65 ‖ u64(epoch) ‖ configuration digest 32)
    configuration digest = SHA-256(version 1 ‖ kind of backend 1 ‖ context 32 ‖ measurement 32)

all taken from the QUOTE statement: the report then covers every field of it.

For AMD (provider "sev_guest") auxblob is the certificate table of the GHCB specification (AMD 56421, section 4.1.8.1):
entries of 16 GUID, 4 offset, 4 length (little-endian), ended by one of zeros; then the certificates.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from trustlog.appraisal.bytesreader import BytesReader
from trustlog.appraisal.evidence import CERTIFICATE_BYTES_MAX, CERTIFICATES_MAX, REPORT_BYTES_MAX, TsmEvidence
from trustlog.errors import MisuseError, TrustLogError
from trustlog.statements import VERSION, QuoteStatement

TSM_DIRECTORY = Path("/sys/kernel/config/tsm/report")
TAG = b"trustlog/tsm\0\0\0\0"


class TsmError(TrustLogError):
    """The platform gave no report; the text says why and what to do."""


def report_data(statement: QuoteStatement) -> bytes:
    """Return the inblob (64 bytes) that a report for ``statement`` must carry."""
    configuration = bytes([VERSION, statement.kind]) + statement.context + statement.measurement
    epoch = statement.epoch.to_bytes(8, "big")
    digest = hashlib.sha256(configuration).digest()
    return hashlib.sha512(TAG + statement.nonce + statement.public_key + epoch + digest).digest()


class ConfigFs:
    """What is asked of configfs; tests put a simulated folder in its place."""

    def make(self, directory: Path) -> None:
        """Make a request."""
        directory.mkdir(mode=0o700)

    def remove(self, directory: Path) -> None:
        """Remove it. The attributes go with it."""
        directory.rmdir()

    def write(self, path: Path, content: bytes) -> None:
        """Write an attribute in one piece."""
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, content)
        finally:
            os.close(fd)

    def read(self, path: Path, size_max: int) -> bytes:
        """Read an attribute, at most ``size_max`` bytes and one."""
        with path.open("rb") as file:
            return file.read(size_max + 1)


def make_report(inblob: bytes, directory: Path = TSM_DIRECTORY, files: ConfigFs | None = None) -> TsmEvidence:
    """Have the platform sign ``inblob`` (64 bytes).

    MisuseError: this machine has no such interface. TsmError: it gave no report.
    """
    files = files or ConfigFs()
    request = directory / f"trustlog-{os.getpid()}-{os.urandom(4).hex()}"
    try:
        files.make(request)
    except OSError as error:
        raise MisuseError(
            f"{directory}: {error.strerror or error}: this machine is no confidential virtual machine, its kernel "
            "lacks the tsm interface (Linux 6.7), configfs is not mounted, or you are not root"
        ) from error
    try:
        before = _generation(request, files)
        files.write(request / "inblob", inblob)
        report = _bounded(request / "outblob", REPORT_BYTES_MAX, files)
        provider = _bounded(request / "provider", 64, files).decode("ascii", "replace").strip()
        certificates = (
            parse_certificate_table(_auxiliary(request / "auxblob", files)) if provider == "sev_guest" else ()
        )
        if _generation(request, files) != before + 1:
            raise TsmError(f"{request}: another program wrote to this request; ask again")
    except OSError as error:
        raise TsmError(f"{error.filename}: {error.strerror or error}: the platform gave no report") from error
    finally:
        files.remove(request)
    return TsmEvidence(provider, report, tuple(certificates))


def parse_certificate_table(table: bytes) -> list[bytes]:
    """Return the certificates (DER) in an auxblob, none if it is empty; TsmError if it is damaged."""
    reader = BytesReader(table, "certificate table", "malformed")
    certificates: list[bytes] = []
    while table and len(certificates) <= CERTIFICATES_MAX:
        if len(table) - reader.position < 24:
            raise TsmError("the platform's certificate table has no end")
        guid, offset, length = reader.take(16), reader.number(4), reader.number(4)
        if guid == bytes(16):
            return certificates
        if offset + length > len(table) or not 1 <= length <= CERTIFICATE_BYTES_MAX:
            raise TsmError("the platform's certificate table names a place outside of itself")
        certificates.append(table[offset : offset + length])
    if table:
        raise TsmError(f"the platform's certificate table has more than {CERTIFICATES_MAX} entries")
    return certificates


def _auxiliary(path: Path, files: ConfigFs) -> bytes:
    try:
        return _bounded(path, REPORT_BYTES_MAX, files)
    except FileNotFoundError:
        return b""  # not every provider has one


def _generation(request: Path, files: ConfigFs) -> int:
    text = _bounded(request / "generation", 32, files)
    try:
        return int(text)
    except ValueError:
        raise TsmError(f"{request / 'generation'}: not a number") from None


def _bounded(path: Path, size_max: int, files: ConfigFs) -> bytes:
    content = files.read(path, size_max)
    if len(content) > size_max:
        raise TsmError(f"{path}: more than {size_max} bytes")
    return content
