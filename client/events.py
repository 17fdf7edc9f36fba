"""What the client's core asks its shell to do, and the settings it runs with."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from replica.core.envelope import Result, SessionId

# A ticket is whatever the shell hands in with an operation and gets back with its outcome, such as a future.
Ticket = object

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Settings:
    """Local choices of one client; nobody else has to know them."""

    patience_ms: int = 500  # how long the believed primary may take before everybody is asked, at least
    patience_learned_ms_max: int = 2000  # how long at most, where answers are slow (client.pace)
    patience_ms_max: int = 8000  # patience doubles with every round of asking, up to this
    opening_wait_ms: int = 200  # how long to wait for the slots of more than f+1 replicas before opening
    busy_retry_ms: int = 250  # pause after an opening that found no room; doubles up to patience_ms_max
    busy_patience_ms: int = 1000  # how long to wait before asking again at most, while the replicas take no more
    envelopes_in_flight_max: int = 16
    bytes_in_flight_max: int = 8 * MIB  # no further envelope starts above this
    queue_operations_max: int = 65536
    queue_bytes_max: int = 64 * MIB

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")


class Failure(Enum):
    """Why an operation has no result."""

    UNDECIDED = "undecided"  # sent, and not answered in time: it may or may not be executed
    NOT_SENT = "not-sent"  # it never left this client, so it will not be executed
    QUEUE_FULL = "queue-full"  # refused at once: too much waits already
    CLOSED = "closed"  # the client was closed before this operation left it
    NOT_ALLOWED = "not-allowed"  # it never left this client, whose key the cluster refuses


@dataclass(frozen=True, slots=True)
class Send:
    """Send the envelope to these replicas."""

    replicas: tuple[int, ...]
    envelope: bytes


@dataclass(frozen=True, slots=True)
class Complete:
    """f+1 replicas agree on these results, one per ticket in the same order, as are the numbers in the session."""

    tickets: Sequence[Ticket]
    results: Sequence[Result]
    session: SessionId
    numbers: Sequence[int]


@dataclass(frozen=True, slots=True)
class Fail:
    """These operations will get no result."""

    tickets: Sequence[Ticket]
    reason: Failure


@dataclass(frozen=True, slots=True)
class AskReports:
    """Ask every connected replica for its status; hand in what it says with `on_report`."""


@dataclass(frozen=True, slots=True)
class WakeAt:
    """Call `tick` at this time; replaces any earlier wish."""

    at_ms: int


Effect = Send | Complete | Fail | AskReports | WakeAt
