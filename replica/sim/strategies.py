"""What faulty replicas do: strategies, which can be combined. Each counts what it really did.

This file holds the interface and the strategies about *when and to whom* something is said; those about what is said
are in `replica.sim.lies`.
"""

from typing import TYPE_CHECKING, ClassVar

from replica.core.envelope import (
    Administer,
    Open,
    OpenReply,
    Result,
    SessionId,
    Status,
    encode_open_reply,
    encode_operations_reply,
)
from replica.core.layout import LayoutError
from replica.core.snapshot import PartWanted, Source
from replica.sim.messages import AskCheckpoint, AskPart, FetchMessage, GroupMessage, Reply, Report, Request
from replica.sim.world import World

if TYPE_CHECKING:
    import random

    from replica.sim.faulty import FaultyReplica

CLIENT_KEY_AT = 50


class Strategy:
    """Does nothing wrong. Subclasses override what they need; `name` is how they are counted."""

    name: ClassVar[str] = "none"
    host: "FaultyReplica"

    def __init__(self, argument: str = "") -> None:
        """Take what stands behind a colon after the name."""

    def join(self, host: "FaultyReplica") -> None:
        """Become part of a faulty replica."""
        self.host = host

    @property
    def world(self) -> World:
        """The world."""
        return self.host.world

    @property
    def chance(self) -> "random.Random":
        """The run's randomness."""
        return self.host.world.random

    def did(self) -> None:
        """Count that this strategy did something."""
        self.host.count(self.name)

    def entries(self, payloads: list[bytes]) -> list[bytes]:
        """Return what is appended instead of what a correct replica would append; [] for nothing."""
        return payloads

    def append_delay(self) -> int:
        """Return how much later an append happens."""
        return 0

    def takes(self, source: int, message: object) -> bool:  # noqa: ARG002 - overridden
        """Say whether a message is taken at all."""
        return True

    def holds(self, to: int, message: object) -> int | None:  # noqa: ARG002 - overridden
        """Return how long a message is held back; None for ever."""
        return 0

    def instead(self, to: int, message: object) -> object:  # noqa: ARG002 - overridden
        """Return what is sent instead of a message; None for nothing."""
        return message

    def report(self, said: Report) -> Report:
        """Return what is said of the own slot and view."""
        return said

    def on_request(self, raw: bytes) -> None:
        """Take in that a request arrived."""

    def on_tick(self) -> None:
        """Take in that some time passed."""


class Silent(Strategy):
    """Says nothing from some moment on; at times from the start."""

    name = "silent"

    def join(self, host: "FaultyReplica") -> None:
        """See `Strategy`."""
        super().join(host)
        self._from = self.chance.choice((0, self.chance.randint(0, 6000)))

    def holds(self, to: int, message: object) -> int | None:  # noqa: ARG002
        """See `Strategy`."""
        if self.world.now < self._from:
            return 0
        self.did()
        return None


class Crash(Strategy):
    """Ends at some moment."""

    name = "crash"

    def join(self, host: "FaultyReplica") -> None:
        """See `Strategy`."""
        super().join(host)
        self._at = self.chance.randint(0, 8000)

    def on_tick(self) -> None:
        """See `Strategy`."""
        if self.world.now >= self._at and not self.host.is_down:
            self.did()
            self.host.is_down = True


class Withhold(Strategy):
    """Shows its own log to some only, and at times hides other logs of the cabal too; whom, it changes now and then."""

    name = "withhold"

    def join(self, host: "FaultyReplica") -> None:
        """See `Strategy`."""
        super().join(host)
        self._shown: tuple[int, ...] = ()
        self._until = -1
        self._hides_all = self.chance.random() < 0.5

    def on_tick(self) -> None:
        """See `Strategy`."""
        if self.world.now > self._until:
            self._until = self.world.now + self.chance.randint(200, 4000)
            kind = self.chance.randrange(4)
            peers = self.host.peers
            if kind == 0:
                self._shown = (self.host.cabal.pet,)
            elif kind == 1:
                self._shown = tuple(p for p in peers if p != self.host.cabal.victim)
            else:
                self._shown = tuple(p for p in peers if self.chance.random() < 0.5)

    def holds(self, to: int, message: object) -> int | None:
        """See `Strategy`."""
        if not isinstance(message, GroupMessage) or to in self._shown:
            return 0
        if message.log != self.host.number and not self._hides_all:
            return 0
        self.did()
        return None


class ShowPrefix(Strategy):
    """Shows everybody but its pet a log that ends some groups earlier."""

    name = "prefix"

    def join(self, host: "FaultyReplica") -> None:
        """See `Strategy`."""
        super().join(host)
        self._behind = self.chance.randint(1, 5)

    def holds(self, to: int, message: object) -> int | None:
        """See `Strategy`."""
        if not isinstance(message, GroupMessage) or message.log != self.host.number or to == self.host.cabal.pet:
            return 0
        own = self.host.library.held[self.host.number]
        hidden = own[-self._behind :]
        if any(group.raw == message.raw for group in hidden):
            self.did()
            return None
        return 0


