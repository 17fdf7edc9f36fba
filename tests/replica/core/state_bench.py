"""What a checkpoint's digest costs, by keys stored and keys changed: `python -m tests.replica.core.state_bench`.

Keys are 20 bytes and values 100. Each figure is the median of several rounds on the same map: put the changes, then
time `root()` and `take_changes()`. `--keys N` may be given repeatedly.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from functools import partial

from replica.core.state import BucketedMap
from replica.core.tree import VALUE_BYTES_MAX
from replica.core.treefetch import TreeFetch
from replica.core.treeparts import part_of

ROUNDS = 5
CHANGES = (1_000, 10_000)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def filled(count: int) -> BucketedMap:
    rng = random.Random(1)
    return BucketedMap((b"key %016d" % number, rng.randbytes(100)) for number in range(count))


def checkpoint(state: BucketedMap, stored: int, changes: int) -> tuple[float, float]:
    """Median seconds of root() and of take_changes() after as many keys were changed."""
    rng = random.Random(2)
    roots, taken = [], []
    for _ in range(ROUNDS):
        for number in rng.sample(range(stored), min(changes, stored)):
            state.begin()
            state.put(b"key %016d" % number, rng.randbytes(100))
            state.commit()
        roots.append(seconds(state.root))
        taken.append(seconds(state.take_changes))
    return statistics.median(roots), statistics.median(taken)


def fetch(source: BucketedMap, mine: BucketedMap) -> TreeFetch:
    """Fetch everything that differs, all in this process."""
    fetching = TreeFetch(source.root(), mine, VALUE_BYTES_MAX)
    while not fetching.is_complete:
        for want in fetching.wants(8):
            fetching.take(want, part_of(source, want))
    fetching.result()
    return fetching


def measure(stored: int) -> None:
    state = filled(stored)
    items = list(state.scan())
    built = seconds(partial(BucketedMap, items))
    del items
    frozen = state.frozen()
    copied, made = seconds(state.frozen), seconds(partial(BucketedMap.thawed, frozen))
    print(
        f"{stored:,} keys: made of sorted items in {built:.2f} s, frozen in {copied * 1e3:.1f} ms, thawed in {made:.2f} s"
    )
    for changes in CHANGES:
        before = BucketedMap.thawed(state.frozen())
        root, taken = checkpoint(state, stored, changes)
        each = (root + taken) / min(changes, stored) * 1e6
        print(
            f"  {changes:>6,} changes: root {root * 1e3:7.1f} ms, changes {taken * 1e3:5.1f} ms: {each:5.1f} us a key"
        )
        report("what these changed", state, before)
        del before
    report("everything", state, BucketedMap())


def report(what: str, source: BucketedMap, mine: BucketedMap) -> None:
    found: list[TreeFetch] = []
    spent = seconds(lambda: found.append(fetch(source, mine)))
    done = found[0].progress
    print(f"  fetching {what}: {done.buckets_fetched:,} buckets, {done.parts_taken} parts, "
          f"{done.bytes_taken / 2**20:.1f} MiB, {spent:.2f} s")  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, action="append", help="keys stored (10,000 and 1,000,000)")
    for stored in parser.parse_args(arguments).keys or [10_000, 1_000_000]:
        measure(stored)


if __name__ == "__main__":
    main()
