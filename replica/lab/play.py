"""Break it: a visitor plays the faulty replica, move by move, and the page says what came of it, and why.

A play is its moves: it is run from the beginning each time, so that it can be stepped back, shared and tested. Clients
A and B are served once, then ask for A2 and B2; from PLAY_MS on the faulty replica appends only what the moves say, and
shows it only to whom they say. Who plays replica 0 is the primary, and both clients ask it. Who plays replica 1 is the
next primary, and the network helps: replica 2 hears nothing of the primary, which is cut off for a while.
"""

from typing import Final

from replica.core.batch import NULL_BATCH, Batch, make_batch
from replica.core.entries import (
    Checkpoint,
    Commit,
    NewView,
    Prepare,
    PrePrepare,
    Reference,
    Suspect,
    ViewChange,
)
from replica.core.envelope import Envelope, Operations
from replica.core.events import Appended
from replica.core.group import VerifiedGroup
from replica.core.layout import LayoutError
from replica.lab import scripts
from replica.lab.moves import Move, parse_moves
from replica.lab.recorder import Recorder
from replica.lab.scenario import LONG_INTERVALS, SAFETY, verdict
from replica.lab.stage import LabStage, LabStory
from replica.lab.systems import System
from replica.lab.trace import Line, Trace
from replica.sim.control import patched
from replica.sim.logs import StandInLog
from replica.sim.messages import GroupMessage
from replica.sim.strategies import Strategy

PLAY_MS: Final = 190
FIRST_MOVE_MS: Final = 240
# Who plays the next primary has so long before the first one is back.
BACK_MS: Final = 2500
MOVE_MS: Final = 40
# Others have patience with a visitor for so long.
PATIENCE_MS: Final = 1000
LONGEST_MS: Final = 9000
CLIENTS: Final = {"A": 0, "B": 1}
REASONS_MAX: Final = 5
PLAYERS: Final = (0, 1)
NOT_DONE: Final = "that did not happen: "


