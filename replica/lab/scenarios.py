"""The scenarios, in the order in which a lecture would show them."""

from typing import Protocol

from replica.lab import deciding, pbft_scenarios, quorums, scripts
from replica.lab.pbft_scenarios import PbftScenario
from replica.lab.scenario import Expected, Scenario
from replica.lab.systems import CLONED, OUTCOME, OUTCOME_3F1, ROLLED_BACK, THREE_PHASE, TWO_PHASE, UNORDERED, System
from replica.lab.trace import Trace
from replica.sim.scenario import LIMITS


class Runnable(Protocol):
    """A scenario, of PBFT or of the product's core."""

    @property
    def name(self) -> str:
        """As on the command line."""

    @property
    def title(self) -> str:
        """One line."""

    @property
    def tells(self) -> str:
        """What a reader should know before."""

    @property
    def system_name(self) -> str:
        """The system's title."""

    @property
    def expected(self) -> Expected:
        """What must come of it."""

    def run(self, seed: int = 1) -> Trace:
        """Run it."""


# The table.

_EQUIVOCATES = (
    "The primary, replica 0, has requests of clients A and B. For one slot it proposes A2 to some replicas and B2 to "
)
_HIDES = """Replicas 0 and 1 decide A2 for slot 5; replica 2 has heard nothing of it yet, and 0 is cut off for a
while. Replica 1 is faulty, and the next primary: it shows replica 2 its VIEW-CHANGE, skips the entry with its vote
for A2 before it, and proposes B2 for slot 5."""


def _core() -> list[Scenario]:
    return [
        Scenario(
            "outcome-only",
            "Attempt 1, 2f+1: two correct logs disagree, both perfectly attested",
            _EQUIVOCATES + "the others. Messages are plain; each replica's trusted log attests what it has executed.",
            OUTCOME,
            scripts.equivocation,
            (0,),
            Expected(
                safe=False,
                live=None,
                decided_by=deciding.violated("agreement"),
                text="safety fails: with quorums of f+1 the primary and one backup are enough, for A2 as for B2",
                happened="replicas 1 and 2 executed different requests at one slot, and both outcomes are attested",
            ),
        ),
        Scenario(
            "outcome-only-3f1",
            "Attempt 1, 3f+1 (A2M-PBFT-E): the same lie falls short of a quorum",
            _EQUIVOCATES + "replica 1. With n = 3f+1, 2f+1 must vote, and clients wait for 2f+1 attested outcomes.",
            OUTCOME_3F1,
            scripts.equivocation,
            (0,),
            Expected(
                safe=True,
                live=True,
                decided_by=deciding.is_short_of_a_quorum,
                text="safety holds: of two quorums of 2f+1 one replica at least is correct in both, and votes once",
                happened="B2 got two votes of three where A2 got three; the next checkpoint brought replica 1 back",
            ),
            limits=LIMITS,
            also=(("replica 1 installs a checkpoint", lambda s: s.world.counts["transfers"] > 0),),
        ),
        Scenario(
            "outcome-only-beyond-f",
            "A2M-PBFT-E with more than f faulty: what attesting the outcome buys",
            "Two of four replicas are faulty, one more than f: 0 proposes A2 and B2, 3 votes for both, both "
            "reply to both.",
            OUTCOME_3F1,
            scripts.two_of_four,
            (0, 3),
            Expected(
                safe=False,
                live=None,
                decided_by=deciding.passed_over,
                text="replicas disagree, as they must; but no two clients believe different outcomes of one slot",
                happened=(
                    "replicas 1 and 2 disagree; A has 2f+1 attested outcomes, and no log attests a second one for B"
                ),
            ),
            also=(("no two clients believe different outcomes", deciding.clients_agree),),
        ),
        Scenario(
            "unordered",
            "Attempt 2: every message logged, but a reader does not insist on order",
            _HIDES + " Here a reader waits for a gap in a log for a moment only.",
            UNORDERED,
            scripts.hidden_vote,
            (1,),
            Expected(
                safe=False,
                live=None,
                decided_by=deciding.violated("agreement"),
                text="safety fails: the entry that is skipped holds the only vote that would carry A2 into view 1",
                happened="view 1 carried nothing for slot 5, and replica 2 executed B2 where replica 0 had executed A2",
            ),
        ),
        *(_ours(system) for system in (THREE_PHASE, TWO_PHASE)),
        *(_ours_in_order(system) for system in (THREE_PHASE, TWO_PHASE)),
        Scenario(
            "cloned-log",
            "Ours with a cloned trusted log: the assumption broken on purpose",
            _EQUIVOCATES + "the others, at one index: it owns two copies of its trusted log, which must never exist.",
            CLONED,
            scripts.cloned,
            (0,),
            Expected(
                safe=False,
                live=None,
                decided_by=deciding.violated("agreement"),
                text=(
                    "safety fails, and the failure detector names log 0: peers compare the heads of the logs they "
                    "read. What it says of other logs after that proves nothing: all proofs rest on what was broken"
                ),
                happened=(
                    "replicas 1 and 2 disagree; both then hold two attestations of log 0 that contradict each other"
                ),
            ),
            also=(("every correct replica names log 0", deciding.named_by_all),),
        ),
        *_rollbacks(),
        *_life(),
    ]


