"""Whether one replica is healthy: asked over its own port, so it needs no HTTP, and answered within a deadline.

*Live*: it answers, and has not halted. *Ready*: it is live and of use to clients, see `replica.shell.readiness`. A
container is restarted when it is not live; clients are sent elsewhere, and a rolling upgrade waits, while it is not
ready.
"""

from dataclasses import dataclass, replace

from replica.cluster.clusterfile import ReplicaPlace
from replica.cluster.home import ReplicaHome
from replica.operations.asking import Answer, Outcome, ask
from replica.operations.reports import text

# Where to ask one that listens everywhere.
ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}


@dataclass(frozen=True, slots=True)
class Health:
    """One replica's health. problem: why it is not healthy, in words; None if it is."""

    number: int
    address: str
    live: bool
    ready: bool
    problem: str | None


async def check_health(home: ReplicaHome, deadline_s: float) -> Health:
    """Ask the replica of this folder, at the address where it listens."""
    answer = await ask(home.cluster, own_place(home), deadline_s)
    return health_of(answer)


def health_of(answer: Answer) -> Health:
    """Judge an answer."""
    where = (answer.number, answer.place.address)
    if answer.outcome is not Outcome.ANSWERED:
        return Health(*where, live=False, ready=False, problem=answer.problem)
    halted = text(answer.report, "halted")
    if halted is not None:
        return Health(*where, live=False, ready=False, problem=f"halted: {halted}")
    not_ready = text(answer.report, "not_ready")
    ready = "not_ready" in answer.report and not_ready is None
    return Health(*where, live=True, ready=ready, problem=None if ready else not_ready or "it does not say")


def own_place(home: ReplicaHome) -> ReplicaPlace:
    """Return where this machine reaches its own replica: where it listens, which may not be where others reach it."""
    host, port = home.listen_address
    return replace(home.place, host=ANY_ADDRESS.get(host, host), port=port)
