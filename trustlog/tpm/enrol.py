"""Enrolment: making a log's key in a TPM, and proving to somebody else which TPM that is (RFC 9334: an attester's).

    host                                      who admits the log
    create      makes the key                                        request: endorsement key and certificate, key
                                              challenge              checks all of it; encrypts a secret for this key
    answer      decrypts it, quotes the PCR                          answer: the secret, and the quote
                                              accept                 what is pinned (``TpmPins``)

What follows from an answer: the attestation key is in the TPM that the endorsement certificate names (only that TPM
can decrypt), was born in it and cannot leave it, and signs what begins as a quote does only if that TPM made it
(restricted; anything else it signs for whoever asks). The quote's qualified name shows that it is a *child* of the
endorsement key: a primary key would come back after TPM2_Clear, which sets the counts back, and so could tell an epoch
twice. The quote pins the PCR's value on which the log begins.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import hmac
import os
import shutil
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from trustlog.errors import MisuseError, VerificationError
from trustlog.keys import VerifyingKey
from trustlog.sealed import SEAL_KEY_SIZE, Files, SealedJournal, write_new
from trustlog.tpm.backend import TpmLog
from trustlog.tpm.chain import PCR_DEFAULT, PCR_MAX, TpmPins, dump_public_file
from trustlog.tpm.client import Signed, Tpm
from trustlog.tpm.credential import Credential, make_credential, public_key_of
from trustlog.tpm.exchange import no_password
from trustlog.tpm.folder import (
    CONFIG_FILE,
    DEFAULT_ADDRESS,
    HANDLES,
    KEY_FILE,
    PUBLIC_KEY_FILE,
    STATE_FILE,
    Role,
    TpmConfig,
    TpmState,
)
from trustlog.tpm.opening import open_log
from trustlog.tpm.quote import parse_quote, verify_quote
from trustlog.tpm.structures import (
    AK_ATTRIBUTES,
    ALG_ECC,
    ALG_ECDSA,
    ALG_NULL,
    ALG_RSA,
    ALG_SHA256,
    CURVE_P256,
    RH_ENDORSEMENT,
    Public,
    attestation_key_template,
    endorsement_key_template,
    qualified_name,
)
from trustlog.tpm.wire import TpmError

SECRET_SIZE = 32
CHAIN_LENGTH_MAX = 6
# "TCG EK Credential Profile", version 2.5, section 2.2.1.4: where TPMs keep the certificates of both templates.
CERTIFICATE_INDEXES = {ALG_RSA: 0x01C00002, ALG_ECC: 0x01C0000A}
CERTIFICATE_SIZE_MAX = 8192
ENDORSEMENT_USAGE = x509.ObjectIdentifier("2.23.133.8.1")  # tcg-kp-EKCertificate, section 3.5.13

_NONCE_TAG = b"trustlog/enrol\0\0"
# Whatever the library says of bytes that are no proper certificate, at once or when a field is looked at.
UNREADABLE = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)


@dataclass(frozen=True, slots=True)
class EnrolmentRequest:
    """What a host shows: two TPMT_PUBLIC, and the endorsement certificate (DER; empty if the TPM has none)."""

    endorsement_key: bytes
    certificate: bytes
    key: bytes

    def digest(self) -> bytes:
        """Return the SHA-256 (32 bytes) of all three, each after its length (u32)."""
        parts = (self.endorsement_key, self.certificate, self.key)
        return hashlib.sha256(b"".join(struct.pack(">I", len(part)) + part for part in parts)).digest()


@dataclass(frozen=True, slots=True)
class Challenge:
    """The verifier's: ``secret`` and ``asked`` (32 bytes each) stay with it, ``credential`` goes to the host.

    asked: the digest of the request that was checked and challenged: no other may be accepted in its place.
    """

    secret: bytes
    credential: Credential
    asked: bytes


@dataclass(frozen=True, slots=True)
class Answer:
    """What the host's TPM decrypted, and its quote of the PCR with the value that it shows."""

    secret: bytes
    pcr: int
    base: bytes
    quote: Signed


