"""Coming to a violation from evidence alone: what a file shows, or why it shows nothing; and collecting such evidence.

`examine` reads the logs in a file as every replica does (`replica.core.rules`), but executes nothing: CHECKPOINTs
never wait. That is sound. Whatever a rule finds wrong follows from log prefixes alone, a missing entry can only make
an entry wait, and what waits exposes nobody. A vote for something else than what was proposed is judged here against
the proposal *that the proposer's own log holds by its rules*, never against a lone entry: a faulty primary's log may go
on with a second proposal after the violation at which every correct replica stopped reading.

What it rests on: the trusted part of the accused, for a fault that its entry alone shows; for all else the trusted
parts of the logs that are shown. For a basis, and for a checkpoint that a quorum contradicts: at most f of the
certificate's q logs belong to faulty replicas.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from replica.core.carry import carry
from replica.core.checkpoint import (
    check_certificate,
    check_certified,
    decode_header,
    encode_certificate,
    is_founding,
    state_digest,
)
from replica.core.entries import (
    CHECKPOINT,
    Checkpoint,
    Commit,
    Entry,
    NewView,
    Prepare,
    VerifyEnvelope,
    decode_entry,
    decode_joining,
    decode_judged,
)
from replica.core.evidence import (
    CLAIM_BYTES_MAX,
    EVIDENCE_BYTES_MAX,
    Basis,
    Claim,
    Evidence,
    Kind,
    decode_claim,
    decode_evidence,
)
from replica.core.genesis import Genesis, Member
from replica.core.group import VerifiedGroup
from replica.core.knowledge import beginning
from replica.core.layout import U64_MAX, LayoutError
from replica.core.logstate import LogState
from replica.core.proof import EntryProof, prove
from replica.core.quorum import primary
from replica.core.rules import Reading, Violation, Wait, apply_entry, apply_opening, judge
from trustlog import VerificationError

MALFORMED = "malformed"
FALSE_VOTE = "false-vote"
FALSE_COMMIT = "false-commit"
FALSE_CHECKPOINT = "false-checkpoint"
FALSE_RESULT = "false-result"  # what executing the slot gave stands in no log, so it is kept as kind 4 only


class UnprovenError(Exception):
    """The evidence does not show what it claims; the text says why."""


class TooLargeError(Exception):
    """The evidence would exceed EVIDENCE_BYTES_MAX."""


class Keys(Protocol):
    """The public keys of one cluster's logs, and what can be verified with them."""

    def initial_heads(self) -> list[bytes]:
        """Return every log's head before its first entry."""
        ...

    def verify(self, log: int, raw: bytes) -> VerifiedGroup:
        """Verify a group; LayoutError or VerificationError."""
        ...

    def entry(self, log: int, proof: EntryProof) -> bool:
        """Say whether `log` attested the entry that is shown."""
        ...


# Groups of a log, in order, from an index on.
Source = Callable[[int, int], Iterator[VerifiedGroup]]


@dataclass(frozen=True, slots=True)
class Ground:
    """Where a list of members begins, verified by whoever made it. ends: index and head of every log there."""

    slot: int
    states: tuple[LogState, ...]
    ends: tuple[tuple[int, bytes], ...]


