"""AMD SEV-SNP attestation reports: who signed one, about which virtual machine, on which chip.

Source: AMD, SEV Secure Nested Paging Firmware ABI Specification (56860), section 7.3, and Versioned Chip Endorsement
Key Certificate and KDS Interface Specification (57230), section 3. A report has 1,184 bytes; integers and the two
halves of the signature are little-endian:

    offset size field
     0x000    4 version, 2 … 5                    0x090   48 launch measurement of the virtual machine
     0x008    8 guest policy, bit 19: debug       0x180    8 reported TCB
     0x030    4 VMPL, 0 … 3                       0x188    1 family of the CPU, from version 3 on
     0x034    4 signature algorithm, 1            0x1A0   64 chip id
     0x048    4 bits 2 … 4: signing key, 0 VCEK   0x2A0   72 r     0x2E8   72 s     0x330  368 zeros
     0x050   64 report data: the guest's own, see trustlog.appraisal.tsm

The first 0x2A0 bytes are signed: ECDSA, P-384, SHA-384, by the VCEK, a key of this one chip at this one TCB. AMD's
intermediate (ASK) signs its certificate, AMD's root (ARK) the intermediate's: RSASSA-PSS with SHA-384. A TCB has four
numbers, at its bytes 0 (boot loader), 1 (TEE), 6 (SNP), 7 (microcode); the other bytes are zeros. Read like this for
Milan and Genoa (family 0x19); others lay the TCB out differently and are refused, as are reports signed by a VLEK.
"""

from __future__ import annotations

import hashlib
import struct
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from trustlog.appraisal.policy import TCB_COMPONENTS, SnpPolicy
from trustlog.errors import VerificationError

REPORT_SIZE = 0x4A0
SIGNED_SIZE = 0x2A0
PROVIDER = "sev_guest"

_VERSIONS = range(2, 6)
_FAMILY_ZEN3_ZEN4 = 0x19
_DEBUG = 1 << 19
_TCB_BYTES = (0, 1, 6, 7)
_TCB_OIDS = tuple(f"1.3.6.1.4.1.3704.1.3.{number}" for number in (1, 2, 3, 8))
_CHIP_ID_OID = "1.3.6.1.4.1.3704.1.4"
# Whatever the library says of bytes that are no proper certificate.
_UNREADABLE = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)
_RSA_PSS = padding.PSS(mgf=padding.MGF1(hashes.SHA384()), salt_length=48)


@dataclass(frozen=True, slots=True)
class SnpReport:
    """A report's fields that are judged. ``tcb`` in the order of TCB_COMPONENTS; ``r`` and ``s`` are numbers."""

    version: int
    debug: bool
    vmpl: int
    report_data: bytes
    launch_measurement: bytes
    tcb: tuple[int, ...]
    chip_id: bytes
    r: int
    s: int
    signed: bytes

    @classmethod
    def decode(cls, report: bytes) -> SnpReport:
        """Read a report, whose signature is not looked at; VerificationError("snp-malformed")."""
        if len(report) != REPORT_SIZE:
            raise _malformed(f"a report of {len(report)} bytes, not {REPORT_SIZE}")
        version, guest_policy = struct.unpack_from("<I4xQ", report)
        vmpl, algorithm = struct.unpack_from("<II", report, 0x30)
        (key_bits,) = struct.unpack_from("<I", report, 0x48)
        if version not in _VERSIONS:
            raise _malformed(f"a report of version {version}")
        if algorithm != 1:
            raise _malformed(f"signature algorithm {algorithm}; only 1, ECDSA P-384 with SHA-384, is known")
        if key_bits >> 2 & 7:
            raise _malformed("the report is not signed by a VCEK")
        if version >= 3 and report[0x188] != _FAMILY_ZEN3_ZEN4:
            raise _malformed(f"a CPU of family {report[0x188]:#x}, whose reports this program cannot read")
        tcb = report[0x180:0x188]
        # What is not signed, and what is in no field, must be zeros: nothing in a report may be changed unnoticed.
        if any(tcb[2:6]) or any(report[0x2D0:0x2E8]) or any(report[0x318:]):
            raise _malformed("reserved bytes are not zeros")
        return cls(
            version,
            bool(guest_policy & _DEBUG),
            vmpl,
            report[0x50:0x90],
            report[0x90:0xC0],
            tuple(tcb[position] for position in _TCB_BYTES),
            report[0x1A0:0x1E0],
            int.from_bytes(report[0x2A0:0x2D0], "little"),
            int.from_bytes(report[0x2E8:0x318], "little"),
            report[:SIGNED_SIZE],
        )


