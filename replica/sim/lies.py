"""What faulty replicas say: strategies that change what is appended, or append on their own."""

from typing import TYPE_CHECKING

from replica.core.batch import NULL_BATCH, encode_batch, make_batch
from replica.core.entries import (
    CHECKPOINT,
    COMMIT,
    NEW_VIEW,
    PRE_PREPARE,
    PREPARE,
    SUSPECT,
    VIEW_CHANGE,
    Checkpoint,
    Commit,
    NewView,
    Prepare,
    PrePrepare,
    Reference,
    Suspect,
    ViewChange,
)
from replica.core.quorum import primary
from replica.sim.mutations import MUTATIONS, NAMES, fields_of, mutate
from replica.sim.strategies import Strategy

if TYPE_CHECKING:
    from replica.sim.faulty import FaultyReplica

VOTES = (PREPARE, COMMIT)


def view_and_slot(payload: bytes) -> tuple[int, int]:
    """Return the view and the slot of a proposal or a vote."""
    return int.from_bytes(payload[1:9], "big"), int.from_bytes(payload[9:17], "big")


def references_of(payload: bytes) -> list[Reference]:
    """Return what a NEW-VIEW names."""
    return [
        Reference(int.from_bytes(payload[at : at + 2], "big"), int.from_bytes(payload[at + 2 : at + 10], "big"))
        for at in range(11, len(payload), 10)
    ]


class Rarely(Strategy):
    """Base of strategies that act now and then: often enough to matter, seldom enough to be believed for a while."""

    share = 0.1

    def __init__(self, argument: str = "") -> None:
        if argument:
            self.share = int(argument) / 100

    def now(self) -> bool:
        """Say whether to act."""
        return self.chance.random() < self.share


class LyingVoter(Rarely):
    """Votes for what was not proposed."""

    name = "lying-vote"
    share = 0.2

    def entries(self, payloads: list[bytes]) -> list[bytes]:
        """See `Strategy`."""
        return [self._lie(p) if p[0] in VOTES and self.now() else p for p in payloads]

    def _lie(self, payload: bytes) -> bytes:
        self.did()
        others = [NULL_BATCH.digest, self.chance.randbytes(32)]
        return payload[:17] + self.chance.choice(others)


class NullVoter(LyingVoter):
    """Votes for the null batch, which everybody knows, whatever was proposed."""

    name = "null-vote"

    def _lie(self, payload: bytes) -> bytes:
        self.did()
        return payload[:17] + NULL_BATCH.digest


class Abstain(Rarely):
    """Votes for nothing, so that its VIEW-CHANGE holds nothing; goes along with view changes."""

    name = "abstain"
    share = 0.9

    def entries(self, payloads: list[bytes]) -> list[bytes]:
        """See `Strategy`."""
        kept = [payload for payload in payloads if payload[0] not in {*VOTES, CHECKPOINT}]
        if len(kept) < len(payloads):
            self.did()
        return kept


class EarlyCommit(Rarely):
    """Commits what it has just voted for, whatever the others do."""

    name = "early-commit"
    share = 0.7

    def entries(self, payloads: list[bytes]) -> list[bytes]:
        """See `Strategy`."""
        said: list[bytes] = []
        committed = self.host.puppet.own.last_commit
        due = max(committed or 0, self.host.puppet.own.last_checkpoint) + 1
        for payload in payloads:
            if payload[0] == COMMIT and view_and_slot(payload)[1] < due:
                continue  # said already
            if payload[0] == COMMIT:
                due = view_and_slot(payload)[1] + 1
            said.append(payload)
            if payload[0] == PREPARE and view_and_slot(payload)[1] == due and self.now():
                self.did()
                said.append(bytes([COMMIT]) + payload[1:])
                due += 1
        return said


class PrematureChange(Rarely):
    """Says SUSPECT and VIEW-CHANGE without reason, or for a view far ahead."""

    name = "premature-change"
    share = 0.03

    def on_tick(self) -> None:
        """See `Strategy`."""
        own = self.host.puppet.own
        if not self.now():
            return
        kind = self.chance.randrange(4)
        if kind < 2 and not own.suspected:
            said = self.host.say([Suspect(own.view).encode()])
        elif kind == 2:
            said = self.host.say([ViewChange(own.view + 1).encode()])
        else:
            said = self.host.say([ViewChange(own.view + self.chance.choice((2, 3, 2**40))).encode()])
        if said:
            self.did()


class Impatient(Rarely):
    """Suspects every view soon after it began; one more, and the view is left."""

    name = "impatient"
    share = 0.05

    def on_tick(self) -> None:
        """See `Strategy`."""
        own = self.host.puppet.own
        if not own.suspected and self.now() and self.host.say([Suspect(own.view).encode()]):
            self.did()


class SkipChange(Rarely):
    """Stays in the old view when the others leave it, and goes on voting there."""

    name = "skipped-change"
    share = 0.8

    def entries(self, payloads: list[bytes]) -> list[bytes]:
        """See `Strategy`."""
        said: list[bytes] = []
        for payload in payloads:
            if payload[0] == VIEW_CHANGE and self.now():
                self.did()
                break
            said.append(payload)
        return said


