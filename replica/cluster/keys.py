"""Key files and certificates.

    tls.key, client.key   ECDSA P-256 private key, PEM PKCS#8, encrypted if it has a passphrase, mode 0600
    tls.crt               self-signed X.509 certificate, PEM; tls.next.key and tls.next.crt: see `.renewal`
    client.pub            the client's public key: 130 hexadecimal digits (uncompressed point) and a newline

A passphrase (`replica.cluster.passphrase`) encrypts with what `cryptography` calls the best available: AES-256-CBC
under PBKDF2-HMAC-SHA256 of 2,048 rounds (PBES2, RFC 8018). That slows guessing little: the passphrase must be hard to
guess.

Certificates carry a key and nothing else: whoever meets one compares all its bytes with those in the cluster
file. They are valid from 1970 to 9999 (RFC 5280, section 4.1.2.5: no expiry), as no decision may depend on
a wall clock; a key is replaced by changing the member list (`.renewal`), not by letting a certificate run out.
"""

import datetime as dt
import os
import re
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from replica.cluster.strict_toml import ConfigError, read_bounded

KEY_FILE_BYTES_MAX: Final = 16 * 1024
PASSPHRASE_BYTES_MAX: Final = 1023  # what OpenSSL takes
CLIENT_KEY_NAME: Final = "client.key"
CLIENT_PUBLIC_NAME: Final = "client.pub"

_NOT_BEFORE: Final = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_NOT_AFTER: Final = dt.datetime(9999, 12, 31, 23, 59, 59, tzinfo=dt.UTC)
_DIGITS: Final = re.compile("[0-9a-fA-F]{66,}")
_ECDSA: Final = ec.ECDSA(hashes.SHA256())


class LockedKeyError(ConfigError):
    """A private key is encrypted and was not opened: no passphrase was given, or a wrong one."""


class KeptKey:
    """A private key's file as it was when it was opened, in memory, with the passphrase that opened it, if it has one.

    OpenSSL reads keys from files only, so it has a path; what is there is in no file system, and ends with this object.
    """

    def __init__(self, path: Path, passphrase: bytes | None) -> None:
        load_private_key(path, passphrase)
        self.passphrase = passphrase
        self._descriptor = os.memfd_create("key", os.MFD_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor)
        os.fchmod(self._descriptor, 0o600)
        with self.path.open("wb") as file:
            file.write(read_bounded(path, KEY_FILE_BYTES_MAX, private="private key"))

    @property
    def path(self) -> Path:
        """Return where this process, and no other, reads it."""
        return Path(f"/proc/self/fd/{self._descriptor}")


def generate_private_key() -> ec.EllipticCurvePrivateKey:
    """Return a new P-256 key."""
    return ec.generate_private_key(ec.SECP256R1())


def public_bytes(key: ec.EllipticCurvePublicKey) -> bytes:
    """Return the uncompressed point: 65 bytes, 0x04 || x || y."""
    return key.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)


def write_new(path: Path, content: bytes, mode: int) -> None:
    """Write a file that did not exist, with this mode from its first moment, and make it durable.

    FileExistsError if the name is taken, were it by a dangling link; nothing is ever overwritten.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_private_key(path: Path, key: ec.EllipticCurvePrivateKey, passphrase: bytes | None = None) -> None:
    """Write a key to a new file with mode 0600, encrypted if there is a passphrase; FileExistsError if there is one."""
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase is not None:
        encryption = serialization.BestAvailableEncryption(passphrase)
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    write_new(path, pem, 0o600)


def is_encrypted(path: Path) -> bool:
    """Say whether a private key can be read with a passphrase only; ConfigError if the file cannot be used."""
    try:
        load_private_key(path)
    except LockedKeyError:
        return True
    return False


def load_private_key(
    path: Path, passphrase: bytes | None = None, source: str = "that was given"
) -> ec.EllipticCurvePrivateKey:
    """Read a P-256 private key; ConfigError if others can read the file or it holds something else.

    passphrase: for a key that is encrypted, left aside for one that is not; LockedKeyError without it, or if it is
    another one. source: where it came from, for that text.
    """
    pem = read_bounded(path, KEY_FILE_BYTES_MAX, private="private key")
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except TypeError:
        if passphrase is None:
            raise LockedKeyError(f"{path}: this private key is encrypted, and no passphrase was given") from None
        key = _decrypt(path, pem, passphrase, source)
    except (ValueError, UnsupportedAlgorithm) as error:
        # The error's own text may quote the content, which must not reach a log.
        raise ConfigError(f"{path}: not a private key in PEM; restore it from a copy") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ConfigError(f"{path}: not a P-256 key; make one with trustlog-replica")
    return key


def _decrypt(path: Path, pem: bytes, passphrase: bytes, source: str) -> PrivateKeyTypes:
    try:
        return serialization.load_pem_private_key(pem, password=passphrase)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise LockedKeyError(
            f"{path}: the passphrase {source} does not open this private key: give the one that it was encrypted with. "
            "If that was it, the file is damaged: restore it from a copy"
        ) from None


def make_certificate(number: int, key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return a self-signed certificate (DER) for the TLS key of replica `number`."""
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, f"trustlog replica {number}")])
    usage = x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_NOT_BEFORE)
        .not_valid_after(_NOT_AFTER)
        # No authority: a member must not be able to issue certificates that pass as another member's.
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.DER)