class Played(Strategy):
    """Says nothing but what the visitor says, to nobody but whom the visitor names."""

    name = "played"

    def __init__(self) -> None:
        super().__init__()
        self._requests: dict[bytes, Envelope] = {}
        self._shown: dict[int, set[bytes]] = {}
        self._twin: StandInLog | None = None
        self._behaves = False
        self._wants_a_copy = False
        self._old = 0  # up to where the log was said before the play began

    @property
    def _is_playing(self) -> bool:
        return self.world.now >= PLAY_MS and not self._behaves

    def entries(self, payloads: list[bytes]) -> list[bytes]:
        """See `Strategy`."""
        return [] if self._is_playing else payloads

    def on_request(self, raw: bytes) -> None:
        """See `Strategy`."""
        try:
            envelope = self.host.setting.decode(raw)
        except LayoutError:
            return
        if isinstance(envelope.content, Operations):
            self._requests[envelope.client] = envelope

    def holds(self, to: int, message: object) -> int | None:
        """See `Strategy`."""
        if not self._is_playing or not isinstance(message, GroupMessage):
            return 0
        if message.log != self.host.number:
            return None  # it hands out nobody else's log
        # What was said before the play began is everybody's.
        group = self.host.setting.verifier.group(message.log, message.raw)
        is_old = group is not None and group.last <= self._old
        return 0 if is_old or message.raw in self._shown.get(to, ()) else None

    def begin(self) -> None:
        """Take over."""
        self._old = self.host.log.last

    # Moves.

    def make(self, move: Move, *, copies: bool) -> str:
        """Make a move; return why it could not be made, or ""."""
        if move.do == "behave":
            self._behaves = True
            # Nothing of what waits was proposed after all.
            self.host.puppet.knowledge.requests.begin_view(())
            self._show_all(self.host.peers)
        elif move.do == "show":
            self._show_all(move.show)
        elif move.do == "append":
            payload = self._payload(move)
            if payload is None:
                return "there is no such request, proposal or VIEW-CHANGE yet"
            if move.copy and not copies:
                return "this log cannot be copied: it says one thing at each index"
            self._append(payload, move)
        return ""

    def _append(self, payload: bytes, move: Move) -> None:
        host = self.host
        if move.copy:
            if self._twin is None and isinstance(host.log, StandInLog):
                self._twin = host.log.clone()
            if self._twin is not None:
                self._say_with_the_copy(self._twin.append((payload,)), move)
            return
        if self._twin is None and isinstance(host.log, StandInLog) and self._wants_a_copy:
            self._twin = host.log.clone()
        group = host.setting.verifier.group(host.number, host.log.append((payload,)))
        if group is None:
            raise RuntimeError("the simulated log attested what does not verify")
        for peer in move.show:
            self._shown.setdefault(peer, set()).add(group.raw)
        host.setting.witness.saw_group(group)
        host.library.add(group)
        host.publish(group)
        self._tell_the_puppet(group)

    def prepare(self, moves: tuple[Move, ...]) -> None:
        """Take in what is to come: a copy is made of the log as it is before the first move."""
        self._wants_a_copy = any(move.copy for move in moves)

    def _say_with_the_copy(self, raw: bytes, move: Move) -> None:
        host = self.host
        group = host.setting.verifier.group(host.number, raw)
        if group is not None and isinstance(host.setting.audience, Recorder):
            host.setting.audience.appended(group, copy=1)
        for peer in move.show:
            host.push(peer, host.number, raw)

    def _tell_the_puppet(self, group: VerifiedGroup) -> None:
        """Let the core inside read on; a visitor may well confuse it, which ends nothing here."""
        self.host.handle(Appended(group))
        self.host.is_down = False

    def _show_all(self, peers: tuple[int, ...] | list[int]) -> None:
        host = self.host
        for group in host.library.since(host.number, self._old + 1, 64):
            for peer in peers:
                self._shown.setdefault(peer, set()).add(group.raw)
                host.push(peer, host.number, group.raw)

    # Entries.

    def _payload(self, move: Move) -> bytes | None:
        view, slot = move.view, move.slot
        if move.kind == "PRE-PREPARE":
            batch = self._batch(move)
            return None if batch is None else PrePrepare(view, slot, batch).encode()
        if move.kind in {"PREPARE", "COMMIT"}:
            digest = self._digest(move)
            entry = Prepare if move.kind == "PREPARE" else Commit
            return None if digest is None else entry(view, slot, digest).encode()
        if move.kind == "NEW-VIEW":
            return self._new_view(view)
        if move.kind == "CHECKPOINT":
            return Checkpoint(slot, bytes(32)).encode()
        return (Suspect(view) if move.kind == "SUSPECT" else ViewChange(view)).encode()

    def _batch(self, move: Move) -> Batch | None:
        if move.batch == "null":
            return NULL_BATCH
        if move.batch == "proposed":
            digest = self._digest(move)
            book = self.host.puppet.knowledge.slots
            return None if digest is None else book.batch(move.slot, digest)
        number = CLIENTS[move.batch]
        keys = list(self.host.setting.clients)
        envelope = self._requests.get(keys[number])
        return None if envelope is None else make_batch(1, (), (envelope,))

    def _digest(self, move: Move) -> bytes | None:
        if move.batch == "proposed":
            return self.host.puppet.knowledge.slots.proposed(move.view, move.slot)
        batch = self._batch(move)
        return None if batch is None else batch.digest

    def _new_view(self, view: int) -> bytes | None:
        states = self.host.puppet.knowledge.states
        departed = [Reference(s.author, s.view_change_at[view].index) for s in states if view in s.view_change_at]
        quorum = self.host.setting.genesis.quorum
        return NewView(view, tuple(departed[:quorum])).encode() if len(departed) >= quorum else None


def may_copy(system: System) -> bool:
    """Say whether whoever plays can say two things at one place."""
    return system.cloned or not system.attested


