"""Writes the trace of a run in the simulator: it hears what the audience of a story hears, and sees the network.

Nothing here changes a run. Heads, subscriptions, reports and groups that their receiver has already are left out: they
come every 400 ms and tell a reader nothing.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from replica.core import events
from replica.core.batch import Batch
from replica.core.entries import (
    Checkpoint,
    Commit,
    Entry,
    NewView,
    Prepare,
    PrePrepare,
    Suspect,
    ViewChange,
    decode_entry,
)
from replica.core.events import Effect
from replica.core.genesis import Ordering
from replica.core.group import VerifiedGroup, decode_group
from replica.core.layout import LayoutError
from replica.core.logstate import Opening
from replica.lab.trace import Line, Trace, disagreement
from replica.sim.audience import Vote
from replica.sim.chronicle import Chronicle, client_name
from replica.sim.host import Host
from replica.sim.messages import AskCheckpoint, AskPart, FetchMessage, GroupMessage, Offer, Part, Reply, Request
from replica.sim.setting import CLIENTS_FROM, Setting
from replica.sim.watched import WatchedCore
from replica.sim.words import effect_in_words, entry_in_words
from replica.sim.world import Network

_STATE = (AskCheckpoint, Offer, AskPart, Part)
_NAMES = {PrePrepare: "PRE-PREPARE", Prepare: "PREPARE", Commit: "COMMIT", Checkpoint: "CHECKPOINT"}
_NAMES |= {Suspect: "SUSPECT", ViewChange: "VIEW-CHANGE", NewView: "NEW-VIEW"}

# Violations that say nothing new once agreement is broken.
FOLLOWS = frozenset({"state", "exactly-once", "durability", "linearizability"})


def node_name(number: int) -> str:
    """Return a node's name in traces."""
    return client_name(number) if number >= CLIENTS_FROM else f"r{number}"


