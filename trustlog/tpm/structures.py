"""The few TPM 2.0 structures that are used here, and their canonical form. All integers are big-endian.

Section numbers are those of "TPM 2.0 Library, Part 2: Structures", version 1.59.

    TPM2B_…             10.4     u16 size, then so many bytes
    TPMT_PUBLIC         12.2.4   u16 type, u16 name algorithm, u32 attributes, TPM2B policy, parameters, unique
      parameters, ECC   12.2.3.6 symmetric, scheme, u16 curve, u16 KDF;     unique: TPM2B x, TPM2B y
      parameters, RSA   12.2.3.5 symmetric, scheme, u16 bits, u32 exponent; unique: TPM2B modulus
      symmetric         11.1.7   u16 algorithm; unless NULL: u16 key bits, u16 mode
      scheme            11.2.3.6 u16 algorithm; unless NULL: u16 hash
    TPML_PCR_SELECTION  10.9.7   u32 count, then per bank: u16 hash, u8 octets, the octets (PCR n: bit n % 8 of
                                 octet n / 8)
    TPMT_SIGNATURE      11.3.4   u16 algorithm, u16 hash, ECDSA: TPM2B r, TPM2B s
    TPMS_NV_PUBLIC      13.6     u32 index, u16 name algorithm, u32 attributes, TPM2B policy, u16 data size
    name                part 1, 16: u16 name algorithm, digest of the public area with it

Whatever is malformed is refused as VerificationError("malformed"), before memory is spent on it.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from trustlog.errors import VerificationError

# Algorithms (TPM_ALG_ID, section 6.3), the curve (TPM_ECC_CURVE, 6.4).
NV_INDEXES = range(0x01000000, 0x02000000)  # handles of type TPM_HT_NV_INDEX
ALG_RSA = 0x0001
ALG_SHA1 = 0x0004
ALG_AES = 0x0006
ALG_SHA256 = 0x000B
ALG_NULL = 0x0010
ALG_ECDSA = 0x0018
ALG_ECC = 0x0023
ALG_CFB = 0x0043
CURVE_P256 = 0x0003

# Attributes of objects (TPMA_OBJECT, section 8.3).
FIXED_TPM = 1 << 1
FIXED_PARENT = 1 << 4
SENSITIVE_DATA_ORIGIN = 1 << 5
USER_WITH_AUTH = 1 << 6
ADMIN_WITH_POLICY = 1 << 7
NO_DA = 1 << 10
RESTRICTED = 1 << 16
DECRYPT = 1 << 17
SIGN = 1 << 18

# Handles that never change (TPM_RH, section 7.4).
RH_OWNER = 0x40000001
RH_NULL = 0x40000007
RH_LOCKOUT = 0x4000000A
RH_ENDORSEMENT = 0x4000000B
RH_PLATFORM = 0x4000000C

STRUCTURE_SIZE_MAX = 4096  # no command or response is longer (TPM_PT_MAX_COMMAND_SIZE of PC clients)
PCR_COUNT = 24  # of a PC client (PC Client Platform TPM Profile, section 5.5)
PCR_SELECT_OCTETS = 3
SHA256_SIZE = 32
NAME_SIZE = 2 + SHA256_SIZE
BANKS_MAX = 16  # TPML_PCR_SELECTION: HASH_COUNT, never so many

# An attestation key was born in its TPM, never leaves it, and signs no TPM_GENERATED structure that another made;
# bytes of anybody else's making it signs, if they do not begin like one (``quote``).
AK_ATTRIBUTES = FIXED_TPM | FIXED_PARENT | SENSITIVE_DATA_ORIGIN | USER_WITH_AUTH | NO_DA | RESTRICTED | SIGN
# "TCG EK Credential Profile", version 2.5, appendix B.3.3 and B.3.4: what every endorsement key looks like.
EK_ATTRIBUTES = FIXED_TPM | FIXED_PARENT | SENSITIVE_DATA_ORIGIN | ADMIN_WITH_POLICY | RESTRICTED | DECRYPT
# PolicySecret(endorsement hierarchy), the policy of both templates.
EK_POLICY = bytes.fromhex("837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa")


def malformed(what: str) -> VerificationError:
    """Return the refusal of bytes that are not the structure that they should be."""
    return VerificationError("malformed", f"TPM structure is malformed: {what}")


class Reader:
    """Reads a structure from its beginning to its end; VerificationError("malformed") for anything else."""

    def __init__(self, data: bytes) -> None:
        if len(data) > STRUCTURE_SIZE_MAX:
            raise malformed(f"{len(data)} bytes, more than {STRUCTURE_SIZE_MAX}")
        self._data = data
        self._at = 0

    def take(self, size: int) -> bytes:
        """Return the next ``size`` bytes."""
        end = self._at + size
        if end > len(self._data):
            raise malformed(f"{len(self._data)} bytes are too short")
        taken, self._at = self._data[self._at : end], end
        return taken

    def number(self, size: int) -> int:
        """Return the next unsigned integer of ``size`` bytes."""
        return int.from_bytes(self.take(size), "big")

    def sized(self) -> bytes:
        """Return the content of a TPM2B."""
        return self.take(self.number(2))

    def rest(self) -> bytes:
        """Return all that was not read yet."""
        return self.take(len(self._data) - self._at)

    def finish(self) -> None:
        """Refuse trailing bytes."""
        if self._at != len(self._data):
            raise malformed(f"{len(self._data) - self._at} bytes too many")


def sized(content: bytes) -> bytes:
    """Return a TPM2B: u16 size, then ``content``."""
    return struct.pack(">H", len(content)) + content


def name_of(public: bytes) -> bytes:
    """Return the name (34 bytes) of an object or NV index with this public area, whose name algorithm is SHA-256."""
    return struct.pack(">H", ALG_SHA256) + hashlib.sha256(public).digest()


def qualified_name(ancestor: bytes, name: bytes) -> bytes:
    """Return the qualified name (34 bytes) of an object under ``ancestor`` (part 1, section 16.5).

    ``ancestor`` is the parent's qualified name; of a primary object it is its hierarchy's handle (4 bytes).
    """
    return struct.pack(">H", ALG_SHA256) + hashlib.sha256(ancestor + name).digest()


@dataclass(frozen=True, slots=True)
class Public:
    """A TPMT_PUBLIC of an RSA or P-256 key. ``raw``: its bytes, which its name digests.

    key: P-256 point as 65 bytes (0x04‖x‖y), or the RSA modulus, big-endian. scheme: algorithm and hash, or NULL and 0.
    """

    raw: bytes
    kind: int
    attributes: int
    policy: bytes
    symmetric: tuple[int, int, int]
    scheme: tuple[int, int]
    detail: tuple[int, int]
    key: bytes

    @property
    def name(self) -> bytes:
        """The name, 34 bytes."""
        return name_of(self.raw)

    @classmethod
    def parse(cls, raw: bytes) -> Self:
        """Read a whole TPMT_PUBLIC; VerificationError("malformed") for other kinds of key and other name algorithms."""
        reader = Reader(raw)
        kind = reader.number(2)
        if kind not in {ALG_RSA, ALG_ECC}:
            raise malformed(f"a public area of type {kind:#06x} is no RSA or elliptic curve key")
        if reader.number(2) != ALG_SHA256:
            raise malformed("the name algorithm is not SHA-256")
        attributes, policy = reader.number(4), reader.sized()
        algorithm = reader.number(2)
        symmetric = (algorithm, 0, 0) if algorithm == ALG_NULL else (algorithm, reader.number(2), reader.number(2))
        algorithm = reader.number(2)
        scheme = (algorithm, 0) if algorithm == ALG_NULL else (algorithm, reader.number(2))
        if kind == ALG_RSA:
            detail, key = (reader.number(2), reader.number(4)), reader.sized()
        else:
            detail, key = (reader.number(2), reader.number(2)), _point(reader)
        reader.finish()
        return cls(raw, kind, attributes, policy, symmetric, scheme, detail, key)


def _point(reader: Reader) -> bytes:
    x, y = reader.sized(), reader.sized()
    if max(len(x), len(y)) > 32:
        raise malformed("a coordinate has more than 32 bytes")
    # A TPM may leave out leading zeros.
    return b"\x04" + x.rjust(32, b"\0") + y.rjust(32, b"\0")


def attestation_key_template() -> bytes:
    """Return the TPMT_PUBLIC to give TPM2_Create for an attestation key: P-256, ECDSA with SHA-256, restricted."""
    head = struct.pack(">HHIH", ALG_ECC, ALG_SHA256, AK_ATTRIBUTES, 0)
    detail = struct.pack(">HHHHH", ALG_NULL, ALG_ECDSA, ALG_SHA256, CURVE_P256, ALG_NULL)
    return head + detail + sized(b"") + sized(b"")


def endorsement_key_template(kind: int) -> bytes:
    """Return the TPMT_PUBLIC of the endorsement key: template L-1 (ALG_RSA, 2048 bits) or L-2 (ALG_ECC, P-256)."""
    head = struct.pack(">HHI", kind, ALG_SHA256, EK_ATTRIBUTES) + sized(EK_POLICY)
    symmetric = struct.pack(">HHH", ALG_AES, 128, ALG_CFB)
    if kind == ALG_RSA:
        return head + symmetric + struct.pack(">HHI", ALG_NULL, 2048, 0) + sized(bytes(256))
    return head + symmetric + struct.pack(">HHH", ALG_NULL, CURVE_P256, ALG_NULL) + sized(bytes(32)) * 2


def pcr_selection(pcrs: Iterable[int], bank: int = ALG_SHA256) -> bytes:
    """Return the TPML_PCR_SELECTION of these PCRs (0 … 23) in one bank."""
    bits = 0
    for pcr in pcrs:
        if not 0 <= pcr < PCR_COUNT:
            raise ValueError(f"PCRs run from 0 to {PCR_COUNT - 1}; {pcr} is none")
        bits |= 1 << pcr
    return struct.pack(">IHB", 1, bank, PCR_SELECT_OCTETS) + bits.to_bytes(PCR_SELECT_OCTETS, "little")


def read_pcr_selection(reader: Reader) -> dict[int, tuple[int, ...]]:
    """Read a TPML_PCR_SELECTION: bank -> its PCRs in rising order. A bank that stands twice is refused."""
    count = reader.number(4)
    if count > BANKS_MAX:
        raise malformed(f"a selection of {count} banks")
    banks: dict[int, tuple[int, ...]] = {}
    for _ in range(count):
        bank, octets = reader.number(2), reader.number(1)
        bits = int.from_bytes(reader.take(octets), "little")
        if bank in banks or octets > 4:
            raise malformed("a bank stands twice, or has more than 32 PCRs")
        banks[bank] = tuple(pcr for pcr in range(8 * octets) if bits >> pcr & 1)
    return banks


def ecdsa_signature(raw: bytes) -> bytes:
    """Return r‖s (64 bytes) of a TPMT_SIGNATURE; only ECDSA with SHA-256 is taken."""
    reader = Reader(raw)
    if (reader.number(2), reader.number(2)) != (ALG_ECDSA, ALG_SHA256):
        raise malformed("the signature is not ECDSA with SHA-256")
    r, s = reader.sized(), reader.sized()
    reader.finish()
    if max(len(r), len(s)) > 32:
        raise malformed("r or s has more than 32 bytes")
    return r.rjust(32, b"\0") + s.rjust(32, b"\0")


@dataclass(frozen=True, slots=True)
class NvPublic:
    """A TPMS_NV_PUBLIC. ``raw``: its bytes, which the index's name digests."""

    raw: bytes
    index: int
    attributes: int
    policy: bytes
    size: int

    @property
    def name(self) -> bytes:
        """The name, 34 bytes."""
        return name_of(self.raw)

    @classmethod
    def parse(cls, raw: bytes) -> Self:
        """Read a whole TPMS_NV_PUBLIC; VerificationError("malformed") for other name algorithms."""
        reader = Reader(raw)
        index = reader.number(4)
        if reader.number(2) != ALG_SHA256:
            raise malformed("the name algorithm is not SHA-256")
        attributes, policy, size = reader.number(4), reader.sized(), reader.number(2)
        reader.finish()
        return cls(raw, index, attributes, policy, size)