class Replay:
    """Reads logs from a basis on, as every replica does, without executing anything.

    ends: the last slot of this list of members, if it is known that it ended: what a log says after CHECKPOINT of that
    slot was said under the next list, and is not read.
    """

    def __init__(
        self,
        genesis: Genesis,
        keys: Keys,
        basis: Basis | Ground | None,
        verify_envelope: VerifyEnvelope,
        ends: int | None = None,
    ) -> None:
        self._genesis = genesis
        self._list_ends = ends
        self._cluster_id = genesis.cluster_id()
        self._verify_envelope = verify_envelope
        self._slot = 0  # of the basis
        self._ends = [(0, head) for head in keys.initial_heads()]
        self.states = beginning(genesis)
        if isinstance(basis, Ground):
            self.states = [state.copy() for state in basis.states]
            self._slot, self._ends = basis.slot, list(basis.ends)
        elif basis is not None:
            self._begin(basis, keys)
        self._unread: list[deque[tuple[int, bytes]]] = [deque() for _ in self.states]
        self._looked_at: dict[int, Entry] = {}
        self._stopped: set[int] = set()
        self.waits: dict[int, Wait] = {}

    def _begin(self, basis: Basis, keys: Keys) -> None:
        header = decode_header(basis.header, self._genesis.n)
        check_certificate(basis.certificate, header, self._genesis, keys.entry)
        founds = is_founding(header, self._genesis)
        too_early = header.slot <= self._genesis.base and not founds
        # Whoever was a member may say anything once the list is no more.
        if too_early or (self._list_ends is not None and header.slot > self._list_ends):
            raise LayoutError(f"slot {header.slot} of the basis is not of list {header.list_number} of the members")
        if tuple(map(state_digest, basis.states)) != header.logs:
            raise LayoutError("a basis whose reduced states are not those that a quorum attested")
        self.states = list(map(LogState.decode, basis.states))
        if [(state.author, state.position) for state in self.states] != list(enumerate(header.cut)):
            raise LayoutError("a basis whose reduced states are not those at its cut")
        self._slot = header.slot
        if not founds:
            self._ends = list(zip(header.cut, header.heads, strict=True))

    def end(self, log: int) -> int:
        """Return the index up to which `log` was handed in."""
        return self._ends[log][0]

    def is_empty(self, log: int) -> bool:
        """Say whether everything of `log` that was handed in is read."""
        return not self._unread[log]

    def add(self, group: VerifiedGroup) -> None:
        """Take the next group of a log; LayoutError if it does not continue what is here."""
        if (group.first - 1, group.head_before) != self._ends[group.author]:
            raise LayoutError(
                f"the group {group.first} to {group.last} of log {group.author} does not follow entry "
                f"{self._ends[group.author][0]}"
            )
        self._ends[group.author] = (group.last, group.head_after)
        self._unread[group.author].extend(enumerate(group.payloads, group.first))

    def run(self, log: int, index: int) -> Violation | None:
        """Read on as far as possible, or to entry `index` of `log`: return what is wrong with it.

        None if it cannot be read yet; `waits` says what stops the logs. UnprovenError if it is read and breaks no
        rule, or its log breaks one before.
        """
        moved = True
        while moved:
            moved = False
            for reading in range(len(self.states)):
                while self._is_readable(reading):
                    wanted = (reading, self._unread[reading][0][0]) == (log, index)
                    outcome = self._read_next(reading)
                    if isinstance(outcome, Wait):
                        break
                    if wanted:
                        if outcome is None:
                            raise UnprovenError(f"entry {index} of replica {log} breaks no rule")
                        return outcome
                    if reading == log and reading in self._stopped:
                        raise UnprovenError(f"replica {log} breaks a rule before entry {index}, which nobody reads")
                    moved = True
        return None

    def _is_readable(self, log: int) -> bool:
        return bool(self._unread[log]) and log not in self._stopped and not self.is_over(log)

    def is_over(self, log: int) -> bool:
        """Say whether what follows in `log` is of the next list of members."""
        return self._list_ends is not None and self.states[log].last_checkpoint >= self._list_ends

    def _read_next(self, log: int) -> Violation | Wait | None:
        """Read the next entry of `log`; return what is wrong with it, a lie included, or what it waits for."""
        _, payload = self._unread[log][0]
        try:
            entry = self._looked_at.get(log) or self._decode(log, payload)
        except LayoutError as error:
            self._stopped.add(log)
            return Violation(MALFORMED, str(error))
        reading = Reading(self._genesis, self.states, U64_MAX, self._slot, self._list_ends)
        verdict = judge(self.states[log], entry, reading)
        if isinstance(verdict, Wait):
            self._looked_at[log] = entry
            self.waits[log] = verdict
            return verdict
        self.waits.pop(log, None)
        self._looked_at.pop(log, None)
        if isinstance(verdict, Violation):
            self._stopped.add(log)
            return verdict
        self._unread[log].popleft()
        carried = carry(entry, self.states, self._slot) if isinstance(entry, NewView) else None
        lie = self._lie(log, entry)
        apply_entry(self.states[log], entry)
        if carried is not None:
            apply_opening(self.states[log], self.states[log].view, carried)
        return lie

    def _decode(self, log: int, payload: bytes) -> Entry:
        if not self.states[log].joined:
            return decode_joining(payload, self._genesis)
        return decode_judged(payload, self._genesis, self._cluster_id, self._verify_envelope)

    def _lie(self, log: int, entry: Entry) -> Violation | None:
        """Return what is false in a vote; votes up to the basis' slot are pruned, and nobody can tell."""
        if not isinstance(entry, Prepare | Commit) or entry.slot <= self._slot:
            return None
        proposer = primary(entry.view, self._genesis.n)
        proposed = self.states[proposer].votes.get(entry.slot, {}).get(entry.view)
        where = f"slot {entry.slot} in view {entry.view}"
        if isinstance(entry, Prepare):
            return (
                None if entry.digest == proposed else Violation(FALSE_VOTE, f"a vote for another batch than {where}'s")
            )
        own = self.states[log].votes.get(entry.slot, {}).get(entry.view)
        if entry.digest == proposed == own:
            return None
        return Violation(FALSE_COMMIT, f"a commit for {where} of what was not proposed, or not voted for by its author")


