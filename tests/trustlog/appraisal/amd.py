"""A maker of SEV-SNP reports: its own root, intermediate and chip key, laid out as AMD documents them."""

from __future__ import annotations

import datetime as dt
import functools

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding

CHIP_ID = bytes(range(64))
TCB = (3, 1, 8, 115)
LAUNCH = bytes(range(48))
NOT_BEFORE = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
NOT_AFTER = dt.datetime(2033, 1, 1, tzinfo=dt.UTC)
SHA384 = hashes.SHA384()
PSS = padding.PSS(mgf=padding.MGF1(hashes.SHA384()), salt_length=48)


@functools.cache
def rsa_key(number: int) -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


@functools.cache
def chip_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP384R1())


def certificate(subject, issuer, key, issuer_key, *, ca=True, extensions=(), signing=PSS, digest=SHA384) -> bytes:
    def name(text):
        return x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, text)])

    builder = x509.CertificateBuilder(name(issuer), name(subject), key.public_key(), 1, NOT_BEFORE, NOT_AFTER)
    if ca:
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    for oid, value in extensions:
        unknown = x509.UnrecognizedExtension(x509.ObjectIdentifier(f"1.3.6.1.4.1.3704.1.{oid}"), value)
        builder = builder.add_extension(unknown, critical=False)
    return builder.sign(issuer_key, digest, rsa_padding=signing).public_bytes(Encoding.DER)


def ark() -> bytes:
    return _ark()


@functools.cache
def _ark() -> bytes:
    return certificate("ARK-Test", "ARK-Test", rsa_key(0), rsa_key(0))


@functools.cache
def ask() -> bytes:
    return certificate("SEV-Test", "ARK-Test", rsa_key(1), rsa_key(0))


def vcek(chip_id=CHIP_ID, tcb=TCB, *, key=None, issuer_key=None, leave_out=(), **numbers) -> bytes:
    """numbers: DER values that replace those of the TCB's extensions, by name ("e1")."""
    values = [
        (f"3.{number}", numbers.get(f"e{number}", _integer(spl))) for number, spl in zip((1, 2, 3, 8), tcb, strict=True)
    ]
    extensions = [one for one in [*values, ("4", chip_id)] if one[0] not in leave_out]
    return certificate(
        "SEV-VCEK", "SEV-Test", key or chip_key(), issuer_key or rsa_key(1), ca=False, extensions=extensions
    )


def _integer(number: int) -> bytes:
    return b"\x02\x01" + bytes([number]) if number < 128 else b"\x02\x02\x00" + bytes([number])


def report(
    report_data: bytes, *, version=2, debug=False, vmpl=0, algorithm=1, key_bits=0, tcb=TCB, family=0x19, key=None
) -> bytes:
    """A signed report, by the table of the ABI specification."""
    data = bytearray(0x4A0)
    data[0:4] = version.to_bytes(4, "little")
    data[8:16] = (0x30000 | debug << 19).to_bytes(8, "little")
    data[0x30:0x34] = vmpl.to_bytes(4, "little")
    data[0x34:0x38] = algorithm.to_bytes(4, "little")
    data[0x48:0x4C] = key_bits.to_bytes(4, "little")
    data[0x50:0x90] = report_data
    data[0x90:0xC0] = LAUNCH
    data[0x180], data[0x181], data[0x186], data[0x187] = tcb
    data[0x188] = family if version >= 3 else 0
    data[0x1A0:0x1E0] = CHIP_ID
    r, s = decode_dss_signature((key or chip_key()).sign(bytes(data[:0x2A0]), ec.ECDSA(hashes.SHA384())))
    data[0x2A0:0x2E8] = r.to_bytes(72, "little")
    data[0x2E8:0x330] = s.to_bytes(72, "little")
    return bytes(data)
