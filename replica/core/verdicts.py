"""What a replica thinks of every log: trusted, suspected, exposed, or its trusted part broken.

Exposed and broken are facts with evidence, for ever. A suspicion is an opinion and ends when its reason does: it rests
on time, so it may be wrong, and nothing that replicas agree on depends on it. A log is suspected when

  silent     nothing was heard from its author;
  behind     it stood still, as far as it was read here, while slots were executed without it;
  withheld   entries of it are known to exist, as a later group of it is here, and nobody delivers them; or its next
             entry waits for entries that nobody delivers, although its author must have them;

for the time that the constants below name. A reader that slept, or catches up itself, begins to count anew.

Nothing here has a clock: times, in milliseconds of one that never goes back, are passed in.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from replica.core.rules import Violation

SILENT_MS = 10_000
BEHIND_MS = 10_000
WITHHELD_MS = 10_000
# A reader that did not look for so long was stopped itself: what it did not hear says nothing.
LOOK_GAP_MS_MAX = 4_000
# The name of the "rule" that a broken trusted part breaks.
FORKED = "forked"


class Standing(Enum):
    """What is thought of a log."""

    TRUSTED = "trusted"
    SUSPECTED = "suspected"
    EXPOSED = "exposed"
    BROKEN = "broken"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is thought of a log, and why.

    reason: "silent", "behind", "withheld", or the rule that was broken; empty if trusted. since_ms: since when.
    """

    standing: Standing = Standing.TRUSTED
    reason: str = ""
    text: str = ""
    since_ms: int | None = None


@dataclass(frozen=True, slots=True)
class Sight:
    """What a reader sees of one log. Times in milliseconds.

    heard_ms: when its author was last heard, about anything. read, received, seen: the indexes up to which it was
    read, arrived without gaps, and is known to exist. waits_for: what its next entry waits for, in words, if that is
    entries which its author must have; None otherwise. violation: the rule that its author broke.
    """

    heard_ms: int
    read: int
    received: int
    seen: int
    waits_for: str | None = None
    violation: Violation | None = None


TRUSTED = Verdict()


class _Watch:
    """One log, watched: since when each reason to suspect it holds."""

    def __init__(self) -> None:
        self.known_ms: int | None = None  # since when a violation is known
        self.since: dict[str, int] = {}
        self.before: Sight | None = None

    def hold(self, reason: str, now_ms: int, *, holds: bool) -> None:
        if holds:
            self.since.setdefault(reason, now_ms)
        else:
            self.since.pop(reason, None)

    def lasts(self, reason: str, now_ms: int, ms: int) -> bool:
        return reason in self.since and now_ms - self.since[reason] >= ms


class Verdicts:
    """What replica `number` of n thinks of every log; call `look` about once a second."""

    def __init__(self, number: int, n: int) -> None:
        self._number = number
        self._watches = [_Watch() for _ in range(n)]
        self._verdicts = [TRUSTED] * n
        self._looked_ms: int | None = None
        self._began_ms = 0
        self._executed = 0

    def __getitem__(self, log: int) -> Verdict:
        """Return the verdict on `log`, as it was when last looked."""
        return self._verdicts[log]

    def look(self, now_ms: int, executed: int, sights: Sequence[Sight], *, awake: bool = True) -> None:
        """Take in what is seen of every log, while slots up to `executed` are executed here.

        awake: whether this replica is up to date itself, as far as it knows; otherwise nobody is suspected anew.
        """
        slept = self._looked_ms is None or now_ms - self._looked_ms > LOOK_GAP_MS_MAX
        if slept or not awake:
            self._began_ms = now_ms
            for watch in self._watches:
                watch.since.clear()
        went_on = executed > self._executed and not slept  # what was executed before the first look says nothing
        for log, sight in enumerate(sights):
            self._take(self._watches[log], sight, now_ms, went_on=went_on)
            self._verdicts[log] = self._judge(log, sight, now_ms)
        self._looked_ms, self._executed = now_ms, executed

    def _take(self, watch: _Watch, sight: Sight, now_ms: int, *, went_on: bool) -> None:
        before = watch.before or sight
        watch.before = sight
        if before.read != sight.read:
            watch.since.pop("behind", None)
        elif went_on:
            watch.hold("behind", now_ms, holds=True)
        arrived = before.received != sight.received
        watch.hold("gap", now_ms, holds=sight.seen > sight.received and not arrived)
        same = before.waits_for == sight.waits_for and before.read == sight.read
        watch.hold("waits", now_ms, holds=sight.waits_for is not None and same)

    def _judge(self, log: int, sight: Sight, now_ms: int) -> Verdict:
        watch = self._watches[log]
        if sight.violation is not None:
            watch.known_ms = now_ms if watch.known_ms is None else watch.known_ms
            standing = Standing.BROKEN if sight.violation.rule == FORKED else Standing.EXPOSED
            return Verdict(standing, sight.violation.rule, sight.violation.text, watch.known_ms)
        if log == self._number:
            return TRUSTED
        heard = max(sight.heard_ms, self._began_ms)
        if now_ms - heard >= SILENT_MS:
            return Verdict(Standing.SUSPECTED, "silent", "nothing was heard from it", heard)
        if watch.lasts("gap", now_ms, WITHHELD_MS):
            text = f"entries {sight.received + 1} to {sight.seen} exist and nobody delivers them"
            return Verdict(Standing.SUSPECTED, "withheld", text, watch.since["gap"])
        if watch.lasts("waits", now_ms, WITHHELD_MS):
            text = f"its entry {sight.read + 1} waits for {sight.waits_for}, which nobody delivers"
            return Verdict(Standing.SUSPECTED, "withheld", text, watch.since["waits"])
        if watch.lasts("behind", now_ms, BEHIND_MS):
            text = f"read up to entry {sight.read}, and others go on"
            return Verdict(Standing.SUSPECTED, "behind", text, watch.since["behind"])
        return TRUSTED