def create(
    directory: Path,
    *,
    address: str = DEFAULT_ADDRESS,
    pcr: int = PCR_DEFAULT,
    endorsement_kind: int = ALG_RSA,
    files: Files | None = None,
) -> TpmLog:
    """Make ``directory`` (must not exist) with a new log whose key is in the TPM at ``address``, and open it.

    MisuseError if the directory exists, or for a PCR that anybody can reset; TpmError if the TPM fails.
    """
    if not 0 <= pcr <= PCR_MAX:
        raise MisuseError(f"PCR {pcr} cannot hold a log: 16 and 23 can be reset, 17 to 22 not extended; take 0 to 15")
    files = files or Files()
    with Tpm.open(address) as tpm:
        try:
            directory.mkdir(mode=0o700)
        except FileExistsError as error:
            raise MisuseError(f"{directory} exists already: choose a new directory for a new log") from error
        handle = None
        try:
            handle = make_key(tpm, endorsement_kind)
            _fill(directory, tpm, TpmSetting(address, handle, pcr, endorsement_kind), files)
        except BaseException:
            if handle is not None:
                with suppress(TpmError):
                    tpm.evict_control(handle, handle)
            shutil.rmtree(directory, ignore_errors=True)
            raise
    return open_log(directory, files=files)


@dataclass(frozen=True, slots=True)
class TpmSetting:
    """Where a new log's key is, and which PCR is its chain."""

    address: str
    handle: int
    pcr: int
    endorsement_kind: int


def make_key(tpm: Tpm, endorsement_kind: int) -> int:
    """Make an attestation key under the endorsement key and keep it; returns its persistent handle."""
    taken = set(tpm.handles(HANDLES[0]))
    free = next((handle for handle in HANDLES if handle not in taken), None)
    if free is None:
        raise TpmError(f"{tpm.address}: all of the handles {HANDLES[0]:#x} … {HANDLES[-1]:#x} are taken: evict one")
    endorsement_key, _ = tpm.create_primary(RH_ENDORSEMENT, endorsement_key_template(endorsement_kind))
    with tpm.loaded(endorsement_key):
        with tpm.endorsement_session() as auth:
            private, public = tpm.create(endorsement_key, attestation_key_template(), [auth])
        with tpm.endorsement_session() as auth:
            transient = tpm.load(endorsement_key, private, public, [auth])
        with tpm.loaded(transient):
            tpm.evict_control(transient, free)
    return free


def _fill(directory: Path, tpm: Tpm, setting: TpmSetting, files: Files) -> None:
    public, signer = tpm.read_public(setting.handle)
    base = tpm.pcr_read([setting.pcr])[setting.pcr]
    epoch = parse_quote(tpm.quote(setting.handle, [setting.pcr], b"").attest).clock.epoch
    pins = TpmPins(setting.pcr, base, signer, epoch)
    config = TpmConfig(setting.address, setting.handle, setting.endorsement_kind, pins)
    seal_key = os.urandom(SEAL_KEY_SIZE)
    zeros = bytes(32)
    state = TpmState(epoch, 1, 0, 0, Role.NORMAL, base, zeros, zeros, zeros)
    write_new(files, directory / KEY_FILE, seal_key, 0o600)
    write_new(files, directory / PUBLIC_KEY_FILE, dump_public_file(public.key, pins), 0o644)
    write_new(files, directory / CONFIG_FILE, config.dump(), 0o644)
    SealedJournal.create(directory / STATE_FILE, seal_key, public.key, state.encode(), files).close()
    files.sync_directory(directory.parent)


# The host's side


def request(tpm: Tpm, config: TpmConfig) -> EnrolmentRequest:
    """Return what somebody else needs to judge this log's key."""
    handle, public = tpm.create_primary(RH_ENDORSEMENT, endorsement_key_template(config.endorsement_kind))
    with tpm.loaded(handle):
        certificate = _read_certificate(tpm, config.endorsement_kind)
        return EnrolmentRequest(public.raw, certificate, tpm.read_public(config.handle)[0].raw)


