"""PBFT's scenarios."""

from collections.abc import Callable
from dataclasses import dataclass

from replica.lab.pbft_stage import FIRST_CLIENT, EquivocatingPrimary, PbftStage
from replica.lab.scenario import Expected, verdict
from replica.lab.trace import Line, Trace


@dataclass(frozen=True, slots=True)
class PbftScenario:
    """A scenario of PBFT; as `replica.lab.scenario.Scenario`. members: n and quorum for f."""

    name: str
    title: str
    tells: str
    system_name: str
    script: Callable[[PbftStage], None]
    faulty: tuple[int, ...]
    expected: Expected
    members: Callable[[int], tuple[int, int]] = lambda f: (3 * f + 1, 2 * f + 1)
    after: Callable[[PbftStage], None] = lambda _: None
    f: int = 1
    longest_ms: int = 6000

    def run(self, seed: int = 1) -> Trace:
        """Run it; the same seed gives the same trace."""
        n, quorum = self.members(self.f)
        header: Line = {"scenario": self.name, "title": self.title, "tells": self.tells, "expects": self.expected.text}
        stage = PbftStage(self.f, n, quorum, self.faulty, seed, header | {"system": self.system_name})
        self.script(stage)
        stage.play(self.longest_ms)
        self.after(stage)
        expected, trace, waits = self.expected, stage.trace, stage.what_is_left()
        safe, live = not stage.broken, not waits
        step = trace.first(expected.decided_by)
        good = safe == expected.safe and expected.live in {None, live} and step is not None
        found = f"{'nothing' if safe else 'agreement'} was broken; {'; '.join(waits) or 'nothing waits'}"
        happened = expected.happened if good else found
        verdict(trace, stage.world.now, expected.text, happened, safe=safe, live=live, good=good, step=step)
        return trace


def equivocation(stage: PbftStage) -> None:
    """Let the primary sign A2 for some and B2 for the others, for one slot."""
    second = (2,) if stage.n == 3 else (1,)
    EquivocatingPrimary(stage, 150, second)
    stage.direct(
        f"replica 0, the primary, will propose B2 to replica {second[0]} and A2 to the rest, for the same slot"
    )
    for client in stage.clients:
        client.ask(10, 200)


def primary_stops(stage: PbftStage) -> None:
    """Let a slot be decided without replica 3, and the primary stop."""
    stage.clients[0].ask(10, 210)
    stage.clients[1].ask(10, 330)
    apart = [(i, 3) for i in range(3)]
    stage.at(190, "nothing of the other replicas reaches replica 3", lambda: stage.cut(*apart))
    others = [(0, i) for i in range(4)] + [(0, FIRST_CLIENT), (0, FIRST_CLIENT + 1)]

    def stop() -> None:
        stage.hosts[0].is_down = True
        stage.cut(*others)
        stage.mend(*apart)

    stage.at(300, "replica 0, the primary, stops for ever; replica 3 hears the others again", stop)
