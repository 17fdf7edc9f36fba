"""What faulty replicas answer those who were away: false offers, parts and claims about logs."""

from dataclasses import replace
from typing import TYPE_CHECKING

from replica.core.checkpoint import decode_header, encode_certificate
from replica.core.entries import CHECKPOINT, Checkpoint
from replica.core.heads import decode_heads, encode_heads
from replica.core.layout import LayoutError, Reader
from replica.core.logstate import LogState
from replica.core.proof import PROOF_BYTES_MAX, prove
from replica.core.snapshot import PartWanted, Source
from replica.core.state import BucketedMap
from replica.sim.library import Kept
from replica.sim.messages import AskPart, Held, Offer, Part, Subscribe
from replica.sim.strategies import Strategy

if TYPE_CHECKING:
    from replica.sim.faulty import FaultyReplica

PART_KINDS = ("flipped", "short", "empty", "swapped", "old", "never", "gone")
OFFER_KINDS = ("old", "few", "twice", "foreign", "header", "slot", "borrowed")
HELD_KINDS = ("nothing", "forgotten", "more")
HEAD_KINDS = ("other", "inside", "beyond", "short")
FAR = 1_000_000


class Chosen(Strategy):
    """Base of strategies that do one of several things: always the given one, or now this, now that."""

    kinds: tuple[str, ...]

    def __init__(self, argument: str = "") -> None:
        self._only = argument

    def kind(self) -> str:
        """Return what to do now."""
        return self._only or self.chance.choice(self.kinds)

    def did_this(self, kind: str) -> None:
        """Count it."""
        self.did()
        self.host.count(f"{self.name}-{kind}")


class FalseParts(Chosen):
    """Hands out parts of the state that are altered, cut, empty, another part, or of an older state; or none at all.

    stripped, which is never drawn: a log's state without the votes in flight; hardly ever there are any.
    """

    name = "false-part"
    kinds = PART_KINDS

    def join(self, host: "FaultyReplica") -> None:
        """See `Strategy`."""
        super().join(host)
        self._old: Kept | None = None
        self._asked: dict[tuple[int, PartWanted], bytes] = {}

    def on_tick(self) -> None:
        """See `Strategy`."""
        self._old = self._old or self.host.kept

    def takes(self, source: int, message: object) -> bool:  # noqa: ARG002
        """See `Strategy`."""
        # It answers at once whatever it is asked, so that it is asked more.
        if isinstance(message, AskPart) and self.host.kept is not None and message.slot not in self.host.leases:
            self.host.leases[message.slot] = (self.host.kept, self.world.now + 1000)
        return True

    def instead(self, to: int, message: object) -> object:  # noqa: ARG002
        """See `Strategy`."""
        if not isinstance(message, Part):
            return message
        kind = self.kind()
        data = message.data or b""
        if kind == "never":
            self.did_this(kind)
            return None
        false = self._false(kind, message, data)
        self._asked[message.slot, message.want] = data
        if false == message.data:
            return message
        self.did_this(kind)
        return replace(message, data=false)

    def _false(self, kind: str, message: Part, data: bytes) -> bytes | None:
        if kind == "gone":
            return None
        if kind == "empty" or not data:
            return b""
        if kind == "short":
            return data[: self.chance.randrange(len(data))]
        if kind == "swapped":
            others = [part for (_, want), part in self._asked.items() if want != message.want]
            return self.chance.choice(others) if others else data
        if kind == "stripped":
            return _stripped(data) if message.want.source is Source.LOGS else data
        if kind == "old":
            return self._old_part(message.want, data)
        at = self.chance.randrange(len(data))
        return data[:at] + bytes([data[at] ^ 1 << self.chance.randrange(8)]) + data[at + 1 :]

    def _old_part(self, want: PartWanted, data: bytes) -> bytes:
        try:
            return data if self._old is None else self._old.part(want)
        except (IndexError, LayoutError):
            return data


class FalseOffers(Chosen):
    """Offers old milestones, and such as no quorum attested."""

    name = "false-offer"
    kinds = OFFER_KINDS

    def join(self, host: "FaultyReplica") -> None:
        """See `Strategy`."""
        super().join(host)
        self._old: Kept | None = None

    def on_tick(self) -> None:
        """See `Strategy`."""
        self._old = self._old or self.host.kept

    def instead(self, to: int, message: object) -> object:  # noqa: ARG002
        """See `Strategy`."""
        if not isinstance(message, Offer):
            return message
        kind = self.kind()
        false = self._false(kind, message)
        if false != message:
            self.did_this(kind)
        return false

    def _false(self, kind: str, offer: Offer) -> Offer:
        kept = self.host.kept
        old, genesis = self._old, self.host.genesis if kept is None else kept.genesis
        if kind in {"old", "borrowed"}:
            if old is None:
                return offer
            if kind == "old":
                self.host.leases[old.slot] = (old, self.world.now + 60_000)
                return Offer(old.header, old.certificate)
            return Offer(offer.header, old.certificate)
        if kind in {"header", "slot"}:
            header = decode_header(offer.header, genesis.n)
            if kind == "header":
                return replace(offer, header=replace(header, application=self.chance.randbytes(32)).encode())
            later = header.slot + self.chance.choice((1, 100)) * genesis.limits.checkpoint_interval
            return replace(offer, header=replace(header, slot=later).encode())
        proofs = _proofs(offer.certificate)
        (first, proof), others = proofs[0], proofs[1:]
        if kind == "few":
            return replace(offer, certificate=_certificate(others[: genesis.quorum - 1]))
        if kind == "twice":
            return replace(offer, certificate=_certificate([(first, proof)] * genesis.quorum))
        borrower = next((log for log in range(genesis.n) if log not in dict(proofs)), first + 1)
        return replace(offer, certificate=_certificate(sorted([(borrower, proof), *others])))


