"""Attestation results (RFC 9334, section 8.3): what was proven, by what root, and what was not."""

from __future__ import annotations

from dataclasses import dataclass

from trustlog.appraisal.policy import EvidenceLevel
from trustlog.statements import BackendKind

_ORDER = (EvidenceLevel.TPM, EvidenceLevel.SEV_SNP, EvidenceLevel.SELF_ASSERTED, EvidenceLevel.NONE)


@dataclass(frozen=True, slots=True)
class MeasuredProgram:
    """One thing that the machine measured.

    source: "firmware", "ima" or "trustlog". name: for people. name_proven: whether the quoted PCRs bind the name too,
    or only the digest. algorithm and digest as they were measured.
    """

    source: str
    pcr: int
    name: str
    name_proven: bool
    algorithm: str
    digest: bytes


@dataclass(frozen=True, slots=True)
class AttestationResult:
    """What a verifier concludes from evidence that passed its policy.

    levels: what the evidence rests on, never empty. root: what the conclusion rests on, in words. proven and
    not_proven: sentences for people. programs: what measured boot showed. endorser: who vouches for the hardware, in a
    few words. anchored: the last index that a TPM's NV index anchors, as its host says.
    """

    levels: frozenset[EvidenceLevel]
    kind: BackendKind
    log_id: bytes
    public_key: bytes
    epoch: int
    context: bytes
    measurement: bytes
    fresh: bool
    root: str
    proven: tuple[str, ...]
    not_proven: tuple[str, ...]
    programs: tuple[MeasuredProgram, ...] = ()
    endorser: str = ""
    anchored: int | None = None

    @property
    def level_names(self) -> str:
        """The levels from strong to weak: "tpm", "sev-snp, self-asserted"."""
        return ", ".join(level.value for level in _ORDER if level in self.levels)

    def summary(self) -> str:
        """Return one line for a table: "tpm, measured 3f9a…, AK endorsed by …"."""
        parts = [self.level_names, f"measured {self.measurement.hex()[:8]}…"]
        if self.endorser:
            parts.append(self.endorser)
        if self.anchored is not None:
            parts.append(f"anchored to {self.anchored:,} by its host's word")
        return ", ".join(parts)

    def facts(self) -> dict[str, object]:
        """Return everything as JSON values."""
        facts: dict[str, object] = {
            "evidence": self.level_names,
            "kind": self.kind.name.lower(),
            "log_id": self.log_id.hex(),
            "public_key": self.public_key.hex(),
            "epoch": self.epoch,
            "context": self.context.hex(),
            "measurement": self.measurement.hex(),
            "fresh": self.fresh,
            "root": self.root,
            "proven": list(self.proven),
            "not_proven": list(self.not_proven),
        }
        if self.anchored is not None:
            facts["anchored"] = self.anchored
        facts["programs"] = [
            {
                "source": one.source,
                "pcr": one.pcr,
                "name": one.name,
                "name_proven": one.name_proven,
                "algorithm": one.algorithm,
                "digest": one.digest.hex(),
            }
            for one in self.programs
        ]
        return facts
