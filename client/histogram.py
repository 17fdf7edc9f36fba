"""A recorder of latencies in bounded memory: log-linear buckets, as HdrHistogram has them (hdrhistogram.org).

A value is kept to three significant decimal digits: values below 2,048 ns in a bucket each, above that 1,024 buckets
to every doubling. A percentile is found by the nearest rank and given as the upper end of its bucket, so it is never
below the exact one, and above it by less than a thousandth. Recorders of several programs or runs can be added up.
"""

import math
from collections import Counter
from collections.abc import Iterable

SUB_BUCKET_BITS = 10  # 1,024 to every doubling: a bucket is narrower than a thousandth of what it holds
# Longer latencies are counted as this one: 2**43 ns, or 2.4 hours. It bounds the buckets at 33,792.
VALUE_MAX_NS = (1 << 43) - 1


class Recorder:
    """Counts latencies by bucket; `maximum_s` and `count` are exact."""

    __slots__ = ("_buckets", "count", "maximum_s")

    def __init__(self) -> None:
        self._buckets: Counter[int] = Counter()  # by the greatest value, in ns, that falls into the same bucket
        self.count = 0
        self.maximum_s = 0.0

    def record(self, seconds: float) -> None:
        """Count one latency; ValueError if it is negative or no number."""
        if not 0 <= seconds < math.inf:
            raise ValueError(f"a latency of {seconds} s cannot be counted")
        value = min(int(seconds * 1e9), VALUE_MAX_NS)
        shift = value.bit_length() - SUB_BUCKET_BITS - 1
        self._buckets[value if shift <= 0 else value | ((1 << shift) - 1)] += 1
        self.count += 1
        self.maximum_s = max(self.maximum_s, seconds)

    def percentile(self, share: float) -> float:
        """Return the least latency in seconds that at least this share of them does not exceed, by nearest rank."""
        if not self.count or not 0 < share <= 1:
            raise ValueError("a percentile needs latencies, and a share above 0 and at most 1")
        rank = math.ceil(share * self.count)
        seen = 0
        for top in sorted(self._buckets):
            seen += self._buckets[top]
            if seen >= rank:
                # The bucket's upper end may lie above all that was recorded.
                return min((top + 1) / 1e9, self.maximum_s)
        raise RuntimeError("fewer latencies in the buckets than were counted")

    def add(self, other: "Recorder") -> None:
        """Count all that `other` counted."""
        self._buckets.update(other._buckets)  # noqa: SLF001 - of the same class
        self.count += other.count
        self.maximum_s = max(self.maximum_s, other.maximum_s)

    def as_data(self) -> list[list[int]]:
        """Return the buckets for JSON: upper end in ns and count, ascending, the exact maximum as a last [ns, 0]."""
        return [*([top, self._buckets[top]] for top in sorted(self._buckets)), [math.ceil(self.maximum_s * 1e9), 0]]

    @classmethod
    def from_data(cls, data: Iterable[Iterable[int]]) -> "Recorder":
        """Return what `as_data` gave."""
        recorder = cls()
        for top, count in data:
            if count:
                recorder._buckets[top] += count
                recorder.count += count
            else:
                recorder.maximum_s = top / 1e9
        return recorder