def certificate_pem(der: bytes) -> str:
    """Return a certificate as PEM text, ending in a newline."""
    certificate = x509.load_der_x509_certificate(der)
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def certificate_der(pem: bytes) -> bytes:
    """Return the DER of the one certificate in `pem`; ValueError says why no replica can have it."""
    try:
        certificates = x509.load_pem_x509_certificates(pem)
        key = certificates[0].public_key()
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ValueError(
            f"not a certificate in PEM ({str(error).splitlines()[0] if str(error) else 'empty'})"
        ) from None
    if len(certificates) != 1:
        raise ValueError(f"{len(certificates)} certificates, exactly one is wanted")
    if not (isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1)):
        raise ValueError("the certificate's key is not a P-256 key")  # noqa: TRY004 - a value from a file
    try:
        certificates[0].verify_directly_issued_by(certificates[0])
    except (ValueError, TypeError, InvalidSignature):
        raise ValueError("the certificate is not signed by its own key, or damaged") from None
    return certificates[0].public_bytes(serialization.Encoding.DER)


def certificate_public_key(der: bytes) -> bytes:
    """Return the public key (65 bytes) in a certificate that `certificate_der` accepted."""
    key = x509.load_der_x509_certificate(der).public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise TypeError("the certificate's key is not a P-256 key")
    return public_bytes(key)


@dataclass(frozen=True, slots=True)
class ClientKey:
    """The key with which a client signs. Its representation shows the public key only."""

    private_key: ec.EllipticCurvePrivateKey = field(repr=False)
    public_key: bytes

    @classmethod
    def from_private(cls, key: ec.EllipticCurvePrivateKey) -> "ClientKey":
        """Wrap a P-256 private key."""
        return cls(key, public_bytes(key.public_key()))

    @classmethod
    def generate(cls) -> "ClientKey":
        """Return a new key, for one that need not outlive the program."""
        return cls.from_private(generate_private_key())

    def sign(self, message: bytes) -> bytes:
        """Return the ECDSA signature with SHA-256 over `message`: 64 bytes, r || s, big-endian."""
        r, s = decode_dss_signature(self.private_key.sign(message, _ECDSA))
        return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def create_client_key(directory: Path, passphrase: bytes | None = None) -> ClientKey:
    """Write a new client key and its public part into a directory; FileExistsError if there is one."""
    key = ClientKey.generate()
    write_private_key(directory / CLIENT_KEY_NAME, key.private_key, passphrase)
    write_new(directory / CLIENT_PUBLIC_NAME, key.public_key.hex().encode() + b"\n", 0o644)
    return key


def read_public_key(text: str) -> bytes:
    """Return a client's public key, 65 bytes, from its hexadecimal digits, its client.pub or the folder that holds it.

    ConfigError if that is no P-256 point.
    """
    path = Path(text)
    digits = text
    if not _DIGITS.fullmatch(text):
        path = path / CLIENT_PUBLIC_NAME if path.is_dir() else path
        digits = read_bounded(path, KEY_FILE_BYTES_MAX).decode("ascii", "replace").strip()
    try:
        raw = bytes.fromhex(digits)
        return public_bytes(ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), raw))
    except ValueError as error:
        raise ConfigError(
            f"{text}: not a client's public key; give the hexadecimal digits in its folder's "
            f"{CLIENT_PUBLIC_NAME}, or that file"
        ) from error


def load_client_key(directory: Path, passphrase: bytes | None = None, source: str = "that was given") -> ClientKey:
    """Read the client key in a directory; ConfigError says what is wrong with it. See `load_private_key`."""
    return ClientKey.from_private(load_private_key(directory / CLIENT_KEY_NAME, passphrase, source))
