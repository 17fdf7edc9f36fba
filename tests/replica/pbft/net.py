"""PBFT machines with checkpoints in a made-up network: whatever order messages come in, they execute the same."""

import random
from collections import deque

from replica.pbft.machine import PbftCore
from replica.pbft.messages import Broadcast, Cluster, Executed, Request, StateWanted, Tell

INTERVAL, WINDOW, PIPELINE, PATIENCE_MS = 4, 8, 3, 300


def sign(author: int, body: object) -> bytes:
    return f"{author} {body!r}".encode()


def cluster(f: int = 1) -> Cluster:
    verify = lambda m: m.signature == sign(m.author, m.body)  # noqa: E731
    return Cluster(3 * f + 1, f, 2 * f + 1, sign, verify, INTERVAL, WINDOW, PIPELINE)


class Net:
    """Machines and what is under way between them, in order for each pair; `lost` says which messages never arrive."""

    def __init__(self, seed: int, f: int = 1) -> None:
        self.random = random.Random(seed)
        self.cluster = cluster(f)
        self.cores = [PbftCore(self.cluster, number, PATIENCE_MS) for number in range(self.cluster.n)]
        self.executed: list[list[str | None]] = [[] for _ in self.cores]
        self.under_way: dict[tuple[int, int], deque] = {}
        self.down: set[int] = set()
        self.cut: set[tuple[int, int]] = set()
        self.now = 0
        self.replaced = {}  # number -> what a faulty replica says instead, to whom: (effect) -> [(to, message)]

    def carry_out(self, number: int, effects: list) -> None:
        left = deque(effects)
        while left:
            effect = left.popleft()
            if isinstance(effect, Broadcast):
                others = [peer for peer in range(self.cluster.n) if peer != number]
                says = [(peer, effect.message) for peer in others]
                if number in self.replaced:
                    says = self.replaced[number](effect.message, says)
                for peer, message in says:
                    if (number, peer) not in self.cut:
                        self.under_way.setdefault((number, peer), deque()).append(message)
            elif isinstance(effect, Tell):
                if (number, effect.to) not in self.cut:
                    self.under_way.setdefault((number, effect.to), deque()).append(effect.message)
            elif isinstance(effect, Executed):
                name = None if effect.request is None else effect.request.operation
                self.executed[number].append(name)
            elif isinstance(effect, StateWanted):
                digest = repr(self.executed[number][: effect.slot]).encode()
                left.extend(self.cores[number].on_state(effect.slot, digest))

    def ask(self, *names: str, to=None) -> None:
        for name in names:
            request = Request(name[0], int(name[1:]), name)
            for number in range(self.cluster.n) if to is None else to:
                if number not in self.down:
                    self.carry_out(number, self.cores[number].on_request(request))

    def step(self) -> bool:
        """Deliver one message, of a pair chosen by chance; say whether there was one."""
        waiting = [pair for pair, messages in self.under_way.items() if messages and pair[1] not in self.down]
        if not waiting:
            return False
        source, destination = self.random.choice(sorted(waiting))
        message = self.under_way[source, destination].popleft()
        self.carry_out(destination, self.cores[destination].on_message(message))
        return True

    def run(self, ms: int = 5000) -> None:
        """Let time pass, and everything arrive meanwhile."""
        for _ in range(ms // 50):
            while self.random.random() > 0.01 and self.step():
                pass
            self.now += 50
            for number, core in enumerate(self.cores):
                if number not in self.down:
                    self.carry_out(number, core.on_tick(self.now))
        while self.step():
            pass

    def kill(self, number: int) -> None:
        self.down.add(number)

    def up(self, *but: int) -> list[int]:
        return [number for number in range(self.cluster.n) if number not in self.down and number not in but]

    def check_agreement(self, *faulty: int) -> None:
        """No two correct replicas executed different things, and none executed anything twice."""
        logs = [log for number, log in enumerate(self.executed) if number not in faulty]
        longest = max(logs, key=len)
        for log in logs:
            assert log == longest[: len(log)]
        said = [name for name in longest if name is not None]
        assert len(said) == len(set(said))
