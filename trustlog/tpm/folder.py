"""The folder of a TPM log: what its host remembers between two starts. The layouts are given where they are read.

tpm.json    where the TPM is, the handle of the attestation key, and what is pinned: nothing secret
log.pub     what verifiers need (``trustlog.tpm.chain``)
log.state   the journal of states (``trustlog.sealed``); with seal.key, which here only shows damage
close.group the attestation of the last CLOSE, which no later epoch can attest again
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, Self

from trustlog.errors import SealedStateError, VerificationError
from trustlog.tpm.chain import TpmPins
from trustlog.tpm.structures import ALG_ECC, ALG_RSA

CONFIG_FILE = "tpm.json"
STATE_FILE = "log.state"
KEY_FILE = "seal.key"
PUBLIC_KEY_FILE = "log.pub"
CLOSE_FILE = "close.group"
DEFAULT_ADDRESS = "/dev/tpmrm0"
# Persistent handles of attestation keys: the first free one of these is taken.
HANDLES = range(0x81017400, 0x81017440)
CONFIG_SIZE_MAX = 4096


class Role(IntEnum):
    """What a group is: entries of its author, or the CLOSE or OPEN of an epoch."""

    NORMAL = 0
    CLOSE = 1
    OPEN = 2


@dataclass(frozen=True, slots=True)
class TpmState:
    """What the host remembers; fixed layout, 161 bytes, big-endian.

    offset 0: epoch, 8: low, 16: last, 24: first of the last group (u64 each); 32: what the last group is (0 entries,
    1 CLOSE, 2 OPEN); 33: the PCR's value at last, 65: before the last group, 97: context of the last group, 129:
    what it extended (32 bytes each).
    """

    epoch: int
    low: int
    last: int
    first: int
    role: Role
    pcr: bytes
    pcr_before: bytes
    context: bytes
    event: bytes

    def encode(self) -> bytes:
        """Return the 161 bytes of the layout above."""
        numbers = (self.epoch, self.low, self.last, self.first, self.role)
        return _STATE.pack(*numbers, self.pcr, self.pcr_before, self.context, self.event)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Read 161 bytes; SealedStateError for another length."""
        if len(data) != _STATE.size:
            raise SealedStateError(f"a saved state has {len(data)} bytes instead of {_STATE.size}")
        epoch, low, last, first, role, *digests = _STATE.unpack(data)
        if role not in {Role.NORMAL, Role.CLOSE, Role.OPEN}:
            raise SealedStateError(f"a saved state's last group is of the unknown kind {role}")
        return cls(epoch, low, last, first, Role(role), *digests)


_STATE = struct.Struct(">4QB32s32s32s32s")


@dataclass(frozen=True, slots=True)
class TpmConfig:
    """tpm.json: the TPM's address, the attestation key's handle, the kind of endorsement key, and the pins."""

    address: str
    handle: int
    endorsement_kind: int
    pins: TpmPins

    def dump(self) -> bytes:
        """Return the file's content."""
        names = {ALG_RSA: "rsa", ALG_ECC: "ecc"}
        content = {
            "format": 1,
            "address": self.address,
            "handle": f"{self.handle:#010x}",
            "endorsement_key": names[self.endorsement_kind],
            "pcr": self.pins.pcr,
            "base": self.pins.base.hex(),
            "pins": self.pins.encode().hex(),
        }
        return (json.dumps(content, indent=2) + "\n").encode()

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the file; SealedStateError says what is wrong with it."""
        with path.open("rb") as stream:
            raw = stream.read(CONFIG_SIZE_MAX)
        try:
            content: Any = json.loads(raw)
            kind = {"rsa": ALG_RSA, "ecc": ALG_ECC}[content["endorsement_key"]]
            pins = TpmPins.decode(bytes.fromhex(content["pins"]))
            config = cls(str(content["address"]), int(content["handle"], 16), kind, pins)
        except (ValueError, KeyError, TypeError, VerificationError) as error:
            raise SealedStateError(f"{path}: damaged: {error}. Restore this file from a copy") from error
        if (content["format"], content["pcr"], content["base"]) != (1, pins.pcr, pins.base.hex()):
            raise SealedStateError(f"{path}: its format is not 1, or its pins differ from what stands beside them")
        return config
