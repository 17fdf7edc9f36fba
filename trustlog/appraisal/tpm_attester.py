"""The attester's side of a TPM: quoting the PCRs, with the lists that explain them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from weakref import WeakKeyDictionary

from trustlog.appraisal.bootlog import SHA256, parse_boot_log
from trustlog.appraisal.evidence import (
    ANCHOR_SIZE,
    ANCHORS_BYTES_MAX,
    BOOT_LOG_BYTES_MAX,
    IMA_LIST_BYTES_MAX,
    Evidence,
    QuotedPcrs,
    ShownAnchors,
    TpmEvidence,
)
from trustlog.appraisal.ima import IMA_PCR
from trustlog.errors import MisuseError, SealedStateError, VerificationError
from trustlog.hashing import HASH_SIZE
from trustlog.measurement import own_manifest, own_measurement
from trustlog.statements import BackendKind, QuoteStatement
from trustlog.tpm import enrol
from trustlog.tpm.anchors import ANCHORS_FILE, INDEX_DEFAULT, read_anchors, value_of
from trustlog.tpm.backend import TpmLog
from trustlog.tpm.client import Signed
from trustlog.tpm.enrol import EnrolmentRequest
from trustlog.tpm.exchange import no_password
from trustlog.tpm.quote import parse_nv_certification
from trustlog.tpm.registers import quote_values
from trustlog.tpm.structures import ALG_SHA1, ALG_SHA256
from trustlog.tpm.wire import TpmError

BOOT_LOG = Path("/sys/kernel/security/tpm0/binary_bios_measurements")
IMA_LIST = Path("/sys/kernel/security/ima/binary_runtime_measurements")
BOOT_PCRS = tuple(range(11))  # the firmware's, the boot loader's, and IMA's

ANCHOR_ATTEMPTS_MAX = 3

# Quotes these PCRs of a bank with this extra data, and returns their values.
Quoter = Callable[[Sequence[int], bytes, int], tuple[Signed, dict[int, bytes]]]


# Making the endorsement key takes a chip a second or more, and it is always the same.
_ENDORSEMENTS: WeakKeyDictionary[TpmLog, EnrolmentRequest] = WeakKeyDictionary()


def make_tpm_evidence(log: TpmLog, *, nonce: bytes, context: bytes, measured_boot: bool = False) -> Evidence:
    """Have a log's TPM make evidence for ``nonce`` (32 bytes); MisuseError, TpmError."""
    measured = own_measurement(BackendKind.TPM)
    said = QuoteStatement(BackendKind.TPM, context, log.log_id, log.epoch, nonce, measured, log.public_key)
    statement = said.encode()

    def quoter(pcrs: Sequence[int], extra_data: bytes, bank: int) -> tuple[Signed, dict[int, bytes]]:
        return quote_values(log.client, log.config.handle, pcrs, extra_data, bank)

    programs = log.programs
    shown = quote_pcrs(quoter, statement, programs.events, pcr=programs.pcr, measured_boot=measured_boot)
    asked = _ENDORSEMENTS.get(log) or enrol.request(log.client, log.config)
    _ENDORSEMENTS[log] = asked
    certificates = (asked.certificate,) if asked.certificate else ()
    shown = replace(shown, attestation_key=asked.key, endorsement_key=asked.endorsement_key, certificates=certificates)
    shown = replace(shown, anchors=_anchors(log, statement))
    return Evidence(statement, b"", own_manifest(BackendKind.TPM), tpm=shown)


def _anchors(log: TpmLog, statement: bytes) -> ShownAnchors | None:
    """Have the TPM certify the log's anchors; None: there are none, too many, others in the index, a damaged list."""
    index = INDEX_DEFAULT if log.anchors is None else log.anchors.index
    nonce = hashlib.sha256(statement).digest()
    for _ in range(ANCHOR_ATTEMPTS_MAX):
        try:
            listed = read_anchors(log.directory / ANCHORS_FILE)
        except SealedStateError:
            return None  # `status` names the damage; the log goes on, and so does its evidence
        if not 1 <= len(listed) <= ANCHORS_BYTES_MAX // ANCHOR_SIZE:
            return None
        try:
            said = log.client.nv_certify(log.config.handle, index, HASH_SIZE, nonce, no_password())
        except TpmError:
            return None
        # The log may have anchored itself in between, and evidence that contradicts itself would be refused.
        if parse_nv_certification(said.attest).content == value_of(log.log_id, listed):
            records = b"".join(one.last.to_bytes(8, "big") + one.head for one in listed)
            return ShownAnchors(index, records, said.attest, said.signature)
    return None


def quote_pcrs(
    quoter: Quoter,
    statement: bytes,
    programs: Sequence[bytes],
    *,
    pcr: int,
    measured_boot: bool = False,
    boot_log: Path | None = None,
    ima_list: Path | None = None,
) -> TpmEvidence:
    """Have the attestation key quote the program's PCR, and with measured_boot those of the boot.

    MisuseError: the kernel shows no event log. TpmError: the TPM fails.
    """
    boot_log, ima_list = boot_log or BOOT_LOG, ima_list or IMA_LIST
    pcrs = sorted({pcr, *BOOT_PCRS}) if measured_boot else [pcr]
    boot = _kernel_list(boot_log, BOOT_LOG_BYTES_MAX) if measured_boot else b""
    if measured_boot and not boot:
        raise MisuseError(
            f"{boot_log}: the kernel shows no event log of the firmware; is there a TPM, and are you root?"
        )
    quoted = _quote(quoter, statement, pcrs, ALG_SHA256)
    sha1 = _quote(quoter, statement, sorted({*BOOT_PCRS}), ALG_SHA1) if _needs_sha1(boot) else None
    # Read after the quote: then the list holds what the PCR remembers, and perhaps more.
    ima = _kernel_list(ima_list, IMA_LIST_BYTES_MAX) if measured_boot and IMA_PCR in pcrs else b""
    return TpmEvidence(quoted, tuple(programs), boot, ima, sha1)


def _needs_sha1(boot: bytes) -> bool:
    with suppress(VerificationError):
        return bool(boot) and SHA256 not in parse_boot_log(boot).algorithms
    return False


def _quote(quoter: Quoter, statement: bytes, pcrs: Sequence[int], bank: int) -> QuotedPcrs:
    signed, values = quoter(pcrs, hashlib.sha256(statement).digest(), bank)
    return QuotedPcrs(signed.attest, signed.signature, values)


def _kernel_list(path: Path, size_max: int) -> bytes:
    """Return the kernel's list, nothing if there is none; MisuseError if it is larger than evidence may hold."""
    try:
        with path.open("rb") as file:
            content = file.read(size_max + 1)
    except OSError:
        return b""
    if len(content) > size_max:
        raise MisuseError(f"{path}: more than {size_max} bytes; evidence cannot hold it")
    return content
