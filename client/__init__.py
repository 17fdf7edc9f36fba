"""The client: signs requests and accepts what f+1 replicas agree on.

`client.api.Client` is the asyncio client, `client.sync.SyncClient` its synchronous twin; `trustlog-client` is
the command. `client.core` holds the rules and does no I/O.
"""

from client.api import Client
from client.errors import (
    ClientError,
    HeldBack,
    NoLongerAllowed,
    NoReceipt,
    NotAllowed,
    NotExecuted,
    NotOffered,
    NotPermitted,
    OperationFailed,
    Overloaded,
    SessionExpired,
    Undecided,
    Unreachable,
)
from client.events import Settings
from client.receipts import Receipt
from client.sync import SyncClient
from client.watch import Change, Position, WatchAhead, WatchGone

__all__ = [
    "Change",
    "Client",
    "ClientError",
    "HeldBack",
    "NoLongerAllowed",
    "NoReceipt",
    "NotAllowed",
    "NotExecuted",
    "NotOffered",
    "NotPermitted",
    "OperationFailed",
    "Overloaded",
    "Position",
    "Receipt",
    "SessionExpired",
    "Settings",
    "SyncClient",
    "Undecided",
    "Unreachable",
    "WatchAhead",
    "WatchGone",
]
