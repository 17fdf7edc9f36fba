"""Evidence (RFC 9334, section 8.1): one JSON document, written by the attester, judged by the verifier.

    schema_version  1
    attestation     {"statement", "signature"}: the QUOTE statement (trustlog.statements, 219 bytes) and the log key's
                    signature over it (r‖s, 64 bytes); a TPM's key signs quotes only: its signature here is empty
    manifest        the manifest (trustlog.measurement) that the measurement is the digest of; may be empty
    tpm             absent, or what a TPM attests: see TpmEvidence
    tsm             absent, or a confidential virtual machine's report: see TsmEvidence

Byte strings are hexadecimal digits, the large ones (manifest, boot_log, ima_list, report, certificates) base64. Other
members are for people, and no verifier reads them. All sizes are bounded before anything is decoded.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trustlog.errors import VerificationError
from trustlog.measurement import MANIFEST_BYTES_MAX
from trustlog.statements import QUOTE_SIZE, QuoteStatement
from trustlog.tpm.registers import PROGRAM_EVENTS_MAX
from trustlog.tpm.structures import NV_INDEXES

SCHEMA_VERSION = 1
EVIDENCE_BYTES_MAX = 16 * 2**20
BOOT_LOG_BYTES_MAX = 2**20
IMA_LIST_BYTES_MAX = 8 * 2**20
REPORT_BYTES_MAX = 64 * 1024
CERTIFICATES_MAX = 8
CERTIFICATE_BYTES_MAX = 16 * 1024
QUOTE_BYTES_MAX = 4096
# JSON values in a document; what evidence holds besides the list of programs are less than 200.
VALUES_MAX = PROGRAM_EVENTS_MAX + 1024
PROGRAM_EVENT_BYTES_MAX = 256
TPM_PUBLIC_BYTES_MAX = 1024
ANCHOR_SIZE = 40
ANCHORS_BYTES_MAX = 2048 * ANCHOR_SIZE
PROVIDER_MAX = 64


@dataclass(frozen=True, slots=True)
class QuotedPcrs:
    """A TPM's quote of one bank, and the values that it binds.

    quote: TPMS_ATTEST as the TPM signed it; its extraData is SHA-256 of the QUOTE statement. signature: r‖s. pcrs: the
    quoted PCRs and no others; 32 bytes each, of the SHA-1 bank 20.
    """

    quote: bytes
    signature: bytes
    pcrs: Mapping[int, bytes]


@dataclass(frozen=True, slots=True)
class ShownAnchors:
    """The log's anchors in the TPM's NV ``index``, and the TPM's certificate of its content (trustlog.tpm.anchors).

    records: 40 bytes each, u64 last and 32 head, from the empty log on. attest: TPMS_ATTEST of TPM2_NV_Certify, whose
    extraData is SHA-256 of the QUOTE statement; signature: r‖s.
    """

    index: int
    records: bytes
    attest: bytes
    signature: bytes


@dataclass(frozen=True, slots=True)
class TpmEvidence:
    """A TPM's quote, and the logs that explain the PCRs in it.

    sha256: the quote that counts. programs: the events (bytes of trustlog.tpm.registers) extended into the program
    PCR since the machine started. boot_log and ima_list: the kernel's binary lists, empty if not asked for. sha1: a
    quote of that bank, for a firmware whose event log has nothing else. attestation_key and endorsement_key:
    TPMT_PUBLIC, empty if not known; certificates: DER, the endorsement key's own first. anchors: None without.
    """

    sha256: QuotedPcrs
    programs: tuple[bytes, ...] = ()
    boot_log: bytes = b""
    ima_list: bytes = b""
    sha1: QuotedPcrs | None = None
    attestation_key: bytes = b""
    endorsement_key: bytes = b""
    certificates: tuple[bytes, ...] = ()
    anchors: ShownAnchors | None = None


@dataclass(frozen=True, slots=True)
class TsmEvidence:
    """A report of the Linux tsm interface. provider: its kind, "sev_guest". certificates: DER, in any order."""

    provider: str
    report: bytes
    certificates: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Evidence:
    """What an attester hands over. Nothing in it is believed before ``trustlog.appraisal.appraise`` has judged it."""

    statement: bytes
    signature: bytes
    manifest: bytes = b""
    tpm: TpmEvidence | None = None
    tsm: TsmEvidence | None = None

    def encode(self) -> bytes:
        """Return the document, one line."""
        return json.dumps({"schema_version": SCHEMA_VERSION, **self.document()}).encode()

    def document(self) -> dict[str, object]:
        """Return the document's members without the schema's version, readable facts first."""
        said = QuoteStatement.decode(self.statement)
        content: dict[str, object] = {
            "kind": said.kind.name.lower(),
            "log_id": said.log_id.hex(),
            "public_key": said.public_key.hex(),
            "epoch": said.epoch,
            "measurement": said.measurement.hex(),
            "nonce": said.nonce.hex(),
            "rests_on": rests_on(self),
            "attestation": {"statement": self.statement.hex(), "signature": self.signature.hex()},
            "manifest": _base64(self.manifest),
        }
        if self.tpm is not None:
            content["tpm"] = _tpm_document(self.tpm)
        if self.tsm is not None:
            content["tsm"] = {
                "provider": self.tsm.provider,
                "report": _base64(self.tsm.report),
                "certificates": [_base64(one) for one in self.tsm.certificates],
            }
        return content


def _tpm_document(tpm: TpmEvidence) -> dict[str, object]:
    banks = {"sha256": tpm.sha256} | ({"sha1": tpm.sha1} if tpm.sha1 is not None else {})
    quotes: dict[str, object] = {
        name: {
            "quote": quoted.quote.hex(),
            "signature": quoted.signature.hex(),
            "pcrs": {str(pcr): value.hex() for pcr, value in sorted(quoted.pcrs.items())},
        }
        for name, quoted in banks.items()
    }
    if tpm.anchors is not None:
        quotes["anchors"] = {
            "index": tpm.anchors.index,
            "records": _base64(tpm.anchors.records),
            "attest": tpm.anchors.attest.hex(),
            "signature": tpm.anchors.signature.hex(),
        }
    return quotes | {
        "programs": [event.hex() for event in tpm.programs],
        "boot_log": _base64(tpm.boot_log),
        "ima_list": _base64(tpm.ima_list),
        "attestation_key": tpm.attestation_key.hex(),
        "endorsement_key": tpm.endorsement_key.hex(),
        "certificates": [_base64(one) for one in tpm.certificates],
    }


def rests_on(evidence: Evidence) -> str:
    """Say in a few words what evidence claims to rest on."""
    parts = []
    if evidence.tpm is not None:
        parts.append("TPM quote")
    elif evidence.signature:
        parts.append("self-asserted: the log key's own signature")
    if evidence.tsm is not None:
        parts.append(f"report of a confidential virtual machine ({evidence.tsm.provider})")
    return "; ".join(parts) or "nothing"


def decode_evidence(data: bytes, bytes_max: int = EVIDENCE_BYTES_MAX) -> Evidence:
    """Read a document of at most ``bytes_max`` bytes; VerificationError("malformed") for anything else."""
    if len(data) > bytes_max:
        raise VerificationError("malformed", f"evidence of {len(data)} bytes; the limit is {bytes_max}")
    # A decoded value takes many times the memory of its text: what can be values is counted before anything is decoded.
    if not data.isascii() or sum(map(data.count, (b",", b"{", b"["))) > VALUES_MAX:
        raise VerificationError("malformed", f"the evidence is not ASCII, or has more than {VALUES_MAX} JSON values")
    try:
        content = json.loads(data, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise VerificationError("malformed", "the evidence is not JSON, or names a member twice") from error
    top = _Members(content, "evidence")
    if (version := top.get("schema_version", int)) != SCHEMA_VERSION:
        raise VerificationError("malformed", f"evidence of version {version}; this program reads {SCHEMA_VERSION}")
    attestation = top.members("attestation")
    return Evidence(
        attestation.hex("statement", QUOTE_SIZE),
        attestation.hex("signature", 64),
        top.base64("manifest", MANIFEST_BYTES_MAX),
        _tpm(top.members("tpm")) if "tpm" in content else None,
        _tsm(top.members("tsm")) if "tsm" in content else None,
    )


def _tpm(part: _Members) -> TpmEvidence:
    return TpmEvidence(
        _quoted(part.members("sha256"), 32),
        tuple(_hex(event, PROGRAM_EVENT_BYTES_MAX, "programs") for event in part.items("programs", PROGRAM_EVENTS_MAX)),
        part.base64("boot_log", BOOT_LOG_BYTES_MAX),
        part.base64("ima_list", IMA_LIST_BYTES_MAX),
        _quoted(part.members("sha1"), 20) if "sha1" in part.names() else None,
        part.hex("attestation_key", TPM_PUBLIC_BYTES_MAX),
        part.hex("endorsement_key", TPM_PUBLIC_BYTES_MAX),
        _certificates(part),
        _anchors(part.members("anchors")) if "anchors" in part.names() else None,
    )


def _anchors(part: _Members) -> ShownAnchors:
    index: int = part.get("index", int)
    records = part.base64("records", ANCHORS_BYTES_MAX)
    if index not in NV_INDEXES or len(records) % ANCHOR_SIZE:
        raise VerificationError("malformed", "the evidence has no proper 'anchors'")
    return ShownAnchors(index, records, part.hex("attest", QUOTE_BYTES_MAX), part.hex("signature", 64))


def _quoted(part: _Members, size: int) -> QuotedPcrs:
    values = part.members("pcrs")
    numbers = {str(number): number for number in range(24)}
    if not set(values.names()) <= set(numbers):
        raise VerificationError("malformed", "the evidence names a PCR that there is not")
    pcrs = {numbers[name]: values.hex(name, size) for name in values.names()}
    if any(len(value) != size for value in pcrs.values()):
        raise VerificationError("malformed", f"a PCR's value is not {size} bytes")
    return QuotedPcrs(part.hex("quote", QUOTE_BYTES_MAX), part.hex("signature", 64), pcrs)


def _tsm(part: _Members) -> TsmEvidence:
    provider = part.get("provider", str)
    if len(provider) > PROVIDER_MAX or not provider.isascii() or not provider.isprintable():
        raise VerificationError("malformed", "the evidence's tsm provider is no proper name")
    return TsmEvidence(provider, part.base64("report", REPORT_BYTES_MAX), _certificates(part))


def _certificates(part: _Members) -> tuple[bytes, ...]:
    listed = part.items("certificates", CERTIFICATES_MAX)
    return tuple(_of_base64(one, CERTIFICATE_BYTES_MAX, "certificates") for one in listed)


class _Members:
    """The members of one JSON object, asked for by type; VerificationError("malformed") otherwise."""

    def __init__(self, content: object, name: str) -> None:
        if type(content) is not dict:
            raise VerificationError("malformed", f"the {name} is not a JSON object")
        self._content: dict[str, Any] = content

    def names(self) -> list[str]:
        return sorted(self._content)

    def get(self, name: str, kind: type) -> Any:  # noqa: ANN401 - what JSON holds
        value = self._content.get(name)
        if type(value) is not kind:
            raise VerificationError("malformed", f"the evidence has no proper {name!r}")
        return value

    def members(self, name: str) -> _Members:
        return _Members(self._content.get(name), f"evidence's {name!r}")

    def items(self, name: str, count_max: int) -> list[Any]:
        value: list[Any] = self.get(name, list)
        if len(value) > count_max:
            raise VerificationError("malformed", f"the evidence's {name!r} has {len(value)} items, not ≤ {count_max}")
        return value

    def hex(self, name: str, size_max: int) -> bytes:
        return _hex(self._content.get(name), size_max, name)

    def base64(self, name: str, size_max: int) -> bytes:
        return _of_base64(self._content.get(name), size_max, name)


def _hex(value: object, size_max: int, name: str) -> bytes:
    # One form only: capital letters or blanks would make two documents of one.
    if type(value) is str and len(value) <= 2 * size_max and value == "".join(value.lower().split()):
        try:
            return bytes.fromhex(value)
        except ValueError:
            pass
    raise VerificationError("malformed", f"the evidence's {name!r} is not hexadecimal digits of ≤ {size_max} bytes")


def _of_base64(value: object, size_max: int, name: str) -> bytes:
    if type(value) is str and len(value) <= 4 * (size_max + 2) // 3 + 4:
        try:
            content = base64.b64decode(value, validate=True)
        except (ValueError, binascii.Error):
            content = None
        # Equal again when encoded: base64 has unused bits, and a flipped one must not pass.
        if content is not None and len(content) <= size_max and _base64(content) == value:
            return content
    raise VerificationError("malformed", f"the evidence's {name!r} is not base64 of at most {size_max} bytes")


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a member stands twice")
    return content
