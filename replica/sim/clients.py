"""A correct client: the real client core, issuing key-value operations and remembering what it was told."""

from dataclasses import dataclass

from client import events
from client.core import ClientCore
from client.events import Settings
from replica.apps import kv
from replica.core.envelope import Status
from replica.core.genesis import Genesis
from replica.sim.histories import Operation
from replica.sim.logs import ClientKey
from replica.sim.messages import AskReport, Connected, Reply, Report, Request
from replica.sim.setting import Setting

KEYS = 4
FOREVER = 1 << 40


@dataclass(frozen=True, slots=True)
class Habits:
    """How a client behaves; times in milliseconds. deadline_ms: some operations have one, the others wait for ever."""

    concurrency: int = 2
    think_ms: int = 120
    deadline_ms: int = 3000
    deadline_share: float = 0.3
    patience_ms: int = 300


class CorrectClient:
    """A client that does what it should. Invariant: every operation ends at most once."""

    def __init__(self, setting: Setting, number: int, habits: Habits, *, real: bool) -> None:
        self.setting, self.number, self.habits = setting, number, habits
        self.world = setting.world
        self.key = ClientKey(number, real=real)
        self.completed = 0
        self.undecided = 0
        self.unanswered: dict[int, Operation] = {}  # by ticket
        self.obliged: dict[int, None] = {}  # tickets that a healed network must answer
        self._connected: dict[int, None] = {}
        self._nodes = list(range(setting.genesis.n))
        self._tickets = 0
        self._wake = 0
        self._is_asking = True
        chance = self.world.random
        self.core = ClientCore(
            setting.genesis,
            setting.cluster_id,
            self.key.public,
            sign=self.key.sign,
            nonce=lambda: chance.randbytes(16),
            # Nothing is learned here: patience is one of the habits that a seed chooses.
            settings=Settings(
                patience_ms=habits.patience_ms,
                patience_learned_ms_max=habits.patience_ms,
                patience_ms_max=4000,
                opening_wait_ms=100,
            ),
        )
        setting.clients[self.key.public] = number
        setting.network.nodes[number] = self

    def start(self) -> None:
        """Begin to ask."""
        for _ in range(self.habits.concurrency):
            self.world.after(self.world.random.randint(0, 2 * self.habits.think_ms), self._ask_and_again)

    def oblige(self) -> None:
        """Note that all that waits now must be answered, whatever else happens."""
        self.obliged.update(dict.fromkeys(self.unanswered))

    def rest(self) -> None:
        """Ask for nothing more on its own."""
        self._is_asking = False

    def ask(self, *, forever: bool) -> None:
        """Ask for one operation."""
        chance = self.world.random
        key = b"key-%d" % chance.randrange(KEYS)
        raw = self._operation(key)
        mortal = not forever and chance.random() < self.habits.deadline_share
        deadline = self.world.now + (self.habits.deadline_ms if mortal else FOREVER)
        self.ask_for(key, raw, deadline, obliged=forever)

    def ask_for(self, key: bytes, raw: bytes, deadline: int = FOREVER, *, obliged: bool = True) -> None:
        """Ask for this operation on this key; obliged: it must be answered, whatever else happens."""
        self._tickets += 1
        if obliged:
            self.obliged[self._tickets] = None
        self.setting.audience.asked(self.number, raw)
        self.unanswered[self._tickets] = self.setting.witness.history.invoke(self.number, key, raw, self.world.now)
        if self.core.submit(self._tickets, raw, deadline) is not None:
            raise RuntimeError("the simulated client asks for more than its queue holds")
        self._flush()

    def _operation(self, key: bytes) -> bytes:
        chance = self.world.random
        kind = chance.randrange(10)
        if key == b"key-0":
            # One key counts: doubled or lost executions show at once.
            return kv.incr(key, chance.randint(1, 9)) if kind < 7 else kv.get(key)
        value = b"%d" % chance.randrange(1000)
        if kind < 3:
            return kv.put(key, value)
        if kind < 6:
            return kv.get(key)
        if kind < 7:
            return kv.delete(key)
        return kv.cas(key, None if kind < 8 else b"%d" % chance.randrange(1000), value)

    def _ask_and_again(self) -> None:
        if self._is_asking:
            if len(self.unanswered) < 4 * self.habits.concurrency:
                self.ask(forever=False)
            self.world.after(self.world.random.randint(1, 2 * self.habits.think_ms), self._ask_and_again)

    # Connections.

    def adopt(self, genesis: Genesis, nodes: list[int]) -> None:
        """Learn another list of members, and at which nodes they are."""
        self._nodes = nodes
        self._connected.clear()
        self._do(self.core.adopt(genesis))

    def disconnect(self, replica: int) -> None:
        """Lose the connection to a replica."""
        if self._connected.pop(replica, 0) is None:
            self._do(self.core.on_disconnected(replica))
            self._flush()

    def receive(self, source: int, message: object) -> None:
        """Take a message from a replica."""
        if source not in self._nodes:
            return
        source = self._nodes.index(source)
        if isinstance(message, Connected):
            if source not in self._connected:
                self._connected[source] = None
                self._do(self.core.on_connected(source, message.executed, message.view))
        elif source not in self._connected:
            return
        elif isinstance(message, Reply):
            self._do(self.core.on_reply(source, message.raw))
        elif isinstance(message, Report):
            self._do(self.core.on_report(source, message.executed, message.view))
        self._flush()

    # The core.

    def _flush(self) -> None:
        self._do(self.core.flush(self.world.now))

    def _do(self, effects: list[events.Effect]) -> None:
        for effect in effects:
            if isinstance(effect, events.Send):
                self.setting.audience.sent(self.number, effect.replicas, effect.envelope)
                for replica in effect.replicas:
                    self._send(replica, Request(effect.envelope), "request")
            elif isinstance(effect, events.Complete):
                for ticket, result in zip(effect.tickets, effect.results, strict=True):
                    self._answered(ticket, result.status, result.slot, result.value)
            elif isinstance(effect, events.Fail):
                for ticket in effect.tickets:
                    self._failed(ticket, effect.reason)
            elif isinstance(effect, events.AskReports):
                for replica in self._connected:
                    self._send(replica, AskReport(), "ask report")
            else:
                self._wake_at(effect.at_ms)

    def _send(self, to: int, message: object, label: str) -> None:
        self.setting.network.send(self.number, self._nodes[to], message, label)

    def _wake_at(self, at: int) -> None:
        self._wake += 1
        wish = self._wake
        if at < FOREVER:

            def wake() -> None:
                if wish == self._wake:
                    self._do(self.core.tick(self.world.now))
                    self._flush()

            self.world.at(at, wake)

    def _answered(self, ticket: object, status: Status, slot: int, value: bytes) -> None:
        operation = self.unanswered.pop(ticket, None)  # type: ignore[call-overload]
        self.obliged.pop(ticket, None)  # type: ignore[call-overload]
        witness = self.setting.witness
        if operation is None:
            witness.violation("reply", f"client {self.number} got a second answer to one operation")
            return
        self.completed += 1
        self.setting.audience.answered(self.number, operation.raw, slot)
        self.world.note(f"{self.number} answered {operation.raw!r} {status} {slot} {value!r}")
        if status not in {Status.OK, Status.ERROR}:
            witness.violation("reply", f"client {self.number} was answered {status.name} to {operation.raw!r}")
            return
        operation.returned, operation.value = self.world.now, value
        witness.acknowledged(self.key.public, operation.raw, status, slot, value)

    def _failed(self, ticket: object, reason: events.Failure) -> None:
        operation = self.unanswered.pop(ticket)  # type: ignore[call-overload]
        self.obliged.pop(ticket, None)  # type: ignore[call-overload]
        self.undecided += 1
        self.setting.audience.failed(self.number, operation.raw, reason.value)
        self.world.counts[f"client-{reason.value}"] += 1
        if reason is not events.Failure.UNDECIDED:
            # It never left the client; nothing may show that it happened.
            self.setting.witness.history.operations.remove(operation)
