"""A faulty replica: it owns a real log, which never says two things at one index; all else is up to its strategies.

A real core, the *puppet*, reads what it is shown and says what a correct replica would say now. Strategies
(`replica.sim.strategies`) change that before it is appended, choose who is shown which part of the log, what is
answered, dropped and delayed, and append on their own. The log takes whatever it is given. What was really appended is
fed back to the puppet, so that it goes on from there; when the own log broke a rule the puppet has nothing more to say,
and strategies may still speak.

The faulty replicas of one run form a *cabal*: each sees the others' logs whole and at once, and they share their choice
of victims and friends.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from replica.core import events
from replica.core.chain import found
from replica.core.checkpoint import Header
from replica.core.events import Event
from replica.core.genesis import Genesis
from replica.core.group import VerifiedGroup
from replica.core.knowledge import Knowledge
from replica.core.layout import LayoutError
from replica.core.logstate import LogState
from replica.core.patience import Patience
from replica.core.snapshot import Fetched, MilestoneRule, Snapshot
from replica.sim.host import Host
from replica.sim.library import Library
from replica.sim.logs import Log
from replica.sim.messages import GroupMessage, Report, Request
from replica.sim.releaser import VersionedKeyValue
from replica.sim.setting import CUT_PATIENCES, WALL_MS, Setting
from replica.sim.strategies import Strategy
from replica.sim.watched import WatchedCore
from replica.sim.words import entry_in_words, group_label


class Puppet(WatchedCore):
    """The real core with its strings: it can be told that something else was appended than it asked for."""

    is_puppet = True

    @property
    def knowledge(self) -> Knowledge:
        """What it has read."""
        return self._known

    @property
    def own(self) -> LogState:
        """The reduced state of its own log."""
        return self._known.states[self.number]

    def milestone(self, slot: int) -> tuple[Header, tuple[bytes, ...], tuple[bytes, ...]] | None:
        """Return the header, the logs' states and the batches of a milestone that is not yet stable here, or None."""
        kept = self._checkpoints._kept.get(slot)  # noqa: SLF001 - nobody else looks at it
        return None if kept is None else (kept.header, kept.logs, kept.batches)

    def put_off(self) -> None:
        """Take in that what it asked for was not appended."""
        self._appending = False
        self._pen.resume()

    def _on_appended(self, group: VerifiedGroup) -> None:
        super()._on_appended(group)
        self._pen.resume()

    def _say_what_is_owed(self, *, tick: bool) -> None:
        # An own entry that waits, or broke a rule, leaves it nothing sensible to say.
        if not self._inboxes[self.number].unread:
            super()._say_what_is_owed(tick=tick)


@dataclass(slots=True)
class Cabal:
    """What the faulty replicas of one run share.

    victim: a correct replica that is kept in the dark. pet: a correct replica that alone is shown what is withheld.
    censored: the key of a client that is never served. friends: keys of faulty clients.
    hidden: the view that is being hidden (`replica.sim.hiding`); shown: up to where each member's log is shown;
    confides: whether the pet is shown all the same.
    """

    victim: int
    pet: int
    censored: bytes
    friends: set[bytes] = field(default_factory=set)
    hidden: int | None = None
    shown: dict[int, int] = field(default_factory=dict)
    confides: bool = False
    members: list["FaultyReplica"] = field(default_factory=list)


