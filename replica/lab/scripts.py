"""What happens in the scenarios, and when. Times are virtual milliseconds."""

from replica.core.entries import PRE_PREPARE
from replica.core.group import VerifiedGroup
from replica.lab.attacks import Collude, Equivocate, Mute, SkipVotes
from replica.lab.stage import LabStage
from replica.sim.lies import view_and_slot
from replica.sim.messages import Request
from replica.sim.stage import Hide
from replica.sim.strategies import Censor

A, B = 0, 1  # the clients


def equivocation(stage: LabStage) -> None:
    """Let the primary propose A's request to some, and B's to the others, for one slot."""
    twice = stage.system.cloned or not stage.system.attested
    second = (2,) if stage.scenario.n == 3 else (1,)
    first = [i for i in range(1, stage.scenario.n) if i not in second]
    stage.trick(0, Equivocate(150, second, twice=twice))
    stage.chronicle.direct(
        f"replica 0, the primary, will propose A2 to {_and(first)} and B2 to {_and(second)}, for the same slot"
    )
    stage.ask(A, 10, 200)
    stage.ask(B, 10, 200)
    if stage.scenario.n > 3:
        # What replica 1 was not shown, the next checkpoint brings.
        stage.keep_asking(B, 500, 60, lambda: stage.world.now < 900)


def two_of_four(stage: LabStage) -> None:
    """Let the primary and replica 3 lie together: A2 to replica 2, B2 to replica 1, to each client what it wants."""
    primary = Equivocate(150, (1,), twice=True, replies=True)
    stage.trick(0, primary)
    stage.trick(3, Collude(primary, victim=1))
    stage.chronicle.direct(
        "replica 0, the primary, will propose B2 to replica 1 and A2 to replica 2; replica 3 will vote for both"
    )
    stage.ask(A, 10, 200)
    stage.ask(B, 10, 200)
    stage.ends = lambda: stage.world.now >= 450


def cloned(stage: LabStage) -> None:
    """Let it do that with two copies of its log; go on until the others have noticed."""
    equivocation(stage)
    stage.ends = lambda: who_noticed_the_fork(stage) == {"r1", "r2"}


def who_noticed_the_fork(stage: LabStage) -> set[str]:
    """Return which correct replicas have found two attestations of log 0 that contradict each other."""
    notes = [line for line in stage.lab_trace.of("note") if line["about"] == "forked" and "log 0" in line["text"]]
    return {line["who"] for line in notes}


def hidden_vote(stage: LabStage) -> None:
    """Let replica 1 vote for what A asks for, and hide that from replica 2, which has heard nothing of it yet."""
    stage.trick(1, SkipVotes(190, victim=2))
    stage.chronicle.direct("replica 1 will hide from replica 2 what it votes for")
    stage.ask(A, 10, 210)
    stage.ask(B, 10, 330)
    cut_off_the_primary(stage, back_ms=1500)


def cut_off_the_primary(stage: LabStage, back_ms: int) -> None:
    """Let nothing of the primary reach replica 2, and then cut it off, for a while."""
    clients = [client.number for client in stage.clients]
    peers = range(2, stage.scenario.n)
    deaf = [(0, peer) for peer in peers]
    stage.at(190, f"nothing of replica 0, the primary, reaches {_and(peers)}", lambda: stage.cut(*deaf))
    others = [(0, 1), (1, 0), *((peer, 0) for peer in peers)]
    others += [pair for client in clients for pair in ((0, client), (client, 0))]
    stage.at(300, "replica 0, which is correct, is cut off", lambda: stage.cut(*others))
    stage.at(back_ms, "replica 0 is connected again", lambda: stage.mend(*deaf, *others))


def rolled_back_disk(stage: LabStage) -> None:
    """Let an operator put an old copy of replica 1's disk and trusted state back."""
    _put_back(stage, "disk and trusted log", with_log=True)


def rolled_back_store(stage: LabStage) -> None:
    """Let an operator put an old copy of replica 1's disk back; its log's end is kept by a TPM."""
    _put_back(stage, "disk; its log's end stands in a TPM, which nobody can put back", with_log=False)


