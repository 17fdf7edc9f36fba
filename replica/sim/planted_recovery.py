"""Planted bugs about durability, checkpoints, the cut, transfers and coming back; see `replica.sim.planted`."""
# ruff: noqa: ANN401, D103, SLF001

from typing import Any

from replica.core import checkpoint, checkpoints, cut, machine, transfer
from replica.core.batch import NULL_BATCH, decode_batch
from replica.core.catchup import CatchUp
from replica.core.checkpoint import state_digest
from replica.core.checkpoints import Checkpoints
from replica.core.cut import AgreedCut
from replica.core.entries import Checkpoint, decode_entry
from replica.core.events import Appended
from replica.core.execution import Executor
from replica.core.homecoming import Homecoming
from replica.core.inbox import Arrival, Inbox
from replica.core.layout import LayoutError, Reader
from replica.core.logstate import LogState
from replica.core.proof import PROOF_BYTES_MAX, decode_proof
from replica.core.rules import Wait, judge
from replica.core.slots import SlotBook
from replica.core.snapshot import Snapshot
from replica.core.state import BucketedMap
from replica.core.transfer import Transfer
from replica.sim import host, library
from replica.sim.disk import Disk
from replica.sim.library import Kept
from replica.sim.planted import Patch
from replica.sim.replica import CorrectReplica

# Durability.


def sent_before_durable() -> list[Patch]:
    """Attest and send at once; a crash before the append is durable takes the trusted part back."""

    def append(replica: Any, effect: Any) -> None:
        life, log = replica._life, replica.log
        replica.disk.sync()
        replica.before = (log.last, log.head)
        group = replica._attest(effect.payloads)
        replica.publish(group)

        def appended() -> None:
            if replica._life == life and not replica.is_down:
                replica.before = None
                replica.handle(Appended(group))
                replica._begin_anew()

        replica.world.after(replica.world.random.randint(20, 60), appended)

    right = CorrectReplica.crash

    def crash(replica: Any) -> None:
        right(replica)
        if getattr(replica, "before", None) is not None:
            replica.log.last, replica.log.head = replica.before
            replica.disk._own.popitem()
            replica.before = None

    return [(CorrectReplica, "_append", append), (CorrectReplica, "crash", crash)]


def causes_not_durable() -> list[Patch]:
    def crash(disk: Any, chance: Any) -> int:  # noqa: ARG001
        before: int = len(disk._received)
        disk._received = disk._received[: disk._durable]
        disk.milestones.clear()
        return before - len(disk._received)

    return [(Disk, "sync", lambda _: None), (Disk, "crash", crash)]


def attested_group_forgotten() -> list[Patch]:
    """Do not ask the trusted part for the group that it took just before a crash."""
    right = CorrectReplica.restart

    def restart(replica: Any, *damage: Any) -> None:
        if replica.is_down and replica.core.halted is None and replica._appending is not None:
            replica.log.append(replica._appending)
            replica._appending = None
        right(replica, *damage)

    return [(CorrectReplica, "restart", restart)]


def truncated_before_durable() -> list[Patch]:
    """Drop logs up to a milestone's cut as soon as it is stable."""
    right = CorrectReplica._persist

    def persist(replica: Any, milestone: Any) -> None:
        right(replica, milestone)
        positions = checkpoint.decode_header(milestone.header, replica.genesis.n).cut
        for log, upto in enumerate(positions):
            replica.library.forget(log, upto)
        replica.disk.take(replica.disk.kept, replica.library)

    return [(CorrectReplica, "_persist", persist)]


def trusted_log_forgets_too_early() -> list[Patch]:
    """Truncate the trusted log to a milestone's cut as soon as it is stable."""
    right = CorrectReplica._persist

    def persist(replica: Any, milestone: Any) -> None:
        right(replica, milestone)
        positions = checkpoint.decode_header(milestone.header, replica.genesis.n).cut
        replica.log.truncate(positions[replica.number] + 1)

    return [(CorrectReplica, "_persist", persist)]