def verify_report(
    report: bytes, certificates: Sequence[bytes], policy: SnpPolicy, report_data: bytes, now: datetime | None = None
) -> SnpReport:
    """Verify a report with its certificates (DER: ARK, ASK, VCEK, in any order) up to a root of the policy.

    report_data: the 64 bytes that it must carry. now: when the certificates must be valid; not looked at if None.
    VerificationError: ``snp-malformed``, ``snp-chain``, ``snp-signature``, ``snp-chip``, ``snp-tcb``,
    ``snp-report-data``, ``snp-policy``.
    """
    said = SnpReport.decode(report)
    vcek = _verify_chain(certificates, policy.roots, now)
    key = vcek.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise VerificationError("snp-chain", "the VCEK is no P-384 key")
    try:
        key.verify(encode_dss_signature(said.r, said.s), said.signed, ec.ECDSA(hashes.SHA384()))
    except InvalidSignature as error:
        raise VerificationError("snp-signature", "the report is not signed by the chip's key") from error
    if _chip_id(vcek) != said.chip_id:
        raise VerificationError("snp-chip", "the certificate is another chip's than the report")
    certified = tuple(_small_integer(vcek, oid) for oid in _TCB_OIDS)
    if certified != said.tcb:
        raise VerificationError("snp-tcb", f"the certificate is for TCB {certified}, the report says {said.tcb}")
    if said.report_data != report_data:
        raise VerificationError("snp-report-data", "the report was made for another nonce, key, epoch or configuration")
    _check_policy(said, policy)
    return said


def _check_policy(said: SnpReport, policy: SnpPolicy) -> None:
    if said.debug and not policy.allow_debug:
        raise VerificationError("snp-policy", "the virtual machine allows debugging: its host can look into it")
    if said.vmpl > policy.vmpl_max:
        raise VerificationError("snp-policy", f"VMPL {said.vmpl}, above the accepted {policy.vmpl_max}")
    if policy.launch_measurements and said.launch_measurement not in policy.launch_measurements:
        shown = said.launch_measurement.hex()
        raise VerificationError("snp-policy", f"the virtual machine's launch measurement {shown} is not accepted")
    if policy.chip_ids and said.chip_id not in policy.chip_ids:
        raise VerificationError("snp-policy", f"the chip {said.chip_id.hex()} is not accepted")
    for name, have, least in zip(TCB_COMPONENTS, said.tcb, policy.minimum_tcb, strict=True):
        if have < least:
            raise VerificationError("snp-policy", f"the TCB's {name} is {have}, below the accepted {least}")


def _verify_chain(certificates: Sequence[bytes], roots: frozenset[bytes], now: datetime | None) -> x509.Certificate:
    """Return the VCEK's certificate after verifying it up to a root that is known by its digest."""
    ark: list[x509.Certificate] = []
    ask: list[x509.Certificate] = []
    vcek: list[x509.Certificate] = []
    for der in certificates:
        certificate = _load(der)
        if hashlib.sha256(der).digest() in roots:
            ark.append(certificate)
        elif isinstance(_public_key(certificate), rsa.RSAPublicKey):
            ask.append(certificate)
        else:
            vcek.append(certificate)
    if not len(ark) == len(ask) == len(vcek) == 1:
        raise VerificationError(
            "snp-chain",
            "the certificates are not one of each: an accepted root (ARK), an intermediate (ASK) and a VCEK",
        )
    _verify_certificate(ark[0], ark[0], "root")
    _verify_certificate(ask[0], ark[0], "intermediate")
    _verify_certificate(vcek[0], ask[0], "VCEK")
    for issuer in (ark[0], ask[0]):
        if not _is_authority(issuer):
            raise VerificationError("snp-chain", "an issuer's certificate is not an authority's")
    for certificate in (*ark, *ask, *vcek):
        if now is not None and not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
            until = certificate.not_valid_after_utc.date()
            raise VerificationError("snp-chain", f"a certificate is not valid now, but until {until}")
    return vcek[0]


