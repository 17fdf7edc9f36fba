"""How much room waiting requests take at a replica, by who handed them over.

What clients hand over themselves shares one room, of which one client gets a part. When it is full, the newest request
of whoever takes most of what is lacking, requests or bytes, gives way to whoever takes less: few keys cannot shut
others out. Operators have some room in reserve.

Beside it, the claims of each backup (`replica.core.claims`) have places of their own, twice as many as a correct backup
has claims: what it executed may be executed here a little later. So nothing that clients or other backups do keeps a
claim out.
"""

from collections import Counter
from collections.abc import Collection

from replica.core.claims import CLAIM_BYTES_MAX, CLAIMS_MAX, CLAIMS_PER_CLIENT_MAX
from replica.core.genesis import KIB, MIB

# Who handed over what came from its client itself; else it is the number of a replica.
DIRECT = -1

REQUESTS_MAX = 8192
REQUEST_BYTES_MAX = 64 * MIB
REQUESTS_PER_CLIENT_MAX = 256
REQUEST_BYTES_PER_CLIENT_MAX = 16 * MIB
# For operators, beyond that.
OPERATOR_REQUESTS_MAX = 64
OPERATOR_BYTES_MAX = 8 * MIB
# Requests that give way to one at the most.
GIVE_WAY_MAX = 64
GAVE_WAY = "this replica is full, and a request of whoever has most waiting gave way; send again later"
# Who takes most bytes is told to within so many.
RANK_BYTES = 64 * KIB
RELAYED_MAX = 2 * CLAIMS_MAX
RELAYED_BYTES_MAX = 2 * CLAIM_BYTES_MAX
RELAYED_PER_CLIENT_MAX = 2 * CLAIMS_PER_CLIENT_MAX

# A client and who handed its request over: requests with the same lane keep their order.
Lane = tuple[bytes, int]


class Ranking:
    """Clients by a number that changes in small steps; finding the highest is as cheap as changing one."""

    def __init__(self) -> None:
        self._of: dict[bytes, int] = {}
        self._at: dict[int, dict[bytes, None]] = {}
        self._top = 0

    def put(self, client: bytes, number: int) -> None:
        """Note a client's number; 0: it is forgotten."""
        before = self._of.pop(client, 0)
        if before:
            del self._at[before][client]
            if not self._at[before]:
                del self._at[before]
        if number:
            self._of[client] = number
            self._at.setdefault(number, {})[client] = None
            self._top = max(self._top, number)

    def highest(self) -> tuple[int, bytes]:
        """Return the highest number, and a client that has it."""
        while self._top and self._top not in self._at:
            self._top -= 1
        return self._top, next(iter(self._at.get(self._top, {})), b"")


class Rooms:
    """Requests and bytes, per who handed them over and per lane."""

    def __init__(self, operators: Collection[bytes] = ()) -> None:
        self.count: Counter[int | Lane] = Counter()
        self.bytes: Counter[int | Lane] = Counter()
        self._operators = frozenset(operators)
        self._by_count, self._by_bytes = Ranking(), Ranking()

    def add(self, lane: Lane, size: int) -> None:
        """Take room for a request, which there must be."""
        for key in (lane, lane[1]):
            self.count[key] += 1
            self.bytes[key] += size
        self._rank(lane)

    def remove(self, lane: Lane, size: int) -> None:
        """Give the room of a request back."""
        for key in (lane, lane[1]):
            self.count[key] -= 1
            self.bytes[key] -= size
            if not self.count[key]:
                del self.count[key], self.bytes[key]
        self._rank(lane)

    def _rank(self, lane: Lane) -> None:
        if lane[1] == DIRECT:
            self._by_count.put(lane[0], self.count[lane])
            self._by_bytes.put(lane[0], -(-self.bytes[lane] // RANK_BYTES))

    def gives_way(self, client: bytes, size: int) -> bytes | None:
        """Return the client of which a request gives way to this one's when the room of all is full; None if nobody's.

        It takes more of what is lacking than the other one with this request.
        """
        lane = client, DIRECT
        if self._own_problem(lane, size) is not None:
            return None
        if self.count[DIRECT] >= REQUESTS_MAX:
            most, other = self._by_count.highest()
            return other if most > self.count[lane] + 1 else None
        most, other = self._by_bytes.highest()
        return other if most > -(-(self.bytes[lane] + size) // RANK_BYTES) else None

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
        reserve = (OPERATOR_REQUESTS_MAX, OPERATOR_BYTES_MAX) if lane[0] in self._operators else (0, 0)
        if count[peer] >= REQUESTS_MAX + reserve[0] or taken[peer] + size > REQUEST_BYTES_MAX + reserve[1]:
            return "this replica has too many requests waiting; send again later"
        return self._own_problem(lane, size)

    def has_place(self, client: bytes) -> bool:
        """Say whether a client may hand over one more request itself, as far as the number of its own goes."""
        return self.count[client, DIRECT] < REQUESTS_PER_CLIENT_MAX

    def _own_problem(self, lane: Lane, size: int) -> str | None:
        if not self.has_place(lane[0]) or self.bytes[lane] + size > REQUEST_BYTES_PER_CLIENT_MAX:
            return "this client has too many requests waiting; wait for replies before sending more"
        return None