def play(system: System, player: int, moves_text: str, seed: int = 1) -> Trace:
    """Run a play. ValueError says what is wrong with the moves."""
    n = system.n(1)
    if player not in PLAYERS:
        raise ValueError("you can play replica 0, the primary, or replica 1, the next one")
    moves = parse_moves(moves_text, n, player)
    log = "You own its trusted log twice." if system.cloned else "Its log says one thing at each index."
    tells = f"You play replica {player}. " + (log if system.attested else "No log attests what it says.")
    header: Line = {"scenario": "break-it", "title": f"You are replica {player}", "tells": tells, "expects": ""}
    story = LabStory(
        "break-it",
        tells,
        lambda stage: _script(stage, player, moves),  # type: ignore[arg-type]
        (player,),
        clients=len(CLIENTS),
        limits=LONG_INTERVALS,
        seed=seed,
        longest_ms=LONGEST_MS,
        first_patience_ms=PATIENCE_MS,
    )
    with patched(*system.patches()):
        stage = LabStage(story, system, header)
        stage.play()
        return _judged(stage, player)


def _script(stage: LabStage, player: int, moves: tuple[Move, ...]) -> None:
    played = Played()
    stage.trick(player, played)
    copies = may_copy(stage.system)
    stage.ends = lambda: bool({v.kind for v in stage.witness.violations} & SAFETY) or not stage.what_is_left()
    stage.ask(scripts.A, 10, 200)
    if player == 0:
        stage.ask(scripts.B, 10, 200)
    else:
        stage.ask(scripts.B, 10, 330)
        scripts.cut_off_the_primary(stage, BACK_MS)
    stage.at(PLAY_MS, f"you take over replica {player}", played.begin)
    played.prepare(moves if copies else ())
    at = FIRST_MOVE_MS
    for move in moves:
        stage.at(at, move.in_words(), lambda m=move: _make(stage, played, m, copies=copies))  # type: ignore[misc]
        at += move.ms if move.do == "wait" else MOVE_MS


def _make(stage: LabStage, played: Played, move: Move, *, copies: bool) -> None:
    problem = played.make(move, copies=copies)
    if problem:
        stage.recorder.note(None, f"{NOT_DONE}{problem}", "script")


def _judged(stage: LabStage, player: int) -> Trace:
    trace = stage.lab_trace
    broken = trace.first(lambda line: line["type"] == "violation" and line["kind"] in SAFETY)
    waits = stage.what_is_left()
    safe, live = broken is None, not waits
    sound = stage.system.attested and not stage.system.cloned and stage.system.in_order
    reasons = _reasons(trace, player)
    if broken is not None:
        happened = f"you broke safety: {broken['text'].removeprefix('agreement: ')}"
    elif waits:
        happened = f"safety held, but not everything was answered within {LONGEST_MS} ms: {'; '.join(waits)}"
    else:
        happened = "nothing was broken: every request was answered, and all correct replicas agree"
    if reasons and safe:
        happened += f". Why: {'; '.join(text for _, text in reasons)}"
    expected = "safety and liveness hold, whatever you do" if sound else f"it can be broken: {stage.system.differs}"
    step = broken if broken is not None else reasons[0][0] if reasons else None
    good = (safe and live) or not sound
    verdict(trace, stage.world.now, expected, happened, safe=safe, live=live, good=good, step=step)
    return trace


def _reasons(trace: Trace, player: int) -> list[tuple[Line, str]]:
    """Return what correct replicas noticed of the visitor's moves, each once."""
    found: dict[str, Line] = {}
    for line in trace.of("note"):
        if line["text"].startswith(NOT_DONE):
            found.setdefault(line["text"].removeprefix(NOT_DONE), line)
        if line["about"] in {"exposed", "lied", "forked", "early"} and line["at"] >= PLAY_MS:
            if line["about"] == "early" and f"log {player} " not in line["text"]:
                continue
            found.setdefault(f"replica {line['who'].removeprefix('r')} {line['text']}", line)
    if not found and (opened := trace.first(lambda line: line["type"] == "view" and line["what"] == "opened")):
        found["the others lost patience, and changed the view"] = opened
    return [(line, text) for text, line in found.items()][:REASONS_MAX]