class ForgedState(Strategy):
    """Attests a checkpoint of a state of its own making, and offers that with its own word as the certificate."""

    name = "forged-state"

    def join(self, host: "FaultyReplica") -> None:
        """See `Strategy`."""
        super().join(host)
        self._forged: list[tuple[bytes, Kept]] = []  # the CHECKPOINT, what it is of

    def entries(self, payloads: list[bytes]) -> list[bytes]:
        """See `Strategy`."""
        return [self._forge(payload) if payload[0] == CHECKPOINT else payload for payload in payloads]

    def _forge(self, payload: bytes) -> bytes:
        executor = self.host.puppet.executor
        milestone = self.host.puppet.milestone(int.from_bytes(payload[1:9], "big"))
        if milestone is None:
            return payload
        header, logs, batches = milestone
        application = {**dict(executor.state.scan()), b"forged": self.chance.randbytes(8)}
        table = dict(executor.table.records.scan())
        roots = [BucketedMap(sorted(content.items())).root() for content in (application, table)]
        forged = replace(header, application=roots[0], table=roots[1])
        said = Checkpoint(forged.slot, forged.digest).encode()
        self._forged.append(
            (said, Kept(forged.slot, forged.encode(), b"", logs, batches, application, table, self.host.genesis))
        )
        return said

    def instead(self, to: int, message: object) -> object:  # noqa: ARG002
        """See `Strategy`."""
        if not isinstance(message, Offer) or not self._forged:
            return message
        said, kept = self._forged[-1]
        for group in self.host.library.held[self.host.number]:
            if said in group.payloads:
                proof = prove(group, group.first + group.payloads.index(said))
                self.host.leases[kept.slot] = (kept, self.world.now + 60_000)
                self.did()
                return Offer(kept.header, encode_certificate({self.host.number: proof}))
        return message


class FalseHeld(Chosen):
    """Says of a log that it holds nothing, that it forgot all of it, or more of somebody's own log than there is."""

    name = "false-held"
    kinds = HELD_KINDS

    def instead(self, to: int, message: object) -> object:
        """See `Strategy`."""
        if not isinstance(message, Held):
            return message
        kind = self.kind()
        if kind == "more" and message.log != to:
            return message
        self.did_this(kind)
        if kind == "nothing":
            return replace(message, first=1, last=0)
        if kind == "forgotten":
            return replace(message, first=message.last + FAR, last=message.last + 2 * FAR)
        return replace(message, last=message.last + self.chance.choice((1, FAR)))


class FalseHeads(Chosen):
    """Says other heads of the logs than it holds, also of the reader's own: a hint costs a question, never trust."""

    name = "false-heads"
    kinds = HEAD_KINDS

    def instead(self, to: int, message: object) -> object:  # noqa: ARG002
        """See `Strategy`."""
        if not isinstance(message, Subscribe) or not message.heads:
            return message
        kind = self.kind()
        self.did_this(kind)
        if kind == "short":
            return replace(message, heads=message.heads[: self.chance.randrange(1, len(message.heads))])
        move = {"other": 0, "inside": -1, "beyond": 1}[kind]
        heads = decode_heads(message.heads, self.host.genesis.n)
        false = tuple((max(0, index + move), self.chance.randbytes(32)) for index, _ in heads)
        return replace(message, heads=encode_heads(false))


def _stripped(data: bytes) -> bytes:
    """Return a log's reduced state without what the log says of slots to come."""
    state = LogState.decode(data)
    state.votes.clear()
    state.commits.clear()
    return state.encode()


def _proofs(certificate: bytes) -> list[tuple[int, bytes]]:
    reader = Reader(certificate)
    return [(reader.u16(), reader.block(PROOF_BYTES_MAX)) for _ in range(reader.u16())]


def _certificate(proofs: list[tuple[int, bytes]]) -> bytes:
    parts = [len(proofs).to_bytes(2, "big")]
    parts += [log.to_bytes(2, "big") + len(raw).to_bytes(4, "big") + raw for log, raw in proofs]
    return b"".join(parts)
