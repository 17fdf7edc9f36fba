"""What can go wrong for a user of the client, by what is known about the operation afterwards."""

# ruff: noqa: N818 - the names say what is known, as a reader of an `except` wants it


class ClientError(Exception):
    """The base of all errors of this package; the text says what happened and what to do."""


class OperationFailed(ClientError):
    """The operation was ordered, and the application refused it: it changed nothing, at every replica.

    `reason` is the application's own text, made printable.
    """

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason or message


class NotPermitted(OperationFailed):
    """The operation was ordered, and this client's key may not do it: it changed nothing, at every replica.

    `reason` says which key it may not read or write.
    """


class NotExecuted(ClientError):
    """The operation is certain not to be executed."""


class NotAllowed(NotExecuted):
    """This client's key may not be a client's of this cluster: it was revoked, or never allowed."""


class NotOffered(NotExecuted):
    """This kind of cluster does not do that: one without trusted logs (PBFT) has no receipts and no watches."""


class Unreachable(NotExecuted):
    """Not enough replicas could be reached, so the operation never left this client."""


class HeldBack(Unreachable):
    """The replicas are reached and took no more of this client's operations, for its quota or for all that waits."""


class Overloaded(NotExecuted):
    """Too much waits in this client already; the operation never left it."""


class Undecided(ClientError):
    """The deadline passed before f+1 replicas agreed. The outcome is unknown: executed, or not, or later."""


class NoReceipt(ClientError):
    """The operation was executed, and there is no receipt of it: too few replicas showed theirs.

    `value` is what the call would have returned.
    """

    def __init__(self, message: str, value: object) -> None:
        super().__init__(message)
        self.value = value


class SessionExpired(Undecided):
    """The cluster no longer knows this client's session. The outcome is unknown; what follows gets a new."""


class NoLongerAllowed(Undecided):
    """This client's key was revoked while the operation was on its way. The outcome is unknown."""