def answer(tpm: Tpm, config: TpmConfig, credential: Credential) -> Answer:
    """Decrypt the challenge and quote the PCR, before the log's first entry; TpmError if this is another TPM."""
    handle, _ = tpm.create_primary(RH_ENDORSEMENT, endorsement_key_template(config.endorsement_kind))
    with tpm.loaded(handle), tpm.endorsement_session() as auth:
        auths = [no_password(), auth]
        secret = tpm.activate_credential(config.handle, handle, credential.blob, credential.secret, auths)
    pcr = config.pins.pcr
    base = tpm.pcr_read([pcr])[pcr]
    return Answer(secret, pcr, base, tpm.quote(config.handle, [pcr], _nonce(secret)))


def _read_certificate(tpm: Tpm, kind: int) -> bytes:
    index = CERTIFICATE_INDEXES[kind]
    try:
        size = tpm.nv_read_public(index).size
        content = tpm.nv_read(index, min(size, CERTIFICATE_SIZE_MAX))
    except TpmError:
        return b""  # many software TPMs have none; who admits the log decides what that means
    # The index may be larger than the certificate: DER says how long it is.
    return content[: 4 + int.from_bytes(content[2:4], "big")] if content[:2] == b"\x30\x82" else b""


def retire(tpm: Tpm, config: TpmConfig) -> None:
    """Remove the log's key from its TPM, for good: nothing can be said with it any more."""
    tpm.evict_control(config.handle, config.handle)


# The verifier's side


def challenge(asked: EnrolmentRequest, roots: Sequence[x509.Certificate], now: dt.datetime) -> Challenge:
    """Check a host's request and encrypt a secret for its key.

    roots: certificates of the TPM makers' authorities, with the intermediate ones; without any, nothing shows that the
    endorsement key is a TPM's at all. VerificationError "malformed", "wrong-key" (attributes or kind of either key),
    "wrong-certificate" (of another key, or not from these roots).
    """
    endorsement_key, key = Public.parse(asked.endorsement_key), Public.parse(asked.key)
    check_attestation_key(key)
    check_endorsement_key(endorsement_key)
    if roots:
        check_certificate(asked.certificate, endorsement_key, roots, now)
    secret = os.urandom(SECRET_SIZE)
    return Challenge(secret, make_credential(endorsement_key, key.name, secret), asked.digest())


def accept(asked: EnrolmentRequest, sent: Challenge, answered: Answer) -> TpmPins:
    """Check the host's answer and return what is to be pinned.

    VerificationError "wrong-request" (not the one that was challenged), "wrong-key", "wrong-secret" (another TPM),
    "wrong-signer" (the key is no child of the endorsement key), and those of ``verify_quote``.
    """
    if not hmac.compare_digest(sent.asked, asked.digest()):
        raise VerificationError(
            "wrong-request", "this is not the request that was challenged: nothing of it is checked"
        )
    if not hmac.compare_digest(sent.secret, answered.secret):
        raise VerificationError("wrong-secret", "the secret was not decrypted: the key is not in that TPM")
    endorsement_key, key = Public.parse(asked.endorsement_key), Public.parse(asked.key)
    check_attestation_key(key)
    check_endorsement_key(endorsement_key)
    parent = qualified_name(struct.pack(">I", RH_ENDORSEMENT), endorsement_key.name)
    signer = qualified_name(parent, key.name)
    values = {answered.pcr: answered.base}
    signed = answered.quote
    verifying = VerifyingKey.from_bytes(key.key)
    quote = verify_quote(verifying, signed.attest, signed.signature, values, nonce=_nonce(sent.secret), signer=signer)
    return TpmPins(answered.pcr, answered.base, signer, quote.clock.epoch)