def milestones_out_of_order() -> list[Patch]:
    def durable(replica: Any, milestone: Any) -> None:
        replica.disk.milestones.append(milestone)

        def write() -> None:
            if milestone in replica.disk.milestones:
                replica.disk.milestones.remove(milestone)
                replica.disk.sync()
                replica.persist(milestone)
                replica.disk.take(replica.kept, replica.library)

        replica._later(write)

    return [(CorrectReplica, "_persist", durable)]


def passed_milestones_lost() -> list[Patch]:
    """Let a milestone that is passed over take its changes with it."""

    def latest(changes: Any) -> Any:
        return changes[-1]

    return [(checkpoints, "_latest", latest)]


def damaged_milestone_begun_with() -> list[Patch]:
    right = Kept.snapshot

    def snapshot(kept: Any, genesis: Any, application: Any, verify: Any) -> Any:
        header = checkpoint.decode_header(kept.header, genesis.n)
        maps = [BucketedMap(sorted(content.items())) for content in (kept.application, kept.table)]
        roots = [tree.root() for tree in maps]
        if roots == [header.application, header.table]:
            return right(kept, genesis, application, verify)
        executor = Executor.restored(application, genesis, kept.slot, header.time_ms, *maps)
        states = tuple(LogState.decode(raw) for raw in kept.logs)
        batches = tuple(decode_batch(raw, genesis.cluster_id(), genesis.limits) for raw in kept.batches)
        return Snapshot(header, kept.certificate, states, batches, executor)

    return [(Kept, "snapshot", snapshot)]


# Coming home.


def rolled_back_accepted() -> list[Patch]:
    def heard(homecoming: Any, peer: int, last: int) -> None:  # noqa: ARG001
        if homecoming._end is not None:
            homecoming._heard.add(peer)

    return [(Homecoming, "contradiction", lambda *_: None), (Homecoming, "heard", heard)]


def rollback_not_said() -> list[Patch]:
    return [(Homecoming, "contradiction", lambda *_: None)]


def speaks_before_its_log_is_whole() -> list[Patch]:
    def missing(homecoming: Any, own: Any) -> str | None:  # noqa: ARG001
        return "its store is being read" if homecoming._end is None else None

    return [(Homecoming, "missing", missing)]


# The cut.


def skipped_without_cut() -> list[Patch]:
    """Go on with the first group that is offered where a part of a log is gone."""
    right_holds, right_arrive = CatchUp.peer_holds, Inbox.arrive
    anything = b"any head"

    def holds(catch_up: Any, event: Any, now_ms: int) -> Any:
        inbox = catch_up._inboxes[event.log]
        if event.log != catch_up._number and inbox.received + 1 < event.first <= event.last:
            inbox.received, inbox.head = event.first - 1, anything
            return []
        return right_holds(catch_up, event, now_ms)

    def arrive(inbox: Any, group: Any) -> Arrival:
        if inbox.head == anything and group.last > inbox.received >= group.first - 1:
            inbox.received, inbox.head = group.first - 1, group.head_before
        return right_arrive(inbox, group)

    return [(CatchUp, "peer_holds", holds), (Inbox, "arrive", arrive)]


def votes_above_dropped() -> list[Patch]:
    """Truncate by position: what a log said of slots above the executed one before the cut is forgotten."""
    right = AgreedCut.execute

    def execute(agreed: Any, slot: int, positions: Any) -> bool:
        moved = right(agreed, slot, positions)
        for journal in agreed._journals:
            journal.state.votes.clear()
            journal.state.commits.clear()
        return moved

    return [(AgreedCut, "execute", execute)]


def open_cut_accepted() -> list[Patch]:
    return [(cut, "is_closed", lambda *_: True)]


