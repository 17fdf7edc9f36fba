"""An operator who revokes faulty clients' keys, allows them again, and lists the correct ones (`replica.core.clients`).

One command after the other, each sent to every replica until f + 1 say alike that it was executed. Correct clients are
allowed before anything is listed, so nothing of theirs may be refused.
"""

from dataclasses import dataclass

from replica.core.clients import Allow, Command, Mode, Revoke, SetMode
from replica.core.envelope import Administer, AdministerReply, Status, decode_reply, encode_administer
from replica.core.genesis import Genesis
from replica.core.layout import U64_MAX, LayoutError
from replica.sim.logs import ClientKey
from replica.sim.messages import Reply, Request
from replica.sim.setting import OPERATOR, Setting

AGAIN_MS = 300


@dataclass(frozen=True, slots=True)
class Order:
    """One order, not before `at_ms`. kind: "revoke", "allow" (a faulty client, by its place), "listed" or "open"."""

    kind: str
    at_ms: int
    who: int = 0


class Registrar:
    """Gives the orders; correct, faulty: the clients' public keys. The members stay, so `chain` is empty."""

    def __init__(
        self,
        setting: Setting,
        key: ClientKey,
        orders: tuple[Order, ...],
        *,
        correct: tuple[bytes, ...],
        faulty: tuple[bytes, ...],
    ) -> None:
        self.setting, self.world, self.key = setting, setting.world, key
        self.chain: list[Genesis] = []
        self._orders = list(orders)
        self._correct, self._faulty = correct, faulty
        self._number = 0
        self._commands: list[Command] = []
        self._envelope = b""
        self._replies: dict[int, bytes] = {}
        setting.network.nodes[OPERATOR] = self
        setting.clients[key.public] = OPERATOR

    @property
    def waits_for(self) -> list[str]:
        """What is still to happen."""
        waits = [f"command {self._number} about clients is not executed"] if self._envelope else []
        return waits + [f"an order about clients was not given: {order}" for order in self._orders]

    def start(self) -> None:
        """Begin."""
        if self._orders:
            self.world.at(max(self._orders[0].at_ms, self.world.now), self._give)

    def _give(self) -> None:
        order = self._orders.pop(0)
        self.world.note(f"order about clients: {order.kind} {order.who}")
        self.world.counts[f"clients-{order.kind}"] += 1
        first = self._number + 1
        if order.kind == "listed":
            made: list[Command] = [Allow(first + i, key, "correct") for i, key in enumerate(self._correct)]
            self._commands = [*made, SetMode(first + len(made), Mode.LISTED)]
        elif order.kind == "open":
            self._commands = [SetMode(first, Mode.OPEN)]
        else:
            key = self._faulty[order.who % len(self._faulty)]
            self._commands = [Allow(first, key) if order.kind == "allow" else Revoke(first, key)]
        self._next()

    def _next(self) -> None:
        self._envelope = b""
        self._replies.clear()
        if not self._commands:
            self.start()
            return
        self._number += 1
        content = Administer(U64_MAX // 2, self._commands.pop(0).encode())
        signed = encode_administer(self.setting.cluster_id, self.key.public, content)
        self._envelope = signed + self.key.sign(signed)
        self._ask(self._number)

    def _ask(self, number: int) -> None:
        if number != self._number or not self._envelope:
            return
        for node in range(self.setting.genesis.n):
            self.setting.network.send(OPERATOR, node, Request(self._envelope), "command about clients")
        self.world.after(AGAIN_MS, lambda: self._ask(number))

    def receive(self, source: int, message: object) -> None:
        """Take a reply."""
        if not self._envelope or not isinstance(message, Reply):
            return
        try:
            reply = decode_reply(message.raw, self.setting.genesis.limits)
        except LayoutError:
            return
        if not isinstance(reply, AdministerReply) or reply.text != f"command {self._number} of clients":
            return
        self._replies[source] = message.raw
        if sum(raw == message.raw for raw in self._replies.values()) > self.setting.genesis.f:
            if reply.status is not Status.OK:
                self.setting.witness.violation("reply", f"command {self._number} about clients: {reply.status.name}")
            self._next()