def _put_back(stage: LabStage, what: str, *, with_log: bool) -> None:
    replica = stage.replicas[1]
    copies = []

    def put_aside() -> None:
        copy = replica.put_aside()
        if copy is None:
            raise RuntimeError("there is nothing to copy yet")
        copies.append(copy)

    def bring_back() -> None:
        if with_log:
            replica.roll_back(copies[0])
        else:
            replica.crash()
            replica.disk = copies[0].disk
            replica.restart()

    stage.ask(A, 10, 220, 260, 700)
    stage.at(180, "an operator copies replica 1's disk", put_aside)
    stage.at(500, f"replica 1 crashes, and comes back with the old copy of its {what}", bring_back)


def log_ahead(stage: LabStage) -> None:
    """Let the primary show what it proposes to replica 1 only, and let replica 2 hear of it late."""

    def is_hidden(to: int, group: VerifiedGroup) -> bool:
        proposes = any(payload[0] == PRE_PREPARE and view_and_slot(payload)[1] > 2 for payload in group.payloads)
        return group.author == 0 and to == 2 and (proposes or stage.world.now >= 200)

    stage.trick(0, Hide(is_hidden))
    stage.ask(A, 10, 210, 230)
    stage.at(
        200, "replica 0, the primary, shows its log to replica 1 only; 1 does not reach 2", lambda: stage.cut((1, 2))
    )
    stage.at(400, "replica 1 reaches replica 2 again", lambda: stage.mend((1, 2)))


def withheld_replies(stage: LabStage) -> None:
    """Let the primary decide A2 with replica 1 alone, and answer nobody; let replica 2 hear of it late."""
    stage.trick(0, Hide(lambda to, group: group.author == 0 and to == 2 and stage.world.now >= 200), Mute())
    stage.ask(A, 10, 210)
    stage.at(
        200,
        "replica 0, the primary, shows its log to 1 only, and answers no client; 1 does not reach 2",
        lambda: stage.cut((1, 2)),
    )
    stage.at(500, "replica 1 reaches replica 2 again", lambda: stage.mend((1, 2)))


def two_quorums(stage: LabStage) -> None:
    """Let replicas 0 and 1 decide A2 where replica 2 hears nothing of it, and replica 0 stop."""
    stage.trick(0, Hide(lambda to, group: group.author == 0 and to == 2 and stage.world.now >= 190))
    stage.ask(A, 10, 210)
    stage.ask(B, 10, 330)
    stage.at(190, "nothing of replicas 0 and 1 reaches replica 2", lambda: stage.cut((0, 2), (1, 2)))

    def stop() -> None:
        stage.stop(0)
        stage.mend((1, 2))

    stage.at(300, "replica 0, the primary, stops for ever; replica 1 reaches replica 2 again", stop)


def ignored_client(stage: LabStage) -> None:
    """Let the primary drop whatever A asks for."""
    stage.cabal.censored = stage.clients[A].key.public
    stage.trick(0, Censor())
    stage.chronicle.direct("replica 0, the primary, drops whatever client A asks for")
    stage.ask(A, 200)
    stage.keep_asking(B, 10, 150, lambda: stage.waits(A, 1))


TELLS_ALL_MS = 1500


def one_replica_told(stage: LabStage) -> None:
    """Let A, which the primary ignores, tell replica 2 only; later, let it tell everybody."""
    stage.cabal.censored = stage.clients[A].key.public
    stage.trick(0, Censor())
    client = stage.clients[A]
    tell = client._send  # noqa: SLF001 - this client does not do what a correct one does

    def tell_one(to: int, message: object, label: str) -> None:
        is_opening = stage.world.now < 200
        if not isinstance(message, Request) or is_opening or to == 2 or stage.world.now >= TELLS_ALL_MS:
            tell(to, message, label)

    client._send = tell_one  # type: ignore[method-assign]  # noqa: SLF001
    stage.chronicle.direct("replica 0, the primary, drops whatever client A asks for; A tells replica 2 only")
    stage.ask(A, 210)
    stage.keep_asking(B, 10, 200, lambda: stage.world.now < TELLS_ALL_MS)
    stage.at(TELLS_ALL_MS, "client A tells all replicas", lambda: None)


def _and(numbers: object) -> str:
    return " and ".join(str(number) for number in numbers)  # type: ignore[attr-defined]
