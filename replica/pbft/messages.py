"""What PBFT's replicas say to each other, and what the machine asks of its host (see `replica.pbft.machine`)."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

NULL = b""


class Proposal(Protocol):
    """What a slot orders: one request, or a batch of them."""

    def digest(self) -> bytes:
        """Return d, 32 bytes; two different ones have different digests."""
        ...


@dataclass(frozen=True, slots=True)
class Request:
    """A client's operation, proposed by itself; `number` counts each client's."""

    client: str
    number: int
    operation: str

    def digest(self) -> bytes:
        """Return d, 32 bytes."""
        return hashlib.sha256(f"{self.client}/{self.number}/{self.operation}".encode()).digest()


@dataclass(frozen=True, slots=True)
class PrePrepare:
    """See the machine. request: None for the null request, whose digest is NULL."""

    view: int
    slot: int
    digest: bytes
    request: Proposal | None

    @classmethod
    def of(cls, view: int, slot: int, request: Proposal | None) -> "PrePrepare":
        """Return the proposal of a request."""
        return cls(view, slot, digest_of(request), request)

    @property
    def is_whole(self) -> bool:
        """Say whether the digest is that of the request: only the digest is voted on."""
        return self.digest == digest_of(self.request)


@dataclass(frozen=True, slots=True)
class Prepare:
    """See the machine."""

    view: int
    slot: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class Commit:
    """See the machine."""

    view: int
    slot: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """See the machine. digest: D, of the state after `slot`."""

    slot: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class Certificate:
    """A proposal and enough PREPAREs for it, as they were signed."""

    proposal: "Signed"
    prepares: tuple["Signed", ...]


@dataclass(frozen=True, slots=True)
class ViewChange:
    """See the machine. stable: h, 0 before the first checkpoint; proof: C."""

    view: int
    prepared: tuple[Certificate, ...]
    stable: int = 0
    proof: tuple["Signed", ...] = ()


@dataclass(frozen=True, slots=True)
class NewView:
    """See the machine."""

    view: int
    changes: tuple["Signed", ...]
    proposals: tuple["Signed", ...]


@dataclass(frozen=True, slots=True)
class Missing:
    """Tell me what was decided from `slot` on: I am behind."""

    slot: int


@dataclass(frozen=True, slots=True)
class Decided:
    """The answer, for one slot: `request` was decided in it, as 2f+1 COMMITs of a view show to anybody."""

    view: int
    slot: int
    digest: bytes
    request: Proposal | None
    commits: tuple["Signed", ...]


Ordering = PrePrepare | Prepare | Commit
Body = Ordering | Checkpoint | ViewChange | NewView | Missing | Decided


@dataclass(frozen=True, slots=True)
class Signed:
    """A message and its author's signature over it. raw: the signed bytes as they were received, if they were."""

    author: int
    body: Body
    signature: bytes
    raw: bytes = field(default=b"", compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Broadcast:
    """Send this to all other replicas."""

    message: Signed


@dataclass(frozen=True, slots=True)
class Tell:
    """Send this to one other replica, once."""

    to: int
    message: Signed


@dataclass(frozen=True, slots=True)
class Executed:
    """A request, or None, was ordered in `slot`, the next one: execute it, and tell its client."""

    slot: int
    digest: bytes
    request: Proposal | None


@dataclass(frozen=True, slots=True)
class StateWanted:
    """Say the digest of the state after `slot`, which was just executed, by `PbftCore.on_state`."""

    slot: int


@dataclass(frozen=True, slots=True)
class Stable:
    """There is a proof of the checkpoint of `slot`; nothing below `forget` is needed any more."""

    slot: int
    forget: int


@dataclass(frozen=True, slots=True)
class Diverged:
    """2f+1 replicas have another state after `slot` than this one: it must not answer anybody any more."""

    slot: int


@dataclass(frozen=True, slots=True)
class Entered:
    """This replica left its view for `view`."""

    view: int


@dataclass(frozen=True, slots=True)
class Opened:
    """`view` is open; carried: slot -> what is proposed again, None for null."""

    view: int
    carried: tuple[tuple[int, Proposal | None], ...]
    named: tuple[int, ...]


Effect = Broadcast | Tell | Executed | StateWanted | Stable | Diverged | Entered | Opened


@dataclass(frozen=True, slots=True)
class Cluster:
    """What all know: n, f, and how many make a quorum; sign and verify make and check signatures.

    interval: slots between checkpoints, none if 0; then window: how far the primary proposes above the stable one.
    pipeline: how many slots it proposes before the first of them is decided, so that what waits makes batches; 0: any.
    """

    n: int
    f: int
    quorum: int
    sign: Callable[[int, Body], bytes]
    verify: Callable[[Signed], bool]
    interval: int = 0
    window: int = 0
    pipeline: int = 0

    def primary(self, view: int) -> int:
        """Return the number of a view's primary."""
        return view % self.n

    def is_genuine(self, message: Signed) -> bool:
        """Say whether a message is by the replica that it names."""
        return 0 <= message.author < self.n and self.verify(message)


def digest_of(request: Proposal | None) -> bytes:
    """Return d, NULL for the null request."""
    return NULL if request is None else request.digest()