class VoteAfterChange(Rarely):
    """Votes in the view that it has left, at the next index."""

    name = "vote-after-change"
    share = 0.8

    def entries(self, payloads: list[bytes]) -> list[bytes]:
        """See `Strategy`."""
        said: list[bytes] = []
        for payload in payloads:
            said.append(payload)
            if payload[0] == VIEW_CHANGE and self.now():
                said += self._late_votes()
        return said

    def _late_votes(self) -> list[bytes]:
        puppet = self.host.puppet
        own, known = puppet.own, puppet.knowledge
        votes: list[bytes] = []
        for slot in range(known.stable + 1, known.stable + 1 + puppet.genesis.limits.window):
            digest = known.slots.proposed(own.view, slot)
            if digest is None:
                continue
            if own.view not in own.votes.get(slot, ()):
                votes.append(Prepare(own.view, slot, digest).encode())
            if own.view not in own.commits.get(slot, ()):
                votes.append(Commit(own.view, slot, digest).encode())
        if votes:
            self.did()
        return votes


class SecondProposal(Rarely):
    """Proposes two batches for one slot: at once, or the second one when the first was voted for."""

    name = "second-proposal"

    def join(self, host: "FaultyReplica") -> None:
        """See `Strategy`."""
        super().join(host)
        self._later: list[bytes] = []

    def entries(self, payloads: list[bytes]) -> list[bytes]:
        """See `Strategy`."""
        said, self._later = self._later, []
        for payload in payloads:
            said.append(payload)
            if payload[0] == PRE_PREPARE and self.now():
                self.did()
                second = payload[:17] + encode_batch(1, cut_of(payload), ())
                (said if self.chance.random() < 0.5 else self._later).append(second)
        return said


class SkipSlot(Rarely):
    """Leaves out a slot in its proposals or votes."""

    name = "skipped-slot"
    share = 0.05

    def entries(self, payloads: list[bytes]) -> list[bytes]:
        """See `Strategy`."""
        said: list[bytes] = []
        for payload in payloads:
            if payload[0] in {PRE_PREPARE, PREPARE, COMMIT} and self.now():
                self.did()
                if self.chance.random() < 0.5:
                    continue
                _, slot = view_and_slot(payload)
                said.append(payload[:9] + (slot + 1).to_bytes(8, "big") + payload[17:])
            else:
                said.append(payload)
        return said


REFERENCE_KINDS = ("fewest", "own", "stale", "twice", "index", "few", "many")


class ChosenReferences(Strategy):
    """Opens its views with references of its choice: few votes, old entries, duplicates, wrong numbers."""

    name = "chosen-references"

    def __init__(self, argument: str = "") -> None:
        self._kind = argument

    def join(self, host: "FaultyReplica") -> None:
        """See `Strategy`."""
        super().join(host)
        self._kind = self._kind or self.chance.choice(
            ("fewest", "own", "own", "stale", "twice", "index", "few", "many")
        )

    def entries(self, payloads: list[bytes]) -> list[bytes]:
        """See `Strategy`."""
        return [self._choose(p) if p[0] == NEW_VIEW else p for p in payloads]

    def _choose(self, payload: bytes) -> bytes:
        view = int.from_bytes(payload[1:9], "big")
        states = self.host.puppet.knowledge.states
        departed = [(s.view_change_at[view].top, s.author) for s in states if view in s.view_change_at]
        # The own VIEW-CHANGE may stand in this very group; what the puppet named is right in any case.
        right = references_of(payload)
        refs = list(right)
        if self._kind in {"fewest", "own"} and len(departed) >= len(right):
            own = self.host.number if self._kind == "own" else -1
            departed.sort(key=lambda d: (d[1] != own, d))
            chosen = [author for _, author in departed[: len(right)]]
            refs = [Reference(author, states[author].view_change_at[view].index) for author in chosen]
        elif self._kind == "stale":
            older = max((v for v in states[refs[0].replica].view_change_at if v < view), default=None)
            if older is not None:
                refs[0] = Reference(refs[0].replica, states[refs[0].replica].view_change_at[older].index)
        elif self._kind == "twice":
            refs[-1] = refs[0]
        elif self._kind == "index":
            refs[0] = Reference(refs[0].replica, refs[0].index + self.chance.choice((-1, 1, 1000)))
        elif self._kind == "few":
            # The own one only, or whichever holds the fewest votes.
            refs = [min(refs, key=lambda r: (r.replica != self.host.number, states[r.replica].top))]
        elif self._kind == "many":
            refs.append(Reference((refs[-1].replica + 1) % len(states), 1))
        if refs != right:
            self.did()
            self.host.count(f"{self.name}-{self._kind}")
        return NewView(view, tuple(refs)).encode()


