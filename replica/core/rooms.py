"""How much room waiting requests take at a replica, by who handed them over.

What clients hand over themselves shares one room, of which one client gets a part. Beside it, the claims of each
backup (`replica.core.claims`) have places of their own, twice as many as a correct backup has claims: what it
executed may be executed here a little later. So nothing that clients or other backups do keeps a claim out.
"""

from collections import Counter

from replica.core.claims import CLAIM_BYTES_MAX, CLAIMS_MAX, CLAIMS_PER_CLIENT_MAX
from replica.core.genesis import MIB

# Who handed over what came from its client itself; else it is the number of a replica.
DIRECT = -1

REQUESTS_MAX = 8192
REQUEST_BYTES_MAX = 64 * MIB
REQUESTS_PER_CLIENT_MAX = 256
REQUEST_BYTES_PER_CLIENT_MAX = 16 * MIB
RELAYED_MAX = 2 * CLAIMS_MAX
RELAYED_BYTES_MAX = 2 * CLAIM_BYTES_MAX
RELAYED_PER_CLIENT_MAX = 2 * CLAIMS_PER_CLIENT_MAX

# A client and who handed its request over: requests with the same lane keep their order.
Lane = tuple[bytes, int]


class Rooms:
    """Requests and bytes, per who handed them over and per lane."""

    def __init__(self) -> None:
        self.count: Counter[int | Lane] = Counter()
        self.bytes: Counter[int | Lane] = Counter()

    def add(self, lane: Lane, size: int) -> None:
        """Take room for a request, which there must be."""
        for key in (lane, lane[1]):
            self.count[key] += 1
            self.bytes[key] += size

    def remove(self, lane: Lane, size: int) -> None:
        """Give the room of a request back."""
        for key in (lane, lane[1]):
            self.count[key] -= 1
            self.bytes[key] -= size
            if not self.count[key]:
                del self.count[key], self.bytes[key]

    def problem(self, lane: Lane, size: int) -> str | None:
        """Return why there is no room for a request, and what whoever handed it over can do; None if there is."""
        count, taken, peer = self.count, self.bytes, lane[1]
        if peer != DIRECT:
            if count[lane] >= RELAYED_PER_CLIENT_MAX or count[peer] >= RELAYED_MAX:
                return "this replica holds too many relayed requests; relay again later"
            # The first one always fits, whatever its size.
            if count[peer] and taken[peer] + size > RELAYED_BYTES_MAX:
                return "this replica holds too many bytes of relayed requests; relay again later"
            return None
        if count[peer] >= REQUESTS_MAX or taken[peer] + size > REQUEST_BYTES_MAX:
            return "this replica has too many requests waiting; send again later"
        if count[lane] >= REQUESTS_PER_CLIENT_MAX or taken[lane] + size > REQUEST_BYTES_PER_CLIENT_MAX:
            return "this client has too many requests waiting; wait for replies before sending more"
        return None
