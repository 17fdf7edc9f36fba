"""One run: a storm in which nothing may go wrong, then a healed network in which everything must go on.

    safety    faults of every kind; nothing that correct replicas and clients do or believe may be wrong
    liveness  partitions and losses end, delays become short, faulty replicas and clients stay faulty; every request of
              a correct client that is still waited for, and some new ones, must be answered within a bound, while
              other requests go on; when these end too, no correct replica may be left behind, and no request that a
              quorum of correct replicas holds may wait

Everything follows from the seed; `run_seed` twice gives the same trace hash.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from replica.sim.clients import CorrectClient
from replica.sim.faulty import Cabal, FaultyReplica
from replica.sim.logs import Verifier, make_cluster
from replica.sim.oracle import Oracle
from replica.sim.repertoire import make_strategy
from replica.sim.replica import CorrectReplica, Host
from replica.sim.scenario import Scenario, draw
from replica.sim.setting import CLIENTS_FROM, VILLAINS_FROM, Setting
from replica.sim.villains import FaultyClient
from replica.sim.witness import Violation, Witness
from replica.sim.world import Network, World

NEW_REQUESTS = 3


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one run."""

    seed: int
    violations: tuple[Violation, ...]
    trace_hash: str
    virtual_ms: int
    counts: Counter[str]


