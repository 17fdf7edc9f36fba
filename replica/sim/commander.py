"""An operator who has one command after the other executed: each is sent to every replica until f + 1 say alike so.

The members stay, so `chain` is empty.
"""

from replica.core.envelope import Administer, AdministerReply, Status, decode_reply, encode_administer
from replica.core.genesis import Genesis
from replica.core.layout import U64_MAX, LayoutError
from replica.sim.logs import ClientKey
from replica.sim.messages import Reply, Request
from replica.sim.setting import OPERATOR, Setting

AGAIN_MS = 300


class Commander:
    """Gives one command at a time. about: what they are about, in words."""

    about = ""

    def __init__(self, setting: Setting, key: ClientKey) -> None:
        self.setting, self.world, self.key = setting, setting.world, key
        self.chain: list[Genesis] = []
        self._given = 0
        self._text = ""
        self._envelope = b""
        self._replies: dict[int, bytes] = {}
        setting.network.nodes[OPERATOR] = self
        setting.clients[key.public] = OPERATOR

    @property
    def waits_for(self) -> list[str]:
        """What is still to happen."""
        return [f"{self._text} is not executed"] if self._envelope else []

    def start(self) -> None:
        """Begin."""

    def executed(self) -> None:
        """Take in that the command was executed."""

    def give(self, command: bytes, text: str) -> None:
        """Have a command executed; text: of the reply that says so."""
        self._given += 1
        self._text = text
        content = Administer(U64_MAX // 2, command)
        signed = encode_administer(self.setting.cluster_id, self.key.public, content)
        self._envelope = signed + self.key.sign(signed)
        self._ask(self._given)

    def _ask(self, number: int) -> None:
        if number != self._given or not self._envelope:
            return
        for node in range(self.setting.genesis.n):
            self.setting.network.send(OPERATOR, node, Request(self._envelope), f"command about {self.about}")
        self.world.after(AGAIN_MS, lambda: self._ask(number))

    def receive(self, source: int, message: object) -> None:
        """Take a reply."""
        if not self._envelope or not isinstance(message, Reply):
            return
        try:
            reply = decode_reply(message.raw, self.setting.genesis.limits)
        except LayoutError:
            return
        if not isinstance(reply, AdministerReply) or reply.text != self._text:
            return
        self._replies[source] = message.raw
        if sum(raw == message.raw for raw in self._replies.values()) > self.setting.genesis.f:
            if reply.status is not Status.OK:
                self.setting.witness.violation("reply", f"{self._text}: {reply.status.name}")
            self._envelope = b""
            self._replies.clear()
            self.executed()