class CheckpointLies(Rarely):
    """Says other digests at checkpoints, or checkpoints of slots that it has not executed, or passes one over."""

    name = "checkpoint-lie"
    share = 0.7

    def __init__(self, argument: str = "") -> None:
        self._only_skips = argument == "skip"
        super().__init__("50" if self._only_skips else argument)

    def entries(self, payloads: list[bytes]) -> list[bytes]:
        """See `Strategy`."""
        said = [self._lie(p) if p[0] == CHECKPOINT and self.now() else p for p in payloads]
        return [payload for payload in said if payload]

    def _lie(self, payload: bytes) -> bytes:
        self.did()
        slot = int.from_bytes(payload[1:9], "big")
        interval = self.host.genesis.limits.checkpoint_interval
        kind = self.chance.randrange(4)
        if kind == 3 or self._only_skips:
            return b""
        if kind == 0:
            return Checkpoint(slot + interval * self.chance.choice((1, 2, 1000)), payload[9:]).encode()
        return Checkpoint(slot, b"\x13" * 32 if kind == 1 else self.chance.randbytes(32)).encode()


class Malformed(Rarely):
    """Changes one field of an otherwise right entry; with an argument, only this field, the second time it can."""

    name = "malformed"
    share = 0.06

    def __init__(self, argument: str = "") -> None:
        self._only = MUTATIONS[argument] if argument else None
        self._chances = 0

    def entries(self, payloads: list[bytes]) -> list[bytes]:
        """See `Strategy`."""
        return [self._change(payload) for payload in payloads]

    def _change(self, payload: bytes) -> bytes:
        kind = payload[0]
        if self._only is None:
            # The rarer an entry is, the more readily it is spoiled.
            eager = 5 if kind in {CHECKPOINT, SUSPECT, VIEW_CHANGE, NEW_VIEW} else 1
            if self.chance.random() >= self.share * eager:
                return payload
            field = self.chance.choice(fields_of(kind))
        else:
            if kind != self._only[0]:
                return payload
            self._chances += 1
            if self._chances < 2 and kind not in {SUSPECT, VIEW_CHANGE, NEW_VIEW}:
                return payload
            field = self._only[1]
        self.did()
        self.world.counts[f"malformed-{NAMES[kind]}-{field}"] += 1
        return mutate(payload, field, self.chance)


class Drip(Rarely):
    """Proposes batches that hold nothing, or one request at a time, whatever waits."""

    name = "drip"
    share = 0.5

    def entries(self, payloads: list[bytes]) -> list[bytes]:
        """See `Strategy`."""
        return [self._empty(p) if p[0] == PRE_PREPARE and self.now() else p for p in payloads]

    def _empty(self, payload: bytes) -> bytes:
        self.did()
        return payload[:17] + encode_batch(2**63 if self.now() else 0, cut_of(payload), ())


class OldRequests(Rarely):
    """Orders again what was ordered before, and requests of others in another order."""

    name = "replayed-requests"
    share = 0.4

    def join(self, host: "FaultyReplica") -> None:
        """See `Strategy`."""
        super().join(host)
        self._seen: list[bytes] = []

    def on_request(self, raw: bytes) -> None:
        """See `Strategy`."""
        if len(self._seen) < 200:
            self._seen.append(raw)

    def entries(self, payloads: list[bytes]) -> list[bytes]:
        """See `Strategy`."""
        return [self._again(p) if p[0] == PRE_PREPARE and self._seen and self.now() else p for p in payloads]

    def _again(self, payload: bytes) -> bytes:
        self.did()
        chosen = [self.chance.choice(self._seen) for _ in range(self.chance.randint(1, 3))]
        valid = [raw for raw in chosen if self._is_signed(raw)]
        return payload[:17] + encode_batch(7, cut_of(payload), valid)

    def _is_signed(self, raw: bytes) -> bool:
        setting = self.host.setting
        try:
            return setting.verifier.envelope(setting.decode(raw))
        except ValueError:
            return False


class Rush(Rarely):
    """As primary, proposes a whole window of empty batches at once: votes for slots far ahead everywhere."""

    name = "rush"
    share = 0.05

    def on_tick(self) -> None:
        """See `Strategy`."""
        puppet = self.host.puppet
        own, genesis = puppet.own, puppet.genesis
        opening = own.opened.get(own.view)
        if opening is None or primary(own.view, genesis.n) != self.host.number or not self.now():
            return
        last = opening.top if own.last_vote is None else own.last_vote
        first = max(last, own.last_checkpoint) + 1
        window_end = own.last_checkpoint + genesis.limits.window
        said = []
        for slot in range(first, window_end + 1):
            cut = () if slot % genesis.limits.checkpoint_interval else (0,) * genesis.n
            said.append(PrePrepare(own.view, slot, make_batch(slot, cut, ())).encode())
        if said and self.host.say(said):
            self.did()


def cut_of(payload: bytes) -> list[int]:
    """Return the cut in a PRE-PREPARE."""
    count = int.from_bytes(payload[25:27], "big")
    return [int.from_bytes(payload[27 + 8 * i : 35 + 8 * i], "big") for i in range(count)]