def check_attestation_key(key: Public) -> None:
    """Raise VerificationError("wrong-key") unless it is a restricted P-256 signing key that never leaves its TPM."""
    expected = (ALG_ECC, AK_ATTRIBUTES, b"", (ALG_NULL, 0, 0), (ALG_ECDSA, ALG_SHA256), (CURVE_P256, ALG_NULL))
    if (key.kind, key.attributes, key.policy, key.symmetric, key.scheme, key.detail) != expected:
        raise VerificationError(
            "wrong-key",
            f"the log's key has attributes {key.attributes:#x} instead of {AK_ATTRIBUTES:#x} (fixedTPM, fixedParent, "
            "sensitiveDataOrigin, userWithAuth, noDA, restricted, sign), or is not P-256 for ECDSA with SHA-256",
        )


def check_endorsement_key(key: Public) -> None:
    """Raise VerificationError("wrong-key") unless it is of the template L-1 (RSA) or L-2 (P-256)."""
    expected = Public.parse(endorsement_key_template(key.kind))
    same = (key.attributes, key.policy, key.symmetric, key.scheme, key.detail)
    if same != (expected.attributes, expected.policy, expected.symmetric, expected.scheme, expected.detail):
        raise VerificationError(
            "wrong-key", "the endorsement key is not of the TCG's template: no child of it is proven"
        )


@contextmanager
def reading_certificates() -> Iterator[None]:
    """Within this, a certificate that cannot be read is a VerificationError("wrong-certificate").

    The library reads many fields only when they are asked for, so all that is done with a certificate of somebody
    else's belongs in here.
    """
    try:
        with warnings.catch_warnings():
            # What RFC 5280 forbids and the library only warns of, such as a serial number 0, is no reason to refuse.
            warnings.simplefilter("ignore")
            yield
    except UNREADABLE as error:
        raise VerificationError("wrong-certificate", f"a certificate cannot be read: {error}") from error


def check_certificate(
    der: bytes, endorsement_key: Public, roots: Sequence[x509.Certificate], now: dt.datetime
) -> x509.Certificate:
    """Check that the certificate is for this key and leads to one of the roots; returns the root it leads to.

    roots may hold intermediate certificates too: only a self-issued one ends a chain. One that cannot be read is passed
    over. VerificationError("wrong-certificate").
    """
    if not der:
        raise VerificationError("wrong-certificate", "the TPM has no endorsement certificate of its maker")
    with reading_certificates():
        certificate = x509.load_der_x509_certificate(der)
        said = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        if said != public_key_of(endorsement_key).public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo):
            raise VerificationError("wrong-certificate", "the endorsement certificate is for another key")
        with suppress(x509.ExtensionNotFound):
            if ENDORSEMENT_USAGE not in certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value:
                raise VerificationError("wrong-certificate", "the certificate is not one of an endorsement key")
        return _root_of(certificate, roots, now)


def _root_of(certificate: x509.Certificate, roots: Sequence[x509.Certificate], now: dt.datetime) -> x509.Certificate:
    for _ in range(CHAIN_LENGTH_MAX):
        if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
            raise VerificationError("wrong-certificate", f"a certificate is not valid now: {_subject(certificate)}")
        issuer = next((root for root in roots if _issued(certificate, root)), None)
        if issuer is None:
            raise VerificationError("wrong-certificate", f"no given authority issued {_subject(certificate)}")
        if issuer == certificate:
            return issuer
        certificate = issuer
    raise VerificationError("wrong-certificate", f"the chain has more than {CHAIN_LENGTH_MAX} certificates")


def _issued(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
        is_authority = issuer.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        usage = issuer.extensions.get_extension_for_class(x509.KeyUsage).value
    except (InvalidSignature, x509.ExtensionNotFound, *UNREADABLE):
        return False
    return is_authority and usage.key_cert_sign


def _subject(certificate: x509.Certificate) -> str:
    return certificate.subject.rfc4514_string() or f"certificate {certificate.serial_number:x}"


def _nonce(secret: bytes) -> bytes:
    return hashlib.sha256(_NONCE_TAG + secret).digest()
