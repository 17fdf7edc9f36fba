"""Opening a TPM log: its folder, its TPM, its key, and this program, before anything is signed."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

from trustlog.errors import MisuseError, SealedStateError
from trustlog.keys import VerifyingKey
from trustlog.sealed import Files, SealedJournal, lock_directory
from trustlog.tpm.backend import RETIRE, TpmLog, program_event
from trustlog.tpm.chain import read_public_file
from trustlog.tpm.client import Tpm
from trustlog.tpm.folder import CONFIG_FILE, KEY_FILE, PUBLIC_KEY_FILE, STATE_FILE, TpmConfig, TpmState
from trustlog.tpm.registers import PROGRAMS_FILE, ProgramEvent, program_pcr, value_with_program
from trustlog.tpm.sealing import SEALED_FILE, load
from trustlog.tpm.storekey import NEW_STORE
from trustlog.tpm.wire import TpmError


def open_log(directory: Path, *, files: Files | None = None) -> TpmLog:
    """Open the log in ``directory`` where its TPM stands.

    MisuseError: no TPM log there, in use, or the PCR does not fit. RestartedError: the machine was started again.
    SealedStateError: a file is damaged. TpmError: the TPM fails, or does not hold the key any more.
    """
    files = files or Files()
    with ExitStack() as stack:
        try:
            stack.callback(os.close, lock_directory(directory))
            config = TpmConfig.load(directory / CONFIG_FILE)
            key, pins = read_public_file(directory / PUBLIC_KEY_FILE)
            seal_key = (directory / KEY_FILE).read_bytes()
            journal = SealedJournal.open(directory / STATE_FILE, seal_key, files)
        except FileNotFoundError as error:
            raise MisuseError(f"there is no complete TPM log in {directory}: {error.filename} is missing") from error
        stack.callback(journal.close)
        if pins != config.pins:
            raise SealedStateError(f"{directory / PUBLIC_KEY_FILE}: damaged: its pins are not those of {CONFIG_FILE}")
        tpm = stack.enter_context(Tpm.open(config.address))
        check_key(tpm, config, key)
        _check_program(tpm, directory, program_event(key), program_pcr(config.pins.pcr))
        log = TpmLog(directory, tpm, config, key, journal)
        log._resume()  # noqa: SLF001 - the second half of its construction
        log._resources = stack.pop_all()  # noqa: SLF001
        return log


def read_state(directory: Path) -> TpmState:
    """Return the newest state that the folder of a log holds, without its TPM; SealedStateError if it is damaged."""
    with ExitStack() as stack:
        stack.callback(os.close, lock_directory(directory))
        journal = SealedJournal.open(directory / STATE_FILE, (directory / KEY_FILE).read_bytes(), Files())
        stack.callback(journal.close)
        return TpmState.decode(journal.states[-1])


def check_key(tpm: Tpm, config: TpmConfig, key: VerifyingKey) -> None:
    """TpmError unless the TPM holds this very key where the log's folder says."""
    try:
        public, signer = tpm.read_public(config.handle)
    except TpmError as error:
        if error.number != 0x8B:
            raise
        raise TpmError(
            f"{config.address} has no key at {config.handle:#010x} any more: was it cleared, or is it another TPM? "
            f"{RETIRE}"
        ) from error
    if public.key != key.raw or signer != config.pins.signer:
        raise TpmError(f"{config.address} has another key than this log's at {config.handle:#010x}. {RETIRE}")


def _check_program(tpm: Tpm, directory: Path, program: ProgramEvent, pcr: int) -> None:
    """Before this program is measured: MisuseError if that would make the TPM keep a sealed key from every other one.

    The TPM decides who has the key; this only lets an unprepared upgrade be taken back without a reboot.
    """
    path = directory / SEALED_FILE
    if not path.exists():
        return
    try:
        value = value_with_program(tpm, directory / PROGRAMS_FILE, program, pcr)
    except MisuseError:
        return  # not for this program to mend: store_key says what the TPM said
    if not load(path).accepts(pcr, value):
        measured = program.measurement.hex()
        raise MisuseError(
            f"{path}: the store's key is not sealed for this program, whose measurement is {measured}: was trustlog "
            "or Python upgraded? Nothing was changed. Put the version before back, with that one seal the key for this "
            f"one as well: trustlog tpm reseal {directory} --measurement {measured}; and then upgrade. {NEW_STORE}"
        )
