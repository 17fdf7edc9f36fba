"""A replica that was away too long: it notices, asks, ignores what does not help, and begins anew with what it got."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from replica.apps.kv import KeyValue
from replica.core.catchup import OFFERS_OPEN_MAX, OFFERS_PAUSE_MS, STALLED_MS, TRANSFER_MS_FIRST, YOUNG_MS
from replica.core.checkpoint import check_certificate
from replica.core.entries import PrePrepare
from replica.core.events import (
    AskCheckpoint,
    AskPart,
    CheckpointOffered,
    Effect,
    Fetch,
    GroupReceived,
    Halt,
    Install,
    PartReceived,
    PeerHolds,
    Persist,
    Recovered,
    Tick,
)
from replica.core.genesis import Ordering
from replica.core.machine import ReplicaCore
from replica.core.snapshot import Snapshot
from replica.core.transfer import PART_DEADLINE_MS, SILENCES_MAX
from tests.replica.core.harness import FakeLog, heads, make_core
from tests.replica.core.support import junk_batch
from tests.replica.core.test_transfer import GENESIS, RUN, SAVED, answer, state_of
from tests.replica.core.traffic import (
    EVERY_CHECKPOINT,
    all_groups,
    feed,
    milestones,
    random_run,
    run_with_votes_in_flight,
    snapshot_of,
)

ASK_ALL = [AskCheckpoint(0), AskCheckpoint(1)]


def away() -> ReplicaCore:
    """Replica 2 that has read nothing, while the others forgot how the logs began; it has asked them."""
    return asking(make_core(GENESIS, 2))


def asking(core: ReplicaCore) -> ReplicaCore:
    core._catch_up._asked_offers.update({0: 4, 1: 4})
    return core


def offer(peer: int = 0, count: int = 1) -> CheckpointOffered:
    snapshot = state_of(count)
    return CheckpointOffered(peer, snapshot.header, snapshot.certificate)


def parts(effects: list[Effect], kind: type = AskPart) -> list:
    return [effect for effect in effects if isinstance(effect, kind)]


def serve(core: ReplicaCore, questions: list[AskPart], truth: Snapshot) -> list[Effect]:
    """Answer questions, and those that come of it, until there are none; return what else comes of it."""
    rest, others = list(questions), []
    while rest:
        question = rest.pop(0)
        part = PartReceived(question.ask, question.slot, question.want, answer(truth, question.want))
        for effect in core.handle(part):
            (rest if isinstance(effect, AskPart) else others).append(effect)
    return others


def test_entries_that_are_gone_have_all_asked_for_checkpoints():
    core = away()
    assert core.handle(PeerHolds(1, 0, 2, 40)) == ASK_ALL
    assert core.handle(PeerHolds(1, 0, 2, 40)) == [], "everybody was asked"
    core.handle(Tick(OFFERS_PAUSE_MS - 1, 0))
    assert core.handle(PeerHolds(0, 0, 9, 40)) == []
    core.handle(Tick(OFFERS_PAUSE_MS, 0))
    assert core.handle(PeerHolds(0, 0, 9, 40)) == ASK_ALL


@pytest.mark.parametrize(("first", "last"), [(1, 40), (1, 0), (1, 1)])
def test_entries_that_somebody_has_are_not_gone(first: int, last: int):
    assert away().handle(PeerHolds(1, 0, first, last)) == []


def test_a_log_that_is_gone_down_to_its_last_entry_is_gone():
    """Its author is silent for good: no peer holds anything of it any more."""
    assert away().handle(PeerHolds(1, 0, 41, 40)) == ASK_ALL


def test_what_follows_what_is_here_is_not_gone():
    core = away()
    core.handle(GroupReceived(FakeLog(0).say(PrePrepare(0, 1, junk_batch(1)))))
    assert core.handle(PeerHolds(1, 0, 2, 40)) == []
    assert core.handle(PeerHolds(1, 0, 3, 40)) == ASK_ALL


def test_the_own_log_too_can_be_gone_elsewhere():
    core = make_core(GENESIS, 2, live=False)
    core.handle(Recovered(9, bytes(32)))
    assert core.handle(PeerHolds(1, 2, 4, 9)) == ASK_ALL


def test_more_of_the_own_log_than_is_here_is_to_be_shown():
    core = away()
    assert core.handle(PeerHolds(1, 2, 1, 3)) == [Fetch(2, 1, 1)]
    assert core.handle(PeerHolds(1, 2, 1, 3)) == [], "not again so soon"
    core.handle(Tick(OFFERS_PAUSE_MS, 0))
    assert core.handle(PeerHolds(0, 2, 1, 3)) == [Fetch(2, 1, 0)]
    assert core.halted is None, "it was only said"
    shown = core.handle(GroupReceived(RUN.logs[2].groups[0]))
    assert isinstance(shown[-1], Halt)


def test_an_offer_begins_a_transfer_from_whoever_makes_it():
    core = away()
    asked = parts(core.handle(offer(0)))
    assert core.transfer is not None
    assert {question.ask for question in asked} == {0}
    asked += parts(core.handle(offer(1)))
    assert core.transfer.sources == (0, 1)
    assert {question.slot for question in asked} == {8}
    assert parts(core.handle(offer(1))) == []


def test_offers_that_do_not_help_are_ignored():
    executed = feed(reader := make_core(GENESIS, 2, live=False), all_groups(RUN), random.Random(1))
    assert executed
    assert reader.executed > SAVED[0].slot
    assert asking(reader).handle(offer(0, 1)) == [], "older than what was executed here"
    assert reader.transfer is None
    # Newer, but every log was received up to its cut: nothing is skipped by it.
    core = away()
    header = state_of().header
    nothing = replace(header, cut=(0, 0, 0), heads=tuple(heads(GENESIS)))
    assert core.handle(CheckpointOffered(0, nothing, b"")) == []
    assert core.transfer is None
    assert parts(core.handle(CheckpointOffered(0, replace(nothing, cut=(0, 1, 0)), b"")))


def test_what_nobody_asked_for_is_refused():
    core = make_core(GENESIS, 2)
    assert core.handle(offer(0)) == []
    assert core.transfer is None
    assert core.refusals == {"offer-unasked": 1}
    assert core.handle(PeerHolds(1, 0, 5, 9)) == ASK_ALL
    assert parts(core.handle(offer(0)))
    assert core.handle(offer(0, 2)) == [], "it was asked once"
    assert core.refusals == {"offer-unasked": 2}
    for _ in range(20):
        core.handle(Tick(core._known.now_ms + OFFERS_PAUSE_MS, 0))
        core.handle(PeerHolds(1, 0, 5, 9))
    assert set(core._catch_up._asked_offers.values()) == {OFFERS_OPEN_MAX}


def begun() -> tuple[ReplicaCore, AskPart]:
    """A transfer from replica 0 that moves, and a newer checkpoint that replica 1 offered."""
    core = away()
    asked = parts(core.handle(offer(0, 1)))
    core.handle(Tick(YOUNG_MS, 0))
    rest = parts(core.handle(PartReceived(0, 8, asked[0].want, answer(state_of(1), asked[0].want))))
    assert parts(core.handle(offer(1, 2))) == []
    assert (core.transfer.slot, core.transfer.sources) == (8, (0,)), "who offers something else is no source of this"
    return core, (asked[1:] + rest)[0]


def test_of_several_offers_the_newest_is_fetched():
    core = away()
    core.handle(offer(0, 1))
    asked = parts(core.handle(offer(1, 2)))
    assert {(question.slot, question.ask) for question in asked} == {(16, 1)}
    assert core.handle(offer(0, 1)) == [], "and an older one changes nothing"
    assert (core.transfer.slot, core.transfer.sources) == (16, (1,))


def test_a_transfer_that_moves_is_not_given_up_for_a_newer_offer():
    core, question = begun()
    core.handle(Tick(PART_DEADLINE_MS - 1, 0))
    core.handle(PartReceived(0, 8, question.want, answer(state_of(1), question.want)))
    core.handle(Tick(YOUNG_MS + STALLED_MS + 1, 0))
    assert core.transfer.slot == 8


def test_one_that_does_not_move_is():
    core, _ = begun()
    core.handle(Tick(YOUNG_MS + STALLED_MS - 1, 0))
    assert core.transfer.slot == 8
    asked = parts(core.handle(Tick(YOUNG_MS + STALLED_MS, 0)))
    assert {(question.slot, question.ask) for question in asked} == {(16, 1)}


def dripping(core: ReplicaCore, ends: int) -> None:
    """Have replica 0 answer one question every second, which is enough to seem to move; until `ends`."""
    while core._known.now_ms < ends:
        wanted = next(iter(core.transfer._peers[0].asked))
        core.handle(PartReceived(0, 8, wanted, answer(state_of(1), wanted)))
        core.handle(Tick(core._known.now_ms + 1000, 0))


def test_one_that_moves_too_slowly_is_given_up_for_what_others_offer():
    core, _ = begun()
    catch_up = core._catch_up
    assert catch_up._transfer_ms == TRANSFER_MS_FIRST
    catch_up._transfer_ms = 5000
    dripping(core, 4000)
    assert (core.transfer.slot, core.transfer.sources) == (8, (0,)), "not before its time is over"
    asked = parts(core.handle(Tick(5000, 0)))
    assert {(one.slot, one.ask) for one in asked} == {(16, 1)}
    assert catch_up._transfer_ms == 10_000, "and the next one has twice as long"
    catch_up._asked_offers[0] = 1
    assert core.handle(offer(0, 1)) == [], "what was too slow comes last"
    assert core.transfer.slot == 16
    for _ in range(3):  # replica 1 sends nothing at all: it is as if it had offered nothing
        core.handle(Tick(core._known.now_ms + STALLED_MS, 0))
    assert core.transfer.slot == 16, "an older checkpoint of a slow source does not take the place of a newer one"


def test_one_that_moves_too_slowly_goes_on_if_nobody_else_offers_anything():
    core = away()
    core.handle(offer(0, 1))
    core._catch_up._transfer_ms = 3000
    dripping(core, 6000)
    assert core.transfer.slot == 8
    assert core._catch_up._transfer_ms == 3000


def test_when_everybody_was_too_slow_the_last_one_comes_last():
    core, _ = begun()
    catch_up = core._catch_up
    catch_up._transfer_ms, catch_up._slow = 1000, {1}
    asked = parts(core.handle(Tick(YOUNG_MS + 1000, 0)))
    assert {(one.slot, one.ask) for one in asked} == {(16, 1)}
    assert (catch_up._slow, catch_up._transfer_ms) == ({0}, 2000)


def test_parts_that_nobody_asked_for_move_nothing():
    core, question = begun()
    part = PartReceived(0, 8, question.want, answer(state_of(1), question.want))
    core.handle(part)
    core.handle(Tick(YOUNG_MS + STALLED_MS - 1, 0))
    core.handle(part)
    asked = parts(core.handle(Tick(YOUNG_MS + STALLED_MS, 0)))
    assert {(one.slot, one.ask) for one in asked} == {(16, 1)}


@pytest.mark.parametrize("data", [None, b"poison"])
def test_the_next_best_is_fetched_as_soon_as_nobody_is_left(data: bytes | None):
    core, question = begun()
    asked = parts(core.handle(PartReceived(0, 8, question.want, data)))
    assert {(question.slot, question.ask) for question in asked} == {(16, 1)}
    core = away()
    first = parts(core.handle(offer(0, 1)))
    assert core.handle(PartReceived(0, 8, first[0].want, data)) == []
    assert core.transfer is None
    assert parts(core.handle(offer(1, 1))), "somebody else still has it"


def test_a_transfer_whose_sources_are_all_gone_is_given_up():
    core = away()
    core.handle(offer(0))
    for _ in range(SILENCES_MAX + 3):
        core.handle(Tick(core._known.now_ms + PART_DEADLINE_MS, 0))
    assert core.transfer is None
    assert parts(core.handle(offer(0))), "and begun anew when somebody offers it again"


def test_a_transfer_that_the_logs_overtook_is_given_up():
    core = asking(make_core(GENESIS, 2, live=False))
    core.handle(offer(0))
    feed(core, all_groups(RUN), random.Random(1))
    assert core.transfer is not None
    assert not parts(core.handle(Tick(1, 1)))
    assert core.transfer is None


def test_parts_of_another_transfer_are_ignored():
    core = away()
    question = parts(core.handle(offer(0)))[0]
    assert core.handle(PartReceived(0, 16, question.want, b"poison")) == []
    assert core.transfer is not None
    assert core.transfer.sources == (0,)
    assert make_core(GENESIS, 2).handle(PartReceived(0, 8, question.want, b"poison")) == []


def test_poison_is_counted_and_fetched_elsewhere():
    core = away()
    asked = parts(core.handle(offer(0)))
    asked += parts(core.handle(offer(1)))
    poisoned = next(question for question in asked if question.ask == 0)
    again = parts(core.handle(PartReceived(0, 8, poisoned.want, b"poison")))
    gone = next(question for question in asked if question.ask == 1)
    refusals = core._catch_up.refusals
    assert refusals == {"part-poisoned": 1}
    assert all(question.ask == 1 for question in again)
    core.handle(PartReceived(1, 8, gone.want, None))
    assert refusals == {"part-poisoned": 1, "part-gone": 1}


def test_the_state_is_installed_when_all_of_it_is_here_and_only_then():
    core, truth = away(), state_of()
    effects = serve(core, parts(core.handle(offer(0))), truth)
    assert [type(effect) for effect in effects] == [Install]
    assert core.transfer is None
    snapshot = effects[0].fetched.snapshot(KeyValue(), GENESIS)
    assert snapshot.executor.roots() == (truth.header.application, truth.header.table)
    check_certificate(snapshot.certificate, snapshot.header, GENESIS, lambda *_: True)
    assert core.handle(offer(1)) == [], "this core's time is over"
    assert core.transfer is None


def test_while_a_state_is_installed_no_newer_one_is_fetched():
    core = away()
    (install,) = serve(core, parts(core.handle(offer(0))), state_of())
    assert isinstance(install, Install)
    core.handle(Tick(OFFERS_PAUSE_MS, 0))
    assert core.handle(PeerHolds(1, 0, 40, 60)) == [], "nor is anybody asked for one"
    assert core.handle(offer(1, 2)) == []
    assert core.transfer is None


@pytest.mark.parametrize("ordering", Ordering)
@pytest.mark.parametrize("what", ["in flight", "random"])
def test_what_was_installed_goes_on_like_the_one_it_came_from(what: str, ordering: Ordering):
    run = run_with_votes_in_flight(ordering) if what == "in flight" else random_run(1, ordering, 3)
    saved = milestones(run, 0)
    count = 1 if what == "in flight" else len(saved) // 2
    truth = snapshot_of(run.genesis, saved[:count])
    truth.executor.roots()
    core = asking(make_core(run.genesis, 2))
    asked = parts(core.handle(CheckpointOffered(1, truth.header, truth.certificate)))
    (install,) = serve(core, asked, truth)
    outcome = []
    for snapshot in (install.fetched.snapshot(KeyValue(), GENESIS), snapshot_of(run.genesis, saved[:count])):
        new = make_core(run.genesis, 2, KeyValue(), live=False, snapshot=snapshot, milestones=EVERY_CHECKPOINT)
        rest = [group for group in all_groups(run) if group.first > truth.header.cut[group.author]]
        effects = [effect for group in rest for effect in new.handle(GroupReceived(group))]
        assert new.executed == run.cores[0].executed
        outcome.append([effect for effect in effects if not isinstance(effect, Persist)])
        persisted = [e.milestone for e in parts(effects, Persist)]
        outcome[-1] += [(m.header, m.certificate, m.logs, m.batches, m.application, m.table) for m in persisted]
    assert outcome[0] == outcome[1]
    assert outcome[0]
