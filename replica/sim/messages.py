"""What travels between the nodes of the virtual world.

life: of whoever asked. A connection ends with the process, so an answer never reaches a later life of the one who
asked; here, whoever is answered looks at this number.
"""

from dataclasses import dataclass

from replica.core.snapshot import PartWanted


@dataclass(frozen=True, slots=True)
class GroupMessage:
    """A group of `log`, as bytes: the receiver verifies it."""

    log: int
    raw: bytes


@dataclass(frozen=True, slots=True)
class Subscribe:
    """Send me your own log from index `first` on.

    heads: now and then also up to where the subscriber holds every log, as `replica.core.heads` lays it out; else b"".
    """

    first: int
    life: int
    heads: bytes = b""


@dataclass(frozen=True, slots=True)
class FetchMessage:
    """Send me what you hold of `log` from index `first` on."""

    log: int
    first: int
    life: int
    number: int = 0  # of the list of members that the log is in


@dataclass(frozen=True, slots=True)
class Held:
    """The end of an answer: of `log` I hold the indexes `first` to `last`; none if first = last + 1."""

    log: int
    first: int
    last: int
    life: int


@dataclass(frozen=True, slots=True)
class AskCheckpoint:
    """Tell me which stable checkpoint's state you can hand out. number: of the list of members that I know."""

    number: int = 0


@dataclass(frozen=True, slots=True)
class Offer:
    """This one's. header and certificate as `replica.core.checkpoint` lays them out.

    links: of the chain of member lists, those that lead from the list that the asker knows to mine.
    """

    header: bytes
    certificate: bytes
    links: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class AskPart:
    """Send me a part of the state after `slot`."""

    slot: int
    want: PartWanted


@dataclass(frozen=True, slots=True)
class Part:
    """That part; None if I do not have that state (any more)."""

    slot: int
    want: PartWanted
    data: bytes | None


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
