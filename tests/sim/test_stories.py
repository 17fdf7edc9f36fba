"""The scenarios of a view change: what must come of each, in both orderings, and how they read.

TRUSTLOG_REWRITE=1 writes tests/testdata/view_change anew; then read the difference.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest

from replica.core.genesis import Ordering
from replica.core.pen import Pen
from replica.core.quorum import primary
from replica.sim import planted, stories
from replica.sim.controls import patched
from replica.sim.stage import CLIENT_PATIENCE_MS, PATIENCE_MS, Stage
from tests.replica.core.support import REWRITE

FOLDER = Path(__file__).parents[1] / "testdata" / "view_change"
STORIES = {story.name: story for story in stories.STORIES}
ORDERINGS = (Ordering.THREE_PHASE, Ordering.TWO_PHASE)
LINES_MAX = 190
# Messages and appends of a view change and of one request, with room.
WORK_MS = 100
LEGEND = f"""\
Times are virtual milliseconds. v1 s7: slot 7 in view 1; the primary of view v is replica v mod n. A3: client A's third
request. Entries are told when their author has them attested; 2:14 is entry 14 of replica 2's log. "--" is the script.
Left out: what the network does, and what a client or a backup sends again, or hands over after another did.

Patience. A client's is {CLIENT_PATIENCE_MS} ms: then it sends its request to all replicas. A replica's first one is {PATIENCE_MS} ms; it runs since
the replica learned of its oldest request that is not executed, or since it entered the view, if that is later. A backup
learns of a request when the client sends it to all. When its patience ends, a replica says SUSPECT; when q replicas
want the next view, they say VIEW-CHANGE.

