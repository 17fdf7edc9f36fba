"""Replicas appraise each other (remote attestation, RFC 9334): on every connection, in both directions, afresh.

Right after Welcome each side sends AskEvidence with a new nonce, and the other answers EvidenceShown. It is judged by
the cluster's policy, the table [appraisal] of cluster.toml; what passed stands in `status`. Until the other side has
passed, its log is not read here and none is handed out to it (with minimum_evidence = "none", at once).

Rules. 1. A peer that fails, or shows nothing where something is demanded, is refused: counted by reason, disconnected,
and asked again when it dials or is dialled. 2. A refusal is this replica's own opinion, so it touches connections only:
what a refused peer's log says still counts when somebody else hands it on, because whose log counts is agreed (the
genesis part of cluster.toml), and opinions must never divide correct replicas. 3. Each side makes a few pieces of
evidence per connection at most, one after the other, in a thread of its own. That delays the log by one signature or
quote, and once by the making of a TPM's endorsement key, for which a chip may need some seconds.

The nonce that the log signs is derived from the asker's (`replica.wire.handshake.evidence_nonce`), so that nobody can
have a replica answer a question that was asked elsewhere.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from replica.wire.frames import MessageProtocol
from replica.wire.handshake import EVIDENCE_VERSION, evidence_nonce
from replica.wire.messages import AskEvidence, EvidenceShown
from trustlog import TrustLogError, VerificationError
from trustlog.appraisal import (
    AttestationResult,
    EvidenceLevel,
    appraise,
    decode_evidence,
    make_evidence,
    tsm,
)
from trustlog.appraisal.attester import with_report
from trustlog.tpm.chain import TpmPins

if TYPE_CHECKING:
    from replica.shell.node import Node

# Peers show no lists of a measured boot, so this is ample; a client's envelope may be as large.
EVIDENCE_BYTES_MAX = 256 * 1024
# How long a peer may take: a TPM needs up to a second for a quote, and several may be asked for.
EVIDENCE_S = 20.0
ANSWERS_PER_CONNECTION_MAX = 4


@dataclass(frozen=True, slots=True)
class Appraised:
    """What the last appraisal of a peer came to: a result, or why it was refused; or neither: it showed nothing."""

    result: AttestationResult | None = None
    refused: str | None = None

    @property
    def text(self) -> str:
        """One line for people."""
        if self.refused is not None:
            return f"refused: {self.refused}"
        return "no evidence" if self.result is None else self.result.summary()


class Appraisals:
    """Makes this replica's evidence, judges that of its peers, and remembers what came of it."""

    def __init__(self, node: "Node") -> None:
        self._node = node
        self._policy = node.home.cluster.appraisal
        # That a member says "tpm" is its own word: only what the assembler of the cluster file was shown counts.
        self._enrolled = node.home.cluster.enrolled_keys
        self._latest: dict[int, Appraised] = {}
        self._maker = ThreadPoolExecutor(1, thread_name_prefix="evidence")

    @property
    def is_demanded(self) -> bool:
        """Say whether a peer must have shown evidence before anything else."""
        return self._policy.minimum_evidence is not EvidenceLevel.NONE

    def close(self) -> None:
        """Make nothing more; what is being made is not waited for."""
        self._maker.shutdown(wait=False, cancel_futures=True)

    async def make(self, asked: AskEvidence) -> EvidenceShown:
        """Return the evidence that was asked for; empty if it cannot be made, or of a version that is not known."""
        if asked.version != EVIDENCE_VERSION:
            self._node.refusals["evidence-version"] += 1
            return EvidenceShown(EVIDENCE_VERSION, b"")
        nonce = evidence_nonce(asked.nonce, self._node.number, self._node.home.place.certificate_der)
        try:
            evidence = await asyncio.get_running_loop().run_in_executor(self._maker, self._make, nonce)
        except (TrustLogError, OSError, RuntimeError) as error:
            self._node.refusals["evidence-not-made"] += 1
            self._node.log.warning("cannot make evidence", why=str(error))
            return EvidenceShown(EVIDENCE_VERSION, b"")
        return EvidenceShown(EVIDENCE_VERSION, evidence)

    def _make(self, nonce: bytes) -> bytes:
        log, context = self._node.trusted_log, self._node.verifier.context(self._node.number)
        evidence = make_evidence(log, nonce=nonce, context=context)
        if tsm.TSM_DIRECTORY.is_dir():
            try:
                evidence = with_report(evidence, tsm.make_report)
            except (TrustLogError, OSError) as error:
                # The rest is worth what it is worth; a policy that demands the report refuses it.
                self._node.log.warning("no report of a confidential virtual machine", why=str(error))
        return evidence.encode()

    def judge(self, peer: int, nonce: bytes, shown: bytes) -> str | None:
        """Judge what replica `peer` showed, empty for nothing; return why it is refused, None if it passed."""
        try:
            appraised = Appraised(self._appraise(peer, nonce, shown))
        except VerificationError as error:
            self._node.refusals[f"evidence-{error.reason}"] += 1
            appraised = Appraised(refused=str(error))
        except Exception as error:
            # A mistake of ours that its bytes have found: what cannot be judged has not passed, and what passed before
            # is not shown any more.
            self._node.refusals["evidence-not-judged"] += 1
            self._node.log.exception("cannot judge a peer's evidence", peer=peer)
            appraised = Appraised(refused=f"its evidence cannot be judged: {type(error).__name__}: {error}")
        before = self._latest.get(peer)
        self._latest[peer] = appraised
        if before is None or before.text != appraised.text:
            log = self._node.log.info if appraised.refused is None else self._node.log.error
            log("appraised a peer", peer=peer, result=appraised.text)
        return appraised.refused

    def _appraise(self, peer: int, nonce: bytes, shown: bytes) -> AttestationResult | None:
        if not shown:
            if self.is_demanded:
                wanted = self._policy.minimum_evidence.value
                raise VerificationError("missing", f"it shows no evidence, and the cluster demands {wanted!r}")
            return None
        member, place = self._node.home.cluster.genesis.members[peer], self._node.home.cluster.replicas[peer]
        result = appraise(
            decode_evidence(shown, EVIDENCE_BYTES_MAX),
            self._policy,
            nonce=evidence_nonce(nonce, peer, place.certificate_der),
            context=self._node.verifier.context(peer),
            public_key=member.log_public_key,
            enrolled=self._enrolled,
            pins=TpmPins.decode(member.log_pins) if member.log_pins else None,
        )
        if result.kind != member.log_kind:
            raise VerificationError("wrong-kind", "its evidence is of another backend than the cluster file says")
        return result

    def report(self, peer: int) -> dict[str, Any] | None:
        """Return what `status` says of a peer; None before the first appraisal."""
        appraised = self._latest.get(peer)
        if appraised is None:
            return None
        result = appraised.result
        return {
            "text": appraised.text,
            "refused": appraised.refused,
            "evidence": None if result is None else result.level_names,
            "measurement": None if result is None else result.measurement.hex(),
            "root": None if result is None else result.root,
            "anchored": None if result is None else result.anchored,
            "not_proven": None if result is None else list(result.not_proven),
        }