def _ours(system: System) -> Scenario:
    return Scenario(
        f"equivocation-{system.name}",
        f"{system.title}: equivocation fails",
        _EQUIVOCATES
        + "the others. Its log cannot say both at one index, so it says one after the other, and hides each.",
        system,
        scripts.equivocation,
        (0,),
        Expected(
            safe=True,
            live=True,
            decided_by=deciding.noted("exposed", "proposed-twice"),
            text="safety and liveness hold: whoever is shown the second proposal cannot read it before the first",
            happened="replica 2 had to read A2 before B2, found a second proposal for one slot, and the view was left",
        ),
    )


def _ours_in_order(system: System) -> Scenario:
    return Scenario(
        f"hidden-vote-{system.name}",
        f"{system.title}: a vote cannot be hidden",
        _HIDES + " Here a log is read in order or not at all.",
        system,
        scripts.hidden_vote,
        (1,),
        Expected(
            safe=True,
            live=True,
            decided_by=deciding.noted("early", "log 1"),
            text="safety holds: replica 2 reads nothing behind the gap, so that no view opens without the vote",
            happened=(
                "replica 2 waited for the missing entry and had it from replica 0; A2 was carried, replica 1 exposed"
            ),
        ),
        also=(deciding.exposes(1),),
    )


def _rollbacks() -> list[Scenario]:
    return [
        Scenario(
            "rollback-software",
            "A software log put back from an old copy: refused when a peer knows more",
            "Replica 1 crashes and finds an old copy of its disk and of its trusted log. Before it speaks it "
            "asks its peers.",
            THREE_PHASE,
            scripts.rolled_back_disk,
            (),
            Expected(
                safe=True,
                live=True,
                decided_by=deciding.noted("halt", "rolled back"),
                text="the rollback is refused: a group signed by its own key beyond its own end proves it",
                happened=(
                    "replica 1 was shown an entry of its own log that its trusted part no longer knew, and stopped"
                ),
            ),
            clients=1,
        ),
        Scenario(
            "rollback-tpm",
            "A TPM's log cannot be put back: the old disk is seen as old, and mended",
            """Replica 1 comes back with an old disk, but its log's end stands in a TPM. (The real backend refuses to
open at once, and says that the folder is old; here, as after any loss of data, what is missing is fetched from the
            peers.)""",
            THREE_PHASE,
            scripts.rolled_back_store,
            (),
            Expected(
                safe=True,
                live=True,
                decided_by=deciding.noted("fetch", "its own log"),
                text="nothing is said twice: the log goes on behind its true end, once its entries are here again",
                happened="replica 1 fetched the end of its own log from its peers, read it, and went on behind it",
            ),
            clients=1,
        ),
        Scenario(
            "rollback-hidden",
            "A software log rolled back by a host that hides it: as bad as a clone",
            _EQUIVOCATES
            + """replica 1, then puts an old copy of its software log back, and proposes B2 to replica 2. It does not
ask its peers first, as an honest replica would.""",
            ROLLED_BACK,
            scripts.cloned,
            (0,),
            Expected(
                safe=False,
                live=None,
                decided_by=deciding.violated("agreement"),
                text=(
                    "safety fails: software cannot notice; with a TPM the second history is impossible "
                    "(equivocation-*). After that the failure detector's word on other logs proves nothing"
                ),
                happened="one log said two things at one index; replicas 1 and 2 disagree, and have the evidence",
            ),
            also=(("every correct replica names log 0", deciding.named_by_all),),
        ),
    ]


