"""The appraisal policy: what a verifier demands of evidence (RFC 9334, section 8.5), as a TOML table.

    format = 1
    minimum_evidence = "tpm"        "none", "self-asserted", "hardware" (tpm or sev-snp), "tpm" or "sev-snp"
    accepted_measurements = [...]   64 hex digits each; without the key any program passes, and the result says so
    accepted_kinds = [...]          kinds of backend: "software", "process", "tpm"; without it all
    log_keys = [...]                130 hex digits each: the logs that count; without it any

    [tpm]
    program_pcr = 13                the PCR that the measurement is extended into, 0 … 15
    program_base = "00…"            that PCR's value before (64 hex digits); zeros unless firmware measures there
    attestation_keys = [...]        130 hex digits each: keys enrolled with their TPM's endorsement key
    endorsement_roots = [...]       SHA-256 of the DER of TPM makers' root certificates, 64 hex digits each
    anchor_verifiers = [...]        130 hex digits each: who may allow a new NV index (trustlog.tpm.anchors)
    boot_pcrs = [0, 2, 4, 7]        with measured boot: PCRs that the firmware's event log must explain
    boot_values = {4 = "…"}         values that boot PCRs must have, 64 hex digits each
    require_measured_boot = false
    allow_sha1 = false              with measured boot: take lists that SHA-1 alone binds, where SHA-256 has nothing

    [sev-snp]
    roots = [...]                   SHA-256 of the DER of AMD's root certificates (ARK), 64 hex digits each
    launch_measurements = [...]     96 hex digits each; without it any virtual machine passes
    chip_ids = [...]                128 hex digits each; without it any genuine chip
    minimum_tcb = {bootloader = 0, tee = 0, snp = 0, microcode = 0}
    vmpl_max = 0
    allow_debug = false             a guest that its host may look into

Everything but `format` is optional. A key that is not listed here is an error: a misspelt demand would be none.
"""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from trustlog.errors import MisuseError
from trustlog.statements import BackendKind

FORMAT = 1
POLICY_BYTES_MAX = 256 * 1024
LIST_ITEMS_MAX = 1024
PCR_MAX = 23
PROGRAM_PCR_MAX = 15
PROGRAM_PCR = 13  # trustlog.tpm.registers
PUBLIC_KEY_SIZE = 65
TCB_COMPONENTS = ("bootloader", "tee", "snp", "microcode")

Value = TypeVar("Value")


class PolicyError(MisuseError):
    """A policy cannot be used; the text names the file, the key, what is wrong and what to do."""


class EvidenceLevel(Enum):
    """What evidence rests on. ``HARDWARE`` stands for either of the two after it."""

    NONE = "none"
    SELF_ASSERTED = "self-asserted"
    HARDWARE = "hardware"
    TPM = "tpm"
    SEV_SNP = "sev-snp"

    def is_met_by(self, shown: frozenset[EvidenceLevel]) -> bool:
        """Tell whether what was ``shown`` is at least this."""
        hardware = {EvidenceLevel.TPM, EvidenceLevel.SEV_SNP}
        match self:
            case EvidenceLevel.NONE:
                return True
            case EvidenceLevel.SELF_ASSERTED:
                return bool(shown - {EvidenceLevel.NONE})
            case EvidenceLevel.HARDWARE:
                return bool(shown & hardware)
            case _:
                return self in shown


@dataclass(frozen=True, slots=True)
class TpmPolicy:
    """What is demanded of a TPM's quote; see the top of this module."""

    program_pcr: int = PROGRAM_PCR
    program_base: bytes = bytes(32)
    attestation_keys: frozenset[bytes] = frozenset()
    endorsement_roots: frozenset[bytes] = frozenset()
    anchor_verifiers: frozenset[bytes] = frozenset()
    boot_pcrs: tuple[int, ...] = (0, 2, 4, 7)
    boot_values: tuple[tuple[int, bytes], ...] = ()
    require_measured_boot: bool = False
    allow_sha1: bool = False


@dataclass(frozen=True, slots=True)
class SnpPolicy:
    """What is demanded of an AMD SEV-SNP report; ``minimum_tcb`` in the order of TCB_COMPONENTS."""

    roots: frozenset[bytes] = frozenset()
    launch_measurements: frozenset[bytes] = frozenset()
    chip_ids: frozenset[bytes] = frozenset()
    minimum_tcb: tuple[int, int, int, int] = (0, 0, 0, 0)
    vmpl_max: int = 0
    allow_debug: bool = False


