"""The verifier: judges evidence by a policy, offline (RFC 9334, section 8.3; the checks from cheap to dear)."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

from trustlog.appraisal import snp, tpm_verifier, tsm
from trustlog.appraisal.evidence import ANCHOR_SIZE, ANCHORS_BYTES_MAX, Evidence, TpmEvidence, TsmEvidence
from trustlog.appraisal.measured_boot import judge_boot
from trustlog.appraisal.policy import TCB_COMPONENTS, EvidenceLevel, Policy, SnpPolicy
from trustlog.appraisal.result import AttestationResult, MeasuredProgram
from trustlog.errors import VerificationError
from trustlog.keys import VerifyingKey
from trustlog.measurement import measurement_of
from trustlog.statements import BackendKind, QuoteStatement
from trustlog.tpm.chain import TpmPins


@dataclass(slots=True)
class Findings:
    """What the parts of the judgement add up; ``AttestationResult`` says what the fields mean."""

    levels: set[EvidenceLevel] = field(default_factory=set)
    roots: list[str] = field(default_factory=list)
    proven: list[str] = field(default_factory=list)
    not_proven: list[str] = field(default_factory=list)
    programs: list[MeasuredProgram] = field(default_factory=list)
    endorser: str = ""
    anchored: int | None = None


@dataclass(frozen=True, slots=True)
class TpmKnowledge:
    """What a verifier knows of a TPM log by itself; see ``appraise``."""

    enrolled: frozenset[bytes]
    pins: TpmPins | None
    now: datetime | None


def appraise(
    evidence: Evidence,
    policy: Policy,
    *,
    nonce: bytes | None,
    context: bytes | None = None,
    public_key: bytes | None = None,
    now: datetime | None = None,
    enrolled: frozenset[bytes] = frozenset(),
    pins: TpmPins | None = None,
) -> AttestationResult:
    """Judge evidence; VerificationError, with a reason, if it fails the policy or proves not what it says.

    nonce: what the verifier asked with; None: freshness is not proven. context, public_key: what the verifier knows by
    itself; None: not compared. now: when certificates must be valid; None: their validity is not looked at. enrolled:
    public keys of which the verifier knows, beside those in the policy, that they are a TPM's restricted keys. pins: of
    a TPM log's enrolment, if they are known; anchors are judged with them.
    """
    said = QuoteStatement.decode(evidence.statement)
    found = Findings()
    _check_expected(said, nonce, context, public_key)
    _check_policy(said, evidence, policy, found)
    if said.kind is BackendKind.TPM:
        _judge_tpm(said, evidence, policy, TpmKnowledge(enrolled, pins, now), found)
    elif pins is not None or said.public_key in policy.tpm.attestation_keys | enrolled:
        # Whose host may have anything signed with it that does not look like a quote (trustlog.tpm.quote).
        raise VerificationError(
            "wrong-kind", "the key is a TPM's, and only its TPM's quotes count: a bare signature is its host's word"
        )
    else:
        _judge_own_signature(said, evidence, found)
    if evidence.tsm is not None:
        _judge_tsm(said, evidence.tsm, policy, now, found)
    if not policy.minimum_evidence.is_met_by(frozenset(found.levels)):
        shown = ", ".join(sorted(level.value for level in found.levels))
        raise VerificationError(
            "insufficient-evidence",
            f"the policy demands {policy.minimum_evidence.value!r}; this evidence is {shown!r}. Not proven: "
            + "; ".join(found.not_proven),
        )
    _check_demands_of_hardware(policy, found)
    _say_what_was_not_compared(nonce, public_key, policy, found)
    return AttestationResult(
        frozenset(found.levels),
        said.kind,
        said.log_id,
        said.public_key,
        said.epoch,
        said.context,
        said.measurement,
        nonce is not None,
        "; ".join(found.roots),
        tuple(found.proven),
        tuple(found.not_proven),
        tuple(found.programs),
        found.endorser,
        found.anchored,
    )


def _check_expected(said: QuoteStatement, nonce: bytes | None, context: bytes | None, public_key: bytes | None) -> None:
    if nonce is not None and said.nonce != nonce:
        raise VerificationError("wrong-nonce", "the evidence answers another question: its nonce differs")
    if context is not None and said.context != context:
        raise VerificationError("wrong-context", "the evidence was made for another context")
    if public_key is not None and said.public_key != public_key:
        raise VerificationError("wrong-log", "the evidence is another log's")


def _check_policy(said: QuoteStatement, evidence: Evidence, policy: Policy, found: Findings) -> None:
    if policy.log_keys and said.public_key not in policy.log_keys:
        raise VerificationError("wrong-log", "the policy does not list this log's key")
    if said.kind not in policy.accepted_kinds:
        raise VerificationError("wrong-kind", f"the policy does not accept the {said.kind.name.lower()} backend")
    check_measurement(said.measurement, policy)
    if not evidence.manifest:
        found.not_proven.append("which files the measurement is of: the evidence holds no manifest")
    elif measurement_of(evidence.manifest) != said.measurement:
        raise VerificationError("wrong-manifest", "the manifest is not the one that was measured")


def _check_demands_of_hardware(policy: Policy, found: Findings) -> None:
    """Refuse evidence without what a measured boot needs, whatever else passes; name what a policy could not judge."""
    if EvidenceLevel.TPM not in found.levels:
        if policy.tpm.require_measured_boot or policy.tpm.boot_values:
            raise VerificationError(
                "no-measured-boot",
                "the policy demands a measured boot (require_measured_boot, boot_values), which only the quote of an "
                "enrolled TPM shows",
            )
        if policy.tpm.attestation_keys or policy.tpm.endorsement_roots:
            found.not_proven.append("what the policy's [tpm] demands of a TPM: this evidence has none that is enrolled")
    if EvidenceLevel.SEV_SNP not in found.levels and policy.snp != SnpPolicy():
        found.not_proven.append("what the policy's [sev-snp] demands of a virtual machine: this evidence has no report")


def check_measurement(measurement: bytes, policy: Policy) -> None:
    """Refuse a program that the policy does not accept; VerificationError("wrong-measurement")."""
    if policy.accepted_measurements and measurement not in policy.accepted_measurements:
        raise VerificationError("wrong-measurement", f"the policy does not accept the program {measurement.hex()}")


def _judge_own_signature(said: QuoteStatement, evidence: Evidence, found: Findings) -> None:
    if evidence.tpm is not None:
        raise VerificationError("wrong-kind", "a TPM's quote beside a log whose key is in no TPM")
    VerifyingKey.from_bytes(said.public_key).verify(evidence.signature, evidence.statement)
    found.levels.add(EvidenceLevel.SELF_ASSERTED)
    found.roots.append("the log's own key (self-asserted)")
    found.proven.append(f"self-asserted: who holds the key of log {said.log_id.hex()} signed this statement")
    found.not_proven.append(
        "that this program holds the key: the statement is self-asserted; a program that lies can name any measurement"
    )
    if said.kind is BackendKind.PROCESS:
        found.not_proven.append("that the key is in a process of its own: that is the statement's word, too")


def _judge_tpm(
    said: QuoteStatement,
    evidence: Evidence,
    policy: Policy,
    known: TpmKnowledge,
    found: Findings,
) -> None:
    shown = evidence.tpm
    if shown is None or evidence.signature:
        raise VerificationError("no-quote", "a TPM log's evidence has a quote of its TPM, and no signature beside it")
    quote = tpm_verifier.verify_quotes(said, evidence.statement, shown, known.pins)
    programs = tpm_verifier.verify_programs(said, shown, policy)
    for event in programs:
        check_measurement(event.measurement, policy)
    is_enrolled = said.public_key in policy.tpm.attestation_keys | known.enrolled
    if not is_enrolled:
        found.levels.add(EvidenceLevel.SELF_ASSERTED)
        found.roots.append("the quoting key itself (self-asserted)")
        why = "it is not among the attestation keys that were enrolled"
        if known.pins is not None:
            found.endorser = why = "AK listed, enrolment not shown"
        found.not_proven.append(f"that the key is in a TPM: {why}")
    else:
        found.levels.add(EvidenceLevel.TPM)
        found.roots.append("a TPM's attestation key, enrolled by the policy or the cluster file")
        found.endorser = "AK enrolled"
        if policy.tpm.endorsement_roots:
            root = tpm_verifier.verify_endorsement(said, quote, shown, policy, known.now)
            found.roots.append(f"the TPM maker's root {root}")
            found.endorser = f"AK endorsed by {root}"
        else:
            found.not_proven.append(
                "whose TPM it is: the policy names no endorsement_roots; enrolment has checked it or not"
            )
    of_tpm = Findings() if not is_enrolled else found
    of_tpm.proven.append(
        f"PCR {policy.tpm.program_pcr} was extended with {len(programs)} program(s) since the machine started, "
        f"last for this log with {said.measurement.hex()}; reset count {quote.clock.reset_count}"
    )
    _judge_anchors(said, evidence.statement, shown, policy, known.pins, of_tpm)
    boot = judge_boot(shown, policy.tpm, evidence.manifest)
    of_tpm.programs += boot.programs
    of_tpm.proven += boot.proven
    of_tpm.not_proven += boot.not_proven
    if not is_enrolled:
        # Whoever has the key outside a TPM can sign any registers: what they would show is the host's word.
        found.not_proven += [f"{line} (the host's word: no TPM is known to have signed it)" for line in of_tpm.proven]
        found.not_proven += of_tpm.not_proven
    found.not_proven.append(
        "that no other program of root's extended the same measurement, unless the lists above show it"
    )


def _judge_anchors(
    said: QuoteStatement,
    statement: bytes,
    shown: TpmEvidence,
    policy: Policy,
    pins: TpmPins | None,
    found: Findings,
) -> None:
    if shown.anchors is None:
        found.not_proven.append(
            "what the log's NV index anchors: not shown (there is none, it holds more than "
            f"{ANCHORS_BYTES_MAX // ANCHOR_SIZE:,} anchors, or others than the log's list)"
        )
        return
    if pins is None or not policy.tpm.anchor_verifiers:
        found.not_proven.append(
            "what the NV index anchors: the log's pins or the policy's anchor_verifiers are not known"
        )
        return
    found.anchored = tpm_verifier.verify_shown_anchors(said, statement, shown.anchors, policy, pins)
    found.proven.append("the TPM's NV index holds the anchors that are shown, in this order, and no others")
    found.not_proven.append(
        f"that the last anchor is of entry {found.anchored:,} and the log's head there: the host chooses what it "
        "anchors; compare it with an attestation of that entry"
    )


def _judge_tsm(said: QuoteStatement, shown: TsmEvidence, policy: Policy, now: datetime | None, found: Findings) -> None:
    if not policy.snp.roots:
        found.not_proven.append("that this is a confidential virtual machine: the policy names no [sev-snp] roots")
        return
    if shown.provider != snp.PROVIDER:
        raise VerificationError(
            "wrong-provider", f"a report of {shown.provider!r}; this verifier knows {snp.PROVIDER!r} only"
        )
    report = snp.verify_report(shown.report, shown.certificates, policy.snp, tsm.report_data(said), now)
    found.levels.add(EvidenceLevel.SEV_SNP)
    tcb = ", ".join(f"{name} {number}" for name, number in zip(TCB_COMPONENTS, report.tcb, strict=True))
    chip = report.chip_id.hex()[:16]
    found.roots.append(f"AMD's root key, by chip {chip}… with TCB {tcb}")
    found.endorser = f"chip {chip}… endorsed by AMD"
    launch = report.launch_measurement.hex()
    found.proven.append(
        f"a virtual machine with launch measurement {launch} on AMD chip {chip}… asked for this report with this "
        "nonce, key, epoch and configuration"
    )
    if not policy.snp.launch_measurements:
        found.not_proven.append("that the virtual machine is one you accept: the policy lists no launch_measurements")
    found.not_proven.append(
        "which program in the virtual machine asked, unless its launch measurement covers the disk too"
    )
    if report.debug:
        found.not_proven.append(
            "that its host cannot look in: the virtual machine allows debugging, and the policy lets it"
        )
    found.not_proven.append("that AMD has not revoked the chip's key: no list of revocations was looked at")
    if now is None:
        found.not_proven.append("that the certificates are valid today: no time was given")


def _say_what_was_not_compared(nonce: bytes | None, public_key: bytes | None, policy: Policy, found: Findings) -> None:
    if nonce is None:
        found.not_proven.append("freshness: no nonce was given, the evidence may be old")
    if public_key is None and not policy.log_keys:
        found.not_proven.append("whose log this is: neither a key nor the policy's log_keys was given")
    if not policy.accepted_measurements:
        found.not_proven.append("that the program is one you accept: the policy lists no accepted_measurements")
