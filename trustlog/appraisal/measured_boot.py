"""Judging measured boot: whether the firmware's event log and the kernel's IMA list explain the quoted PCRs.

Which bank? A bank that the firmware leaves out is free for root, who extends it later and writes a list to fit: no
collision is needed (the class of CVE-2021-42299). So the attester must not choose. SHA-256 it is; SHA-1 only if the
policy says allow_sha1, and then only where the SHA-256 bank is quoted and empty, never where its replay fails.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from trustlog.appraisal.bootlog import EV_NO_ACTION, SHA1, SHA256, BootLog, parse_boot_log
from trustlog.appraisal.evidence import QuotedPcrs, TpmEvidence
from trustlog.appraisal.ima import (
    IMA_PCR,
    ImaEntry,
    check_little_endian,
    parse_ima_list,
    proven_entries,
    proven_entries_sha1,
)
from trustlog.appraisal.policy import TpmPolicy
from trustlog.appraisal.result import MeasuredProgram
from trustlog.errors import VerificationError

_NAMES = {SHA1: "sha1", SHA256: "sha256"}
_FILE_LINE = re.compile(r"^([0-9a-f]{64})  (trustlog/\S+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class BootFindings:
    """programs: what was measured. proven and not_proven: sentences for people."""

    programs: tuple[MeasuredProgram, ...]
    proven: tuple[str, ...]
    not_proven: tuple[str, ...]


def judge_boot(shown: TpmEvidence, policy: TpmPolicy, manifest: bytes) -> BootFindings:
    """Replay both lists against the quoted PCRs; VerificationError if one that the policy demands is not explained."""
    for pcr, value in policy.boot_values:
        if shown.sha256.pcrs.get(pcr) != value:
            raise VerificationError("boot-value", f"PCR {pcr} is not quoted with the value that the policy demands")
    programs: list[MeasuredProgram] = []
    proven: list[str] = []
    not_proven: list[str] = []
    if shown.boot_log:
        firmware_programs, said, unsaid = _judge_firmware(shown, policy)
        programs += firmware_programs
        proven += said
        not_proven += unsaid
    elif policy.require_measured_boot:
        raise VerificationError("no-measured-boot", "the policy demands the firmware's event log; use --measured-boot")
    else:
        not_proven.append("which firmware and kernel were started: the evidence holds no event log of the firmware")
    if shown.ima_list:
        entries, is_sha1 = _proven_ima(shown, policy)
        programs += [_file(entry) for entry in entries]
        if entries:
            proven.append(
                f"the IMA list leads to the quoted PCR {IMA_PCR}: {len(entries)} programs and files, in this order"
            )
            not_proven.append(_manifest_in(entries, manifest, proven))
            not_proven.append(
                "that the kernel alone wrote the IMA list, and of all that ran: root can extend its PCR, or load a "
                "policy that measures less"
            )
        else:
            not_proven.append(f"which interpreter and files really ran: PCR {IMA_PCR} is empty; see allow_sha1")
        if is_sha1:
            not_proven.append("the kernel's programs and files against who can find collisions of SHA-1")
    else:
        not_proven.append("which interpreter and files really ran: the evidence holds no IMA list of the kernel")
    return BootFindings(tuple(programs), tuple(proven), tuple(one for one in not_proven if one))


def _judge_firmware(shown: TpmEvidence, policy: TpmPolicy) -> tuple[list[MeasuredProgram], list[str], list[str]]:
    log = parse_boot_log(shown.boot_log)
    algorithm, quoted = _bank(log, shown, policy)
    values = log.replay(algorithm)
    explained = {pcr for pcr, value in quoted.pcrs.items() if values.get(pcr, bytes(len(value))) == value}
    # Empty is no explanation: firmware that measures into this bank ends each of its PCRs with a separator.
    missing = [pcr for pcr in policy.boot_pcrs if pcr not in explained or not any(quoted.pcrs[pcr])]
    if missing:
        raise VerificationError(
            "boot-log", f"the firmware's event log does not explain the quoted PCRs {', '.join(map(str, missing))}"
        )
    programs = [
        MeasuredProgram(
            "firmware",
            event.pcr,
            event.proven_text(algorithm) or event.text() or event.type_name,
            bool(event.proven_text(algorithm)),
            _NAMES[algorithm],
            event.digests[algorithm],
        )
        for event in log.events
        if event.type != EV_NO_ACTION and event.pcr in explained and event.may_be_program(algorithm)
    ]
    replayed = sorted(explained & set(values))
    said = [f"the firmware's event log leads to the quoted PCRs {', '.join(map(str, replayed))}"]
    unsaid = []
    beyond = sorted(set(values) - explained)
    if beyond:
        unsaid.append(f"what stands in the event log for PCRs {', '.join(map(str, beyond))}: it does not lead there")
    unsaid.append(
        f"that the firmware itself measures into the {_NAMES[algorithm]} bank: one that it leaves out is free for root "
        "to extend, with a list to fit (CVE-2021-42299)"
    )
    if algorithm == SHA1:
        unsaid.append("the firmware's programs against who can find collisions of SHA-1: its log has nothing else")
    if not policy.boot_values:
        unsaid.append("that the firmware and the kernel are ones you accept: the policy lists no boot_values")
    return programs, said, unsaid


def _bank(log: BootLog, shown: TpmEvidence, policy: TpmPolicy) -> tuple[int, QuotedPcrs]:
    if SHA256 in log.algorithms:
        return SHA256, shown.sha256
    if shown.sha1 is None or SHA1 not in log.algorithms:
        raise VerificationError("boot-log-bank", "the firmware's event log has digests of no bank that was quoted")
    if not policy.allow_sha1:
        raise VerificationError(
            "boot-log-bank", "the firmware's event log has SHA-1 digests only, and the policy does not say allow_sha1"
        )
    # Empty must be shown, too: what is not quoted may be anything.
    used = [pcr for pcr in range(IMA_PCR) if pcr != policy.program_pcr and any(shown.sha256.pcrs.get(pcr, b"?"))]
    if used:
        raise VerificationError(
            "boot-log-bank",
            f"the firmware's event log has SHA-1 digests only, but PCRs {', '.join(map(str, used))} of the SHA-256 "
            "bank are not shown to be empty: what was measured there is not in the log",
        )
    return SHA1, shown.sha1


def _proven_ima(shown: TpmEvidence, policy: TpmPolicy) -> tuple[list[ImaEntry], bool]:
    """Return the entries that lead to the quoted PCR, and whether SHA-1 alone binds them."""
    check_little_endian(shown.ima_list)
    entries = parse_ima_list(shown.ima_list)
    quoted = shown.sha256.pcrs.get(IMA_PCR)
    count, is_sha1 = None if quoted is None else proven_entries(entries, quoted), False
    if quoted is not None and policy.allow_sha1:
        if count is None:
            count, is_sha1 = proven_entries(entries, quoted, padded=True), True
        elif not any(quoted) and shown.sha1 is not None and IMA_PCR in shown.sha1.pcrs:
            # A kernel that uses the SHA-1 bank alone leaves the other empty.
            count, is_sha1 = proven_entries_sha1(entries, shown.sha1.pcrs[IMA_PCR]), True
    if count is None:
        raise VerificationError(
            "ima-list",
            f"the IMA list does not lead to the quoted PCR {IMA_PCR} of the SHA-256 bank (a kernel before 5.8 extends "
            "SHA-1 digests there: see allow_sha1)",
        )
    return [entry for entry in entries[:count] if entry.pcr == IMA_PCR], is_sha1


def _file(entry: ImaEntry) -> MeasuredProgram:
    name = "(violation: the file changed while it was read)" if entry.is_violation else entry.path or entry.template
    return MeasuredProgram("ima", entry.pcr, name, not entry.is_violation, entry.algorithm, entry.digest)


def _manifest_in(entries: list[ImaEntry], manifest: bytes, proven: list[str]) -> str:
    """Say whether the list holds every file of the manifest; return what is not proven, or nothing."""
    files = _FILE_LINE.findall(manifest.decode("ascii", "replace"))
    digests = {entry.digest.hex() for entry in entries if entry.algorithm == "sha256" and not entry.is_violation}
    absent = [name for digest, name in files if digest not in digests]
    if files and not absent:
        proven.append(f"the IMA list holds all {len(files)} files of the manifest")
        return ""
    return f"that the trusted part's own files ran: {len(absent)} of {len(files)} are not in the IMA list"
