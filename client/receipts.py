"""Receipts: an operation's proof for others, collected from f+1 replicas and verified here before it counts.

    replaced, receipt = await client.with_receipt(lambda calls: calls.put("greeting", "hello"))
    Path("r.json").write_bytes(receipt.encode())

What a receipt holds, and how anybody verifies it offline, is in `trustlog.receipts`; `verify` below does so with a
cluster file. Replicas keep what it takes for a bounded while, so a receipt is asked for right after its operation.
"""

import asyncio
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from client.connection import printable
from replica.cluster.identities import members_of
from replica.cluster.memberlists import load_present_cluster
from replica.core.envelope import Result, SessionId
from replica.core.layout import DIGEST_SIZE, LayoutError
from replica.core.proof import decode_proof
from replica.wire.messages import RECEIPT_VERSION, ReceiptShown
from trustlog import VerificationError
from trustlog.merkle import root_of_path
from trustlog.receipts import (
    PATH_MAX,
    Entry,
    Members,
    Outcome,
    Receipt,
    result_payload,
    verify_entry,
    verify_receipt,
)

__all__ = ["Addressed", "Receipt", "ReceiptRound", "verify"]

LOOK_S: Final = 0.02  # how often to look whether somebody is to be asked again
PAUSE_S: Final = 0.02  # before one that may have it soon is asked again; doubles up to
PAUSE_S_MAX: Final = 1.0
ANSWER_S: Final = 1.0  # without an answer for so long, it is asked again
CODE_TEXT_MAX: Final = 40

# Codes of `replica.core.results` that may be otherwise soon, and those that stay.
_PASSING = {
    "later": "it has not executed that slot yet, or may not speak now",
    "busy": "it may say no more of them before its next checkpoint",
}
_LASTING = {
    "gone": "it keeps that slot no more, or did not execute it itself",
    "absent": "it executed no such operation with this result in that slot",
    "version": "it speaks another version",
    "not-allowed": "this client's key is not allowed",
    "false": "what it shows does not verify",
}


@dataclass(frozen=True, slots=True)
class Addressed:
    """A result, with the session and the number that its operation had."""

    result: Result
    session: SessionId
    number: int

    def outcome(self, client: bytes, operation: bytes) -> Outcome:
        """Return what a receipt is of."""
        session, result = (self.session.slot, self.session.place), self.result
        return Outcome(client, session, self.number, operation, result.slot, result.status, result.value)


class ReceiptRound:
    """One receipt that is being collected; `receipt` is set when f+1 replicas showed alike, and it verifies."""

    def __init__(self, members: Members, said: Outcome) -> None:
        self.receipt: Receipt | None = None
        self._members, self._said = members, said
        # By replica: place, size and path, and the entry; verified.
        self._shown: dict[int, tuple[tuple[int, int, tuple[bytes, ...]], Entry]] = {}
        self._codes: dict[int, str] = {}
        self._ask_at: dict[int, float] = {}
        self._pauses: dict[int, float] = {}
        self._news = asyncio.Event()

    def to_ask(self, now: float, connected: Iterable[int]) -> list[int]:
        """Return who is to be asked now, on the loop's clock in seconds."""
        due = [
            replica
            for replica in sorted(connected)
            if replica not in self._shown
            and self._codes.get(replica, "later") in _PASSING
            and now >= self._ask_at.get(replica, 0.0)
        ]
        self._ask_at.update(dict.fromkeys(due, now + ANSWER_S))
        return due

    @property
    def is_hopeless(self) -> bool:
        """Say whether too many replicas can never show it."""
        lost = sum(code not in _PASSING for code in self._codes.values())
        return len(self._members.identities) - lost < self._members.quorum

    async def news(self) -> None:
        """Wait until a replica answered, or for a moment."""
        self._news.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(LOOK_S):
                await self._news.wait()

    def reasons(self) -> str:
        """Say in words what every replica that was asked answered."""
        texts = _PASSING | _LASTING
        parts = [f"replica {one}: {texts.get(code, code)}" for one, code in sorted(self._codes.items())]
        parts += [f"replica {one}: shown" for one in sorted(self._shown)]
        return "; ".join(parts) or "nobody answered"

    def on_shown(self, replica: int, message: ReceiptShown, now: float) -> None:
        """Take what a replica answers; what does not verify is not counted, and it is asked no more."""
        if replica in self._shown or self.receipt is not None:
            return
        self._news.set()
        code = message.code if message.version == RECEIPT_VERSION else "version"
        if code:
            self._refused(replica, code, now)
            return
        try:
            self._shown[replica] = self._verified(replica, message)
        except (LayoutError, VerificationError):
            self._refused(replica, "false", now)
            return
        self._codes.pop(replica, None)
        self._finish(self._shown[replica][0])

    def _refused(self, replica: int, code: str, now: float) -> None:
        self._codes[replica] = printable(code[:CODE_TEXT_MAX])
        pause = self._pauses.get(replica, PAUSE_S)
        self._pauses[replica] = min(2 * pause, PAUSE_S_MAX)
        self._ask_at[replica] = now + pause

    def _verified(self, replica: int, message: ReceiptShown) -> tuple[tuple[int, int, tuple[bytes, ...]], Entry]:
        if len(message.path) % DIGEST_SIZE or len(message.path) > PATH_MAX * DIGEST_SIZE:
            raise LayoutError("a path that is none")
        path = tuple(message.path[at : at + DIGEST_SIZE] for at in range(0, len(message.path), DIGEST_SIZE))
        proof = decode_proof(message.proof)
        entry = Entry(replica, proof.attestation, proof.digests, proof.place)
        root = root_of_path(self._said.leaf, message.place, message.size, path)
        verify_entry(self._members, entry, result_payload(self._said.slot, message.size, root))
        return (message.place, message.size, path), entry

    def _finish(self, way: tuple[int, int, tuple[bytes, ...]]) -> None:
        alike = [entry for _, (other, entry) in sorted(self._shown.items()) if other == way]
        if len(alike) < self._members.quorum:
            return
        receipt = Receipt(self._members.cluster_id, self._said, *way, tuple(alike))
        verify_receipt(receipt, self._members)
        self.receipt = receipt


def verify(raw: bytes, cluster_file: Path | str) -> Receipt:
    """Verify a receipt's file with the verifier's own cluster file (or its folder) and return what it says.

    Nothing needs to run. VerificationError says why it proves nothing; ClusterFileError is about the cluster file.
    """
    lists = load_present_cluster(Path(cluster_file)).lists
    receipt = Receipt.decode(raw)
    # Members come and go: a slot is proven by the logs of its own list, above whose last slot they count no more.
    genesis = next(one for one in reversed(lists) if one.base < receipt.outcome.slot or not one.list_number)
    verify_receipt(receipt, members_of(genesis))
    return receipt
