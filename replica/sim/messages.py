"""What travels between the nodes of the virtual world."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GroupMessage:
    """A group of `log`, as bytes: the receiver verifies it."""

    log: int
    raw: bytes


@dataclass(frozen=True, slots=True)
class Subscribe:
    """Send me your own log from index `first` on."""

    first: int


@dataclass(frozen=True, slots=True)
class FetchMessage:
    """Send me what you hold of `log` from index `first` on."""

    log: int
    first: int


@dataclass(frozen=True, slots=True)
class Request:
    """A client's envelope, from the client or relayed by a replica."""

    raw: bytes


@dataclass(frozen=True, slots=True)
class Reply:
    """A replica's reply to a client."""

    raw: bytes


@dataclass(frozen=True, slots=True)
class AskReport:
    """Tell me which slot you executed last and in which view you are."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a replica says of itself."""

    executed: int
    view: int


@dataclass(frozen=True, slots=True)
class Connected:
    """The connection to a replica stands (again): its welcome says what a report says."""

    executed: int
    view: int