@dataclass(frozen=True, slots=True)
class Policy:
    """An appraisal policy; empty sets of accepted things demand nothing."""

    minimum_evidence: EvidenceLevel = EvidenceLevel.SELF_ASSERTED
    accepted_measurements: frozenset[bytes] = frozenset()
    accepted_kinds: frozenset[BackendKind] = frozenset(BackendKind)
    log_keys: frozenset[bytes] = frozenset()
    tpm: TpmPolicy = field(default_factory=TpmPolicy)
    snp: SnpPolicy = field(default_factory=SnpPolicy)


def load_policy(path: Path) -> Policy:
    """Read a policy file; PolicyError says what is wrong with it, OSError if it cannot be read."""
    with path.open("rb") as file:
        raw = file.read(POLICY_BYTES_MAX + 1)
    return parse_policy(raw, str(path))


def parse_policy(raw: bytes, name: str) -> Policy:
    """Read a policy file's bytes; error texts call it ``name``."""
    if len(raw) > POLICY_BYTES_MAX:
        raise PolicyError(f"{name}: larger than {POLICY_BYTES_MAX} bytes")
    try:
        data = tomllib.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        raise PolicyError(f"{name}: not valid TOML: {error}; mend that line") from None
    table = _Table(name, data)
    table.integer("format", FORMAT, FORMAT)
    return _policy(table)


def policy_of_table(data: dict[str, Any], name: str, minimum: EvidenceLevel = EvidenceLevel.SELF_ASSERTED) -> Policy:
    """Read a policy that stands as a table in another file, without ``format``; error texts call it ``name``.

    minimum: the minimum evidence if the table does not say.
    """
    return _policy(_Table(name, data), minimum)


def _policy(table: _Table, minimum: EvidenceLevel = EvidenceLevel.SELF_ASSERTED) -> Policy:
    levels = {level.value: level for level in EvidenceLevel}
    kinds = {kind.name.lower(): kind for kind in BackendKind}
    policy = Policy(
        minimum_evidence=table.choice("minimum_evidence", levels, minimum),
        accepted_measurements=table.digests("accepted_measurements", 32),
        accepted_kinds=table.choices("accepted_kinds", kinds) or frozenset(BackendKind),
        log_keys=table.digests("log_keys", PUBLIC_KEY_SIZE),
        tpm=_tpm(table.table("tpm")),
        snp=_snp(table.table("sev-snp")),
    )
    table.finish()
    if policy.minimum_evidence is EvidenceLevel.SEV_SNP and not policy.snp.roots:
        raise table.error("sev-snp.roots", 'is missing: minimum_evidence "sev-snp" needs the root that you trust')
    return policy


def _tpm(table: _Table) -> TpmPolicy:
    tpm = TpmPolicy(
        program_pcr=table.integer("program_pcr", 0, PROGRAM_PCR_MAX, PROGRAM_PCR),
        program_base=table.digest("program_base", 32, bytes(32)),
        attestation_keys=table.digests("attestation_keys", PUBLIC_KEY_SIZE),
        endorsement_roots=table.digests("endorsement_roots", 32),
        anchor_verifiers=table.digests("anchor_verifiers", PUBLIC_KEY_SIZE),
        boot_pcrs=table.integers("boot_pcrs", PCR_MAX, TpmPolicy().boot_pcrs),
        boot_values=table.pcr_values("boot_values"),
        require_measured_boot=table.boolean("require_measured_boot"),
        allow_sha1=table.boolean("allow_sha1"),
    )
    table.finish()
    return tpm


def _snp(table: _Table) -> SnpPolicy:
    minimum = table.table("minimum_tcb")
    bootloader, tee, snp, microcode = (minimum.integer(name, 0, 255, 0) for name in TCB_COMPONENTS)
    minimum.finish()
    policy = SnpPolicy(
        roots=table.digests("roots", 32),
        launch_measurements=table.digests("launch_measurements", 48),
        chip_ids=table.digests("chip_ids", 64),
        minimum_tcb=(bootloader, tee, snp, microcode),
        vmpl_max=table.integer("vmpl_max", 0, 3, 0),
        allow_debug=table.boolean("allow_debug"),
    )
    table.finish()
    return policy


