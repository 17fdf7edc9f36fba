"""The key of payloads at rest in a TPM log's folder: made, released to the measured program, sealed anew."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from trustlog.errors import MisuseError, VerificationError
from trustlog.hashing import HASH_SIZE
from trustlog.sealed import Files
from trustlog.tpm.client import Tpm
from trustlog.tpm.registers import ProgramEvent, Programs
from trustlog.tpm.sealing import SEALED_FILE, STORE_KEY_SIZE, load, save, seal, unseal
from trustlog.tpm.wire import TpmError

NEW_STORE = (
    f"If the key cannot be had any more: remove {SEALED_FILE} and the replica's store.sqlite and state.sqlite, make a "
    "new key (trustlog tpm reseal --new-key), and the replica fetches everything from its peers again"
)


class StoreKey:
    """The sealed key in ``directory``; ``program`` is the one that runs, as ``programs``' register has it."""

    def __init__(self, tpm: Tpm, directory: Path, programs: Programs, program: ProgramEvent) -> None:
        self._tpm = tpm
        self._directory = directory
        self._programs = programs
        self._program = program

    def release(self) -> bytes:
        """Return the key, 32 bytes, which the TPM releases to the measured program alone.

        MisuseError if none was made, SealedStateError if its file is damaged, TpmError if the TPM refuses.
        """
        path = self._directory / SEALED_FILE
        sealed = load(path)
        try:
            return unseal(self._tpm, sealed)
        except (TpmError, VerificationError) as error:
            raise TpmError(
                f"{path}: the TPM does not release the key: {error}. It does so only if PCR {self._programs.pcr} was "
                "extended by the program that the key is sealed for, and by nothing else since the machine started; "
                f"or is this file damaged, or another TPM's? Restore it from a copy. {NEW_STORE}",
                error.code if isinstance(error, TpmError) else 0,
            ) from error

    def create(self) -> None:
        """Make a key, for an empty store; MisuseError if there is one, or if anything but this log was measured."""
        if (self._directory / SEALED_FILE).exists():
            raise MisuseError(f"{self._directory / SEALED_FILE} exists already: a key is made once, with its log")
        _ = self._programs.events  # MisuseError if the register was extended by something else
        self._seal(os.urandom(STORE_KEY_SIZE), self._program)

    def reseal(self, measurement: bytes | None = None) -> None:
        """Seal the key anew: for this program, and for the one with that measurement (32 bytes), which will replace it.

        That one has it after the next boot, or at once if it is the next that opens this log.
        """
        if measurement is not None and len(measurement) != HASH_SIZE:
            raise MisuseError(f"measurement must be {HASH_SIZE} bytes, not {len(measurement)}")
        successor = self._program if measurement is None else replace(self._program, measurement=measurement)
        self._seal(self.release(), successor)

    def _seal(self, key: bytes, successor: ProgramEvent) -> None:
        """Seal for this program, and its successor: as after a boot, and as things stand now."""
        pcr = self._programs.pcr
        now = self._tpm.pcr_read([pcr])[pcr]
        values = [self._program.extended(), now]
        if successor != self._program:
            values += [successor.extended(), successor.extended(now)]
        sealed = seal(self._tpm, key, pcr, list(dict.fromkeys(values)))
        if unseal(self._tpm, sealed) != key:
            raise TpmError(f"{self._tpm.address}: does not return what it sealed; nothing was changed")
        save(self._directory / SEALED_FILE, sealed, Files())