# Verifying


def examine(
    raw: bytes, genesis: Genesis, keys: Keys, verify_envelope: VerifyEnvelope, ends: int | None = None
) -> tuple[Claim, str]:
    """Return what a file of evidence proves, and a sentence about it; UnprovenError says why it proves nothing.

    genesis: of the list of members under which the entry was said; ends: see `Replay`.
    """
    try:
        evidence = decode_evidence(raw, genesis.n)
        claim = evidence.claim
        if evidence.cluster_id != genesis.cluster_id():
            raise UnprovenError("it is of another cluster than the given cluster file's")
        if claim.log >= genesis.n:
            raise UnprovenError(f"there is no replica {claim.log}")
        found = _EXAMINERS[evidence.kind](evidence, genesis, keys, verify_envelope, ends)
    except LayoutError as error:
        raise UnprovenError(f"malformed, truncated or altered: {error}") from error
    except VerificationError as error:
        raise UnprovenError(f"what it shows was not attested by that log: {error}") from error
    if found.rule != claim.rule:
        raise UnprovenError(
            f"entry {claim.index} of replica {claim.log} breaks the rule {found.rule}, not {claim.rule}"
        )
    return claim, found.text


def examine_under(
    raw: bytes,
    spans: Sequence[tuple[Genesis, int | None]],
    keys_of: Callable[[Genesis], Keys],
    verify_envelope: VerifyEnvelope,
) -> tuple[Claim, str, Member]:
    """Return what a file of evidence proves in a cluster whose members changed, and of whose log.

    UnprovenError says why it proves nothing.

    spans: of every list of members so far, the first one first: what is agreed under it, and its last slot, None of the
    present one's. Who knows of too few lists judges what was said under a later one by an older one's rules, and may
    accuse a correct replica. An entry that is shown alone does not say under which list it was said: it is malformed
    only if it is under all lists that its log was in.
    """
    try:
        kind, _, claim = decode_claim(raw[:CLAIM_BYTES_MAX])
    except LayoutError as error:
        raise UnprovenError(f"malformed, truncated or altered: {error}") from error
    reasons = [f"there is no replica {claim.log}"]
    for tenure in _tenures(spans, claim.log):
        found = []
        for genesis, ends in tenure:
            try:
                found.append(examine(raw, genesis, keys_of(genesis), verify_envelope, ends))
            except UnprovenError as error:
                reasons.append(str(error))
        if found and (kind is not Kind.ENTRY or len(found) == len(tenure)):
            return *found[-1], tenure[0][0].members[claim.log]
    raise UnprovenError("; ".join(dict.fromkeys(reasons[1:] or reasons)))


