"""PBFT in the simulator's virtual time and network: hosts, clients, an equivocating primary, and the trace."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

from replica.lab.trace import FORMAT, Line, Trace, disagreement, numbered
from replica.pbft.machine import PbftCore
from replica.pbft.messages import (
    Body,
    Broadcast,
    Checkpoint,
    Cluster,
    Commit,
    Decided,
    Effect,
    Entered,
    Executed,
    Missing,
    NewView,
    Opened,
    Prepare,
    PrePrepare,
    Proposal,
    Request,
    Signed,
    ViewChange,
)
from replica.pbft.pending import OneByOne
from replica.sim.chronicle import PROLOGUE_MS
from replica.sim.world import Network, Weather, World

PATIENCE_MS = 300
CLIENT_PATIENCE_MS = 100
TICK_MS = 50
FIRST_CLIENT = 100
NAMES = ("A", "B")


@dataclass(frozen=True, slots=True)
class Reply:
    """A replica's word that it executed a request at a slot."""

    request: Request
    slot: int


def _sign(author: int, body: Body) -> bytes:
    # A stand-in, as in the simulator's logs: nobody here makes another's.
    return hashlib.sha256(f"sim signature {author} {body!r}".encode()).digest()


def _operation(request: Proposal | None) -> str | None:
    return request.operation if isinstance(request, Request) else None


def describe(body: Body) -> str:
    """Return a message in words."""
    if isinstance(body, ViewChange):
        slots = " ".join(f"s{getattr(c.proposal.body, 'slot', '?')}" for c in body.prepared)
        return f"VIEW-CHANGE v{body.view} with certificates for {slots or 'nothing'}"
    if isinstance(body, NewView):
        return f"NEW-VIEW v{body.view} with the VIEW-CHANGEs of {' '.join(str(c.author) for c in body.changes)}"
    if isinstance(body, Checkpoint | Missing | Decided):
        raise TypeError("the lecture's PBFT has no checkpoints, and nobody fetches what it missed")
    kind = {PrePrepare: "PRE-PREPARE", Prepare: "PREPARE", Commit: "COMMIT"}[type(body)]
    return f"{kind} v{body.view} s{body.slot}"


class PbftStage:
    """One run of PBFT. n and quorum say how many replicas there are and how many must agree."""

    def __init__(self, f: int, n: int, quorum: int, faulty: tuple[int, ...], seed: int, header: Line) -> None:
        self.world = World(seed)
        self.network = Network(self.world, Weather(delay_min=1, delay_max=3))
        self.f, self.faulty = f, faulty
        self.cluster = Cluster(n, f, quorum, _sign, lambda m: m.signature == _sign(m.author, m.body))
        self.trace = Trace()
        lanes = [{"id": name, "name": f"client {name}", "faulty": False} for name in NAMES]
        lanes += [{"id": f"r{i}", "name": f"replica {i}", "faulty": i in faulty} for i in range(n)]
        numbers = {"n": n, "f": f, "quorum": quorum, "seed": seed, "begins": PROLOGUE_MS, "lanes": lanes}
        self.trace.add("header", 0, format=FORMAT, **header, **numbers)
        self.names: dict[bytes, str] = {}
        self.agreed: dict[int, bytes] = {}
        self.broken = False
        self.hosts = [PbftHost(self, number) for number in range(n)]
        self.clients = [PbftClient(self, FIRST_CLIENT + i, name) for i, name in enumerate(NAMES)]

    @property
    def n(self) -> int:
        """The number of replicas."""
        return self.cluster.n

    def add(self, kind: str, /, **fields: object) -> Line:
        """Add a line to the trace."""
        return self.trace.add(kind, self.world.now, **fields)

    def direct(self, text: str) -> None:
        """Note what the script does."""
        self.add("note", who=None, text=text, about="script")

    def at(self, ms: int, text: str, action: Callable[[], None]) -> None:
        """Do something at this time."""

        def do() -> None:
            self.direct(text)
            action()

        self.world.at(ms, do)

    def cut(self, *pairs: tuple[int, int]) -> None:
        """Lose everything between these (source, destination) pairs."""
        self.network.blocked.update(dict.fromkeys(pairs))

    def mend(self, *pairs: tuple[int, int]) -> None:
        """Lose nothing any more between these pairs."""
        for pair in pairs:
            self.network.blocked.pop(pair, None)

    def name(self, number: int) -> str:
        """Return a node's name in the trace."""
        return NAMES[number - FIRST_CLIENT] if number >= FIRST_CLIENT else f"r{number}"

    def play(self, longest_ms: int) -> None:
        """Let it all happen."""
        for host in self.hosts:
            host.start()
        self.world.run(longest_ms, lambda: self.broken or not self.what_is_left())

    def what_is_left(self) -> list[str]:
        """Return what must still come to an end."""
        left = [
            f"client {c.name} waits for {r.operation}" for c in self.clients for r in c.planned if r not in c.answered
        ]
        sound = [host for host in self.hosts if host.number not in self.faulty]
        reached = max(host.core.executed for host in sound)
        left += [f"replica {h.number} is at slot {h.core.executed}" for h in sound if h.core.executed < reached]
        return left

    def send(self, source: int, destination: int, message: object, told: Line) -> None:
        """Send a message, and add it to the trace when it arrives, or is lost."""
        sent = self.world.now
        ends = {"from": self.name(source), "to": self.name(destination)}

        def arrive() -> None:
            is_lost = (source, destination) in self.network.blocked
            self.add("message", **ends, sent=sent, became="lost" if is_lost else "read", **told)
            if not is_lost:
                node = self.network.nodes.get(destination)
                if node is not None:
                    node.receive(source, message)

        weather = self.network.weather
        self.world.after(self.world.random.randint(weather.delay_min, weather.delay_max), arrive)

    def executed(self, effect: Executed) -> None:
        """Take in that a correct replica executed something: all must execute the same."""
        known = self.agreed.setdefault(effect.slot, effect.digest)
        if known != effect.digest:
            self.broken = True
            self.add("violation", kind="agreement", text=f"agreement: {disagreement(self.trace)}")


