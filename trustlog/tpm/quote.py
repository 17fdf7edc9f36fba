"""What a TPM attests, verified with its attestation key's public half and nothing else.

    TPMS_ATTEST ("TPM 2.0 Library, Part 2", section 10.12.12)
      u32 magic 0xFF544347  u16 type  TPM2B qualified signer  TPM2B extra data
      clock information     u64 clock  u32 reset count  u32 restart count  u8 safe (1 or 0)
      u64 firmware version
      quote (0x8018)        TPML_PCR_SELECTION  TPM2B digest over the selected PCRs' values, in rising order
      NV certify (0x8014)   TPM2B name of the index  u16 offset  TPM2B content

A *restricted* key signs what begins with the magic only if it was made inside the TPM; so whoever checks that the key
is restricted, and that the magic is there, may believe every field but one: the extra data is whatever the caller of
the command handed in. What does not begin with the magic proves nothing: the key signs any such bytes for who hands
them in (TPM2_Hash gives the ticket that TPM2_Sign asks for: part 1, section 23.2.2; part 3, 15.4). The extra data shows
that a quote is younger than a nonce in it, never that anything in it is true. The selection is compared exactly: a
quote of PCR 23, which anybody can reset, must not pass for one of PCR 14 (known as Keylime's checkquote defect).
``safe`` is 0 after every power cut and says nothing about the counts, which never fall but for TPM2_Clear.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from trustlog.errors import VerificationError
from trustlog.keys import VerifyingKey
from trustlog.tpm.structures import ALG_SHA256, NAME_SIZE, SHA256_SIZE, Reader, malformed, read_pcr_selection

GENERATED = 0xFF544347  # TPM_GENERATED_VALUE: 0xFF and "TCG"
TYPE_QUOTE = 0x8018
TYPE_NV_CERTIFY = 0x8014


@dataclass(frozen=True, slots=True)
class ClockInfo:
    """TPMS_CLOCK_INFO: clock in milliseconds; reset and restart counts are u32."""

    clock_ms: int
    reset_count: int
    restart_count: int
    safe: bool

    @property
    def epoch(self) -> int:
        """Both counts as one u64 that never falls: reset count, then restart count."""
        return self.reset_count << 32 | self.restart_count


@dataclass(frozen=True, slots=True)
class Quote:
    """A TPM's statement about PCRs. selection: bank -> PCRs; digest: SHA-256 over their values (32 bytes)."""

    qualified_signer: bytes
    extra_data: bytes
    clock: ClockInfo
    firmware_version: int
    selection: dict[int, tuple[int, ...]]
    digest: bytes


@dataclass(frozen=True, slots=True)
class NvCertification:
    """A TPM's statement about an NV index. name: 34 bytes; content: what stands at ``offset``."""

    qualified_signer: bytes
    extra_data: bytes
    clock: ClockInfo
    firmware_version: int
    name: bytes
    offset: int
    content: bytes


def parse_quote(attest: bytes) -> Quote:
    """Read a TPMS_ATTEST of a quote, to its last byte; VerificationError("malformed", "wrong-statement")."""
    reader = Reader(attest)
    signer, extra, clock, firmware = _read_header(reader, TYPE_QUOTE, "quote")
    selection, digest = read_pcr_selection(reader), reader.sized()
    reader.finish()
    if len(digest) != SHA256_SIZE:
        raise malformed(f"a PCR digest of {len(digest)} bytes is not SHA-256")
    return Quote(signer, extra, clock, firmware, selection, digest)


def parse_nv_certification(attest: bytes) -> NvCertification:
    """Read a TPMS_ATTEST of TPM2_NV_Certify; VerificationError("malformed", "wrong-statement")."""
    reader = Reader(attest)
    signer, extra, clock, firmware = _read_header(reader, TYPE_NV_CERTIFY, "certified NV index")
    name, offset, content = reader.sized(), reader.number(2), reader.sized()
    reader.finish()
    return NvCertification(signer, extra, clock, firmware, name, offset, content)


