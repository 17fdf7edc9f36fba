"""A stage for scripted runs: a calm network, and only what the script makes happen.

A `Story` says who is faulty and what happens when. Its clients ask for what the script says, its faulty replicas behave
well but for the tricks that the script gives them, and the witness judges it like any other run. It ends when every
request is answered and all correct replicas stand at the same slot.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from replica.apps import kv
from replica.core.genesis import Limits, Ordering
from replica.core.group import VerifiedGroup
from replica.sim.chronicle import Chronicle, Facts, client_name
from replica.sim.clients import CorrectClient, Habits
from replica.sim.faulty import FaultyReplica, Puppet
from replica.sim.messages import GroupMessage
from replica.sim.run import Outcome, Run
from replica.sim.scenario import LIMITS, Scenario, draw
from replica.sim.strategies import Strategy
from replica.sim.world import Weather

PATIENCE_MS = 300
CLIENT_PATIENCE_MS = 100
LONGEST_MS = 20_000
CALM = Weather(delay_min=1, delay_max=3)
# Checkpoints come seldom enough to stay out of a story that is not about them.
_LIMITS = replace(LIMITS, checkpoint_interval=32, window=64)


@dataclass(frozen=True, slots=True)
class Story:
    """One scripted run. tells: what a reader should know. faulty: at most f replicas. script: makes it happen."""

    name: str
    tells: str
    script: Callable[["Stage"], None]
    faulty: tuple[int, ...]
    f: int = 1
    clients: int = 2
    limits: Limits = _LIMITS

    def scenario(self, ordering: Ordering) -> Scenario:
        """Return the run in which nothing happens but the script."""
        return replace(
            draw(1),
            f=self.f,
            ordering=ordering,
            limits=self.limits,
            faulty=self.faulty,
            strategies=((),) * len(self.faulty),
            real_signatures=False,
            weather=CALM,
            healed=CALM,
            patience_ms=PATIENCE_MS,
            milestone_intervals=1,
            retained=0,
            append_ms_max=1,
            liveness_ms=LONGEST_MS,
            clients=self.clients,
            faulty_clients=0,
            habits=Habits(patience_ms=CLIENT_PATIENCE_MS),
        )


class Hide(Strategy):
    """Shows a replica no group for which `rule` says so: (to whom, the group)."""

    name = "hide"

    def __init__(self, rule: Callable[[int, VerifiedGroup], bool]) -> None:
        super().__init__()
        self._rule = rule

    def holds(self, to: int, message: object) -> int | None:
        """See `Strategy`."""
        if not isinstance(message, GroupMessage):
            return 0
        group = self.host.verifier.group(message.log, message.raw)
        if group is None or not self._rule(to, group):
            return 0
        self.did()
        return None


class Rewrite(Strategy):
    """Appends, for each payload, what `rule` makes of it; None for nothing."""

    name = "rewrite"

    def __init__(self, rule: Callable[[bytes], bytes | None]) -> None:
        super().__init__()
        self._rule = rule

    def entries(self, payloads: list[bytes]) -> list[bytes]:
        """See `Strategy`."""
        return [said for payload in payloads if (said := self._rule(payload)) is not None]


class Stage(Run):
    """One story being played."""

    def __init__(self, story: Story, ordering: Ordering, trace: Callable[[str], None] | None = None) -> None:
        self.story = story
        self.chronicle = Chronicle()
        super().__init__(story.scenario(ordering), trace, self.chronicle)
        self.chronicle.begin(
            self.setting.genesis, frozenset(story.faulty), self.setting.clients, lambda: self.world.now
        )
        self._numbers = [0] * story.clients
        self._pending = 0  # things that the script still waits for

    @property
    def facts(self) -> Facts:
        """What happened so far."""
        return self.chronicle.facts

    def transcript(self) -> list[str]:
        """Return what happened, for a reader."""
        scenario = self.scenario
        mode = f"# {scenario.ordering.label}, n = {scenario.n}, faulty: {', '.join(map(str, scenario.faulty))}"
        return [mode, *self.chronicle.text()]

    def play(self) -> Outcome:
        """Let it all happen."""
        for host in self.hosts.values():
            host.start()
            for client in self.clients:
                host.welcome(client.number)
        self.story.script(self)
        self._bring_to_an_end(0, self._what_is_left)
        return self._verdict()

    def _what_is_left(self) -> list[str]:
        return [*(["the script is not at its end"] if self._pending else []), *self._what_waits()]

    # What a script can do.

    def at(self, ms: int, text: str, action: Callable[[], None]) -> None:
        """Do something at this time; `text` tells a reader what."""
        self._pending += 1
        self.world.at(ms, lambda: self._do(text, action))

    def when(self, condition: Callable[[], bool], text: str, action: Callable[[], None]) -> None:
        """Do something as soon as a condition holds; it is looked at every millisecond."""
        self._pending += 1

        def look() -> None:
            if condition():
                self._do(text, action)
            else:
                self.world.after(1, look)

        self.world.after(0, look)

    def _do(self, text: str, action: Callable[[], None]) -> None:
        self._pending -= 1
        self.chronicle.direct(text)
        action()

    def ask(self, client: int, *times: int) -> None:
        """Let a client ask for an operation at each of these times."""
        for ms in times:
            self._pending += 1
            self.world.at(ms, lambda: self._ask(client))

    def keep_asking(self, client: int, ms: int, every: int, as_long_as: Callable[[], bool]) -> None:
        """Let a client ask for one operation after the other."""
        self._pending += 1

        def again() -> None:
            self._ask(client)
            if as_long_as():
                self._pending += 1
                self.world.after(every, again)

        self.world.at(ms, again)

    def _ask(self, client: int) -> None:
        self._pending -= 1
        asking: CorrectClient = self.clients[client]
        self._numbers[client] += 1
        name = f"{client_name(asking.number)}{self._numbers[client]}"
        operation = kv.put(name.encode(), b"done")
        self.chronicle.name(operation, name)
        asking.ask_for(name.encode(), operation)

    def trick(self, replica: int, *strategies: Strategy) -> None:
        """Give a faulty replica something to do."""
        host = self.faulty(replica)
        for strategy in strategies:
            host.strategies.append(strategy)
            strategy.join(host)

    def faulty(self, replica: int) -> FaultyReplica:
        """Return a faulty replica."""
        host = self.hosts[replica]
        if not isinstance(host, FaultyReplica):
            raise TypeError(f"replica {replica} is not faulty in this story")
        return host

    def puppet(self, replica: int) -> Puppet:
        """Return what a faulty replica knows, and would say if it were correct."""
        return self.faulty(replica).puppet

    def stop(self, replica: int) -> None:
        """Let a faulty replica stop for ever, in the middle of whatever it does."""
        self.hosts[replica].is_down = True

    def crash(self, *replicas: int) -> None:
        """Let correct replicas crash."""
        for number in replicas:
            self.replicas[number].crash()

    def restart(self, *replicas: int) -> None:
        """Let crashed replicas come back with what their disks hold."""
        for number in replicas:
            self.replicas[number].restart()

    def cut(self, *pairs: tuple[int, int]) -> None:
        """Lose everything between these (source, destination) pairs."""
        self.setting.network.blocked.update(dict.fromkeys(pairs))

    def mend(self, *pairs: tuple[int, int]) -> None:
        """Lose nothing any more between these pairs."""
        for pair in pairs:
            self.setting.network.blocked.pop(pair, None)

    def waits(self, client: int, number: int) -> bool:
        """Say whether a client still waits for its request of this number, asked for or not."""
        asked = self.facts.asked.get(f"{client_name(self.clients[client].number)}{number}")
        return asked is None or asked.answered_ms is None

    def all_suspect(self, *replicas: int) -> bool:
        """Say whether all of these are at the end of their patience with the first view."""
        cores = [self.hosts[i].core for i in replicas]
        return all(core.suspects or core.view > 0 for core in cores)