class _Table:
    """One table, read key by key; ``finish`` refuses what nobody asked for. Every method raises PolicyError."""

    def __init__(self, name: str, data: dict[str, Any], path: str = "") -> None:
        self._name = name
        self._data = data
        self._path = path
        self._asked: list[str] = []

    def error(self, key: str, text: str) -> PolicyError:
        return PolicyError(f"{self._name}: {self._path}{key}: {text}")

    def take(self, key: str, kind: type, wanted: str) -> Any:  # noqa: ANN401 - what TOML holds
        """Return the value, None if it is absent."""
        self._asked.append(key)
        value = self._data.get(key)
        # `type`, not isinstance: a bool is an int in Python, but not in a policy.
        if value is not None and type(value) is not kind:
            raise self.error(key, f"must be {wanted}, not {type(value).__name__}")
        return value

    def table(self, key: str) -> _Table:
        return _Table(self._name, self.take(key, dict, "a table") or {}, f"{self._path}{key}.")

    def boolean(self, key: str) -> bool:
        return bool(self.take(key, bool, "true or false"))

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        value = self.take(key, int, "a whole number")
        value = default if value is None else value
        if value is None:
            raise self.error(key, f"is missing; it must be {low}" if low == high else "is missing")
        if not low <= value <= high:
            raise self.error(key, f"must be {low}" if low == high else f"must be from {low} to {high}")
        return int(value)

    def integers(self, key: str, high: int, default: tuple[int, ...]) -> tuple[int, ...]:
        if key not in self._data:
            self._asked.append(key)
            return default
        values = self._list(key)
        if not all(type(value) is int and 0 <= value <= high for value in values):
            raise self.error(key, f"must hold whole numbers from 0 to {high}")
        return tuple(sorted(set(values)))

    def choice(self, key: str, choices: dict[str, Value], default: Value) -> Value:
        value = self.take(key, str, "a text in quotes")
        return default if value is None else self._one_of(key, value, choices)

    def choices(self, key: str, choices: dict[str, Value]) -> frozenset[Value]:
        return frozenset(self._one_of(key, value, choices) for value in self._list(key))

    def digest(self, key: str, size: int, default: bytes) -> bytes:
        value = self.take(key, str, "a text in quotes")
        return default if value is None else self._hex(key, value, size)

    def digests(self, key: str, size: int) -> frozenset[bytes]:
        values = self._list(key)
        if not values and key in self._data:
            # An empty list reads like "nothing is accepted", and would accept everything.
            raise self.error(key, "must not be empty: leave the key out to accept any")
        return frozenset(self._hex(key, value, size) for value in values)

    def pcr_values(self, key: str) -> tuple[tuple[int, bytes], ...]:
        values = self.take(key, dict, 'a table such as {4 = "64 hex digits"}') or {}
        pcrs = {str(number): number for number in range(PCR_MAX + 1)}
        return tuple(
            sorted(
                (self._one_of(key, pcr, pcrs), self._hex(f"{key}.{pcr}", value, 32)) for pcr, value in values.items()
            )
        )

    def finish(self) -> None:
        for key in self._data:
            if key not in self._asked:
                hint = _nearest(key, self._asked) or f"; known here: {', '.join(self._asked)}"
                raise self.error(_shown(key), f"is not a key that this program knows{hint}")

    def _list(self, key: str) -> list[Any]:
        values = self.take(key, list, "a list") or []
        if len(values) > LIST_ITEMS_MAX:
            raise self.error(key, f"{len(values)} items, at most {LIST_ITEMS_MAX} are possible")
        return list(values)

    def _one_of(self, key: str, value: object, choices: dict[str, Value]) -> Value:
        if type(value) is not str or value not in choices:
            shown = _shown(str(value))
            raise self.error(key, f'"{shown}" is none of {", ".join(choices)}{_nearest(shown, list(choices))}')
        return choices[value]

    def _hex(self, key: str, value: object, size: int) -> bytes:
        try:
            content = bytes.fromhex(value) if type(value) is str and len(value) == 2 * size else b""
        except ValueError:
            content = b""
        if len(content) != size:
            raise self.error(key, f"must be {2 * size} hexadecimal digits ({size} bytes)")
        return content


def _nearest(word: str, words: list[str]) -> str:
    near = difflib.get_close_matches(word, words, 1)
    return f'; did you mean "{near[0]}"?' if near else ""


def _shown(text: str) -> str:
    return text[:80].encode("unicode_escape").decode("ascii")
