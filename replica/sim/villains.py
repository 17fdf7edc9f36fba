"""Faulty clients: everything that a client's key and a connection allow."""

from collections.abc import Callable

from replica.apps import kv
from replica.core.envelope import (
    Open,
    OpenReply,
    Operations,
    OperationsReply,
    SessionId,
    Status,
    decode_reply,
    encode_open,
    encode_operations,
)
from replica.core.layout import LayoutError
from replica.sim.logs import ClientKey
from replica.sim.messages import Reply, Request
from replica.sim.setting import Setting

STEP_MS = 60
TRICKS = ("open", "two-operations", "unsigned", "one-backup", "again", "flood", "far-ahead", "foreign-session")


class FaultyClient:
    """A client with a valid key that follows no rule. It touches keys of its own only, "evil-…".

    Tricks: two operations under one number, to different replicas; signatures that do not verify; requests to a single
    backup; everything once more; floods; numbers out of the window; sessions of others; openings with old horizons.
    """

    def __init__(self, setting: Setting, number: int, *, real: bool) -> None:
        self.setting, self.number = setting, number
        self.world = setting.world
        self.key = ClientKey(number, real=real)
        self._session: SessionId | None = None
        self._next = 1
        self._sent: list[bytes] = []
        self._executed = 0
        self._is_resting = False
        self._tricks: tuple[Callable[[], None], ...] = (
            self._plain,
            self._plain,
            self._two_operations,
            self._unsigned,
            self._one_backup,
            self._again,
        )
        self._tricks += (self._flood, self._far_ahead, self._foreign_session, self._open)
        setting.clients[self.key.public] = number
        setting.network.nodes[number] = self

    def start(self) -> None:
        """Begin."""
        self.world.after(self.world.random.randint(0, 500), self._step)

    def rest(self) -> None:
        """Stop."""
        self._is_resting = True

    def receive(self, source: int, message: object) -> None:  # noqa: ARG002
        """Take a message from a replica; one replica's word is enough for a faulty client."""
        if not isinstance(message, Reply):
            return
        try:
            reply = decode_reply(message.raw, self.setting.genesis.limits)
        except LayoutError:
            return
        if isinstance(reply, OpenReply):
            if reply.status is Status.OK and self._session is None:
                self._session = reply.session
        elif isinstance(reply, OperationsReply):
            self._executed = max(self._executed, *(result.slot for result in reply.results))
            if any(result.status is Status.EXPIRED for result in reply.results):
                self._session = None

    def _did(self, trick: str) -> None:
        self.world.counts[f"attack-client-{trick}"] += 1

    def _step(self) -> None:
        chance = self.world.random
        if self._is_resting:
            return
        if self._session is None:
            self._open()
        else:
            trick = chance.choice(self._tricks)
            trick()
        self.world.after(chance.randint(1, 2 * STEP_MS), self._step)

    def _send(self, raw: bytes, to: list[int]) -> None:
        if len(self._sent) < 200:
            self._sent.append(raw)
        for replica in to:
            self.setting.network.send(self.number, replica, Request(raw), "evil request")

    def _everybody(self) -> list[int]:
        return list(range(self.setting.genesis.n))

    def _open(self) -> None:
        chance = self.world.random
        self._did("open")
        horizon = self.setting.genesis.limits.checkpoint_interval * chance.choice((0, 1, 4, 8, 9))
        content = Open(chance.randbytes(16), self._executed + horizon)
        signed = encode_open(self.setting.cluster_id, self.key.public, content)
        self._send(signed + self.key.sign(signed), self._everybody())

    def _envelope(self, first: int, *, session: SessionId | None = None, good: bool = True) -> bytes:
        chance = self.world.random
        key = b"evil-%d" % chance.randrange(3)
        operations = tuple(
            chance.choice((kv.put(key, chance.randbytes(3)), kv.get(key), kv.delete(key)))
            for _ in range(chance.choice((1, 1, 3)))
        )
        content = Operations(session or self._session or SessionId(0, 0), first, chance.choice((1, first)), operations)
        signed = encode_operations(self.setting.cluster_id, self.key.public, content)
        signature = self.key.sign(signed)
        return signed + (signature if good else bytes([signature[0] ^ 1]) + signature[1:])

    def _plain(self) -> None:
        self._send(self._envelope(self._next), self._everybody())
        self._next += self.world.random.choice((1, 1, 2, 5))

    def _two_operations(self) -> None:
        self._did("two-operations")
        chance = self.world.random
        halves = [[], []]  # type: list[list[int]]
        for replica in self._everybody():
            halves[chance.randrange(2)].append(replica)
        for half in halves:
            self._send(self._envelope(self._next), half)
        self._next += 1

    def _unsigned(self) -> None:
        self._did("unsigned")
        self._send(self._envelope(self._next, good=False), self._everybody())

    def _one_backup(self) -> None:
        self._did("one-backup")
        self._send(self._envelope(self._next), [self.world.random.choice(self._everybody())])
        self._next += 1

    def _again(self) -> None:
        self._did("again")
        if self._sent:
            self._send(self.world.random.choice(self._sent), self._everybody())

    def _flood(self) -> None:
        self._did("flood")
        to = [self.world.random.choice(self._everybody())]
        for _ in range(20):
            self._send(self._envelope(self._next), to)
            self._next += 1

    def _far_ahead(self) -> None:
        self._did("far-ahead")
        self._send(self._envelope(self._next + 1000), self._everybody())

    def _foreign_session(self) -> None:
        self._did("foreign-session")
        chance = self.world.random
        self._send(self._envelope(1, session=SessionId(chance.randint(1, 9), chance.randint(0, 2))), self._everybody())
