"""What one client may have waiting, and how many operations it may ask for in a second: set by an operator, agreed.

A quota is agreed (`replica.core.clients`), and its keeping is each replica's own business, by its own clock: it decides
what a replica *takes* from a client, never what is executed. What was ordered is executed.

So it is kept where the client's connection is. A request that another replica hands on was taken there, and a primary
that refused it would be suspected for a client's greed; such a request is taken within the bounds that hold for
everybody, and its operations are charged when they are executed, at every replica. A client that asks each replica for
something else is therefore held to its rate as well: it can be ahead by one second's operations at each replica, and
then waits for all of them. Only operations that were really executed are charged so. Whoever repeats a client's old
envelopes, a faulty primary for instance, uses up nothing of its quota.

The rate is a token bucket: it holds what is allowed in one second, and begins full. An envelope is taken if the bucket
holds as much as it asks for, or is full; what it asks for beyond that is a debt. Counted in thousandths of an
operation, one for each millisecond and operation per second: nothing is rounded.

A quota of envelopes or bytes never refuses the only envelope of a client.

Layout of a quota (12 bytes, integers big-endian), 0 for what it does not limit:

    u32 envelopes waiting    u32 their bytes    u32 operations per second
"""

import struct
from dataclasses import dataclass

from replica.core.genesis import MIB
from replica.core.layout import LayoutError

# Part of what is agreed; what `replica.core.requests` allows everybody is as much, and holds whatever a quota says.
ENVELOPES_MAX = 256
BYTES_MAX = 16 * MIB
OPERATIONS_PER_S_MAX = 1_000_000
# Clients whose bucket is remembered; who has not asked for longest is forgotten first, and begins with a full one.
BUCKETS_MAX = 8192
PARTS = 1000

_QUOTA = struct.Struct(">III")
QUOTA_SIZE = _QUOTA.size


@dataclass(frozen=True, slots=True)
class Quota:
    """Envelopes waiting, their bytes, operations per second; 0 for what is not limited."""

    envelopes: int = 0
    octets: int = 0
    operations_per_s: int = 0

    def encode(self) -> bytes:
        """Return the documented layout."""
        return _QUOTA.pack(self.envelopes, self.octets, self.operations_per_s)


NO_QUOTA = Quota()


def decode_quota(raw: bytes) -> Quota:
    """Decode the documented layout; LayoutError for more than anybody may have."""
    made = Quota(*_QUOTA.unpack(raw))
    for what, value, limit in (
        ("envelopes", made.envelopes, ENVELOPES_MAX),
        ("bytes", made.octets, BYTES_MAX),
        ("operations per second", made.operations_per_s, OPERATIONS_PER_S_MAX),
    ):
        if value > limit:
            raise LayoutError(f"a quota of {value} {what}, the limit is {limit}")
    return made


class Buckets:
    """One token bucket for each client that has a rate; times in milliseconds of a clock that never goes back."""

    def __init__(self) -> None:
        self._held: dict[bytes, tuple[int, int]] = {}  # client -> parts, as of when; the latest last

    def has(self, client: bytes, operations: int, rate: int, now_ms: int) -> bool:
        """Say whether a client with this rate may ask for so many operations now."""
        full = rate * PARTS
        return self._parts(client, full, rate, now_ms) >= min(operations * PARTS, full)

    def charge(self, client: bytes, operations: int, rate: int, now_ms: int) -> None:
        """Take so many operations out of a client's bucket, were it more than it holds."""
        left = self._parts(client, rate * PARTS, rate, now_ms) - operations * PARTS
        self._held.pop(client, None)
        self._held[client] = (left, now_ms)
        if len(self._held) > BUCKETS_MAX:
            del self._held[next(iter(self._held))]

    def _parts(self, client: bytes, full: int, rate: int, now_ms: int) -> int:
        parts, at_ms = self._held.get(client, (full, now_ms))
        return min(full, parts + (now_ms - at_ms) * rate)
