"""What happened in a scripted run: as facts for a test, and as lines for a reader.

Of the network's business only what tells something is told: what a replica attests in its log, what it executes, what
it asks others for, what a client asks, sends to everybody and is answered. Operations go by short names: A3 is the
third that client A asks for.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from replica.core import events
from replica.core.batch import NULL_BATCH, Batch
from replica.core.entries import NEW_VIEW, PRE_PREPARE, PREPARE, NewView, Prepare, PrePrepare, decode_entry
from replica.core.envelope import Administer, Open, decode_envelope
from replica.core.events import Effect
from replica.core.genesis import Genesis
from replica.core.group import VerifiedGroup
from replica.core.layout import LayoutError
from replica.core.logstate import Opening
from replica.sim.audience import Audience, Vote
from replica.sim.setting import CLIENTS_FROM
from replica.sim.words import effect_in_words, entry_in_words

DIRECTOR = "--"
_VOTES = ("PREPARE", "COMMIT")
# What happens before is the same in every story: sessions are opened, and each client is served once.
PROLOGUE_MS = 100


@dataclass(slots=True)
class Asked:
    """One operation of a client; times in virtual milliseconds. slot: the one that the accepted result names."""

    asked_ms: int
    answered_ms: int | None = None
    slot: int | None = None


@dataclass(slots=True)
class Line:
    """Something that somebody did or said."""

    at_ms: int
    who: str
    what: list[str]


@dataclass(slots=True)
class Facts:
    """What tests ask about.

    asked: operation -> what became of it. errors: what clients gave up.
    entered, opened: per correct replica, view -> time. named: view -> whose VIEW-CHANGEs its NEW-VIEW names.
    proposed: (view, slot) -> operations. carried: view -> slot -> operations proposed again, () for a null batch.
    executed: per correct replica, slot -> (time, operations). fetched: (who asks, whom, for whose log).
    sent_to_all, relayed: what a client sent to all, what backups handed to whom. exposed, liars: (by whom, who).
    """

    asked: dict[str, Asked] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    entered: dict[int, dict[int, int]] = field(default_factory=lambda: defaultdict(dict))
    opened: dict[int, dict[int, int]] = field(default_factory=lambda: defaultdict(dict))
    carried: dict[int, dict[int, tuple[str, ...]]] = field(default_factory=dict)
    executed: dict[int, dict[int, tuple[int, tuple[str, ...]]]] = field(default_factory=lambda: defaultdict(dict))
    proposed: dict[tuple[int, int], tuple[str, ...]] = field(default_factory=dict)
    named: dict[int, tuple[int, ...]] = field(default_factory=dict)
    fetched: set[tuple[int, int, int]] = field(default_factory=set)
    sent_to_all: set[str] = field(default_factory=set)
    relayed: set[tuple[str, int]] = field(default_factory=set)
    exposed: set[tuple[int, int]] = field(default_factory=set)
    liars: set[tuple[int, int]] = field(default_factory=set)


class Chronicle(Audience):
    """Keeps what it hears. `begin` tells it what a run is made of."""

    def __init__(self) -> None:
        self.facts = Facts()
        self.lines: list[Line] = []
        self._faulty: frozenset[int] = frozenset()
        self._clock: Callable[[], int] = lambda: 0
        self._genesis: Genesis | None = None
        self._labels: dict[bytes, str] = {}  # operation -> its short name
        self._openings: dict[bytes, str] = {}  # a client's key -> the short name of its opening
        self._digests: dict[tuple[int, int], bytes] = {}  # (view, slot) -> what was proposed
        self._names: dict[bytes, tuple[str, ...]] = {}  # a batch -> its operations

    def begin(
        self, genesis: Genesis, faulty: frozenset[int], clients: Mapping[bytes, int], clock: Callable[[], int]
    ) -> None:
        """Take in who takes part, and where the time stands."""
        self._genesis, self._faulty, self._clock = genesis, faulty, clock
        self._openings = {key: f"{client_name(number)}'s session" for key, number in clients.items()}

    def name(self, operation: bytes, name: str) -> None:
        """Give an operation its short name."""
        self._labels[operation] = name

    def direct(self, text: str) -> None:
        """Note what the script does to the world."""
        for part in text.split("; "):
            self._tell(DIRECTOR, part)

    # What is heard.

    def said(self, group: VerifiedGroup) -> None:
        """See `Audience`."""
        mark = " (faulty)" if group.author in self._faulty else ""
        words = _shorten([self._in_words(payload) for payload in group.payloads])
        votes = [word for word in words if word.startswith(_VOTES)]
        for told in [*(word for word in words if word not in votes), *(["; ".join(votes)] if votes else [])]:
            self._tell(f"replica {group.author}{mark}", told)

    def effect(self, replica: int, effect: Effect) -> None:
        """See `Audience`; what a faulty replica's core makes of things is nobody's business."""
        if replica in self._faulty:
            return
        facts, now, who = self.facts, self._clock(), f"replica {replica}"
        if isinstance(effect, events.Executed):
            names = self._batch(effect.batch)
            facts.executed[replica][effect.slot] = (now, names)
            self._tell(who, f"executes s{effect.slot} ({_list(names)})")
        elif isinstance(effect, events.ViewEntered):
            facts.entered[replica][effect.view] = now
        elif isinstance(effect, events.Relay):
            self._tell_relay(replica, effect)
        elif isinstance(effect, events.Fetch):
            facts.fetched.add((replica, effect.ask, effect.log))
            if effect.ask != effect.log:
                self._tell(who, f"asks replica {effect.ask} for log {effect.log} from entry {effect.first} on")
        elif isinstance(effect, events.Exposed | events.Lied | events.Halt):
            if isinstance(effect, events.Exposed):
                facts.exposed.add((replica, effect.log))
            if isinstance(effect, events.Lied):
                facts.liars.add((replica, effect.log))
            self._tell(who, effect_in_words(effect))

    def opened(
        self,
        replica: int,
        view: int,
        opening: Opening,
        carried: Mapping[int, Batch],
        votes: Mapping[int, Sequence[Vote]],
    ) -> None:
        """See `Audience`."""
        again = {slot: self._batch(batch) for slot, batch in carried.items()}
        for slot, batch in carried.items():
            self._digests[view, slot] = batch.digest
            self._names.setdefault(batch.digest, again[slot])
        if replica in self._faulty:
            return
        self.facts.opened[replica][view] = self._clock()
        who = f"replica {replica}"
        # All compute the same; only another result would be worth telling again.
        known = self.facts.carried.setdefault(view, again) == again and len(self._openers(view)) > 1
        self._tell(
            who, f"reads that v{view} is open" + ("" if known else f": base s{opening.base}, top s{opening.top}")
        )
        if not known:
            for told in self._carried(view, carried, votes) or [f"v{view} carries nothing"]:
                self._tell(who, told)

    def _carried(self, view: int, carried: Mapping[int, Batch], votes: Mapping[int, Sequence[Vote]]) -> list[str]:
        """Return what is carried, slots without a rival together."""
        told: list[str] = []
        alike: dict[int, list[str]] = {}  # the view it was voted for in -> slots
        for slot, batch in carried.items():
            named = sorted(vote for vote in votes[slot] if vote.author in self.facts.named.get(view, ()))
            winners = [v for v in named if v.digest == batch.digest and self._counts(v, slot)]
            won_in = max((vote.view for vote in winners), default=None)
            others = [vote for vote in named if vote.digest != batch.digest]
            words = f"s{slot} ({_list(self._batch(batch))})"
            if won_in is not None and not others:
                alike.setdefault(won_in, []).append(words)
                continue
            mine = (
                "for which no vote counts"
                if won_in is None
                else f"voted for in v{won_in} by {_authors(winners, won_in)}"
            )
            told.append(f"v{view} carries {words}, {mine}" + "".join(f"; not {self._rival(v, slot)}" for v in others))
        return [*(f"v{view} carries {', '.join(slots)}, voted for in v{at}" for at, slots in alike.items()), *told]

    def _counts(self, vote: Vote, slot: int) -> bool:
        return self._digests.get((vote.view, slot)) == vote.digest

    def _rival(self, vote: Vote, slot: int) -> str:
        if not self._counts(vote, slot):
            return f"what replica {vote.author} voted for in v{vote.view}, which nobody proposed"
        return f"({_list(self._names[vote.digest])}), voted for in v{vote.view} by replica {vote.author}"

    def asked(self, client: int, operation: bytes) -> None:
        """See `Audience`."""
        label = self._label(operation)
        self.facts.asked[label] = Asked(self._clock())
        self._tell(f"client {client_name(client)}", f"asks for {label}")

    def sent(self, client: int, replicas: Sequence[int], envelope: bytes) -> None:
        """See `Audience`."""
        names = self._envelope(envelope)
        # It does so again and again; a reader wants to know the first time.
        if len(replicas) > 1 and names not in self.facts.sent_to_all:
            self.facts.sent_to_all.add(names)
            self._tell(f"client {client_name(client)}", f"sends {names} to all replicas")

    def answered(self, client: int, operation: bytes, slot: int) -> None:
        """See `Audience`."""
        found = self.facts.asked[self._label(operation)]
        found.answered_ms, found.slot = self._clock(), slot
        self._tell(f"client {client_name(client)}", f"is answered: {self._label(operation)} was executed in s{slot}")

    def failed(self, client: int, operation: bytes, reason: str) -> None:
        """See `Audience`."""
        self.facts.errors.append(f"{self._label(operation)}: {reason}")
        self._tell(f"client {client_name(client)}", f"gives {self._label(operation)} up: {reason}")

    # What is told.

    def text(self) -> list[str]:
        """Return the lines, one for each thing; time and name stand before the first of those that belong together."""
        lines = [line for line in self.lines if line.at_ms >= PROLOGUE_MS or line.who == DIRECTOR]
        begin = sum(line.at_ms < PROLOGUE_MS for line in lines)
        lines.insert(begin, Line(PROLOGUE_MS, DIRECTOR, [self._prologue()]))
        width = max(len(line.who) for line in lines)
        return [
            f"{line.at_ms:5}  {line.who:{width}}  {what}" if place == 0 else f"{'':5}  {'':{width}}  {what}"
            for line in lines
            for place, what in enumerate(line.what)
        ]

    def _prologue(self) -> str:
        done = dict[int, tuple[str, ...]]()
        for executed in self.facts.executed.values():
            done |= {slot: names for slot, (at_ms, names) in executed.items() if at_ms < PROLOGUE_MS}
        told = ", ".join(f"s{slot} ({_list(done[slot])})" for slot in sorted(done))
        return f"before: {told} are executed in v0"

    def _openers(self, view: int) -> list[int]:
        return [replica for replica, views in self.facts.opened.items() if view in views]

    def _tell(self, who: str, what: str) -> None:
        now = self._clock()
        last = self.lines[-1] if self.lines else None
        if last is not None and (last.at_ms, last.who) == (now, who):
            last.what.append(what)
        else:
            self.lines.append(Line(now, who, [what]))

    def _tell_relay(self, replica: int, effect: events.Relay) -> None:
        names = self._envelope(effect.envelope.raw)
        # All backups do so again and again; the first time is told.
        if (names, effect.to) not in self.facts.relayed:
            self.facts.relayed.add((names, effect.to))
            self._tell(f"replica {replica}", f"hands {names} to replica {effect.to}")

    def _in_words(self, payload: bytes) -> str:
        words = entry_in_words(payload)
        if self._genesis is None or payload[0] not in {PRE_PREPARE, PREPARE, NEW_VIEW}:
            return words
        try:
            entry = decode_entry(payload, self._genesis, self._genesis.cluster_id())
        except LayoutError:
            return words
        if isinstance(entry, PrePrepare):
            place = (entry.view, entry.slot)
            self._digests[place] = entry.batch.digest
            self.facts.proposed[place] = self._names[entry.batch.digest] = self._batch(entry.batch)
            return f"{words} ({_list(self.facts.proposed[place])})"
        if isinstance(entry, NewView):
            self.facts.named[entry.view] = tuple(reference.replica for reference in entry.references)
        if isinstance(entry, Prepare) and self._digests.get((entry.view, entry.slot), entry.digest) != entry.digest:
            return f"{words} (a lie: this was not proposed)"
        return words

    def _label(self, operation: bytes) -> str:
        return self._labels.get(operation) or repr(operation)

    def _batch(self, batch: Batch) -> tuple[str, ...]:
        if batch.digest == NULL_BATCH.digest:
            return ()
        return tuple(self._envelope(envelope.raw) for envelope in batch.envelopes)

    def _envelope(self, raw: bytes) -> str:
        if self._genesis is None:
            return ""
        envelope = decode_envelope(raw, self._genesis.cluster_id(), self._genesis.limits)
        if isinstance(envelope.content, Open):
            return self._openings.get(envelope.client, "a session")
        if isinstance(envelope.content, Administer):
            return "a list of members"
        return " ".join(self._label(operation) for operation in envelope.content.operations)


def client_name(number: int) -> str:
    """Return "A" for the first client, and so on."""
    return chr(ord("A") + number - CLIENTS_FROM)


def _shorten(words: list[str]) -> list[str]:
    """Return "PREPARE v1 s1 to s6", "COMMIT v1 s1 to s6" for a group's votes, which are said in turn, if it is long."""
    votes = [word.split(" s") for word in words if word.startswith(_VOTES)]
    slots: dict[str, list[int]] = {}
    for kind, slot in votes:
        slots.setdefault(kind, []).append(int(slot) if slot.isdigit() else -1)
    if len(votes) < 3 or any(found != list(range(found[0], found[0] + len(found))) for found in slots.values()):
        return words
    short = [f"{kind} s{found[0]}" + (f" to s{found[-1]}" if found[1:] else "") for kind, found in slots.items()]
    return [*(word for word in words if not word.startswith(_VOTES)), *short]


def _authors(votes: Sequence[Vote], view: int) -> str:
    return ", ".join(str(vote.author) for vote in votes if vote.view == view)


def _list(names: Sequence[str]) -> str:
    return " ".join(names) if names else "null"
