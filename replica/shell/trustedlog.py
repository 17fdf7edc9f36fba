"""What a replica needs of its trusted log, whatever keeps it.

Every kind of log has the verbs of `TrustedLog`. One that another process keeps can be away for a while; it is an
`ExternalLog` as well, and says so. A TPM's takes as long as the TPM needs for an extend and a quote, about 1 ms in
software and up to hundreds in a chip, while what is to be said gathers for the next group; one that fails, or was
extended by something else, ends the replica with the reason. replica.shell.opening opens a log by its kind.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

from trustlog import Attestation, BackendKind
from trustlog.tpm.backend import TpmLog

SOFTWARE_PROTECTS = "in process: not against this host's own program"
TPM_PROTECTS = "TPM 2.0: against a compromised root and a rolled back disk, if it is a chip; a reboot can end it"


class TrustedLog(Protocol):
    """The verbs that a replica needs of its trusted log; see trustlog.AttestedLog."""

    @property
    def kind(self) -> BackendKind:
        """What keeps the key."""
        ...

    @property
    def public_key(self) -> bytes:
        """The log's key, 65 bytes."""
        ...

    @property
    def low(self) -> int:
        """The first index that is not forgotten."""
        ...

    @property
    def last(self) -> int:
        """The last index assigned."""
        ...

    @property
    def head(self) -> bytes:
        """The chain's head."""
        ...

    @property
    def last_group(self) -> tuple[int, int] | None:
        """The bounds of the last group."""
        ...

    def append(self, digests: Sequence[bytes], *, context: bytes) -> Attestation:
        """Append a group durably and attest it."""
        ...

    def reissue(self) -> Attestation:
        """Attest the last group again."""
        ...

    def quote(self, *, nonce: bytes, context: bytes) -> Attestation:
        """Attest which program holds the key."""
        ...

    def truncate(self, index: int, *, context: bytes) -> object:
        """Forget what is below `index`, durably."""
        ...

    def close(self) -> None:
        """Give the log back."""
        ...


class ExternalLog(ABC):
    """What a log outside this process says besides, for status and for an orderly end."""

    @property
    @abstractmethod
    def trouble(self) -> str | None:
        """Why nothing can be attested now, and what to do; None if all is well."""

    @property
    @abstractmethod
    def protects(self) -> str:
        """What this log protects against, in a line for people."""

    @property
    @abstractmethod
    def details(self) -> dict[str, object]:
        """What keeps the log, for programs that read status: JSON values only."""

    @abstractmethod
    def store_key(self) -> bytes:
        """Return the key for payloads at rest, 32 bytes, which the log's keeper releases to this replica only."""

    @abstractmethod
    def stop_waiting(self) -> None:
        """Have calls fail from now on, instead of waiting for a log that is away."""


def trouble(log: TrustedLog) -> str | None:
    """Return why the log cannot attest now; None if it can."""
    return log.trouble if isinstance(log, ExternalLog) else None


def epoch_groups(log: TrustedLog) -> list[tuple[tuple[bytes, ...], Attestation]]:
    """Return what a TPM's log itself said last, CLOSE and OPEN of its epochs, which its host may not have."""
    return log.epoch_groups() if isinstance(log, TpmLog) else []


def protects(log: TrustedLog) -> str:
    """Return what the log protects against."""
    if isinstance(log, ExternalLog):
        return log.protects
    return TPM_PROTECTS if log.kind is BackendKind.TPM else SOFTWARE_PROTECTS


def details(log: TrustedLog) -> dict[str, object]:
    """Return what keeps the log; nothing for one in this process."""
    if isinstance(log, TpmLog):
        pins = log.config.pins
        epoch = {"resets": log.epoch >> 32, "restarts": log.epoch & 0xFFFFFFFF}
        return {"tpm": log.config.address, "pcr": pins.pcr, "base": pins.base.hex(), "epoch": epoch, **_anchors(log)}
    return log.details if isinstance(log, ExternalLog) else {}


def _anchors(log: TpmLog) -> dict[str, object]:
    if log.anchors is None:
        return {"anchored_to": None}
    return {"anchored_to": log.anchors.anchored_to, "anchor_trouble": log.anchors.trouble}


def stop_waiting(log: TrustedLog) -> None:
    """Do not wait for a log that is away any more."""
    if isinstance(log, ExternalLog):
        log.stop_waiting()