def pcr_digest(values: Mapping[int, bytes]) -> bytes:
    """Return the digest over PCR values that a quote of exactly these PCRs holds (part 1, section 17.5)."""
    return hashlib.sha256(b"".join(values[pcr] for pcr in sorted(values))).digest()


def verify_quote(
    key: VerifyingKey,
    attest: bytes,
    signature: bytes,
    values: Mapping[int, bytes],
    *,
    nonce: bytes | None = None,
    signer: bytes | None = None,
    bank: int = ALG_SHA256,
) -> Quote:
    """Verify that the TPM that holds ``key`` said: exactly these PCRs of ``bank`` have exactly these values.

    signature: r‖s, 64 bytes. nonce: the extra data that is expected; without it nothing is known of the quote's age.
    signer: the expected qualified name (34 bytes) of the key. VerificationError "malformed", "wrong-statement" (no
    quote), "wrong-signer", "wrong-nonce", "wrong-selection" (other PCRs or banks), "wrong-pcr" (other values),
    "bad-signature". That the key is restricted and the TPM's own is for enrolment to have checked.
    """
    quote = parse_quote(attest)
    if signer is not None and quote.qualified_signer != signer:
        raise VerificationError("wrong-signer", "the quote's signer is another key, or stands in another hierarchy")
    if nonce is not None and quote.extra_data != nonce:
        raise VerificationError("wrong-nonce", "the quote was made for another question: its extra data differs")
    if not values or quote.selection != {bank: tuple(sorted(values))}:
        raise VerificationError("wrong-selection", f"the quote is of other PCRs: {describe_selection(quote.selection)}")
    if quote.digest != pcr_digest(values):
        raise VerificationError("wrong-pcr", "the PCRs have other values than the quote says")
    key.verify(signature, attest)
    return quote


def verify_nv_certification(
    key: VerifyingKey, attest: bytes, signature: bytes, *, name: bytes, signer: bytes | None = None
) -> NvCertification:
    """Verify what stands in the NV index called ``name`` (34 bytes), from its beginning.

    VerificationError "malformed", "wrong-statement", "wrong-signer", "wrong-index" (another name: another index, or
    other attributes or policy; or not from offset 0), "bad-signature".
    """
    said = parse_nv_certification(attest)
    if signer is not None and said.qualified_signer != signer:
        raise VerificationError("wrong-signer", "the signer is another key, or stands in another hierarchy")
    if len(name) != NAME_SIZE or said.name != name or said.offset:
        raise VerificationError("wrong-index", "this is about another NV index, or one with other attributes or policy")
    key.verify(signature, attest)
    return said


def describe_selection(selection: Mapping[int, tuple[int, ...]]) -> str:
    """Say a PCR selection in words, as tpm2-tools write it: "sha256:0,7"."""
    names = {0x0004: "sha1", 0x000B: "sha256", 0x000C: "sha384", 0x000D: "sha512"}
    said = [f"{names.get(bank, hex(bank))}:{','.join(map(str, pcrs))}" for bank, pcrs in selection.items()]
    return "+".join(said) or "none"


def _read_header(reader: Reader, kind: int, what: str) -> tuple[bytes, bytes, ClockInfo, int]:
    if reader.number(4) != GENERATED:
        raise malformed("it does not begin with TPM_GENERATED: no TPM made it")
    if reader.number(2) != kind:
        raise VerificationError("wrong-statement", f"the TPM attested something else than a {what}")
    signer, extra = reader.sized(), reader.sized()
    clock_ms, resets, restarts, safe = (reader.number(size) for size in (8, 4, 4, 1))
    if safe > 1:
        raise malformed("TPMI_YES_NO is neither 0 nor 1")
    return signer, extra, ClockInfo(clock_ms, resets, restarts, bool(safe)), reader.number(8)
