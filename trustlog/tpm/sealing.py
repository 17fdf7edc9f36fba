"""A key that the TPM releases only while the measured program runs: what a replica seals its payloads at rest with.

The key (32 random bytes) is the data of a sealed object (TPM2_Create of a KEYEDHASH without a scheme; "TPM 2.0 Library,
Part 1", section 27.7) under a storage key of the owner's. Its only authorization is a policy, TPM2_PolicyPCR: the
register of the measured programs (``trustlog.tpm.registers``) must hold what it holds when this very program, and
nothing else, extended it since the machine started:

    value     SHA-256(32 zeros ‖ SHA-256(event of the program)), as after every start of the machine
    policy    SHA-256(32 zeros ‖ u32 TPM_CC_PolicyPCR ‖ TPML_PCR_SELECTION of the register ‖ SHA-256(value))

So the TPM refuses another program, an older or newer trustlog, and a machine on which nothing was measured. It is
sealed for more than one value only before an upgrade (``StoreKey.reseal``). The host keeps the objects in
``store.sealed``:

    offset size field
         0   16 tag "trustlog/sealed", a zero
        16    1 version, 1
        17    1 the register
        18   34 name of the storage key
        52    1 count, 1 … 4
        53      so many times: TPM2B public area, TPM2B private part (encrypted by the storage key, in this TPM only)

On the way between processor and chip the key is encrypted (``trustlog.tpm.session``). TPM2_Clear forgets the storage
key, and so the sealed one.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from trustlog.errors import MisuseError, SealedStateError, VerificationError
from trustlog.sealed import Files, write_new
from trustlog.tpm.client import Tpm
from trustlog.tpm.exchange import no_password
from trustlog.tpm.structures import (
    ADMIN_WITH_POLICY,
    ALG_AES,
    ALG_CFB,
    ALG_ECC,
    ALG_NULL,
    ALG_SHA256,
    CURVE_P256,
    DECRYPT,
    FIXED_PARENT,
    FIXED_TPM,
    NAME_SIZE,
    NO_DA,
    PCR_COUNT,
    RESTRICTED,
    RH_OWNER,
    SENSITIVE_DATA_ORIGIN,
    STRUCTURE_SIZE_MAX,
    USER_WITH_AUTH,
    Public,
    Reader,
    name_of,
    pcr_selection,
    sized,
)
from trustlog.tpm.wire import TpmError

SEALED_FILE = "store.sealed"
STORE_KEY_SIZE = 32
OBJECTS_MAX = 4

_TAG = b"trustlog/sealed\0"
_VERSION = 1
_HEADER = struct.Struct(f">16sBB{NAME_SIZE}sB")
_ALG_KEYEDHASH = 0x0008
_CC_POLICY_PCR = 0x0000017F
# The storage key of the "TCG TPM v2.0 Provisioning Guidance", section 7.5.1, P-256: whoever else makes it has the same.
_STORAGE_ATTRIBUTES = FIXED_TPM | FIXED_PARENT | SENSITIVE_DATA_ORIGIN | USER_WITH_AUTH | NO_DA | RESTRICTED | DECRYPT
# Without userWithAuth and with adminWithPolicy there is no way around the policy.
_SEALED_ATTRIBUTES = FIXED_TPM | FIXED_PARENT | ADMIN_WITH_POLICY | NO_DA


def pcr_policy(pcr: int, value: bytes) -> bytes:
    """Return the policy (32 bytes) that demands ``value`` (32 bytes) of one register of the SHA-256 bank."""
    content = struct.pack(">I", _CC_POLICY_PCR) + pcr_selection([pcr]) + hashlib.sha256(value).digest()
    return hashlib.sha256(bytes(32) + content).digest()


@dataclass(frozen=True, slots=True)
class SealedKey:
    """The content of store.sealed. objects: public area and private part of each."""

    pcr: int
    parent: bytes
    objects: tuple[tuple[bytes, bytes], ...]

    def accepts(self, pcr: int, value: bytes) -> bool:
        """Tell whether it says to be sealed for this value (32 bytes) of this register; only the TPM knows."""
        policy = pcr_policy(pcr, value)
        return any(public.startswith(_template(policy)) for public, _ in self.objects)

    def encode(self) -> bytes:
        """Return the layout above."""
        header = _HEADER.pack(_TAG, _VERSION, self.pcr, self.parent, len(self.objects))
        return header + b"".join(sized(public) + sized(private) for public, private in self.objects)

    @classmethod
    def decode(cls, raw: bytes) -> Self:
        """Read the layout; VerificationError("malformed") otherwise."""
        reader = Reader(raw)
        tag, version, pcr, parent, count = _HEADER.unpack(reader.take(_HEADER.size))
        if (tag, version) != (_TAG, _VERSION) or pcr >= PCR_COUNT or not 1 <= count <= OBJECTS_MAX:
            raise VerificationError("malformed", "its tag, version, register or count is unknown")
        objects = tuple((reader.sized(), reader.sized()) for _ in range(count))
        reader.finish()
        return cls(pcr, parent, objects)


def seal(tpm: Tpm, key: bytes, pcr: int, values: Sequence[bytes]) -> SealedKey:
    """Have the TPM seal ``key`` (32 bytes) for each of these values of ``pcr``; TpmError if it fails."""
    if len(key) != STORE_KEY_SIZE or not 1 <= len(values) <= OBJECTS_MAX:
        raise MisuseError(f"a key of {STORE_KEY_SIZE} bytes is sealed for 1 … {OBJECTS_MAX} values")
    objects = []
    with _storage_key(tpm) as (parent, storage):
        for value in values:
            template = _template(pcr_policy(pcr, value)) + sized(b"")
            with tpm.salted_session(parent, storage, policy=False) as session:
                private, public = tpm.create_sealed(parent, storage.name, template, key, session)
            objects.append((public, private))
    return SealedKey(pcr, storage.name, tuple(objects))


def unseal(tpm: Tpm, sealed: SealedKey) -> bytes:
    """Return the key (32 bytes) if the register holds one of the values; TpmError if the TPM refuses.

    VerificationError("wrong-tpm"): the storage key is another one.
    """
    with _storage_key(tpm) as (parent, storage):
        if storage.name != sealed.parent:
            raise VerificationError("wrong-tpm", "the storage key is another one: another TPM, or it was cleared")
        refusals = []
        for public, private in sealed.objects:
            try:
                with tpm.loaded(tpm.load(parent, private, public, [no_password()])) as handle:
                    return _unseal(tpm, storage, parent, handle, name_of(public), sealed.pcr)
            except TpmError as error:
                refusals.append(error)
    raise refusals[-1]


def _unseal(tpm: Tpm, storage: Public, parent: int, handle: int, name: bytes, pcr: int) -> bytes:
    with tpm.salted_session(parent, storage, policy=True) as session:
        tpm.policy_pcr(session.handle, [pcr])
        key = tpm.unseal(handle, name, session)
    if len(key) != STORE_KEY_SIZE:
        raise TpmError(f"{tpm.address}: what was sealed has {len(key)} bytes instead of {STORE_KEY_SIZE}")
    return key


@contextmanager
def _storage_key(tpm: Tpm) -> Iterator[tuple[int, Public]]:
    """Yield the storage key's handle and public area: the TPM makes the same one every time, until it is cleared."""
    handle, public = tpm.create_primary(RH_OWNER, _storage_template())
    with tpm.loaded(handle):
        yield handle, public