class Run:
    """One virtual world from its first event to its verdict."""

    def __init__(self, scenario: Scenario, trace: Callable[[str], None] | None = None) -> None:
        self.scenario = scenario
        self.world = World(scenario.seed, trace=trace)
        limits = scenario.limits
        genesis, logs = make_cluster(
            scenario.f, scenario.ordering, limits, scenario.seed, real=scenario.real_signatures
        )
        self.correct = tuple(i for i in range(scenario.n) if i not in scenario.faulty)
        oracle = Oracle(limits.checkpoint_interval, limits.session_window, limits.sessions_per_client_max)
        self.witness = Witness(genesis.cluster_id(), scenario.n, frozenset(self.correct), oracle, _bounds(scenario))
        self.witness.clock = lambda: self.world.now
        self.setting = Setting(
            world=self.world,
            network=Network(self.world, scenario.weather),
            genesis=genesis,
            verifier=Verifier(genesis, real=scenario.real_signatures),
            witness=self.witness,
            patience_ms=scenario.patience_ms,
            append_ms_max=scenario.append_ms_max,
        )
        self.replicas = {i: CorrectReplica(self.setting, i, logs[i]) for i in self.correct}
        real = scenario.real_signatures
        self.clients = [
            CorrectClient(self.setting, CLIENTS_FROM + i, scenario.habits, real=real) for i in range(scenario.clients)
        ]
        self.villains = [
            FaultyClient(self.setting, VILLAINS_FROM + i, real=real) for i in range(scenario.faulty_clients)
        ]
        chance = self.world.random
        self.cabal = Cabal(
            victim=chance.choice(self.correct),
            pet=chance.choice(self.correct),
            censored=chance.choice(self.clients).key.public,
            friends={villain.key.public for villain in self.villains},
        )
        self.hosts: dict[int, Host] = {}
        faulty = dict(zip(scenario.faulty, scenario.strategies, strict=True))
        for i in range(scenario.n):
            if i in faulty:
                chosen = [make_strategy(name) for name in faulty[i]]
                self.hosts[i] = FaultyReplica(self.setting, i, logs[i], self.cabal, chosen)
            else:
                self.hosts[i] = self.replicas[i]

    def play(self) -> Outcome:
        """Let it all happen."""
        for host in self.hosts.values():
            host.start()
        for client in self.clients:
            for host in self.hosts.values():
                self.world.after(self.world.random.randint(0, 30), lambda h=host, c=client: h.welcome(c.number))  # type: ignore[misc]
            client.start()
        for villain in self.villains:
            villain.start()
        self._plan_faults()
        self.world.run(self.scenario.storm_ms)
        self._heal()
        healed = self.world.now
        # New requests come one after the other, so that several views with faulty primaries are seen.
        for i in range(NEW_REQUESTS):
            for client in self.clients:
                self.world.after(1 + i * 400, lambda c=client: c.ask(forever=True))  # type: ignore[misc]
        self.world.run(healed + NEW_REQUESTS * 400)
        self._bring_to_an_end(healed, self._who_is_owed)
        self.world.counts["heal-ms-max"] = self.world.now - healed
        for client in self.clients:
            client.rest()
        for villain in self.villains:
            villain.rest()
        calm = self.world.now
        self._bring_to_an_end(calm, self._what_waits)
        self.world.counts["calm-ms-max"] = self.world.now - calm
        return self._verdict()

    def _bring_to_an_end(self, began: int, what_waits: Callable[[], list[str]]) -> None:
        self.world.run(began + self.scenario.liveness_ms, lambda: bool(self.witness.violations) or not what_waits())
        waits = what_waits()
        if waits and not self.witness.violations:
            text = f"{self.world.now - began} ms after the network healed: {'; '.join(waits)}"
            self.witness.violation("liveness", text)

    def _who_is_owed(self) -> list[str]:
        """Return which clients still wait for what a healed network must answer; others go on asking meanwhile."""
        return [f"client {c.number} waits for {len(c.obliged)} answers" for c in self.clients if c.obliged]

    def _what_waits(self) -> list[str]:
        """Return what must come to an end when nobody asks for more."""
        waits = [f"client {c.number} waits for {len(c.unanswered)} answers" for c in self.clients if c.unanswered]
        reached = max(r.core.executed for r in self.replicas.values())
        held = Counter(digest for r in self.replicas.values() for digest in r.core.waiting_requests())
        # A faulty primary may ignore for ever what its client did not send to a quorum of correct replicas.
        enough = self.setting.genesis.quorum if self.scenario.faulty else 1
        owed = sum(1 for holders in held.values() if holders >= enough)
        if owed:
            waits.append(f"{owed} requests are held by {enough} correct replicas or more")
        for number, replica in self.replicas.items():
            if replica.core.executed < reached:
                waits.append(
                    f"replica {number} in view {replica.core.view} is at slot {replica.core.executed} of {reached}"
                )
        return waits

    def _heal(self) -> None:
        self.setting.network.heal(self.scenario.healed)
        for replica in self.replicas.values():
            replica.restart()
        for client in self.clients:
            client.oblige()
            for host in self.hosts.values():
                host.welcome(client.number)

    def _verdict(self) -> Outcome:
        states = {}
        for number, replica in self.replicas.items():
            core = replica.core
            self.witness.state_digest(number, core.executed, core.executor.digest())
            states[number] = (core.executed, core.contents())
            try:
                core.check()
            except RuntimeError as error:
                self.witness.violation("bounds", f"replica {number}: {error}")
        self.witness.settle(states)
        counts = self.world.counts + self.witness.counts
        counts["runs"] = 1
        counts["runs-real-signatures"] = int(self.scenario.real_signatures)
        counts[f"runs-n{self.scenario.n}"] = 1
        counts[f"runs-{self.scenario.ordering.label}"] = 1
        counts["runs-with-faulty"] = int(bool(self.scenario.faulty))
        counts["events"] = self.world.events
        return Outcome(
            self.scenario.seed, tuple(self.witness.violations), self.world.trace_hash(), self.world.now, counts
        )

    # Faults of the network and of correct replicas.

    def _plan_faults(self) -> None:
        chance, scenario, world = self.world.random, self.scenario, self.world
        nodes = [*range(scenario.n), *(client.number for client in self.clients)]

        def moment() -> int:
            return chance.randint(0, scenario.storm_ms)

        for _ in range(scenario.partitions):
            world.at(moment(), lambda: self._partition(nodes))
        for _ in range(scenario.stalls):
            world.at(moment(), lambda: self._stall(nodes))
        for _ in range(scenario.crashes):
            world.at(moment(), self._crash)
        for _ in range(scenario.disconnects):
            world.at(moment(), self._disconnect)

    def _partition(self, nodes: list[int]) -> None:
        chance, network = self.world.random, self.setting.network
        side = [node for node in nodes if chance.random() < 0.4]
        others = [node for node in nodes if node not in side]
        pairs = [(a, b) for a in side for b in others]
        kind = chance.randrange(3)
        if kind == 1:
            pairs += [(b, a) for a, b in pairs]
        elif kind == 2:
            # A bridge: one node of the other side is still reached.
            pairs = [(a, b) for a, b in pairs if b != others[0]] + [(b, a) for a, b in pairs if b != others[0]]
        self.world.counts[f"net-partition-{('one-way', 'two-way', 'bridged')[kind]}"] += 1
        self.world.note(f"partition {kind} {side}")
        for pair in pairs:
            network.blocked[pair] = None

        def end() -> None:
            self.world.note("partition ends")
            for pair in pairs:
                network.blocked.pop(pair, None)

        self.world.after(chance.randint(50, 3000), end)

    def _stall(self, nodes: list[int]) -> None:
        chance, network = self.world.random, self.setting.network
        source, destination = chance.sample(nodes, 2)
        self.world.counts["net-stall"] += 1
        self.world.note(f"stall {source}>{destination}")
        network.stalled[source, destination] = self.world.now + chance.randint(100, 4000)

    def _crash(self) -> None:
        replica = self.replicas[self.world.random.choice(self.correct)]
        replica.crash()
        self.world.after(self.world.random.randint(10, 1500), replica.restart)

    def _disconnect(self) -> None:
        chance = self.world.random
        client = chance.choice(self.clients)
        number = chance.choice(list(self.hosts))
        client.disconnect(number)
        host = self.hosts[number]
        self.world.after(chance.randint(10, 1000), lambda: host.welcome(client.number))


def _bounds(scenario: Scenario) -> dict[str, int]:
    window = scenario.limits.window
    return {
        "slots": 4 * window,
        "votes": 4 * window,
        "commits": 4 * window,
        "checkpoints": 8,
        "own-digests": 8,
        # What waits behind a gap is taken at once when the gap closes.
        "unread": 4096 + 65 * scenario.limits.group_entries_max,
        "requests": 8192,
    }


def run_seed(
    seed: int, *, trace: Callable[[str], None] | None = None, overrides: dict[str, Any] | None = None
) -> Outcome:
    """Run the scenario of one seed; `overrides` replaces some of its fields."""
    scenario = draw(seed)
    if overrides:
        scenario = replace(scenario, **overrides)
    return Run(scenario, trace).play()