class Examination:
    """One connection's part: asks the other side once, answers what it asks, and says when it has passed or failed.

    done: called once, with why the peer is refused, or None. start: runs a coroutine until the connection's owner ends.
    """

    def __init__(
        self,
        appraisals: Appraisals,
        connection: MessageProtocol,
        nonce: bytes,
        done: Callable[[str | None], None],
    ) -> None:
        self.is_over = False
        self._appraisals = appraisals
        self._connection = connection
        self._nonce = nonce
        self._done = done
        self._peer = -1
        self._timer: asyncio.TimerHandle | None = None
        self._answers: set[asyncio.Task[None]] = set()

    def begin(self, peer: int) -> None:
        """Ask replica `peer`, who is at the other end."""
        self._peer = peer
        self._timer = asyncio.get_running_loop().call_later(EVIDENCE_S, self._judge, b"")
        self._connection.send(AskEvidence(EVIDENCE_VERSION, self._nonce))

    def on_shown(self, message: EvidenceShown) -> None:
        """Judge what the other side shows, if it was asked and has not answered before."""
        if self._timer is None:
            self._connection.refuse("evidence-unasked")
        elif not self.is_over:
            self._judge(message.evidence if message.version == EVIDENCE_VERSION else b"")

    def on_asked(self, message: AskEvidence) -> None:
        """Make evidence for the other side."""
        if len(self._answers) >= ANSWERS_PER_CONNECTION_MAX:
            self._connection.refuse("evidence-asked-too-often")
            return
        task = asyncio.get_running_loop().create_task(self._answer(message))
        self._answers.add(task)  # kept when done: a connection is one examination, not a service

    def close(self) -> None:
        """Forget it: the connection is gone."""
        self.is_over = True
        if self._timer is not None:
            self._timer.cancel()
        for task in self._answers:
            task.cancel()

    async def _answer(self, message: AskEvidence) -> None:
        shown = await self._appraisals.make(message)
        if self._connection.is_open:
            self._connection.send(shown)

    def _judge(self, evidence: bytes) -> None:
        if self.is_over:
            return
        self.is_over = True
        if self._timer is not None:
            self._timer.cancel()
        self._done(self._appraisals.judge(self._peer, self._nonce, evidence))