def cut_moves_back() -> list[Patch]:
    right = cut._Journal.at

    def at(journal: Any, position: int) -> Any:
        if position >= journal.state.position:
            return right(journal, position)
        state = journal.state.copy()
        state.position = position
        return state, journal.head

    def move(agreed: Any, slot: int, positions: Any) -> str:
        if len(positions) != len(agreed._journals):
            return "none"
        places = [journal.at(position) for journal, position in zip(agreed._journals, positions, strict=True)]
        found = [place for place in places if place is not None]
        if len(found) < len(places) or not cut.is_closed([state for state, _ in found], slot):
            return "open"
        for journal, (state, head) in zip(agreed._journals, found, strict=True):
            journal.move(state, head)
        return "moved"

    return [(cut._Journal, "at", at), (AgreedCut, "_move", move)]


def lag_never_suspected() -> list[Patch]:
    return [(Checkpoints, "cut_lags", lambda *_: False)]


# Checkpoints and transfers.


def checkpoint_does_not_wait() -> list[Patch]:
    def lax(state: Any, entry: Any, reading: Any) -> Any:
        verdict = judge(state, entry, reading)
        return None if isinstance(verdict, Wait) and isinstance(entry, Checkpoint) else verdict

    return [(machine, "judge", lax)]


def digest_without_votes() -> list[Patch]:
    def digest(encoded: bytes) -> bytes:
        try:
            state = LogState.decode(encoded)
        except LayoutError:
            return state_digest(encoded)
        state.votes.clear()
        state.commits.clear()
        return state_digest(state.encode())

    return [(module, "state_digest", digest) for module in (checkpoints, transfer, library)]


def parts_not_verified() -> list[Patch]:
    def take_log(moving: Any, log: int, data: bytes) -> None:
        moving._states[log] = LogState.decode(data)
        if len(moving._states) == moving._genesis.n:
            states = [moving._states[i] for i in range(moving._genesis.n)]
            moving._named = checkpoint.distinct_digests(checkpoint.batches_in_flight(states))

    def take_batch(moving: Any, place: int, data: bytes) -> None:
        moving._batches[place] = decode_batch(data, moving._genesis.cluster_id(), moving._genesis.limits)

    return [(Transfer, "_take_log", take_log), (Transfer, "_take_batch", take_batch)]


def batches_not_transferred() -> list[Patch]:
    """Begin without the batches in flight: proposals that a state names are not counted."""
    right = SlotBook.resume

    def resume(book: Any, states: Any, batches: Any) -> None:  # noqa: ARG001
        kept = [state.copy() for state in states]
        for state in kept:
            for slot, by_view in state.votes.items():
                own = {v: d for v, d in by_view.items() if v % len(kept) == state.author and d != NULL_BATCH.digest}
                state.votes[slot] = {view: digest for view, digest in by_view.items() if view not in own}
        right(book, kept, ())

    return [(SlotBook, "resume", resume)]


def certificate_one_short() -> list[Patch]:
    def check(raw: bytes, header: Any, genesis: Any, verify: Any) -> None:
        reader = Reader(raw)
        if reader.u16() < genesis.f:
            raise LayoutError("fewer than f")
        wanted = Checkpoint(header.slot, header.digest)
        while reader.left():
            log, proof = reader.u16(), decode_proof(reader.block(PROOF_BYTES_MAX))
            entry = decode_entry(proof.payload, genesis, genesis.cluster_id())
            if log >= genesis.n or entry != wanted or not verify(log, proof):
                raise LayoutError("not that log's CHECKPOINT")

    return [(module, "check_certificate", check) for module in (host, library)]


def certificate_not_checked() -> list[Patch]:
    return [(module, "check_certificate", lambda *_: None) for module in (host, library)]


def passed_milestones_pile_up() -> list[Patch]:
    """Nothing takes the place of a milestone that was passed over."""
    right = Checkpoints._hand_out

    def hand_out(checkpoints: Any, slot: int, proofs: Any) -> Any:
        return right(checkpoints, slot, proofs) if slot in checkpoints._kept else None

    return [(Checkpoints, "_hand_out", hand_out)]
