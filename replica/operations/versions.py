"""The application's version in force, what replicas know, and an operator's command (`replica.core.versions`).

What a replica's code knows is its own word, and so is what it says of the version in force; f + 1 that say alike are
believed, because one of them is correct. The command is ordered, and refused by the replicas unless the version is
greater than the one in force. Whether their code knows it, they cannot agree on: that is looked at here, beforehand.
"""

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from replica.cluster.clusterfile import ClusterFile
from replica.cluster.keys import ClientKey
from replica.core.envelope import Status
from replica.core.genesis import Genesis
from replica.core.versions import encode_activation
from replica.operations.asking import Answer, Outcome
from replica.operations.changing import ChangeError, Council, silence
from replica.wire import reports


@dataclass(frozen=True, slots=True)
class Standing:
    """What one replica says: the version that is in force where it is, and the newest that its code knows.

    Both None if it did not answer, or said nothing of it.
    """

    number: int
    in_force: int | None
    known: int | None
    problem: str


def standings(answers: Sequence[Answer]) -> list[Standing]:
    """Return what each replica that was asked says."""
    return [
        Standing(
            answer.number,
            reports.number(answer.report, "application_version", "in_force"),
            reports.number(answer.report, "application_version", "known"),
            answer.problem,
        )
        for answer in answers
    ]


def in_force(found: Sequence[Standing], genesis: Genesis) -> int | None:
    """Return the version that f + 1 replicas say is in force, None if there is none (a command is under way)."""
    said = Counter(one.in_force for one in found if one.in_force is not None)
    return next((version for version, count in said.items() if count >= genesis.quorum), None)


def not_ready_for(version: int, answers: Sequence[Answer], genesis: Genesis) -> tuple[list[str], bool]:
    """Return what stands against putting a version in force, a text per replica; and whether f + 1 know it."""
    against = []
    for answer, one in zip(answers, standings(answers), strict=True):
        if answer.outcome is not Outcome.ANSWERED:
            against.append(f"replica {one.number} does not answer ({one.problem})")
        elif one.known is None:
            against.append(f"replica {one.number} does not say which versions it knows")
        elif one.known < version:
            against.append(f"replica {one.number} knows no version above {one.known}")
    return against, genesis.n - len(against) >= genesis.quorum


async def activate(cluster: ClusterFile, key: ClientKey, version: int, *, deadline_s: float) -> int:
    """Have a version put in force; return the last slot of the one before.

    ChangeError if it is refused, or if that is not known within the deadline.
    """
    try:
        async with asyncio.timeout(deadline_s), Council(cluster, key) as council:
            reply = await council.order(encode_activation(version))
            if reply.status is not Status.OK:
                raise ChangeError(f"the command was refused: {reply.text}")
            return reply.slot
    except TimeoutError:
        what = f"put version {version} of the application in force"
        raise silence(council, what, deadline_s, "application show") from None