class PbftHost:
    """A replica: the core, and a shell that carries out its effects."""

    def __init__(self, stage: PbftStage, number: int) -> None:
        self.stage, self.number = stage, number
        self.pending = OneByOne()
        self.core = PbftCore(stage.cluster, number, PATIENCE_MS, self.pending)
        self.is_down = False
        self.instead: Callable[[Request], bool] = lambda _: False
        self._said = 0
        self._tallies: dict[tuple[int, int, str], tuple[bytes, tuple[int, ...]]] = {}
        stage.network.nodes[number] = self

    def start(self) -> None:
        """Begin to live."""

        def tick() -> None:
            if not self.is_down:
                self.carry_out(self.core.on_tick(self.stage.world.now))
                self.stage.world.after(TICK_MS, tick)

        self.stage.world.after(self.stage.world.random.randrange(TICK_MS), tick)

    def receive(self, source: int, message: object) -> None:
        """Take a message."""
        del source
        if self.is_down:
            return
        if isinstance(message, Request):
            self.stage.names[message.digest()] = message.operation
            slot = self.pending.executed_slot(message)
            if slot is not None:
                self.reply(message, slot)
            elif not self.instead(message):
                self.carry_out(self.core.on_request(message))
        elif isinstance(message, Signed):
            self.carry_out(self.core.on_message(message))

    def carry_out(self, effects: list[Effect]) -> None:
        """Do what the core asks for."""
        stage, who = self.stage, f"r{self.number}"
        for effect in effects:
            if isinstance(effect, Broadcast):
                self.say(effect.message, [i for i in range(stage.n) if i != self.number])
            elif isinstance(effect, Executed):
                ops = [operation] if (operation := _operation(effect.request)) is not None else []
                stage.add("execute", who=who, slot=effect.slot, digest=effect.digest.hex(), ops=ops)
                if self.number not in stage.faulty:
                    stage.executed(effect)
                if isinstance(effect.request, Request):
                    self.reply(effect.request, effect.slot)
            elif isinstance(effect, Entered):
                stage.add("view", who=who, view=effect.view, what="entered", text=f"leaves for v{effect.view}")
            elif isinstance(effect, Opened):
                again = ", ".join(f"s{s} ({_operation(r) or 'null'})" for s, r in effect.carried)
                text = f"takes v{effect.view} for open: it carries {again or 'nothing'}"
                named = numbered(effect.named)
                stage.add("view", who=who, view=effect.view, what="opened", text=text, named=named)
        self._look()

    def say(self, message: Signed, to: list[int], copy: int = 0) -> None:
        """Sign a message, and send it to some."""
        self._said += 1
        entry = self._entry(message.body)
        self.stage.add(
            "append",
            who=f"r{self.number}",
            attested=False,
            copy=copy,
            chain="log",
            first=self._said,
            last=self._said,
            head_before="",
            head="",
            statement="",
            signature=message.signature.hex(),
            verifies=self.stage.cluster.verify(message),
            entries=[entry],
        )
        for peer in to:
            self.stage.send(self.number, peer, message, {"kind": "message", "label": entry["text"]})

    def reply(self, request: Request, slot: int) -> None:
        """Answer a client."""
        client = FIRST_CLIENT + NAMES.index(request.client)
        self.stage.send(
            self.number, client, Reply(request, slot), {"kind": "reply", "label": f"{request.operation} at s{slot}"}
        )

    def _entry(self, body: Body) -> Line:
        kind = describe(body).split(" ", 1)[0]
        digest = getattr(body, "digest", None)
        ops = [self.stage.names.get(digest, "null")] if digest is not None else []
        place = {"index": self._said, "kind": kind, **{name: getattr(body, name, None) for name in ("view", "slot")}}
        text = describe(body) + (f" ({ops[0]})" if ops else "")
        return {**place, "digest": None if digest is None else digest.hex(), "ops": ops, "text": text}

    def _look(self) -> None:
        for number, slot in self.core.slots.items():
            for view, signed in slot.proposals.items():
                digest = signed.body.digest if isinstance(signed.body, PrePrepare) else b""
                votes = {signed.author, *slot.prepares.get((view, digest), ())}
                self._meter(number, view, "vote", digest, votes)
                self._meter(number, view, "commit", digest, set(slot.commits.get((view, digest), ())))

    def _meter(self, slot: int, view: int, phase: str, digest: bytes, said: set[int]) -> None:
        voters = tuple(sorted(said))
        if self._tallies.get((slot, view, phase), (digest, ())) == (digest, voters):
            return
        self._tallies[slot, view, phase] = (digest, voters)
        place = {"view": view, "slot": slot, "phase": phase, "digest": digest.hex()}
        named = {"ops": [self.stage.names.get(digest, "null")], "voters": numbered(voters)}
        self.stage.add("meter", who=f"r{self.number}", **place, **named, need=self.stage.cluster.quorum)


