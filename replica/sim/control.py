"""One planted bug: what it patches, and the seed with which it is found. The tables are in `replica.sim.controls`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from replica.sim.planted import Patch
from replica.sim.run import Outcome, run_seed
from replica.sim.scenario import LIMITS, STORMY

SEARCH_SEEDS = 100
# These hide what else a bug does, so a control that is found by them says so.
TO_BE_NAMED = frozenset({"exception", "bounds", "liveness"})


@contextmanager
def patched(*patches: Patch) -> Iterator[None]:
    """Replace attributes, and put them back."""
    saved = [(owner, name, getattr(owner, name)) for owner, name, _ in patches]
    try:
        for owner, name, value in patches:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in saved:
            setattr(owner, name, value)


@dataclass(frozen=True, slots=True)
class Control:
    """One planted bug.

    kinds: violations of all of these kinds show it. seed: with which it is found. overrides: what of the scenario is
    not drawn. without: what else differs when the bug is not there.
    """

    name: str
    breaks: str
    kinds: tuple[str, ...]
    patches: Callable[[], list[Patch]]
    seed: int
    overrides: dict[str, Any] = field(default_factory=dict)
    without: dict[str, Any] = field(default_factory=dict)

    def run(self, seed: int | None = None) -> Outcome:
        """Run a seed with the bug."""
        with patched(*self.patches()):
            return run_seed(self.seed if seed is None else seed, overrides=self.overrides)

    def run_without(self, seed: int | None = None) -> Outcome:
        """Run a seed without the bug."""
        overrides = {**self.overrides, **self.without}
        return run_seed(self.seed if seed is None else seed, overrides=overrides)

    def is_found(self, outcome: Outcome) -> bool:
        """Say whether violations of all named kinds were found, and none of a sort that would have to be named."""
        found = {violation.kind for violation in outcome.violations}
        return found >= set(self.kinds) and not found & TO_BE_NAMED - set(self.kinds)

    def search(self, first: int = 0, count: int = SEARCH_SEEDS) -> int | None:
        """Return the first seed that finds it and is clean without the bug, or None."""
        for seed in range(first, first + count):
            if self.is_found(self.run(seed)) and not self.run_without(seed).violations:
                return seed
        return None


def one_faulty(number: int, *strategies: str) -> dict[str, Any]:
    """Script the scenario: three replicas, one of them faulty in this way, and a network that changes views."""
    faulty = {"f": 1, "faulty": (number,), "strategies": (strategies,)}
    calm = {"crashes": 0, "damages": (), "power_cuts": 0, "limits": LIMITS}
    return {**faulty, **calm, "weather": STORMY, "patience_ms": 150, "partitions": 8}