class FaultyReplica(Host):
    """A replica that does what its strategies say."""

    def __init__(
        self,
        setting: Setting,
        number: int,
        log: Log,
        cabal: Cabal,
        strategies: list[Strategy],
        *,
        node: int | None = None,
        chain: Sequence[Genesis] = (),
    ) -> None:
        self.cabal = cabal
        self.strategies = strategies
        self._is_appending = False
        self._installing: Fetched | None = None
        super().__init__(setting, number, log, node=node, chain=chain)
        cabal.members.append(self)
        for strategy in strategies:
            strategy.join(self)
        self.handle(events.Recovered(log.last, log.head))

    @property
    def puppet(self) -> Puppet:
        """The real core inside."""
        if not isinstance(self.core, Puppet):
            raise TypeError("a faulty replica has a puppet")
        return self.core

    def _make_core(self, snapshot: Snapshot | None) -> WatchedCore:
        setting = self.setting
        return Puppet(
            self.genesis,
            self.number,
            VersionedKeyValue(),
            self.verifier.heads(),
            self.verifier.envelope,
            Patience(setting.patience_ms, CUT_PATIENCES),
            snapshot=snapshot,
            milestones=MilestoneRule(intervals=setting.milestone_intervals),
        )

    def count(self, strategy: str) -> None:
        """Count that a strategy did something."""
        self.world.counts[f"attack-{strategy}"] += 1

    # What comes in.

    def receive(self, source: int, message: object) -> None:
        """See `Host`."""
        if all(strategy.takes(source, message) for strategy in self.strategies):
            super().receive(source, message)

    def on_request(self, source: int, message: Request) -> None:
        """See `Host`."""
        for strategy in self.strategies:
            strategy.on_request(message.raw)
        super().on_request(source, message)

    def handle(self, event: Event) -> None:
        """See `Host`."""
        if self.is_down:
            return
        if isinstance(event, events.Tick):
            for strategy in self.strategies:
                strategy.on_tick()
        try:
            super().handle(event)
        except Exception as error:  # noqa: BLE001 - its own entries may be anything; it fell into its own trap
            self.world.counts[f"puppet-{type(error).__name__}"] += 1
            self.is_down = True

    # What goes out.

    def send(self, to: int, message: object, label: str, hold: int = 0) -> None:
        """See `Host`."""
        for strategy in self.strategies:
            more = strategy.holds(to, message)
            if more is None:
                return
            hold += more
        for strategy in self.strategies:
            message = strategy.instead(to, message)
            if message is None:
                return
        super().send(to, message, label, hold)

    def report(self) -> Report:
        """See `Host`."""
        said = super().report()
        for strategy in self.strategies:
            said = strategy.report(said)
        return said

    def carry_out(self, effect: events.Effect) -> None:
        """See `Host`."""
        if isinstance(effect, events.Append):
            payloads = list(effect.payloads)
            for strategy in self.strategies:
                payloads = strategy.entries(payloads)
            if payloads:
                self._append_later(payloads)
            else:
                self.puppet.put_off()
        elif isinstance(effect, events.Send):
            self.reply(effect)
        elif isinstance(effect, events.Relay):
            self.relay(effect)
        elif isinstance(effect, events.Fetch):
            self.fetch(effect)
        elif isinstance(effect, events.Taken):
            self.library.add(effect.group)
        elif isinstance(effect, events.AskCheckpoint | events.AskPart):
            self.ask_about_state(effect)
        elif isinstance(effect, events.Persist):
            self.persist(effect.milestone)
        elif isinstance(effect, events.ListEnded):
            self.world.after(1, self._go_over_soon)
        elif isinstance(effect, events.Install):
            self._installing = effect.fetched
            self.world.after(1, self._begin_anew)

    def _begin_anew(self) -> None:
        """Go on with a puppet that begins with what was transferred, once nothing is being appended.

        Whoever fell behind what the others kept would else stay there, and be no adversary any more.
        """
        fetched = self._installing
        if fetched is None or self.is_down or self._is_appending:
            return
        self._installing = None
        begins = fetched.header.slot == self.genesis.base and self.before is not None
        said_under = self.before if begins and self.before is not None else self.genesis
        try:
            snapshot = fetched.snapshot(VersionedKeyValue(), said_under)
            if begins:
                snapshot = found(snapshot, self.genesis, self.verifier.heads())
        except LayoutError:
            return  # it does not notice what is planted in correct replicas, and stays behind
        self.world.counts["transfers-to-faulty"] += 1
        self.persist(fetched.milestone(), said_under)
        self._begin(snapshot)

    def _go_over_soon(self) -> None:
        """Go on under the next list of members, if this replica's log is in it."""
        if self.is_down or self._is_appending:
            return
        try:
            snapshot = self.next_list(VersionedKeyValue())
        except LayoutError:
            return  # as above
        if snapshot is not None:
            self.world.counts["faulty-went-over"] += 1
            self._begin(snapshot)

    def jump(self, genesis: Genesis) -> None:
        """See `Host`."""
        is_member = any(member.log_public_key == self.log.public_key for member in genesis.members)
        if self._is_appending or self.is_down or not is_member:
            return
        self._enter(genesis)
        self.kept = None
        self.leases.clear()
        self._begin(None)

    def _begin(self, snapshot: Snapshot | None) -> None:
        self._life += 1
        before, self.library = self.library, Library(self.genesis.n)
        self.core = self.make_core(snapshot)
        cut = (0,) * self.genesis.n if snapshot is None else snapshot.header.cut
        for log, upto in enumerate(cut):
            self.library.forget(log, upto)
        self.handle(events.Tick(self.world.now, WALL_MS + self.world.now))
        for log, groups in enumerate(before.held[: self.genesis.n]):
            for group in groups:
                if group.last > cut[log] and self.verifier.group(log, group.raw) is not None:
                    self.library.add(group)
                    self.handle(events.GroupReceived(group))
        self.handle(events.Recovered(self.log.last, self.log.head))
        self.start()

    def _append_later(self, payloads: list[bytes]) -> None:
        self._is_appending = True
        delay = self.world.random.randint(0, self.setting.append_ms_max)
        delay += sum(strategy.append_delay() for strategy in self.strategies)

        def appended() -> None:
            self._is_appending = False
            if not self.is_down:
                self._append(payloads)
                self._begin_anew()
                self._go_over_soon()

        self.world.after(delay, appended)

    def say(self, payloads: list[bytes]) -> bool:
        """Append on a strategy's behalf; say whether that was possible now."""
        # Before it has come home, a replica whose own log grows takes itself for one that was rolled back.
        if self._is_appending or self.is_down or not payloads or not self.puppet.is_live:
            return False
        self._append(payloads)
        return True

    def _append(self, payloads: list[bytes]) -> None:
        limit = self.genesis.limits.group_entries_max
        for start in range(0, len(payloads), limit):
            group = self.verifier.group(self.number, self.log.append(tuple(payloads[start : start + limit])))
            if group is None:
                raise RuntimeError("the simulated log attested what does not verify")
            self.world.note(f"{self.number} appended {group_label(group)}")
            if self.world.is_traced:
                said = "; ".join(entry_in_words(payload) for payload in group.payloads)
                self.world.remark(f"replica {self.number} (faulty): really says {said}")
            self.setting.witness.saw_group(group, self.log.public_key)
            self.library.add(group)
            self.publish(group)
            self.handle(events.Appended(group))
            for member in self.cabal.members:
                shares = member.genesis.list_number == self.genesis.list_number
                if member is not self and not member.is_down and shares:
                    member.library.add(group)
                    member.handle(events.GroupReceived(group))

    def push(self, to: int, log: int, raw: bytes) -> None:
        """Send any bytes as a group, past all strategies."""
        super().send(to, GroupMessage(log, raw), f"pushed {log} {len(raw)} bytes")