class Recorder(Chronicle):
    """Keeps a story's facts as its chronicle does, and writes the trace beside them.

    attested: whether the logs of this system attest messages at all. insists: whether a reader insists on their order.
    """

    def __init__(self, trace: Trace, *, attested: bool = True, insists: bool = True) -> None:
        super().__init__()
        self.trace = trace
        self.attested, self.insists = attested, insists
        self._hosts: Mapping[int, Host] = {}
        self._setting: Setting | None = None
        self._said: set[tuple[int, bytes]] = set()
        self._tallies: dict[tuple[int, int, int, str], int] = {}
        self._entries: dict[bytes, Entry | None] = {}
        self._shown: set[tuple[int, bytes]] = set()  # to whom which group came
        self._gaps: set[tuple[int, int, int]] = set()  # who could not read which log beyond which index

    def watch(self, setting: Setting, hosts: Mapping[int, Host]) -> None:
        """Take in whom to look at, and see the network from now on."""
        self._setting, self._hosts = setting, hosts
        old = setting.network
        setting.network = WatchedNetwork(self, old.world, old.weather, old.nodes, old.blocked, old.stalled)
        witness = setting.witness
        noted = witness.violation

        def violation(kind: str, text: str) -> None:
            noted(kind, text)
            told = disagreement(self.trace) or text if kind == "agreement" else text
            is_known = any(line["kind"] == "agreement" for line in self.trace.of("violation"))
            # After two outcomes of one slot, the model that states and answers are compared with is one side's.
            if not is_known or kind not in FOLLOWS:
                self.add("violation", kind=kind, text=f"{kind}: {told}")

        witness.violation = violation  # type: ignore[method-assign]

    def add(self, kind: str, /, **fields: Any) -> Line:  # noqa: ANN401 - see Trace
        """Add a line with the present time."""
        return self.trace.add(kind, self._clock(), **fields)

    def note(self, who: int | None, text: str, about: str) -> None:
        """Add a note."""
        self.add("note", who=None if who is None else node_name(who), text=text, about=about)

    # What the audience hears.

    def direct(self, text: str) -> None:
        """See `Chronicle`."""
        super().direct(text)
        self.note(None, text, "script")

    def said(self, group: VerifiedGroup) -> None:
        """See `Audience`."""
        super().said(group)
        self.appended(group)
        self.look(group.author)

    def appended(self, group: VerifiedGroup, *, copy: int = 0, chain: str = "log") -> None:
        """Add what a log attested, once."""
        if (copy, group.raw) in self._said:
            return
        self._said.add((copy, group.raw))
        proof = decode_group(group.raw, self._known_setting.genesis.limits).attestation
        entries = [self.entry(payload, index) for index, payload in enumerate(group.payloads, group.first)]
        self.add(
            "append",
            who=node_name(group.author),
            attested=self.attested or chain == "outcome",
            copy=copy,
            chain=chain,
            first=group.first,
            last=group.last,
            head_before=group.head_before.hex(),
            head=group.head_after.hex(),
            statement=proof.statement.hex(),
            signature=proof.signature.hex(),
            verifies=self._known_setting.verifier.group(group.author, group.raw) is not None,
            entries=entries,
        )

    def entry(self, payload: bytes, index: int) -> Line:
        """Return an entry for the trace."""
        found: Line = {"index": index, "kind": "?", "view": None, "slot": None, "digest": None, "ops": []}
        entry = self._decode(payload)
        if entry is not None:
            found["kind"] = _NAMES.get(type(entry), "EPOCH")
            found["view"], found["slot"] = getattr(entry, "view", None), getattr(entry, "slot", None)
            if isinstance(entry, PrePrepare):
                names = self._names.setdefault(entry.batch.digest, self._batch(entry.batch))
                found["digest"], found["ops"] = entry.batch.digest.hex(), list(names)
            elif isinstance(entry, Prepare | Commit | Checkpoint):
                found["digest"] = entry.digest.hex()
            if isinstance(entry, Prepare | Commit):
                found["ops"] = list(self._names.get(entry.digest, ()))
        ops = f" ({' '.join(found['ops'])})" if found["ops"] else ""
        found["text"] = entry_in_words(payload) + ops
        return found

    def effect(self, replica: int, effect: Effect) -> None:
        """See `Audience`."""
        super().effect(replica, effect)
        if isinstance(effect, events.Executed):
            self.add(
                "execute",
                who=node_name(replica),
                slot=effect.slot,
                digest=effect.batch.digest.hex(),
                ops=list(self._batch(effect.batch)),
            )
            self.look(replica)
        elif isinstance(effect, events.ViewEntered):
            self.add(
                "view", who=node_name(replica), view=effect.view, what="entered", text=f"leaves for v{effect.view}"
            )
        elif isinstance(effect, events.Fetch):
            whose = f"its own log, {effect.log}," if effect.log == replica else f"log {effect.log}"
            text = f"asks replica {effect.ask} for {whose} from entry {effect.first} on"
            self.note(replica, text, "fetch")
        elif replica not in self._faulty:
            self._judgement(replica, effect)

    def _judgement(self, replica: int, effect: Effect) -> None:
        about = {events.Exposed: "exposed", events.Lied: "lied", events.Forked: "forked", events.Halt: "halt"}
        if type(effect) in about:
            self.note(replica, effect_in_words(effect), about[type(effect)])
        elif isinstance(effect, events.Install):
            self.note(replica, f"installs the state after s{effect.fetched.header.slot}", "state")

    def opened(
        self,
        replica: int,
        view: int,
        opening: Opening,
        carried: Mapping[int, Batch],
        votes: Mapping[int, Sequence[Vote]],
    ) -> None:
        """See `Audience`."""
        super().opened(replica, view, opening, carried, votes)
        again = ", ".join(f"s{slot} ({' '.join(self._batch(batch)) or 'null'})" for slot, batch in carried.items())
        text = f"reads that v{view} is open: it carries {again or 'nothing'}"
        self.add("view", who=node_name(replica), view=view, what="opened", text=text)

    def asked(self, client: int, operation: bytes) -> None:
        """See `Audience`."""
        super().asked(client, operation)
        self.add("ask", who=node_name(client), op=self._label(operation))

    def answered(self, client: int, operation: bytes, slot: int) -> None:
        """See `Audience`."""
        super().answered(client, operation, slot)
        self.add("answer", who=node_name(client), op=self._label(operation), slot=slot)

    # What the network carries.

    def carried(self, source: int, destination: int, message: object, sent_ms: int) -> Callable[[], None]:
        """Take in a message that is about to be delivered; return what to call when it was."""
        told = self._message(destination, message)
        is_again = isinstance(message, GroupMessage) and (destination, message.raw) in self._shown
        if told is None or is_again:
            return lambda: self._look_if_replica(destination)
        if isinstance(message, GroupMessage):
            self._shown.add((destination, message.raw))
        line = self.add(
            "message", **{"from": node_name(source), "to": node_name(destination)}, sent=sent_ms, became="read", **told
        )
        host = self._hosts.get(destination)
        core = None if host is None else host.core

        def delivered() -> None:
            if isinstance(message, GroupMessage) and core is not None:
                line["became"] = "read" if destination in self._faulty else self._became(core, message)
                if line["became"] == "early":
                    self._note_gap(destination, message.log, core.received(message.log), line["first"])
            self._look_if_replica(destination)

        return delivered

    def _look_if_replica(self, number: int) -> None:
        if number in self._hosts:
            self.look(number)

    def _note_gap(self, reader: int, log: int, have: int, first: int) -> None:
        is_mute = reader in self._faulty or self._hosts[reader].core.halted is not None
        if not is_mute and (reader, log, have) not in self._gaps:
            self._gaps.add((reader, log, have))
            then = "and reads nothing beyond the gap" if self.insists else "and will soon read on beyond the gap"
            text = f"is shown log {log} from entry {first} on, has it up to {have}, {then}"
            self.note(reader, text, "early")

    def lost(self, source: int, destination: int, message: object, sent_ms: int) -> None:
        """Take in a message that the network loses."""
        told = self._message(destination, message)
        if told is not None:
            ends = {"from": node_name(source), "to": node_name(destination)}
            self.add("message", **ends, sent=sent_ms, became="lost", **told)

    def _message(self, destination: int, message: object) -> Line | None:
        if isinstance(message, GroupMessage):
            group = self._known_setting.verifier.group(message.log, message.raw)
            if group is None:
                return {"kind": "group", "label": f"{len(message.raw)} bytes that do not verify", "log": message.log}
            core = self._hosts[destination].core
            if core.received(message.log) >= group.last and core.read(message.log) >= group.last:
                known = core.head_at(message.log, group.last)
                if known in {None, group.head_after}:
                    return None
            label = "; ".join(self.entry(payload, 0)["text"] for payload in group.payloads)
            place = {"log": message.log, "first": group.first, "last": group.last, "head": group.head_after.hex()}
            return {"kind": "group", "label": label, **place}
        if isinstance(message, Request):
            names = self._envelope(message.raw)
            return {"kind": "request", "label": f"request {names}"}
        if isinstance(message, Reply):
            return {"kind": "reply", "label": "reply"}
        if isinstance(message, FetchMessage):
            return {"kind": "fetch", "label": f"asks for log {message.log} from {message.first} on"}
        if isinstance(message, _STATE):
            return {"kind": "state", "label": "state"}
        return None

    def _became(self, core: WatchedCore, message: GroupMessage) -> str:
        group = self._known_setting.verifier.group(message.log, message.raw)
        if group is None:
            return "refused"
        if message.log in core.exposed:
            return "forked" if core.exposed[message.log].rule == "forked" else "ignored"
        if core.head_at(message.log, group.last) not in {None, group.head_after}:
            return "ignored"
        if core.received(message.log) < group.last:
            return "early"
        return "waits" if core.read(message.log) < group.last else "read"

    def operations(self, digest: bytes) -> tuple[str, ...]:
        """Return the operations of a batch by their short names, () if it was not seen."""
        return self._names.get(digest, ())

    def look(self, number: int) -> None:
        """Add what a replica's counts have become."""
        core = self._hosts[number].core
        for slot, found in list(core.tallies()):
            for view, digest, voters, committers in found:
                self._meter(number, view, slot, "vote", digest, voters)
                if self._known_setting.genesis.ordering is Ordering.THREE_PHASE:
                    self._meter(number, view, slot, "commit", digest, committers)

    def _meter(self, number: int, view: int, slot: int, phase: str, digest: bytes, mask: int) -> None:
        key = (number, view, slot, phase)
        if self._tallies.get(key, 0) == mask:
            return
        self._tallies[key] = mask
        voters = [node_name(i) for i in range(self._known_setting.genesis.n) if mask >> i & 1]
        names = list(self._names.get(digest, ()))
        need = self._known_setting.genesis.quorum
        place = {"view": view, "slot": slot, "phase": phase}
        self.add("meter", who=node_name(number), **place, digest=digest.hex(), ops=names, voters=voters, need=need)

    @property
    def _known_setting(self) -> Setting:
        if self._setting is None:
            raise RuntimeError("the recorder watches nothing yet")
        return self._setting

    def _decode(self, payload: bytes) -> Entry | None:
        if payload not in self._entries:
            genesis = self._known_setting.genesis
            try:
                self._entries[payload] = decode_entry(payload, genesis, genesis.cluster_id())
            except LayoutError:
                self._entries[payload] = None
        return self._entries[payload]


class WatchedNetwork(Network):
    """The simulator's network; the recorder sees when what was sent arrives."""

    def __init__(self, recorder: Recorder, *parts: Any) -> None:  # noqa: ANN401 - of a Network
        super().__init__(*parts)
        self.recorder = recorder
        self._sent: dict[tuple[int, int, int], deque[tuple[int, object]]] = defaultdict(deque)

    def send(self, source: int, destination: int, message: object, label: str, hold: int = 0) -> None:
        """See `Network`."""
        self._sent[source, destination, id(message)].append((self.world.now, message))
        super().send(source, destination, message, label, hold)

    def _deliver(self, source: int, destination: int, message: object, label: str) -> None:
        waiting = self._sent[source, destination, id(message)]
        sent_ms = waiting.popleft()[0] if waiting else self.world.now
        if (source, destination) in self.blocked:
            self.recorder.lost(source, destination, message, sent_ms)
            super()._deliver(source, destination, message, label)
            return
        done = self.recorder.carried(source, destination, message, sent_ms)
        super()._deliver(source, destination, message, label)
        done()