class JustUnderPatience(Strategy):
    """Delays all that it says so that the others' patience just holds."""

    name = "sluggish"

    def join(self, host: "FaultyReplica") -> None:
        """See `Strategy`."""
        super().join(host)
        self._share = self.chance.choice((0.3, 0.6, 0.9))

    def append_delay(self) -> int:
        """See `Strategy`."""
        self.did()
        # It knows the others' patience: it doubles as theirs does.
        return int(self.host.core.patience.present_ms * self._share)


class Censor(Strategy):
    """Never serves one client."""

    name = "censor"

    def takes(self, source: int, message: object) -> bool:  # noqa: ARG002
        """See `Strategy`."""
        if isinstance(message, Request) and _client_of(message.raw) == self.host.cabal.censored:
            self.did()
            return False
        return True


class FriendsOnly(Strategy):
    """Orders nothing but its friends' junk, one request at a time, to restore the others' patience."""

    name = "friends-only"

    def takes(self, source: int, message: object) -> bool:  # noqa: ARG002
        """See `Strategy`."""
        if isinstance(message, Request) and _client_of(message.raw) not in self.host.cabal.friends:
            self.did()
            return False
        return True


class EqualLies(Strategy):
    """Answers requests at once with forged results, the same ones as the rest of the cabal."""

    name = "forged-replies"

    def on_request(self, raw: bytes) -> None:
        """See `Strategy`."""
        setting = self.host.setting
        try:
            envelope = setting.decode(raw)
        except LayoutError:
            return
        client = setting.clients.get(envelope.client)
        if client is None:
            return
        content = envelope.content
        if isinstance(content, Open):
            forged = encode_open_reply(OpenReply(content.nonce, Status.OK, SessionId(1, 0)))
        elif isinstance(content, Administer):
            return
        else:
            results = [Result(Status.OK, 1, b"\x01forged") for _ in content.operations]
            forged = encode_operations_reply(content.session, content.first, results)
        self.did()
        # More than once: one replica's replies must count once.
        for _ in range(self.chance.choice((1, 2, 5))):
            self.host.send(client, Reply(forged), "forged reply")


class FalseReports(Strategy):
    """Says that it is far ahead, or far behind."""

    name = "false-reports"

    def report(self, said: Report) -> Report:
        """See `Strategy`."""
        self.did()
        return Report(self.chance.choice((0, said.executed + 1000, 2**63)), self.chance.choice((0, said.view + 1, 7)))


class Replayer(Strategy):
    """Sends groups again: old ones, altered ones, and some in another's name."""

    name = "replay"

    def on_tick(self) -> None:
        """See `Strategy`."""
        chance, host = self.chance, self.host
        if chance.random() > 0.2:
            return
        log = chance.randrange(len(host.library.held))
        if not host.library.held[log]:
            return
        raw = chance.choice(host.library.held[log]).raw
        to = chance.choice(host.peers)
        kind = chance.randrange(4)
        if kind == 1:
            at = chance.randrange(len(raw))
            raw = raw[:at] + bytes([raw[at] ^ 1 << chance.randrange(8)]) + raw[at + 1 :]
            host.count("altered-groups")
        elif kind == 2:
            log = (log + 1) % len(host.library.held)
            host.count("borrowed-groups")
        elif kind == 3:
            raw = raw[: chance.randrange(len(raw))]
            host.count("cut-groups")
        self.did()
        host.push(to, log, raw)


class Nuisance(Strategy):
    """Asks for what does not exist and hands over requests that are not signed."""

    name = "nuisance"

    def on_tick(self) -> None:
        """See `Strategy`."""
        chance, host = self.chance, self.host
        if chance.random() < 0.1:
            self.did()
            nonsense = FetchMessage(chance.choice((-1, 0, 2**16)), chance.choice((0, 2**62)), 0)
            host.send(chance.choice(host.peers), nonsense, "?")
            slot = 0 if host.kept is None else host.kept.slot
            part = PartWanted(chance.choice((Source.LOGS, Source.BATCHES)), chance.choice((-1, 99, 2**62)))
            host.send(chance.choice(host.peers), AskCheckpoint(), "?")
            host.send(chance.choice(host.peers), AskPart(slot, part), "?")
            host.send(chance.choice(host.peers), Request(chance.randbytes(chance.choice((0, 1, 200, 400)))), "?")


def _client_of(envelope: bytes) -> bytes:
    return envelope[CLIENT_KEY_AT : CLIENT_KEY_AT + 65]