def _life() -> list[Scenario]:
    return [
        Scenario(
            "log-ahead",
            "One correct replica's log is ahead: the others wait, fetch and follow",
            "Replica 0, faulty, shows its proposals to replica 1 only. What 1 then says rests on what 2 has "
            "never seen.",
            THREE_PHASE,
            scripts.log_ahead,
            (0,),
            Expected(
                safe=True,
                live=True,
                decided_by=deciding.noted("fetch", "asks replica 1 for log 0"),
                text="replica 2 waits with replica 1's votes, and has the proposals from it: entries prove themselves",
                happened="replica 2 asked the author of the waiting entry for log 0, and followed",
            ),
            clients=1,
        ),
        Scenario(
            "withheld-replies",
            "Faulty replicas that decide, and answer nobody: the client is answered all the same",
            "Replica 0 decides A2 with replica 1, and keeps its reply to itself. A has one reply, and needs f+1.",
            THREE_PHASE,
            scripts.withheld_replies,
            (0,),
            Expected(
                safe=True,
                live=True,
                decided_by=deciding.follows,
                text="A is answered without a view change: replica 2 reads what 1 holds, executes A2 and replies",
                happened="replica 2 fetched log 0 from replica 1, executed A2, and its reply was the second of two",
            ),
            clients=1,
            also=(("no view changes", lambda stage: not stage.lab_trace.of("view")),),
        ),
        Scenario(
            "ignored-client",
            "A primary ignores a client: the backups hand its request over, and replace the primary",
            "The primary serves B and drops whatever A asks for. A's patience ends, and it sends its request to all.",
            THREE_PHASE,
            scripts.ignored_client,
            (0,),
            Expected(
                safe=True,
                live=True,
                decided_by=deciding.opened,
                text=(
                    "A is served: patience belongs to the oldest request that waits, and that B is served does "
                    "not end it"
                ),
                happened="f+1 replicas lost patience with view 0, and view 1 served A",
            ),
        ),
        Scenario(
            "one-replica-told",
            "A client tells one replica only: one impatient replica moves nothing",
            "The primary ignores A, and A tells replica 2 only: out of malice, or because it does not know better.",
            THREE_PHASE,
            scripts.one_replica_told,
            (0,),
            Expected(
                safe=True,
                live=True,
                decided_by=deciding.opened,
                text="the view stays until f+1 replicas are impatient: then A has told them all",
                happened="replica 2 alone suspected the primary and the view stayed; when A told all, view 1 served it",
            ),
            also=(("only replica 2 suspects, and no view changes, before A tells all", deciding.alone_moves_nothing),),
        ),
        Scenario(
            "quorums-logs",
            "Why f+1 VIEW-CHANGEs and f+1 replies are enough here",
            "Replicas 0 and 1 decide A2, of which replica 2 hears nothing. Replica 0 stops; 1 and 2 open view 1.",
            THREE_PHASE,
            scripts.two_quorums,
            (0,),
            Expected(
                safe=True,
                live=True,
                decided_by=deciding.opened,
                text="A2 is carried: the replica in both quorums has the vote in its log, before its VIEW-CHANGE",
                happened="view 1 carried A2, by the one vote in the log that both quorums share",
            ),
            after=quorums.of_logs,
        ),
    ]


def _pbft() -> list[PbftScenario]:
    return [
        PbftScenario(
            "pbft-equivocation",
            "PBFT, 3f+1: the same equivocation falls short of a quorum",
            _EQUIVOCATES + "replica 1. Nothing is attested; 2f+1 of 3f+1 must agree.",
            "PBFT (Castro & Liskov)",
            pbft_scenarios.equivocation,
            (0,),
            Expected(
                safe=True,
                live=True,
                decided_by=deciding.is_short_of_a_quorum,
                text="safety and liveness hold, with f replicas more than with logs",
                happened="B2 got two of three votes; view 1 carried A2's certificate to replica 1, and then ordered B2",
            ),
        ),
        PbftScenario(
            "pbft-2f1",
            "PBFT's rules with 2f+1 replicas: why the f more are there",
            _EQUIVOCATES + "the others. PBFT's rules with n = 2f+1, and quorums of f+1.",
            "PBFT's rules, n = 2f+1",
            pbft_scenarios.equivocation,
            (0,),
            Expected(
                safe=False,
                live=None,
                decided_by=deciding.violated("agreement"),
                text="safety fails: the one replica in both quorums is the liar",
                happened="replicas 1 and 2 executed different requests at one slot",
            ),
            members=lambda f: (2 * f + 1, f + 1),
        ),
        PbftScenario(
            "quorums-pbft",
            "Why PBFT needs 2f+1 VIEW-CHANGEs, each with certificates",
            "Replicas 0, 1 and 2 decide A2, of which replica 3 hears nothing. Replica 0 stops; 1, 2 and 3 open view 1.",
            "PBFT (Castro & Liskov)",
            pbft_scenarios.primary_stops,
            (0,),
            Expected(
                safe=True,
                live=True,
                decided_by=deciding.opened,
                text="A2 is carried: a correct replica in both quorums hands over its certificate",
                happened="view 1 carried A2, by the certificates of replicas 1 and 2",
            ),
            after=quorums.of_pbft,
        ),
    ]


def _all() -> list[Runnable]:
    first, second, third = _pbft()
    return [first, second, *_core(), third]


SCENARIOS: dict[str, Runnable] = {scenario.name: scenario for scenario in _all()}
