"""A correct replica: the real core, and a shell that does what the daemon's does.

Append is answered after a while by Appended, and only then does anybody hear of the group. A correct replica may crash
and come back with what its disk (`replica.sim.disk`) then holds.
"""

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from replica.core import events
from replica.core.chain import found
from replica.core.events import Event
from replica.core.genesis import Genesis
from replica.core.group import VerifiedGroup
from replica.core.patience import Patience
from replica.core.snapshot import Fetched, Milestone, MilestoneRule, Snapshot
from replica.sim.disk import Damage, Disk
from replica.sim.host import Host
from replica.sim.library import Library
from replica.sim.logs import Log, StandInLog
from replica.sim.releaser import VersionedKeyValue
from replica.sim.setting import CUT_PATIENCES, WALL_MS, Setting
from replica.sim.watched import WatchedCore, WatchedKeyValue
from replica.sim.words import group_label


@dataclass(frozen=True, slots=True)
class Copy:
    """What an operator may have put aside: a disk and the trusted state, as they were at one moment."""

    disk: Disk
    log: StandInLog


class CorrectReplica(Host):
    """A replica that does what it should, and may crash and come back.

    rolled_back: its disk and its trusted state were replaced by an older copy, which makes it one of the f faulty ones:
    it must stop, and everything that it does before must be right. on_milestone: called when one has become durable.
    """

    def __init__(
        self, setting: Setting, number: int, log: Log, *, node: int | None = None, chain: Sequence[Genesis] = ()
    ) -> None:
        self.rolled_back = False
        self.disk = Disk()
        self._appending: tuple[bytes, ...] | None = None
        self._installing: Snapshot | None = None
        self.on_milestone: Callable[[CorrectReplica], None] = lambda _: None
        self._was_damaged = False  # and no milestone made that good since
        self._left_at: tuple[int, int] | None = None  # slot and view when it last crashed
        super().__init__(setting, number, log, node=node, chain=chain)
        self.handle(events.Recovered(log.last, log.head))

    def _make_core(self, snapshot: Snapshot | None) -> WatchedCore:
        setting, witness, number = self.setting, self.setting.witness, self.number
        witness.born(self.node, 0 if snapshot is None else snapshot.header.slot)
        return WatchedCore(
            self.genesis,
            number,
            self._application(),
            self.verifier.heads(),
            self.verifier.envelope,
            Patience(setting.patience_ms, CUT_PATIENCES),
            snapshot=snapshot,
            milestones=MilestoneRule(intervals=setting.milestone_intervals),
        )

    def _application(self) -> WatchedKeyValue:
        witness, node = self.setting.witness, self.node
        return WatchedKeyValue(lambda slot, client, operation: witness.applied(node, slot, client, operation))

    def handle(self, event: Event) -> None:
        """See `Host`."""
        if not self.is_down and self._survives(partial(super().handle, event)):
            self.setting.witness.look_at(self.node, self.core)

    def _survives(self, work: Callable[[], None]) -> bool:
        """Do something; an exception of the core is a violation and this replica's end, not the simulator's."""
        try:
            work()
        except Exception as error:  # noqa: BLE001 - whatever it is, it must be reported with its seed
            where = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__}: {error} in {where.name}, line {where.lineno} of {where.filename}"
            self.setting.witness.violation("exception", f"replica {self.number}: {text}")
            self.is_down = True
            return False
        return True

    def carry_out(self, effect: events.Effect) -> None:
        """See `Host`."""
        witness, number = self.setting.witness, self.number
        if isinstance(effect, events.Append):
            self._append(effect)
        elif isinstance(effect, events.Taken):
            self.library.add(effect.group)
            self.disk.receive(effect.group, number)
        elif isinstance(effect, events.Send):
            self.reply(effect)
        elif isinstance(effect, events.Relay):
            self.relay(effect)
        elif isinstance(effect, events.Fetch):
            self.fetch(effect)
        elif isinstance(effect, events.AskCheckpoint | events.AskPart):
            self.ask_about_state(effect)
        elif isinstance(effect, events.Persist):
            self._persist(effect.milestone)
        elif isinstance(effect, events.Install):
            self._install(effect.fetched)
        elif isinstance(effect, events.Executed):
            witness.executed(self.node, effect.slot, effect.batch.raw)
        elif isinstance(effect, events.ListEnded):
            self.world.counts["lists-ended"] += 1
            self._go_over_soon()
        else:
            log = getattr(effect, "log", None)
            witness.heard(self.node, effect, None if log is None else self.node_of(log))

    def _append(self, effect: events.Append) -> None:
        life = self._life
        self.disk.sync()
        self._appending = effect.payloads

        def appended() -> None:
            if self._life == life and not self.is_down:
                self._release(effect.payloads)

        self.world.after(self.world.random.randint(0, self.setting.append_ms_max), appended)

    def _release(self, payloads: tuple[bytes, ...]) -> None:
        group = self._attest(payloads)
        self.world.note(f"{self.number} appended {group_label(group)}")
        self.publish(group)
        self.handle(events.Appended(group))
        self._begin_anew()
        self._go_over_soon()

    def _attest(self, payloads: tuple[bytes, ...]) -> VerifiedGroup:
        group = self.verifier.group(self.number, self.log.append(payloads))
        if group is None:
            raise RuntimeError("the simulated log attested what does not verify")
        self._appending = None
        self.setting.witness.saw_group(group, self.log.public_key)
        self.library.add(group)
        self.disk.say(group)
        return group

    # Milestones and transfer.

    def _later(self, what: Callable[[], None]) -> None:
        """Do something when the disk is ready, unless it crashes before."""
        life = self._life

        def ready() -> None:
            if self._life == life and not self.is_down:
                what()

        self.world.after(self.world.random.randint(0, 20 * self.setting.append_ms_max), ready)

    def _persist(self, milestone: Milestone) -> None:
        self.disk.milestones.append(milestone)

        def durable() -> None:
            # In their order: each holds only what changed since the one before.
            while milestone in self.disk.milestones:
                self.disk.sync()
                self.persist(self.disk.milestones.pop(0))
                self.disk.take(self.kept, self.library)
                self._truncate()
                self.world.counts["milestones"] += 1
                self.on_milestone(self)
                self._go_over_soon()
                if self.is_down:
                    return

        self._later(durable)

    # Lists of members.

    def _go_over_soon(self) -> None:
        """Go on under the next list of members, once the state with which it begins is durable."""
        if self.is_down or self.core.is_appending or self._installing is not None or self.disk.milestones:
            return
        if self.core.halted is None and self.core.executed == self.core.ends:
            self._survives(self._go_over)

    def _go_over(self) -> None:
        before = self.genesis
        snapshot = self.next_list(self._application())
        if snapshot is not None:
            self.world.note(f"{self.number} goes over to list {self.genesis.list_number}")
            self.world.counts["went-over"] += 1
            self.disk.drop_logs(before, self.genesis)
            self._begin(snapshot)

    def jump(self, genesis: Genesis) -> None:
        """See `Host`."""
        if self.core.is_appending or self._installing is not None or self.core.halted is not None:
            return
        if all(member.log_public_key != self.log.public_key for member in genesis.members):
            self.crash()
            self.world.counts["left-for-good"] += 1
            return
        self.world.note(f"{self.number} jumps to list {genesis.list_number}")
        self.world.counts["jumps"] += 1
        before = self.genesis
        self._enter(genesis)
        self._was_damaged = True  # what it leaves behind is nothing that it could begin with
        self.kept = None
        self.disk.kept = None
        self.disk.milestones.clear()
        self.leases.clear()
        self.disk.drop_logs(before, genesis)
        self._begin(None)

    def _install(self, fetched: Fetched) -> None:
        self.world.counts["transfers"] += 1
        self._count_what_was_missed(fetched)
        milestone = fetched.milestone()

        def make() -> None:
            if fetched.header.slot == self.genesis.base and self.before is not None:
                snapshot = fetched.snapshot(self._application(), self.before)
                self._installing = found(snapshot, self.genesis, self.verifier.heads())
            else:
                self._installing = fetched.snapshot(self._application(), self.genesis)

        def durable() -> None:
            self.disk.milestones.clear()
            self.disk.sync()
            self.persist(milestone, self._said_under(fetched))
            self.disk.take(self.kept, self.library)
            self._truncate()
            if self._survives(make) and not self.core.is_appending:
                self._begin_anew()
                self._go_over_soon()

        self._later(durable)

    def _said_under(self, fetched: Fetched) -> Genesis:
        """Return the list under which a state was said: the last one of a list is what the next begins with."""
        at_base = fetched.header.slot == self.genesis.base and self.before is not None
        return self.before if at_base and self.before is not None else self.genesis

    def _count_what_was_missed(self, fetched: Fetched) -> None:
        """Count an absence across several checkpoints and views at once that ends with a transfer."""
        if self._left_at is None:
            return
        slot, view = self._left_at
        self._left_at = None
        genesis = self.genesis
        views = sorted((state.view for state in fetched.states), reverse=True)
        checkpoints = (fetched.header.slot - slot) // genesis.limits.checkpoint_interval
        if checkpoints >= 2 and views[genesis.quorum - 1] >= view + 2:
            self.world.counts["away-across-checkpoints-and-views"] += 1

    def _truncate(self) -> None:
        """Let the trusted log forget what lies before the cut of the milestone that is durable."""
        if self.kept is not None:
            low = self.kept.cut(self.genesis)[self.number] + 1
            # After damage, peers may give back a milestone older than the lost one: its log's part comes from them too.
            self._was_damaged = self._was_damaged and low < self.log.low
            self.log.truncate(low)
            self.world.counts["log-truncations"] += 1

    def _begin_anew(self) -> None:
        """Go on with a core that begins with what was transferred, once nothing is being appended."""
        snapshot, self._installing = self._installing, None
        if snapshot is None or self.is_down:
            return
        self.world.note(f"{self.number} installs {snapshot.header.slot}")
        self._begin(snapshot)

    def _begin(self, snapshot: Snapshot | None) -> None:
        """Make a core from a snapshot and what the disk holds beyond it."""
        self._life += 1
        self.count_refusals()
        self.core = self.make_core(snapshot)
        self.library = Library(self.genesis.n)
        if self.kept is not None:
            for log, upto in enumerate(self.kept.cut(self.genesis)):
                self.library.forget(log, upto)
        self.handle(events.Tick(self.world.now, WALL_MS + self.world.now))
        stored, self.disk = self.disk, self.disk.emptied()
        groups, noticed = stored.read(self.verifier.group)
        self.world.counts["damaged-groups-noticed"] += noticed
        for group in groups:
            if group.author == self.number:
                self.library.add(group)
                self.disk.say(group)
            self.handle(events.GroupReceived(group))
        self.disk.sync()
        self.handle(events.Recovered(self.log.last, self.log.head))
        self.start()

    def count_refusals(self) -> None:
        """Count what the core, which is about to end, did not take."""
        for reason, count in self.core.all_refusals().items():
            self.world.counts[f"refused-{reason}"] += count

    # Crashes.

    def crash(self) -> None:
        """Stop at once."""
        if not self.is_down:
            self.is_down = True
            self._life += 1
            self._installing = None
            self._left_at = (self.core.executed, self.core.view)
            self.leases.clear()
            self.world.counts["crashes"] += 1
            self.world.note(f"{self.number} crashes")

    def restart(self, damage: Damage = Damage.NONE) -> None:
        """Come back with what was durable, less what the damage took."""
        if not self.is_down or self.core.halted is not None:
            return
        self.is_down = False
        self.world.counts["restarts"] += 1
        self.world.note(f"{self.number} restarts, damage: {damage.value}")
        if damage is Damage.NONE and self._appending is not None and self.world.random.random() < 0.5:
            # The trusted part took the group before the crash; its one statement is issued again.
            self._attest(self._appending)
        self._appending = None
        self.world.counts["writes-lost"] += self.disk.crash(self.world.random)
        if self.disk.damage(damage, self.world.random):
            self._was_damaged = True
            self.world.counts[f"damage-{damage.value}"] += 1
        if not self._was_damaged:
            self._check_what_is_forgotten()
        if damage is Damage.NONE and not self.is_milestone_sound():
            text = f"the milestone that replica {self.number} stored is not what its header names"
            self.setting.witness.violation("state", text)
        self._begin(self._stored_snapshot())
        self._go_over_soon()

    def _check_what_is_forgotten(self) -> None:
        """Note if the trusted log forgot entries of which the disk has neither the groups nor a milestone."""
        kept = self.disk.kept
        covered = 0 if kept is None else kept.cut(self.genesis)[self.number]
        if self.log.low > covered + 1:
            text = f"replica {self.number}'s trusted log begins at {self.log.low}, its milestone ends at {covered}"
            self.setting.witness.violation("durability", text)

    def is_milestone_sound(self) -> bool:
        """Say whether the disk's milestone, if there is one, is what its header and certificate name."""
        kept = self.disk.kept
        return kept is None or self.stored(kept, VersionedKeyValue()) is not None

    def _stored_snapshot(self) -> Snapshot | None:
        """Return what the disk's milestone comes to; one that is damaged is given up."""
        self.kept = self.disk.kept
        if self.kept is None:
            return None
        snapshot = self.stored(self.kept, self._application())
        if snapshot is None:
            self.world.counts["damaged-state-noticed"] += 1
            self.kept = self.disk.kept = None
        return snapshot

    # An older copy.

    def put_aside(self) -> Copy | None:
        """Return a copy of the disk and the trusted state; None if there cannot be one now."""
        if self.is_down or self.core.is_appending or not isinstance(self.log, StandInLog) or not self.log.last:
            return None
        return Copy(self.disk.copy(), self.log.clone())

    def roll_back(self, copy: Copy) -> None:
        """Come back with an older copy of everything."""
        self.crash()
        self.world.note(f"{self.number} is rolled back to entry {copy.log.last}")
        self.world.counts["rollbacks"] += 1
        self.setting.witness.excuse(self.number)
        self.rolled_back = True
        self._appending = None
        self.disk, self.log = copy.disk, copy.log
        self.restart()
