"""What signatures alone cost on this machine: the bound for many clients that each sign every operation.

A request is signed once, by its client, and verified by each of three replicas. With nothing else to do, a machine does
its processors / (signing + 3 * verifying) of these per second.
"""

import os
from dataclasses import dataclass
from statistics import median
from time import process_time  # what other programs take of the processor does not count

from replica.cluster.keys import ClientKey
from replica.shell.verify import verify_by_client

REPLICAS = 3
REPEATED = 9
AT_A_TIME = 50
MESSAGE = bytes(range(256))


@dataclass(frozen=True)
class SignatureCosts:
    """Seconds for one, and how many processors there are."""

    sign_s: float
    verify_s: float
    cpus: int

    @property
    def bound_per_second(self) -> float:
        """Return how many separately signed operations per second would be possible with nothing else to do."""
        return self.cpus / (self.sign_s + REPLICAS * self.verify_s)

    def words(self) -> str:
        """Say it."""
        return (
            f"signing {self.sign_s * 1e6:.0f} µs, verifying {self.verify_s * 1e6:.0f} µs, so at most "
            f"{self.bound_per_second:,.0f} separately signed operations per second"
        )


def signature_costs() -> SignatureCosts:
    """Measure them; medians."""
    key = ClientKey.generate()
    signature = key.sign(MESSAGE)

    def verify() -> None:
        if not verify_by_client(key.public_key, signature, MESSAGE):
            raise RuntimeError("a good signature was refused")

    return SignatureCosts(_each(lambda: key.sign(MESSAGE)), _each(verify), len(os.sched_getaffinity(0)))


def _each(work) -> float:
    took = []
    for _ in range(REPEATED):
        began = process_time()
        for _ in range(AT_A_TIME):
            work()
        took.append((process_time() - began) / AT_A_TIME)
    return median(took)
