"""A scenario's stage: the simulator's, with a recorder, a log of outcomes where the system has one, and its own end."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from replica.core.envelope import OperationsReply, decode_reply
from replica.core.events import Effect, Executed
from replica.core.genesis import Limits, Ordering
from replica.core.layout import LayoutError
from replica.lab.recorder import Recorder
from replica.lab.systems import System
from replica.lab.trace import FORMAT, Line, Trace, numbered
from replica.sim.chronicle import PROLOGUE_MS, client_name
from replica.sim.logs import StandInLog
from replica.sim.messages import Reply
from replica.sim.run import Outcome
from replica.sim.scenario import Scenario
from replica.sim.setting import CLIENTS_FROM
from replica.sim.stage import PATIENCE_MS, Stage, Story

OUTCOME = 0x40  # no entry of the protocol begins with this byte


class OutcomeLogs:
    """Attempt 1's trusted logs: each replica appends what it has executed, and nothing else."""

    def __init__(self, stage: "LabStage") -> None:
        self._stage = stage
        # The replica's own key: its messages are attested by nothing here.
        self._logs = {number: StandInLog(number) for number in stage.hosts}
        for log in self._logs.values():
            log.context = stage.setting.genesis.context()
        self.said: dict[int, dict[int, bytes]] = {number: {} for number in stage.hosts}  # replica -> slot -> digest

    def executed(self, replica: int, slot: int, digest: bytes) -> None:
        """Append an outcome; a log says one thing for each slot."""
        if slot in self.said[replica]:
            return
        self.said[replica][slot] = digest
        payload = bytes([OUTCOME]) + slot.to_bytes(8, "big") + digest
        raw = self._logs[replica].append((payload,))
        group = self._stage.setting.verifier.group(replica, raw)
        if group is None:
            raise RuntimeError("the simulated log attested what does not verify")
        self._stage.recorder.appended(group, chain="outcome")


def insist_on_outcomes(stage: "LabStage", outcomes: OutcomeLogs) -> None:
    """Let clients count a reply only if its author's log attests that outcome: a batch with the client's request.

    A log attests one outcome for each slot, whoever its author lies to.
    """
    for client in stage.clients:
        take, name = client.receive, client_name(client.number)

        def receive(source: int, message: object, take: Callable[[int, object], None] = take, name: str = name) -> None:
            slot = _slot_of(message, stage.setting.genesis.limits)
            if slot is not None:
                digest = outcomes.said[source].get(slot, b"")
                if not any(operation.startswith(name) for operation in stage.recorder.operations(digest)):
                    text = f"passes over replica {source}'s reply: its log attests another outcome for s{slot}"
                    stage.recorder.add("note", who=name, text=text, about="reply")
                    return
            take(source, message)

        client.receive = receive  # type: ignore[method-assign]


def _slot_of(message: object, limits: Limits) -> int | None:
    """Return the slot in which a reply says that an operation was executed, or None if it says nothing of the kind."""
    if not isinstance(message, Reply):
        return None
    try:
        reply = decode_reply(message.raw, limits)
    except LayoutError:
        return None
    # Slot 0: the result is kept no more, so no outcome is claimed.
    return (reply.results[0].slot or None) if isinstance(reply, OperationsReply) else None


class LabRecorder(Recorder):
    """Also appends outcomes, where the system attests these."""

    outcomes: OutcomeLogs | None = None

    def entry(self, payload: bytes, index: int) -> Line:
        """See `Recorder`."""
        if payload[:1] != bytes([OUTCOME]):
            return super().entry(payload, index)
        slot, digest = int.from_bytes(payload[1:9], "big"), payload[9:]
        ops = list(self._names.get(digest, ()))
        place = {"index": index, "kind": "OUTCOME", "view": None, "slot": slot, "digest": digest.hex(), "ops": ops}
        return {**place, "text": f"OUTCOME s{slot} ({' '.join(ops) or 'null'})"}

    def effect(self, replica: int, effect: Effect) -> None:
        """See `Recorder`."""
        super().effect(replica, effect)
        if isinstance(effect, Executed) and self.outcomes is not None:
            self.outcomes.executed(replica, effect.slot, effect.batch.digest)


@dataclass(frozen=True, slots=True)
class LabStory(Story):
    """A story with a seed: it decides how long messages and appends take."""

    seed: int = 1
    longest_ms: int = 6000
    first_patience_ms: int = PATIENCE_MS

    def scenario(self, ordering: Ordering) -> Scenario:
        """See `Story`."""
        drawn = Story.scenario(self, ordering)
        return replace(drawn, seed=self.seed, liveness_ms=self.longest_ms, patience_ms=self.first_patience_ms)


class LabStage(Stage):
    """One scenario being played. Build it and play it while the system's patches are in force.

    ends: when to stop; else when nothing waits any more, or something went wrong that must not.
    """

    def __init__(self, story: LabStory, system: System, header: Line) -> None:
        self.system = system
        super().__init__(story, system.ordering)
        self.lab_trace = Trace()
        scenario = self.scenario
        clients = [client_name(CLIENTS_FROM + i) for i in range(story.clients)]
        lanes = [{"id": name, "name": f"client {name}", "faulty": False} for name in clients]
        for number, name in enumerate(numbered(range(scenario.n))):
            lanes.append({"id": name, "name": f"replica {number}", "faulty": number in story.faulty})
        self.lab_trace.add(
            "header",
            0,
            format=FORMAT,
            **header,
            system=system.title,
            n=scenario.n,
            f=scenario.f,
            quorum=self.setting.genesis.quorum,
            seed=story.seed,
            begins=PROLOGUE_MS,
            lanes=lanes,
        )
        self.recorder = LabRecorder(self.lab_trace, attested=system.attested, insists=system.in_order)
        self.recorder.begin(self.setting.genesis, frozenset(story.faulty), self.setting.clients, lambda: self.world.now)
        self.chronicle = self.recorder
        self.setting.audience = self.recorder
        for host in self.hosts.values():
            host.core.audience = self.recorder
        self.recorder.watch(self.setting, self.hosts)
        if system.outcomes:
            self.recorder.outcomes = OutcomeLogs(self)
            insist_on_outcomes(self, self.recorder.outcomes)
        if not system.attested:
            # Nothing attests what is said, so there is nothing that could contradict itself.
            self.witness.saw_group = lambda group, key=b"": None  # type: ignore[method-assign]  # noqa: ARG005
        self.ends: Callable[[], bool] | None = None

    def play(self) -> Outcome:
        """Let it all happen; what still waits at the end is the scenario's business."""
        for host in self.hosts.values():
            host.start()
            for client in self.clients:
                host.welcome(client.number)
        self.story.script(self)
        self.world.run(self.scenario.liveness_ms, self._is_over)
        return self._verdict()

    def _is_over(self) -> bool:
        if self.ends is not None:
            return self.ends()
        return bool(self.witness.violations) or not self.what_is_left()

    def what_is_left(self) -> list[str]:
        """Return what must still come to an end."""
        return self._what_is_left()