def _verify_certificate(subject: x509.Certificate, issuer: x509.Certificate, what: str) -> None:
    key = _public_key(issuer)
    try:
        if not isinstance(key, rsa.RSAPublicKey):
            raise VerificationError("snp-chain", f"the {what}'s issuer has no RSA key")
        key.verify(subject.signature, subject.tbs_certificate_bytes, _RSA_PSS, hashes.SHA384())
        if subject.issuer != issuer.subject:
            raise VerificationError("snp-chain", f"the {what}'s certificate names another issuer")
    except (InvalidSignature, ValueError) as error:
        raise VerificationError("snp-chain", f"the {what}'s certificate is not signed by its issuer") from error


def _load(der: bytes) -> x509.Certificate:
    try:
        with warnings.catch_warnings():
            # AMD numbers its VCEK certificates 0, which RFC 5280 does not allow.
            warnings.simplefilter("ignore")
            certificate = x509.load_der_x509_certificate(der)
        parameters = certificate.signature_algorithm_parameters
        algorithm = certificate.signature_hash_algorithm
    except _UNREADABLE as error:
        raise VerificationError("snp-chain", "a certificate cannot be read") from error
    _check_unsigned_part(der, certificate)
    if not (isinstance(parameters, padding.PSS) and isinstance(algorithm, hashes.SHA384)):
        raise VerificationError("snp-chain", "a certificate is not signed with RSASSA-PSS and SHA-384")
    return certificate


def _check_unsigned_part(der: bytes, certificate: x509.Certificate) -> None:
    """Refuse a certificate whose bytes outside of what is signed are not what follows from the rest.

    30 82 len ‖ signed part ‖ algorithm, the same bytes as in the signed part ‖ 03 82 len 00 ‖ signature (RFC 5280,
    section 4.1; the lengths have two bytes, because an RSA signature is longer than 255 bytes).
    """
    signed, signature = certificate.tbs_certificate_bytes, certificate.signature
    start = b"\x30\x82" + (len(der) - 4).to_bytes(2, "big") + signed
    end = b"\x03\x82" + (len(signature) + 1).to_bytes(2, "big") + b"\x00" + signature
    algorithm = der[len(start) : -len(end)]
    if not (der.startswith(start) and der.endswith(end) and len(algorithm) > 8 and algorithm in signed):
        raise VerificationError("snp-chain", "a certificate's two mentions of its algorithm differ")


def _public_key(certificate: x509.Certificate) -> object:
    try:
        return certificate.public_key()
    except _UNREADABLE as error:
        raise VerificationError("snp-chain", "a certificate's key cannot be read") from error


def _is_authority(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (x509.ExtensionNotFound, *_UNREADABLE):
        return False


def _extension(certificate: x509.Certificate, oid: str) -> bytes:
    try:
        return certificate.extensions.get_extension_for_oid(x509.ObjectIdentifier(oid)).value.public_bytes()
    except (x509.ExtensionNotFound, *_UNREADABLE) as error:
        raise VerificationError("snp-chain", f"the VCEK's certificate lacks AMD's extension {oid}") from error


def _chip_id(certificate: x509.Certificate) -> bytes:
    """Return the chip id: AMD stores its 64 bytes bare or, in other certificates, as a DER octet string."""
    value = _extension(certificate, _CHIP_ID_OID)
    return value.removeprefix(b"\x04\x40") if len(value) == 66 else value


def _small_integer(certificate: x509.Certificate, oid: str) -> int:
    """Return a DER INTEGER of 0 … 255."""
    value = _extension(certificate, oid)
    if value[:1] != b"\x02" or value[1:2] not in {b"\x01", b"\x02"} or len(value) != 2 + value[1]:
        raise VerificationError("snp-chain", f"the VCEK's extension {oid} is no small number")
    number = int.from_bytes(value[2:], "big")
    if number > 255 or (len(value) == 3 and number > 127):
        raise VerificationError("snp-chain", f"the VCEK's extension {oid} is no small number")
    return number


def _malformed(what: str) -> VerificationError:
    return VerificationError("snp-malformed", f"SEV-SNP report: {what}")
