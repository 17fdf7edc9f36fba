"""Whose statements count: the log identities that a cluster file names, for whoever verifies with it."""

from replica.core.genesis import Genesis, Member
from trustlog import BackendKind, LogIdentity, VerifyingKey
from trustlog.receipts import Members
from trustlog.tpm.chain import TpmPins


def identity_of(member: Member) -> LogIdentity:
    """Return whose statements count as this member's, of which kind, and what was pinned for it."""
    pins = TpmPins.decode(member.log_pins) if member.log_kind == BackendKind.TPM else None
    epoch = 0 if pins is None else pins.epoch
    return LogIdentity(VerifyingKey.from_bytes(member.log_public_key), BackendKind(member.log_kind), epoch, pins)


def members_of(genesis: Genesis) -> Members:
    """Return what a verifier of receipts needs to know of a cluster."""
    identities = tuple(identity_of(member) for member in genesis.members)
    return Members(identities, genesis.quorum, genesis.cluster_id(), genesis.contexts())
