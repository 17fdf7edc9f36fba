"""An operator who revokes faulty clients' keys, allows them again, and lists the correct ones (`replica.core.clients`).

Correct clients are allowed before anything is listed, so nothing of theirs may be refused.
"""

from dataclasses import dataclass

from replica.core.clients import Allow, Command, Mode, Revoke, SetMode
from replica.sim.commander import Commander
from replica.sim.logs import ClientKey
from replica.sim.setting import Setting


@dataclass(frozen=True, slots=True)
class Order:
    """One order, not before `at_ms`. kind: "revoke", "allow" (a faulty client, by its place), "listed" or "open"."""

    kind: str
    at_ms: int
    who: int = 0


class Registrar(Commander):
    """Gives the orders; correct, faulty: the clients' public keys."""

    about = "clients"

    def __init__(
        self,
        setting: Setting,
        key: ClientKey,
        orders: tuple[Order, ...],
        *,
        correct: tuple[bytes, ...],
        faulty: tuple[bytes, ...],
    ) -> None:
        super().__init__(setting, key)
        self._orders = list(orders)
        self._correct, self._faulty = correct, faulty
        self._number = 0
        self._commands: list[Command] = []

    @property
    def waits_for(self) -> list[str]:
        """What is still to happen."""
        return super().waits_for + [f"an order about clients was not given: {order}" for order in self._orders]

    def start(self) -> None:
        """Begin, or go on."""
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
        self.executed()

    def executed(self) -> None:
        """Go on with the next command, or the next order."""
        if not self._commands:
            self.start()
            return
        self._number += 1
        self.give(self._commands.pop(0).encode(), f"command {self._number} of clients")