A new view. NEW-VIEW names q VIEW-CHANGEs. base is the last checkpoint in the logs up to there, top the highest slot
voted for. The new view proposes every slot after base up to top again: of the votes in these logs, the one of the
highest view. Slots that some have executed are carried too: others have not, and can decide them in this view."""


@cache
def play(name: str, ordering: Ordering) -> tuple[Stage, tuple]:
    stage = Stage(STORIES[name], ordering)
    return stage, stage.play().violations


def staged(name: str, ordering: Ordering) -> Stage:
    return play(name, ordering)[0]


def views_entered(stage: Stage) -> dict[int, list[int]]:
    return {number: sorted(stage.facts.entered[number]) for number in stage.correct}


def answered_in(stage: Stage, label: str) -> int:
    """Return how long a client waited for an answer."""
    asked = stage.facts.asked[label]
    return asked.answered_ms - asked.asked_ms


def assert_all_is_well(stage: Stage, violations: tuple) -> None:
    assert violations == ()
    assert stage.facts.errors == []
    assert all(asked.answered_ms is not None for asked in stage.facts.asked.values())
    assert not {log for _, log in stage.facts.exposed | stage.facts.liars} & set(stage.correct)
    histories = [{slot: names for slot, (_, names) in stage.facts.executed[i].items()} for i in stage.correct]
    assert all(history == histories[0] for history in histories)
    done = [name for names in histories[0].values() for name in names if "session" not in name]
    assert sorted(" ".join(done).split()) == sorted(stage.facts.asked)  # each once


@pytest.mark.parametrize("ordering", ORDERINGS)
@pytest.mark.parametrize("name", STORIES)
def test_every_request_is_answered_and_nothing_is_wrong(name, ordering):
    assert_all_is_well(*play(name, ordering))


@pytest.mark.parametrize("name", STORIES)
def test_the_transcripts_read_as_committed(name):
    told = [staged(name, ordering).transcript() for ordering in ORDERINGS]
    text = "\n".join([STORIES[name].tells, "", LEGEND, *(line for lines in told for line in ("", *lines)), ""])
    path = FOLDER / f"{name}.txt"
    if REWRITE:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text.count("\n") <= LINES_MAX
    assert text == path.read_text()


def test_no_transcript_is_left_without_its_story():
    assert {path.stem for path in FOLDER.iterdir()} == set(STORIES)


@pytest.mark.parametrize("ordering", ORDERINGS)
def test_service_resumes_within_three_patiences_of_the_primarys_end(ordering):
    stage = staged("primary_stops", ordering)
    assert views_entered(stage) == {1: [1], 2: [1]}
    assert_resumes(stage, 303)
    # What is asked for in the new view is answered as before.
    assert answered_in(stage, "A6") <= CLIENT_PATIENCE_MS + WORK_MS


def assert_resumes(stage: Stage, stopped_ms: int) -> None:
    held_up = [
        asked.answered_ms
        for asked in stage.facts.asked.values()
        if asked.asked_ms < stopped_ms + 3 * PATIENCE_MS and asked.answered_ms >= stopped_ms
    ]
    assert min(held_up) <= stopped_ms + 3 * PATIENCE_MS
    for name in ("A4", "A5", "B4"):  # asked for when nobody was there to order it
        assert stage.facts.asked[name].answered_ms <= stopped_ms + 3 * PATIENCE_MS


@pytest.mark.parametrize("ordering", ORDERINGS)
def test_it_does_not_matter_at_which_millisecond_the_primary_stops(ordering):
    told = set()
    for at_ms in range(298, 326):
        script = partial(stories.primary_stops, at_ms=at_ms)
        stage = Stage(replace(STORIES["primary_stops"], script=script), ordering)
        assert_all_is_well(stage, stage.play().violations)
        assert_resumes(stage, at_ms)
        assert views_entered(stage) == {1: [1], 2: [1]}
        told.add(max(stage.facts.carried[1]))
    # Some moments lie before its last proposals, some after.
    assert len(told) > 1


@pytest.mark.parametrize("ordering", ORDERINGS)
@pytest.mark.parametrize(("name", "label", "others"), [("one_client_ignored", "A1", 4), ("junk", "A2", 3)])
def test_a_primary_that_serves_others_only_is_replaced(name, label, others, ordering):
    stage = staged(name, ordering)
    facts = stage.facts
    assert views_entered(stage) == {1: [1], 2: [1]}
    # The others were served all the time, in view 0, while this client waited.
    began = facts.asked[label].asked_ms
    change = min(facts.entered[1][1], facts.entered[2][1])
    friends = [a for name, a in facts.asked.items() if name.startswith("B") and a.answered_ms < change]
    assert len(friends) >= others
    assert any(a.asked_ms > began for a in friends)
    assert not any(label in names for (view, _), names in facts.proposed.items() if view == 0)
    assert any(label in names for (view, _), names in facts.proposed.items() if view == 1)
    assert change - began <= CLIENT_PATIENCE_MS + PATIENCE_MS + WORK_MS
    # Opening a session and the request: the client asks everybody for either.
    assert answered_in(stage, label) <= 3 * PATIENCE_MS


@pytest.mark.parametrize("ordering", ORDERINGS)
def test_two_faulty_primaries_in_a_row_are_replaced(ordering):
    stage = staged("two_in_a_row", ordering)
    facts = stage.facts
    assert views_entered(stage) == {2: [1, 2], 3: [1, 2], 4: [1, 2]}
    # View 1 was open for everybody, and nothing new came in it.
    assert all({1, 2} <= set(facts.opened[i]) for i in stage.correct)
    assert {view for view, slot in facts.proposed if slot > max(facts.carried[1])} == {2}
    for number in stage.correct:
        assert facts.entered[number][2] - facts.entered[number][1] >= 2 * PATIENCE_MS - WORK_MS
    # One patience with the first, and as it ended two with the second.
    assert answered_in(stage, "A2") <= CLIENT_PATIENCE_MS + 3 * PATIENCE_MS + WORK_MS


@pytest.mark.parametrize("ordering", ORDERINGS)
def test_a_view_that_was_never_opened_to_anybody_is_left(ordering):
    stage = staged("new_view_withheld", ordering)
    facts = stage.facts
    assert views_entered(stage) == {2: [1, 2], 3: [1, 2], 4: [1, 2]}
    # The withheld NEW-VIEW is read, but only when all are in view 2, and its proposal is not executed.
    left = max(facts.entered[number][2] for number in stage.correct)
    read = [facts.opened[number][1] for number in stage.correct if 1 in facts.opened[number]]
    assert read
    assert min(read) > left
    assert (1, 3) in facts.proposed
    assert facts.proposed[2, 3] == ("A2",)
    assert facts.carried[2].keys() == {1, 2}
    assert answered_in(stage, "A2") <= CLIENT_PATIENCE_MS + 3 * PATIENCE_MS + WORK_MS


@pytest.mark.parametrize("ordering", ORDERINGS)
def test_a_lost_new_view_costs_another_view_and_its_proposals_are_carried(ordering):
    stage = staged("new_view_lost", ordering)
    facts = stage.facts
    assert views_entered(stage) == {1: [1, 2], 2: [1, 2]}
    assert facts.opened[2][1] >= facts.opened[1][1] + PATIENCE_MS - WORK_MS
    # Replica 1 proposed A2 in view 1; nobody else voted for it, and view 2 carries it all the same.
    assert facts.proposed[1, 3] == ("A2",)
    assert facts.carried[2][3] == ("A2",)
    assert answered_in(stage, "A2") <= 4 * PATIENCE_MS


@pytest.mark.parametrize("ordering", ORDERINGS)
def test_a_slot_that_some_decided_in_the_old_view_is_carried_with_its_value(ordering):
    stage = staged("decided_by_some", ordering)
    facts = stage.facts
    assert views_entered(stage) == {1: [1], 2: [1], 3: [1], 4: [1]}
    stopped_ms = 300
    # The client had its answer, and only replicas 3 and 4 had executed it, when the primary stopped.
    assert facts.asked["A2"].answered_ms < stopped_ms
    assert [i for i in stage.correct if facts.executed[i][5][0] < stopped_ms] == [3, 4]
    # Replica 4 has no part in it: the view is opened by 1, 2 and 3.
    assert facts.named[1] == (1, 2, 3)
    assert facts.carried[1][5] == ("A2",)
    assert all(facts.executed[i][5][0] >= facts.opened[i][1] for i in (1, 2))
    assert {(1, 3, 0), (2, 3, 0)} <= facts.fetched


@pytest.mark.parametrize("ordering", ORDERINGS)
def test_of_two_values_the_one_of_the_highest_view_is_carried(ordering):
    stage = staged("highest_view", ordering)
    facts = stage.facts
    assert views_entered(stage) == {2: [1, 2], 3: [1, 2], 4: [1, 2]}
    # Both values are voted for by a correct replica that opens view 2.
    assert facts.proposed[0, 3] == ("A2",)
    assert facts.proposed[1, 3] == ("A2", "A3")
    assert (facts.named[1], facts.named[2]) == ((1, 2, 3), (2, 3, 4))
    assert facts.carried[2][3] == ("A2", "A3")
    told = "v2 carries s3 (A2 A3), voted for in v1 by 2, 3, 4; not (A2), voted for in v0 by replica 4"
    assert sum(line.endswith(told) for line in stage.transcript()) == 1
    assert facts.asked["A3"].answered_ms < 700  # while view 1 had its primary


@pytest.mark.parametrize("ordering", ORDERINGS)
def test_the_lowest_view_would_carry_another_value(ordering):
    with patched(*planted.carry_lowest_view()):
        stage = Stage(STORIES["highest_view"], ordering)
        stage.play()
    assert stage.facts.carried[2][3] == ("A2",)


@pytest.mark.parametrize("ordering", ORDERINGS)
def test_a_slot_without_a_vote_that_counts_becomes_null(ordering):
    stage = staged("gap", ordering)
    facts = stage.facts
    assert views_entered(stage) == {0: [1], 1: [1]}
    assert {slot: facts.carried[1][slot] for slot in (3, 4, 5)} == {3: ("A2",), 4: (), 5: ("A4",)}
    assert all(facts.executed[i][4][1] == () for i in stage.correct)
    # What stood in the gap is ordered anew, and who left it is known.
    assert facts.proposed[0, 4] == facts.proposed[1, 6] == ("A3",)
    assert facts.asked["A3"].slot == 6
    told = "s4 (null), for which no vote counts; not what replica 2 voted for in v0, which nobody proposed"
    assert sum(line.endswith(told) for line in stage.transcript()) == 1
    assert {log for _, log in facts.liars} == {2}
    assert not facts.exposed


@pytest.mark.parametrize("ordering", ORDERINGS)
def test_different_prefixes_of_a_log_are_one_log(ordering):
    stage = staged("different_prefixes", ordering)
    facts = stage.facts
    assert views_entered(stage) == {1: [1], 2: [1], 3: [1]}
    # Replica 0 proposed all four; the backups had what it hid from them from each other.
    assert [slot for view, slot in sorted(facts.proposed) if view == 0 and slot > 2] == [3, 4, 5, 6]
    assert {(1, 2, 0), (1, 3, 0), (2, 3, 0)} <= facts.fetched
    assert all(facts.executed[i][5][0] > facts.opened[i][1] for i in stage.correct)
    assert facts.carried[1].keys() == {1, 2, 3, 4, 5}
    assert facts.carried[1][5] == facts.proposed[0, 5]
    assert facts.proposed[1, 6] == facts.proposed[0, 6]
    assert not facts.exposed
    assert not facts.liars


def patience_waits_for_new_view() -> list[planted.Patch]:
    """A view that is not open is never suspected."""
    right = Pen._owed_suspicion

    def owed(pen: Pen):
        opener = pen._states()[primary(pen.view, pen._known.genesis.n)]
        return right(pen) if pen.view in opener.opened else None

    return [(Pen, "_owed_suspicion", owed)]


BROKEN = [
    ("primary_stops", planted.nobody_suspects, "liveness"),
    ("primary_stops", planted.no_votes_for_the_executed, "liveness"),
    ("one_client_ignored", planted.any_progress_restores, "liveness"),
    ("junk", planted.any_progress_restores, "liveness"),
    ("two_in_a_row", planted.never_impatient, "liveness"),
    ("new_view_withheld", patience_waits_for_new_view, "liveness"),
    ("different_prefixes", planted.gap_by_arithmetic, "accuracy"),
    ("new_view_lost", patience_waits_for_new_view, "liveness"),
    ("decided_by_some", planted.carry_forgets, "agreement"),
    ("decided_by_some", planted.fetched_from_author_only, "liveness"),
    ("gap", planted.carry_what_was_not_proposed, "exception"),
    ("different_prefixes", planted.fetched_from_author_only, "liveness"),
]


@pytest.mark.parametrize("ordering", ORDERINGS)
@pytest.mark.parametrize(("name", "broken", "kind"), BROKEN)
def test_the_story_goes_wrong_without_its_rule(name, broken, kind, ordering):
    with patched(*broken()):
        found = Stage(STORIES[name], ordering).play().violations
    assert kind in {violation.kind for violation in found}