def _tenures(
    spans: Sequence[tuple[Genesis, int | None]], number: int
) -> Sequence[Sequence[tuple[Genesis, int | None]]]:
    """Return the lists in which each log that was number `number` was, log by log."""
    tenures: dict[tuple[bytes, int], list[tuple[Genesis, int | None]]] = {}
    for genesis, ends in spans:
        if number < genesis.n:
            member = genesis.members[number]
            tenures.setdefault((member.log_public_key, member.since), []).append((genesis, ends))
    return tuple(tenures.values())


def _shown(evidence: Evidence, keys: Keys) -> bytes:
    """Return the payload of the accused entry from the one group of the evidence, verified."""
    claim = evidence.claim
    group = keys.verify(claim.log, evidence.groups[0][0])
    if not group.first <= claim.index <= group.last:
        raise UnprovenError(f"it shows entries {group.first} to {group.last}, not entry {claim.index}")
    return group.payloads[claim.index - group.first]


def _examine_entry(
    evidence: Evidence, genesis: Genesis, keys: Keys, verify_envelope: VerifyEnvelope, _ends: int | None
) -> Violation:
    payload = _shown(evidence, keys)
    try:
        decode_judged(payload, genesis, genesis.cluster_id(), verify_envelope)
    except LayoutError as error:
        return Violation(MALFORMED, str(error))
    raise UnprovenError(f"entry {evidence.claim.index} of replica {evidence.claim.log} is a well-formed entry")


def _examine_replay(
    evidence: Evidence, genesis: Genesis, keys: Keys, verify_envelope: VerifyEnvelope, ends: int | None
) -> Violation:
    claim = evidence.claim
    replay = Replay(genesis, keys, evidence.basis, verify_envelope, ends)
    for log, groups in enumerate(evidence.groups):
        for raw in groups:
            replay.add(keys.verify(log, raw))
    found = replay.run(claim.log, claim.index)
    if found is None:
        wait = replay.waits.get(claim.log)
        why = "is not shown" if wait is None else f"cannot be judged: what is shown lacks {wait.why}"
        if replay.is_over(claim.log):
            why = f"is not of list {genesis.list_number} of the members, which ended before it"
        raise UnprovenError(f"entry {claim.index} of replica {claim.log} {why}")
    return found


def _examine_checkpoint(
    evidence: Evidence, genesis: Genesis, keys: Keys, _: VerifyEnvelope, ends: int | None
) -> Violation:
    entry = decode_entry(_shown(evidence, keys), genesis, genesis.cluster_id())
    if not isinstance(entry, Checkpoint):
        raise UnprovenError(f"entry {evidence.claim.index} of replica {evidence.claim.log} is no CHECKPOINT")
    # Whoever was a member may say anything once the list is no more.
    if entry.slot < genesis.base or (ends is not None and entry.slot > ends):
        raise UnprovenError(f"slot {entry.slot} is not of the list of members that is shown to contradict it")
    attested = check_certified(evidence.certificate, genesis, keys.entry)
    if attested.slot != entry.slot or attested.digest == entry.digest:
        raise UnprovenError("the quorum's CHECKPOINT does not contradict the replica's")
    return _false_checkpoint(entry.slot)


def _false_checkpoint(slot: int) -> Violation:
    return Violation(FALSE_CHECKPOINT, f"its state after slot {slot} is not the one that a quorum attested")


