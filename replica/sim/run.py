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

from replica.core.genesis import Genesis
from replica.sim.audience import Audience
from replica.sim.bounds import SLOW_PATIENCES_MAX, bounds
from replica.sim.clients import CorrectClient
from replica.sim.disk import Damage
from replica.sim.faulty import Cabal, FaultyReplica
from replica.sim.host import Host
from replica.sim.logs import ClientKey, Verifier, make_cluster
from replica.sim.operator import Change, Newcomer, Operator
from replica.sim.oracle import Oracle
from replica.sim.registrar import Registrar
from replica.sim.releaser import Releaser
from replica.sim.repertoire import make_strategy
from replica.sim.replica import CorrectReplica
from replica.sim.scenario import Scenario, draw
from replica.sim.setting import CLIENTS_FROM, OPERATOR, VILLAINS_FROM, Setting
from replica.sim.slow import Slow
from replica.sim.strategies import Crash, Silent
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

    def __init__(
        self,
        scenario: Scenario,
        trace: Callable[[str], None] | None = None,
        audience: Audience | None = None,
    ) -> None:
        self.scenario = scenario
        self.world = World(scenario.seed, trace=trace)
        limits = scenario.limits
        operator = ClientKey(OPERATOR, real=scenario.real_signatures)
        genesis, logs = make_cluster(
            scenario.f,
            scenario.ordering,
            limits,
            scenario.seed,
            real=scenario.real_signatures,
            operators=(operator.public,) if scenario.changes or scenario.orders or scenario.releases else (),
        )
        self.is_healed = False
        self.correct = tuple(i for i in range(scenario.n) if i not in scenario.faulty)
        windows = (limits.checkpoint_interval, limits.session_window, limits.sessions_per_client_max)
        oracle = Oracle(*windows, genesis.operators)
        self.witness = Witness(genesis.cluster_id(), scenario.n, frozenset(self.correct), oracle, bounds(scenario))
        self.witness.clock = lambda: self.world.now
        self.setting = Setting(
            world=self.world,
            network=Network(self.world, scenario.weather),
            genesis=genesis,
            verifier=Verifier(genesis, real=scenario.real_signatures),
            witness=self.witness,
            patience_ms=scenario.patience_ms,
            append_ms_max=scenario.append_ms_max,
            milestone_intervals=scenario.milestone_intervals,
            retained=scenario.retained,
            audience=audience or Audience(),
            real_signatures=scenario.real_signatures,
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
        self.operator: Operator | Registrar | Releaser | None = None
        if scenario.changes:
            calls = {"lose": self._lose, "enter": self._enter, "settled": self._settled}
            self.operator = Operator(self.setting, operator, scenario.changes, **calls)  # type: ignore[arg-type]
        elif scenario.orders:
            correct, evil = (tuple(one.key.public for one in of) for of in (self.clients, self.villains))
            self.operator = Registrar(self.setting, operator, scenario.orders, correct=correct, faulty=evil)
        elif scenario.releases:
            self.operator = Releaser(self.setting, operator, scenario.releases)

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
        if self.operator is not None:
            self.operator.start()
        self.world.run(self.scenario.storm_ms)
        self._heal()
        healed = self.world.now
        # New requests come one after the other, so that several views with faulty primaries are seen.
        for i in range(NEW_REQUESTS):
            for client in self.clients:
                self.world.after(1 + i * 400, lambda c=client: c.ask(forever=True))  # type: ignore[misc]
        self.world.run(healed + max(NEW_REQUESTS * 400, self.scenario.goes_on_ms))
        self._bring_to_an_end(healed, self._who_is_owed)
        self.world.counts["heal-ms-max"] = self.world.now - healed
        for client in self.clients:
            client.rest()
        for villain in self.villains:
            villain.rest()
        calm = self.world.now
        self._bring_to_an_end(calm, self._what_waits)
        self.world.counts["calm-ms-max"] = self.world.now - calm
        # Where what it said later was forgotten, it takes a transfer of the state to show it that there was more.
        shown = self.world.now + self.scenario.liveness_ms
        self.world.run(shown, lambda: bool(self.witness.violations) or not self._goes_on_rolled_back())
        return self._verdict()

    def _goes_on_rolled_back(self) -> list[int]:
        """Return who was rolled back and does not know it."""
        return [number for number, one in self.replicas.items() if one.rolled_back and one.core.halted is None]

    def _bring_to_an_end(self, began: int, what_waits: Callable[[], list[str]]) -> None:
        self.world.run(began + self.scenario.liveness_ms, lambda: bool(self.witness.violations) or not what_waits())
        waits = what_waits()
        if waits and not self.witness.violations:
            text = f"{self.world.now - began} ms after the network healed: {'; '.join(waits)}"
            self.witness.violation("liveness", text)

    def _who_is_owed(self) -> list[str]:
        """Return which clients still wait for what a healed network must answer; others go on asking meanwhile."""
        waits = [f"client {c.number} waits for {len(c.obliged)} answers" for c in self.clients if c.obliged]
        return waits + (self.operator.waits_for if self.operator is not None else [])

    def _what_waits(self) -> list[str]:
        """Return what must come to an end when nobody asks for more."""
        waits = [f"client {c.number} waits for {len(c.unanswered)} answers" for c in self.clients if c.unanswered]
        sound = {number: replica for number, replica in self.replicas.items() if not replica.rolled_back}
        reached = max(r.core.executed for r in sound.values())
        held = Counter(digest for r in sound.values() for digest in r.core.waiting_requests())
        # A faulty primary may ignore for ever what its client did not send to a quorum of correct replicas.
        present = self.setting.genesis if self.operator is None or not self.operator.chain else self.operator.chain[-1]
        all_are_sound = len(sound) == present.n
        enough = 1 if all_are_sound else present.quorum
        owed = sum(1 for holders in held.values() if holders >= enough)
        if owed:
            waits.append(f"{owed} requests are held by {enough} correct replicas or more")
        for number, replica in sound.items():
            if replica.core.executed < reached:
                waits.append(
                    f"replica {number} in view {replica.core.view} is at slot {replica.core.executed} of {reached}"
                )
        return waits

    def _slow(self) -> dict[int, list[Slow]]:
        """Return what faulty replicas do to be slow and nothing else."""
        hosts = {number: host for number, host in self.hosts.items() if isinstance(host, FaultyReplica)}
        # Who is mute, or no member any more, is no primary, whatever it takes itself for.
        lists = len(self.setting.links)
        mute = {Silent, Crash}
        hosts = {
            number: host
            for number, host in hosts.items()
            if host.genesis.list_number == lists and not any(type(one) in mute for one in host.strategies)
        }
        return {number: [one for one in host.strategies if isinstance(one, Slow)] for number, host in hosts.items()}

    def _heal(self) -> None:
        self.is_healed = True
        self.setting.network.heal(self.scenario.healed)
        for replica in self.replicas.values():
            replica.restart()
        for strategies in self._slow().values():
            for strategy in strategies:
                strategy.forgive()
        for client in self.clients:
            client.oblige()
            for host in self.hosts.values():
                host.welcome(client.number)

    def _verdict(self) -> Outcome:
        states = {}
        for number, replica in self.replicas.items():
            core = replica.core
            replica.count_refusals()
            self.witness.state_digest(number, core.executed, core.executor.digest())
            states[number] = (core.executed, core.contents())
            try:
                core.check()
            except RuntimeError as error:
                self.witness.violation("bounds", f"replica {number}: {error}")
            if not replica.is_milestone_sound():
                self.witness.violation("state", f"what replica {number} stored is not what its header names")
        for number in self._goes_on_rolled_back():
            self.witness.violation("rollback", f"replica {number} was rolled back and goes on")
        for number, strategies in self._slow().items():
            longest = max((strategy.longest for strategy in strategies), default=0)
            self.world.counts["slow-patiences-max"] = max(self.world.counts["slow-patiences-max"], longest)
            if longest > SLOW_PATIENCES_MAX:
                text = f"replica {number} was slow, and the primary of one view, for {longest} patiences"
                self.witness.violation("slow", text)
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

    # Changes of the members.

    def _lose(self, node: int) -> None:
        """Let a correct replica be lost for good, as one of the f faulty ones."""
        self.replicas.pop(node).crash()
        self.world.counts["replicas-lost"] += 1

    def _settled(self, genesis: Genesis) -> bool:
        """Say whether all correct members of a list have the state with which it began."""
        return all(
            replica.genesis.list_number >= genesis.list_number and replica.core.executed >= genesis.base
            for replica in self.replicas.values()
        )

    def _enter(self, change: Change, newcomers: list[Newcomer], chain: list[Genesis]) -> None:
        """Start who comes in, and tell the clients after a while; who is no member any more is looked at no more."""
        for newcomer in newcomers:
            host = CorrectReplica(self.setting, newcomer.number, newcomer.log, node=newcomer.node, chain=chain)
            self.witness.correct |= {newcomer.node}
            self.replicas[newcomer.node] = host
            self.hosts[newcomer.node] = host
            host.start()
        keys = {member.log_public_key for member in chain[-1].members}
        for node, host in list(self.replicas.items()):
            if host.log.public_key not in keys:
                del self.replicas[node]
                if change.off:
                    self.world.counts["switched-off"] += 1
                    host.crash()
        nodes = [self.setting.places.get(member.log_public_key, member.number) for member in chain[-1].members]

        def tell(client: CorrectClient) -> None:
            client.adopt(chain[-1], nodes)
            for node in nodes:
                self.hosts[node].welcome(client.number)

        for client in self.clients:
            self.world.after(self.world.random.randint(0, 500), lambda c=client: tell(c))  # type: ignore[misc]

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
        for damage in scenario.damages:
            world.at(moment(), lambda d=damage: self._absence(d))  # type: ignore[misc]
        for _ in range(scenario.power_cuts):
            world.at(moment(), self._power_cut)
        if scenario.rolled_back is not None:
            replica = self.replicas[scenario.rolled_back]
            world.at(moment(), lambda: self._put_aside(replica))

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
        replica = self.replicas[self.world.random.choice(list(self.replicas))]
        replica.crash()
        self.world.after(self.world.random.randint(10, 1500), replica.restart)

    def _power_cut(self) -> None:
        """Let all correct replicas crash at once."""
        self.world.counts["power-cuts"] += 1
        for replica in self.replicas.values():
            replica.crash()
            self.world.after(self.world.random.randint(10, 1500), replica.restart)

    def _absence(self, damage: Damage) -> None:
        """Let a replica be away for several checkpoints, and come back with a disk that suffered."""
        chance = self.world.random
        replica = self.replicas[chance.choice([i for i in self.replicas if i != self.scenario.rolled_back])]
        if damage is Damage.BATCHES:
            replica.on_milestone = self._leave_with_batches
        else:
            self._leave(replica, damage)

    def _leave_with_batches(self, replica: CorrectReplica) -> None:
        """Let a replica be away as soon as there is something in flight at its milestone's cut: that is seldom."""
        is_wanted = not self.is_healed and not any(other.is_down for other in self.replicas.values())
        if is_wanted and replica.kept is not None and replica.kept.batches:
            replica.on_milestone = lambda _: None
            self._leave(replica, Damage.BATCHES)

    def _leave(self, replica: CorrectReplica, damage: Damage) -> None:
        chance = self.world.random
        replica.crash()

        def come_back() -> None:
            if replica.is_down:
                replica.restart(damage if self._can_do_without(replica) else Damage.NONE)

        self.world.after(chance.randint(800, max(1000, self.scenario.storm_ms // 3)), come_back)

    def _can_do_without(self, damaged: CorrectReplica) -> bool:
        """Say whether others hold all that a replica has; else what it loses would be one fault too many.

        Whoever has read its log to the end has everything that it rests on. All of it is made durable there, and
        nobody else is still mending its own disk.
        """
        others = [r for i, r in self.replicas.items() if r is not damaged and i != self.scenario.rolled_back]
        if any(other.is_down or not other.core.is_live for other in others):
            return False
        if any(other.genesis.list_number != damaged.genesis.list_number for other in others):
            return False
        if all(other.core.read(damaged.number) < damaged.log.last for other in others):
            return False
        for other in others:
            other.disk.sync()
        return True

    def _put_aside(self, replica: CorrectReplica) -> None:
        """Take a copy of a replica's disk and trusted state, and bring it back when all others know more."""
        copy = replica.put_aside()
        if copy is None:
            self.world.after(100, lambda: self._put_aside(replica))
            return
        end = copy.log.last

        def bring_back() -> None:
            if self.is_healed or replica.core.halted is not None:
                return
            others = [other for other in self.replicas.values() if other is not replica]
            if all(not other.is_down and other.core.received(replica.number) > end for other in others):
                replica.roll_back(copy)
            else:
                self.world.after(100, bring_back)

        self.world.after(self.world.random.randint(100, 4000), bring_back)

    def _disconnect(self) -> None:
        chance = self.world.random
        client = chance.choice(self.clients)
        number = chance.choice(list(self.hosts))
        client.disconnect(number)
        host = self.hosts[number]
        self.world.after(chance.randint(10, 1000), lambda: host.welcome(client.number))


def run_seed(
    seed: int, *, trace: Callable[[str], None] | None = None, overrides: dict[str, Any] | None = None
) -> Outcome:
    """Run the scenario of one seed; `overrides` replaces some of its fields."""
    scenario = draw(seed)
    if overrides:
        scenario = replace(scenario, **overrides)
    back = scenario.rolled_back
    if back is not None and (back in scenario.faulty or back >= scenario.n or len(scenario.faulty) >= scenario.f):
        # After what was replaced it would be one fault too many, or is not there.
        scenario = replace(scenario, rolled_back=None)
    return Run(scenario, trace).play()