@dataclass(slots=True)
class PbftClient:
    """A client: asks the primary, then all; believes f+1 equal replies."""

    stage: PbftStage
    number: int
    name: str
    planned: list[Request] = field(default_factory=list)
    answered: dict[Request, int] = field(default_factory=dict)
    _replies: dict[tuple[Request, int], set[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.stage.network.nodes[self.number] = self

    def ask(self, *times: int) -> None:
        """Ask for an operation at each of these times."""
        for ms in times:
            number = len(self.planned) + 1
            request = Request(self.name, number, f"{self.name}{number}")
            self.planned.append(request)
            self.stage.world.at(ms, lambda r=request: self._begin(r))  # type: ignore[misc]

    def _begin(self, request: Request) -> None:
        self.stage.add("ask", who=self.name, op=request.operation)
        self._send(request, [0])
        self.stage.world.after(CLIENT_PATIENCE_MS, lambda: self._again(request, 2 * CLIENT_PATIENCE_MS))

    def _again(self, request: Request, pause: int) -> None:
        if request not in self.answered:
            self._send(request, list(range(self.stage.n)))
            self.stage.world.after(pause, lambda: self._again(request, 2 * pause))

    def _send(self, request: Request, to: list[int]) -> None:
        for replica in to:
            self.stage.send(self.number, replica, request, {"kind": "request", "label": f"request {request.operation}"})

    def receive(self, source: int, message: object) -> None:
        """Take a reply."""
        if isinstance(message, Reply) and message.request not in self.answered:
            said = self._replies.setdefault((message.request, message.slot), set())
            said.add(source)
            if len(said) > self.stage.f:
                self.answered[message.request] = message.slot
                replies = numbered(sorted(said))
                self.stage.add(
                    "answer", who=self.name, op=message.request.operation, slot=message.slot, replies=replies
                )


class EquivocatingPrimary:
    """Signs two proposals for one slot, and shows each to some; it commits both."""

    def __init__(self, stage: PbftStage, from_ms: int, second: tuple[int, ...]) -> None:
        self._stage, self._from_ms, self._second = stage, from_ms, second
        self._found: dict[str, Request] = {}
        stage.hosts[0].instead = self.on_request

    def on_request(self, request: Request) -> bool:
        """Take a request; say whether that is all that happens with it."""
        host = self._stage.hosts[0]
        if self._stage.world.now < self._from_ms:
            return False
        self._found.setdefault(request.client, request)
        if len(self._found) == len(NAMES):
            slot = host.core.executed + 1
            first = [i for i in range(1, self._stage.n) if i not in self._second]
            self._propose(slot, self._found["A"], first, 0)
            self._propose(slot, self._found["B"], list(self._second), 1)
            host.instead = lambda _: True
        return True

    def _propose(self, slot: int, request: Request, to: list[int], copy: int) -> None:
        host = self._stage.hosts[0]
        for body in (PrePrepare(0, slot, request.digest(), request), Commit(0, slot, request.digest())):
            host.say(Signed(0, body, _sign(0, body)), to, copy)
