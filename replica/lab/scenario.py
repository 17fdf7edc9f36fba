"""What a scenario is: a story, a system, and what is expected of it; how it is run and judged."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from replica.core.genesis import Limits
from replica.lab.stage import LabStage, LabStory
from replica.lab.systems import System
from replica.lab.trace import Line, Trace
from replica.sim.control import patched
from replica.sim.scenario import LIMITS

# Violations of the simulator's witness that mean that the service was wrong, not that somebody was found out.
SAFETY = frozenset({"agreement", "state", "exactly-once", "durability", "linearizability"})
# Violations that no scenario expects: the lab itself, or the product, would be broken.
BROKEN = frozenset({"exception", "bounds", "reply", "rollback"})
# Checkpoints come seldom enough to stay out of what is shown.
LONG_INTERVALS = replace(LIMITS, checkpoint_interval=32, window=64)

Decides = Callable[[Line], bool]


@dataclass(frozen=True, slots=True)
class Expected:
    """What must come of a scenario.

    safe: whether correct replicas and clients agree to the end. live: whether every request is answered; None if
    that is not judged. decided_by: the first line for which this holds decided it. text: all that in words,
    happened: what is said if it came so.
    """

    safe: bool
    live: bool | None
    decided_by: Decides
    text: str
    happened: str


@dataclass(frozen=True, slots=True)
class Scenario:
    """One scenario of the lab. also: what must hold besides, each with its name."""

    name: str
    title: str
    tells: str
    system: System
    script: Callable[[LabStage], None]
    faulty: tuple[int, ...]
    expected: Expected
    f: int = 1
    clients: int = 2
    limits: Limits = LONG_INTERVALS
    longest_ms: int = 6000
    also: tuple[tuple[str, Callable[[LabStage], bool]], ...] = ()
    after: Callable[[LabStage], None] = field(default=lambda _: None)

    @property
    def system_name(self) -> str:
        """Return the system's title."""
        return self.system.title

    def run(self, seed: int = 1) -> Trace:
        """Run it; the same seed gives the same trace."""
        story = LabStory(
            self.name,
            self.tells,
            self.script,  # type: ignore[arg-type]
            self.faulty,
            f=self.f,
            clients=self.clients,
            limits=self.limits,
            seed=seed,
            longest_ms=self.longest_ms,
        )
        header: Line = {"scenario": self.name, "title": self.title, "tells": self.tells, "expects": self.expected.text}
        with patched(*self.system.patches()):
            stage = LabStage(story, self.system, header)
            stage.play()
            self.after(stage)
            return self._judged(stage)

    def _judged(self, stage: LabStage) -> Trace:
        expected, trace = self.expected, stage.lab_trace
        kinds = {violation.kind for violation in stage.witness.violations}
        safe = not kinds & SAFETY
        waits = stage.what_is_left()
        live = not waits
        step = trace.first(expected.decided_by)
        missing = [name for name, holds in self.also if not holds(stage)]
        as_expected = safe == expected.safe and expected.live in {None, live} and step is not None
        as_expected = as_expected and not missing and not kinds & BROKEN
        happened = expected.happened
        if not as_expected:
            found = ", ".join(sorted(kinds)) or "no violation"
            happened = f"{found}; {'; '.join(waits) or 'nothing waits'}"
            happened += "".join(f"; not so: {name}" for name in missing)
            happened += "" if step is not None else "; the step that should decide it never came"
        verdict(trace, stage.world.now, self.expected.text, happened, safe=safe, live=live, good=as_expected, step=step)
        return trace


def verdict(
    trace: Trace, at_ms: int, expected: str, happened: str, *, safe: bool, live: bool, good: bool, step: Line | None
) -> None:
    """Add the verdict."""
    mark = "as expected" if good else "NOT as expected"
    text = f"{mark}: {happened}"
    number = None if step is None else step["step"]
    trace.add(
        "verdict",
        at_ms,
        safe=safe,
        live=live,
        expected=expected,
        happened=happened,
        as_expected=good,
        decided_by=number,
        text=text,
    )
