"""Verdicts: when a log is suspected, for what, since when, and when no longer; what is a fact stays."""

from __future__ import annotations

from dataclasses import replace

from replica.core.rules import Violation
from replica.core.verdicts import (
    BEHIND_MS,
    FORKED,
    LOOK_GAP_MS_MAX,
    SILENT_MS,
    WITHHELD_MS,
    Sight,
    Standing,
    Verdict,
    Verdicts,
)

STEP = 1000
START = 1_000_000


class Looker:
    """Replica 0 of three looks at replica 1 each second, and hears all of them each time unless told otherwise."""

    def __init__(self) -> None:
        self.verdicts = Verdicts(0, 3)
        self.now = START
        self.executed = 0
        self.sight = Sight(START, 10, 10, 10)
        self.hears = True
        self.awake = True
        self.look()

    def look(self, ms: int = STEP, times: int = 1) -> Verdict:
        for _ in range(times):
            self.now += ms
            if self.hears:
                self.sight = replace(self.sight, heard_ms=self.now)
            good = Sight(self.now, self.now, self.now, self.now)
            self.verdicts.look(self.now, self.executed, [good, self.sight, good], awake=self.awake)
        assert self.verdicts[0].standing is self.verdicts[2].standing is Standing.TRUSTED
        return self.verdicts[1]

    def until(self, ms: int) -> Verdict:
        """Look for `ms`; whatever lasts shorter must be trusted still just before."""
        assert self.look(times=ms // STEP - 1).standing is Standing.TRUSTED
        return self.look()


def test_an_idle_log_is_trusted():
    looker = Looker()
    assert looker.look(times=100).standing is Standing.TRUSTED


def test_silent_and_heard_again():
    looker = Looker()
    since = looker.now
    looker.hears = False
    found = looker.until(SILENT_MS)
    assert (found.standing, found.reason, found.since_ms) == (Standing.SUSPECTED, "silent", since)
    assert looker.look(times=5).since_ms == since
    looker.hears = True
    assert looker.look().standing is Standing.TRUSTED


def test_a_log_that_was_never_heard_is_silent_from_the_beginning_on():
    looker = Looker()
    looker.hears = False
    looker.sight = replace(looker.sight, heard_ms=0)
    assert looker.until(SILENT_MS).since_ms == START + STEP


def test_behind_only_while_others_go_on():
    looker = Looker()
    assert looker.look(times=60).standing is Standing.TRUSTED
    looker.executed += 1
    since = looker.now + STEP
    looker.look()
    found = looker.until(BEHIND_MS)
    assert (found.reason, found.since_ms) == ("behind", since)
    looker.sight = replace(looker.sight, read=11, received=11, seen=11)
    assert looker.look().standing is Standing.TRUSTED
    for _ in range(60):
        looker.executed += 1
        looker.sight = replace(looker.sight, read=looker.sight.read + 1)
        assert looker.look().standing is Standing.TRUSTED, "a log that moves is not behind"


def test_withheld_when_a_later_group_is_here():
    looker = Looker()
    looker.sight = replace(looker.sight, seen=20)
    looker.look()
    found = looker.until(WITHHELD_MS)
    assert (found.reason, found.text) == ("withheld", "entries 11 to 20 exist and nobody delivers them")
    looker.sight = replace(looker.sight, received=15)
    assert looker.look().standing is Standing.TRUSTED, "they come"
    looker.look(times=2)
    assert looker.until(WITHHELD_MS - STEP).reason == "withheld"


def test_withheld_when_its_entry_waits_for_what_nobody_delivers():
    looker = Looker()
    looker.sight = replace(looker.sight, waits_for="the proposal for slot 5 in view 0")
    looker.look(times=2)
    found = looker.until(WITHHELD_MS)
    assert (found.reason, found.text) == (
        "withheld",
        "its entry 11 waits for the proposal for slot 5 in view 0, which nobody delivers",
    )
    looker.sight = replace(looker.sight, waits_for="the proposal for slot 6 in view 0", read=13)
    assert looker.look().standing is Standing.TRUSTED


def test_a_reader_that_slept_or_catches_up_suspects_nobody_for_it():
    looker = Looker()
    looker.hears = False
    looker.sight = replace(looker.sight, seen=20)
    looker.look(times=SILENT_MS // STEP - 2)
    assert looker.look(LOOK_GAP_MS_MAX + 1).standing is Standing.TRUSTED, "it was stopped itself"
    looker.look(times=SILENT_MS // STEP - 2)
    looker.awake = False
    assert looker.look(times=30).standing is Standing.TRUSTED
    looker.awake = True
    assert looker.until(SILENT_MS).reason == "silent"


def test_facts_stand_above_suspicions_and_stay():
    looker = Looker()
    looker.hears = False
    looker.look(times=20)
    looker.sight = replace(looker.sight, violation=Violation("wrong-view", "an entry for view 3"))
    found = looker.look()
    assert found == Verdict(Standing.EXPOSED, "wrong-view", "an entry for view 3", looker.now)
    assert looker.look(times=5).since_ms == found.since_ms
    looker.sight = replace(looker.sight, violation=Violation(FORKED, "two attestations"))
    assert looker.look().standing is Standing.BROKEN


def test_what_was_executed_before_the_first_look_suspects_nobody():
    """A cluster that was restarted and stays idle: its logs stand where they stood."""
    verdicts = Verdicts(0, 3)
    for now in range(START, START + 3 * BEHIND_MS, STEP):
        verdicts.look(now, 500, [Sight(now, 10, 10, 10)] * 3)
    assert [verdicts[log].standing for log in range(3)] == [Standing.TRUSTED] * 3
