"""RESULT: what executing a slot gave, said on demand, so that a client can have a receipt (`trustlog.receipts`).

Asked for an operation of slot s, a replica that executed s itself says RESULT(s, size, root) in its log, once, and then
shows that entry and the path from the operation's leaf to the root; asked again, it shows the same entry. A leaf stands
for an operation that slot s executed: OK, or ERROR. What was only answered there once more has none, so a second
operation under a number that was used already never gets the first one's result.

RESULT orders nothing, is no part of the agreed state, and never exposes a correct replica:

  1. it is said after its slot was executed, and read when its slot is executed (as a CHECKPOINT is);
  2. its slot lies in its author's window, and at most a window of them stand between two CHECKPOINTs. The pen keeps to
     that. Slots above the last CHECKPOINT always have room; older ones share what an interval of K leaves of a window,
     a client has at most a quarter of that;
  3. what it says is not judged by rules, as who did not execute the slot, or keeps it no more, cannot tell. Whoever can
     reports another root as a lie.

What is kept is bounded, the newest slots. A tree is made when it is wanted, in less time than the slot took to execute.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from replica.core.batch import Batch, decode_batch
from replica.core.entries import SlotResult
from replica.core.envelope import Envelope, Operations, OperationsReply, Status, decode_reply
from replica.core.events import ResultAsked, ResultRefused, ResultShown
from replica.core.execution import ERROR_TEXT_BYTES_MAX, Executed
from replica.core.genesis import MIB, Genesis, Limits
from replica.core.group import VerifiedGroup
from replica.core.layout import DIGEST_SIZE
from replica.core.logstate import LogState
from replica.core.proof import EntryProof, prove
from replica.core.rules import results_max
from trustlog import ATTESTATION_SIZE_MAX
from trustlog.merkle import MerkleTree
from trustlog.receipts import Outcome

# Executed slots of which results are kept, the newest, and what they take: batches and replies, or trees, and proofs.
RESULT_SLOTS_MAX: Final = 1024
RESULT_BYTES_MAX: Final = 32 * MIB
PAYLOAD_SIZE: Final = 64  # of a RESULT in its proof, with the counts beside it
# Who waits for a RESULT that is being said.
ASKING_MAX: Final = 4096
ASKING_PER_CLIENT_MAX: Final = 64

# Why nothing is shown. LATER and BUSY may be otherwise soon; GONE and ABSENT stay.
LATER, BUSY, GONE, ABSENT = "later", "busy", "gone", "absent"

_EXECUTED = frozenset({Status.OK, Status.ERROR})

Told = ResultShown | ResultRefused


@dataclass(slots=True)
class _Kept:
    """One executed slot: its batch and replies as they are sent, until its tree is made; the own RESULT, once it came.

    size: the most bytes that all this takes.
    """

    size: int
    batch: bytes = b""
    replies: Sequence[bytes] = ()
    tree: MerkleTree | None = None
    proof: EntryProof | None = None
    asking: list[tuple[bytes, Any, int]] = field(default_factory=list)  # client, source, place


class ResultBook:
    """What one replica keeps of the slots that it executed. due: what its pen still has to say, by slot.

    Invariants, checked by `check()`:
      1. at most RESULT_SLOTS_MAX slots and RESULT_BYTES_MAX bytes are kept, and `_bytes` is their size;
      2. whoever waits waits for a slot that is due or being said, at most ASKING_MAX, ASKING_PER_CLIENT_MAX each.
    """

    def __init__(self, genesis: Genesis) -> None:
        self.due: dict[int, SlotResult] = {}
        self._genesis = genesis
        # A reply may hold the text of an error where results are smaller than that.
        size = max(genesis.limits.result_bytes_max, ERROR_TEXT_BYTES_MAX)
        self._limits = replace(genesis.limits, result_bytes_max=size)
        digests = DIGEST_SIZE * genesis.limits.group_entries_max
        self._proof_size = ATTESTATION_SIZE_MAX + digests + PAYLOAD_SIZE
        self._slots: dict[int, _Kept] = {}
        self._bytes = 0
        self._asking: Counter[bytes] = Counter()
        self._checkpoint = 0  # the own last one, since when older slots are counted
        self._older: Counter[bytes] = Counter()

    def __len__(self) -> int:
        return len(self._slots)

    def executed(self, slot: int, batch: Batch, replies: Sequence[Executed]) -> list[Told]:
        """Keep what executing `slot` gave, and drop what is too old; return what its askers are told."""
        raw = [reply.raw for reply in replies]
        contents = [envelope.content for envelope in batch.envelopes]
        operations = sum(len(content.operations) for content in contents if isinstance(content, Operations))
        size = max(len(batch.raw) + sum(map(len, raw)), 2 * DIGEST_SIZE * operations) + self._proof_size
        self._slots[slot] = _Kept(size, batch.raw, raw)
        self._bytes += size
        told: list[Told] = []
        while self._bytes > RESULT_BYTES_MAX or len(self._slots) > RESULT_SLOTS_MAX:
            told += self._drop(next(iter(self._slots)))
        return told

    def ask(self, event: ResultAsked, own: LogState, executed: int, *, live: bool) -> list[Told]:
        """Take a question; return the answer, or nothing if it is given once the own log holds the RESULT.

        own: the own log's state, what is being appended included. live: whether this replica may speak.
        """
        kept = self._slots.get(event.slot)
        if kept is None:
            return [ResultRefused(event.source, LATER if event.slot > executed else GONE)]
        tree = self._tree(event.slot, kept)
        place = None if tree is None else tree.find(event.leaf)
        if tree is None or place is None:
            return [ResultRefused(event.source, ABSENT)]
        if kept.proof is not None:
            return [self._answer(event.slot, kept, tree, event.source, place)]
        if not live:
            return [ResultRefused(event.source, LATER)]
        if self._asking.total() >= ASKING_MAX or self._asking[event.client] >= ASKING_PER_CLIENT_MAX:
            return [ResultRefused(event.source, BUSY)]
        if not kept.asking:
            if not self._may_say(event.slot, event.client, own):
                return [ResultRefused(event.source, BUSY)]
            self.due[event.slot] = SlotResult(event.slot, tree.size, tree.root)
        kept.asking.append((event.client, event.source, place))
        self._asking[event.client] += 1
        return []

    def said(self, entry: SlotResult, index: int, group: VerifiedGroup) -> list[Told]:
        """Take in that the own log holds this RESULT, durable and attested; return what its askers are told."""
        kept = self._slots.get(entry.slot)
        if kept is None or kept.proof is not None:
            return []
        kept.proof = prove(group, index)
        tree = self._tree(entry.slot, kept)
        if tree is None:
            return []
        asking, kept.asking = kept.asking, []
        for client, _, _ in asking:
            self._left(client)
        return [self._answer(entry.slot, kept, tree, source, place) for _, source, place in asking]

    def agrees(self, entry: SlotResult) -> bool:
        """Say whether a RESULT of another log is what was executed here, or cannot be judged here."""
        kept = self._slots.get(entry.slot)
        if kept is None:
            return True
        tree = self._tree(entry.slot, kept)
        return tree is not None and (entry.size, entry.root) == (tree.size, tree.root)

    def check(self) -> None:
        """Raise RuntimeError if an invariant is broken."""
        if self._bytes != sum(kept.size for kept in self._slots.values()):
            raise RuntimeError("invariant 1: what is kept has another size")
        if self._bytes > RESULT_BYTES_MAX or len(self._slots) > RESULT_SLOTS_MAX:
            raise RuntimeError(f"invariant 1: {len(self._slots)} slots and {self._bytes} bytes are kept")
        waiting = Counter(client for kept in self._slots.values() for client, _, _ in kept.asking)
        if waiting != self._asking or waiting.total() > ASKING_MAX:
            raise RuntimeError("invariant 2: others wait than were counted")

    def _may_say(self, slot: int, client: bytes, own: LogState) -> bool:
        limits = self._genesis.limits
        if own.results + len(self.due) >= results_max(self._genesis) or slot > own.last_checkpoint + limits.window:
            return False
        if slot > own.last_checkpoint:
            return True
        if own.last_checkpoint != self._checkpoint:
            self._checkpoint = own.last_checkpoint
            self._older.clear()
        most = limits.window - limits.checkpoint_interval
        if self._older.total() >= most or self._older[client] >= max(1, most // 4):
            return False
        self._older[client] += 1
        return True

    def _answer(self, slot: int, kept: _Kept, tree: MerkleTree, source: Any, place: int) -> Told:  # noqa: ANN401
        right = SlotResult(slot, tree.size, tree.root).encode()
        if kept.proof is None or kept.proof.payload != right:
            # Said before a restart, and executed otherwise since: whichever is wrong, this is no receipt.
            return ResultRefused(source, ABSENT)
        return ResultShown(source, kept.proof, place, tree.size, tuple(tree.path(place)))

    def _tree(self, slot: int, kept: _Kept) -> MerkleTree | None:
        """Return the slot's tree, made when it is first wanted; None if nothing was executed in it."""
        if kept.replies:
            batch = decode_batch(kept.batch, self._genesis.cluster_id(), self._genesis.limits)
            leaves = leaves_of(slot, batch.envelopes, kept.replies, self._limits)
            kept.tree = MerkleTree(leaves) if leaves else None
            kept.batch, kept.replies = b"", ()
        return kept.tree

    def _drop(self, slot: int) -> list[Told]:
        kept = self._slots.pop(slot)
        self._bytes -= kept.size
        self.due.pop(slot, None)
        for client, _, _ in kept.asking:
            self._left(client)
        return [ResultRefused(source, GONE) for _, source, _ in kept.asking]

    def _left(self, client: bytes) -> None:
        self._asking[client] -= 1
        if not self._asking[client]:
            del self._asking[client]


def leaves_of(slot: int, envelopes: Sequence[Envelope], replies: Sequence[bytes], limits: Limits) -> list[bytes]:
    """Return the leaf hashes (32 bytes each) of what `slot` executed, in its order; `replies` are to the `envelopes`.

    A function of what all replicas agree on. The first of several operations under one number is the one that was
    executed: the others were given its result.
    """
    leaves: dict[tuple[bytes, int, int, int], bytes] = {}
    for envelope, raw in zip(envelopes, replies, strict=True):
        content = envelope.content
        reply = decode_reply(raw, limits) if isinstance(content, Operations) else None
        if not isinstance(content, Operations) or not isinstance(reply, OperationsReply):
            continue
        session = content.session.slot, content.session.place
        answered = zip(content.operations, reply.results, strict=True)
        for number, (operation, result) in enumerate(answered, content.first):
            name = (envelope.client, *session, number)
            if result.slot != slot or result.status not in _EXECUTED or name in leaves:
                continue
            said = Outcome(envelope.client, session, number, operation, slot, result.status, result.value)
            leaves[name] = said.leaf
    return list(leaves.values())