def _storage_template() -> bytes:
    head = struct.pack(">HHI", ALG_ECC, ALG_SHA256, _STORAGE_ATTRIBUTES) + sized(b"")
    detail = struct.pack(">HHHHHH", ALG_AES, 128, ALG_CFB, ALG_NULL, CURVE_P256, ALG_NULL)
    return head + detail + sized(bytes(32)) * 2


def _template(policy: bytes) -> bytes:
    """Return the sealed object's TPMT_PUBLIC up to its last field, a digest that the TPM fills in."""
    head = struct.pack(">HHI", _ALG_KEYEDHASH, ALG_SHA256, _SEALED_ATTRIBUTES) + sized(policy)
    return head + struct.pack(">H", ALG_NULL)


def load(path: Path) -> SealedKey:
    """Read ``path``; MisuseError if there is none, SealedStateError if it is damaged."""
    try:
        with path.open("rb") as stream:
            return SealedKey.decode(stream.read(STRUCTURE_SIZE_MAX + 1))
    except FileNotFoundError as error:
        raise MisuseError(f"{path} is missing: this log keeps no key for payloads, or the file was lost") from error
    except VerificationError as error:
        raise SealedStateError(f"{path}: damaged: {error}. Restore this file from a copy") from error


def save(path: Path, sealed: SealedKey, files: Files) -> None:
    """Write ``path`` durably, in the place of what was there."""
    new = path.with_name(path.name + ".new")
    new.unlink(missing_ok=True)
    write_new(files, new, sealed.encode(), 0o600)
    files.replace(new, path)
    files.sync_directory(path.parent)