def _examine_bare(evidence: Evidence, _genesis: Genesis, keys: Keys, _: VerifyEnvelope, _ends: int | None) -> Violation:
    _shown(evidence, keys)
    raise UnprovenError(
        "it is not self-contained: the log did say that entry, and whether it breaks a rule is not shown"
    )


_EXAMINERS = {
    Kind.ENTRY: _examine_entry,
    Kind.REPLAY: _examine_replay,
    Kind.CHECKPOINT: _examine_checkpoint,
    Kind.BARE: _examine_bare,
}


# Collecting


def bare(claim: Claim, group: VerifiedGroup, genesis: Genesis, kind: Kind = Kind.BARE) -> Evidence:
    """Return evidence with the one group that holds the entry."""
    return Evidence(kind, genesis.cluster_id(), claim, ((group.raw,),))


def collect_replay(
    log: int,
    index: int,
    genesis: Genesis,
    keys: Keys,
    basis: Basis | None,
    source: Source,
    ends: int | None = None,
) -> Evidence | None:
    """Collect what is needed to come to the violation or lie in entry `index` of `log`, and no more.

    None if `source` lacks something. TooLargeError, or UnprovenError if that entry breaks no rule: it must be one that
    the core found bad, so envelopes' signatures are not looked at again. ends: see `Replay`; without it no vote is
    beyond the list.
    """
    replay = Replay(genesis, keys, basis, lambda _: True, ends)
    taken: list[list[bytes]] = [[] for _ in range(genesis.n)]
    groups = [source(other, replay.end(other) + 1) for other in range(genesis.n)]
    size = 0
    while (found := replay.run(log, index)) is None:
        wanted = {log, *(other for wait in replay.waits.values() for other in wait.logs)}
        grown = False
        for other in sorted(wanted):
            group = next(groups[other], None) if replay.is_empty(other) else None
            if group is None:
                continue
            replay.add(group)
            taken[other].append(group.raw)
            size += len(group.raw) + 4
            grown = True
        if not grown:
            return None
        if size > EVIDENCE_BYTES_MAX:
            raise TooLargeError
    claim = Claim(log, index, found.rule)
    evidence = Evidence(Kind.REPLAY, genesis.cluster_id(), claim, tuple(map(tuple, taken)), basis=basis)
    if len(evidence.encode()) > EVIDENCE_BYTES_MAX:
        raise TooLargeError
    return evidence


def collect_checkpoint(
    group: VerifiedGroup, index: int, starts: Sequence[int], genesis: Genesis, source: Source
) -> Evidence | None:
    """Collect q CHECKPOINTs that contradict the one at `index` in `group`; None if `source` lacks them.

    starts: the first index of every log to look at.
    """
    lie = decode_entry(group.payloads[index - group.first], genesis, genesis.cluster_id())
    if not isinstance(lie, Checkpoint):
        return None
    said: dict[bytes, dict[int, EntryProof]] = {}
    for log, start in enumerate(starts):
        for digest, proof in _checkpoints(lie.slot, source(log, start), genesis):
            said.setdefault(digest, {}).setdefault(log, proof)
            if digest != lie.digest and len(said[digest]) >= genesis.quorum:
                claim = Claim(group.author, index, FALSE_CHECKPOINT)
                certificate = encode_certificate(said[digest])
                return Evidence(Kind.CHECKPOINT, genesis.cluster_id(), claim, ((group.raw,),), certificate)
    return None


def _checkpoints(slot: int, groups: Iterator[VerifiedGroup], genesis: Genesis) -> Iterator[tuple[bytes, EntryProof]]:
    cluster_id = genesis.cluster_id()
    for group in groups:
        for index, payload in enumerate(group.payloads, group.first):
            if payload[:1] != bytes([CHECKPOINT]):
                continue
            entry = decode_entry(payload, genesis, cluster_id)
            if isinstance(entry, Checkpoint) and entry.slot >= slot:
                if entry.slot == slot:
                    yield entry.digest, prove(group, index)
                return
