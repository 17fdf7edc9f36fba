"""How long a client waits for the believed primary before it asks everybody: learned from how long answers take.

The estimate is that of TCP's retransmission timer (RFC 6298, section 2): smoothed time plus four times its mean
deviation, never from an attempt that everybody was asked (Karn's rule: it may say more of a silent primary than of the
cluster), and after a patience that ended in vain the next attempts begin with twice as much, until an answer came in
time. Without it a cluster that many clients keep busy would get every request three times over, from each of them,
as soon as answers take longer than the patience that suits an idle one, and would get slower still.

The ceiling keeps a primary that slows down bit by bit from buying itself more than that.
"""

GROWTH = 32  # answers after which one more envelope may be in flight
SMOOTHING = 8  # RFC 6298: alpha = 1/8 and, for the deviation, beta = 1/4
DEVIATIONS = 4


class Window:
    """How many envelopes may be in flight: half as many after each round of asking in which the replicas took no more.

    A client whose quota lets fewer wait than it has in flight would else have most of them refused, over and over.
    """

    def __init__(self, most: int) -> None:
        self.size = most
        self._most = most
        self._answers = 0

    def refused(self) -> None:
        """Take in that f+1 replicas took no more when everybody was asked."""
        self.size = max(1, self.size // 2)
        self._answers = 0

    def answered(self) -> None:
        """Take in an answer."""
        self._answers += 1
        if self._answers >= GROWTH:
            self._answers = 0
            self.size = min(self._most, self.size + 1)


class Pace:
    """The patience, in milliseconds, with which an attempt begins: within floor_ms … ceiling_ms, at first the floor."""

    def __init__(self, floor_ms: int, ceiling_ms: int) -> None:
        self.patience_ms = floor_ms
        self._floor_ms, self._ceiling_ms = floor_ms, max(floor_ms, ceiling_ms)
        self._smoothed: float | None = None
        self._deviation = 0.0

    def answered(self, took_ms: int) -> None:
        """Take in that an answer came so long after its request was sent, to the primary alone."""
        if self._smoothed is None:
            self._smoothed, self._deviation = took_ms, took_ms / 2
        else:
            self._deviation += (abs(self._smoothed - took_ms) - self._deviation) * 2 / SMOOTHING
            self._smoothed += (took_ms - self._smoothed) / SMOOTHING
        self._begin_with(round(self._smoothed + DEVIATIONS * self._deviation))

    def ended(self, patience_ms: int) -> None:
        """Take in that an attempt's patience of so long ended without an answer."""
        self._begin_with(max(self.patience_ms, 2 * patience_ms))

    def _begin_with(self, patience_ms: int) -> None:
        self.patience_ms = min(max(patience_ms, self._floor_ms), self._ceiling_ms)
