"""Signatures: of groups by their logs, of envelopes by their clients. Every one is verified once."""

from collections import OrderedDict
from functools import lru_cache

from replica.core.envelope import Envelope
from replica.core.events import VerifiedGroup
from replica.core.genesis import Genesis
from replica.core.group import decode_group
from trustlog import (
    BackendKind,
    LogIdentity,
    VerificationError,
    VerifyingKey,
    entry_digest,
    genesis_head,
    verify_append,
)

KEYS_REMEMBERED = 4096
ENVELOPES_REMEMBERED = 65536


class GroupVerifier:
    """Verifies groups of one cluster's logs."""

    def __init__(self, genesis: Genesis) -> None:
        self._limits = genesis.limits
        self._context = genesis.context()
        self._identities = [
            LogIdentity(VerifyingKey.from_bytes(m.log_public_key), BackendKind(m.log_kind)) for m in genesis.members
        ]

    @property
    def context(self) -> bytes:
        """The context that every statement must carry."""
        return self._context

    def initial_heads(self) -> list[bytes]:
        """Return every log's head before its first entry."""
        return [genesis_head(identity.key.log_id, identity.epoch) for identity in self._identities]

    def verify(self, log: int, raw: bytes) -> VerifiedGroup:
        """Verify a group of `log`: signature, log, kind, epoch, context, digests. LayoutError or VerificationError."""
        if not 0 <= log < len(self._identities):
            raise VerificationError("wrong-log", f"there is no replica {log}")
        group = decode_group(raw, self._limits)
        digests = [entry_digest(payload) for payload in group.payloads]
        said = verify_append(self._identities[log], group.attestation, digests, context=self._context)
        return VerifiedGroup(log, said.first, said.last, said.head_before, said.head_after, group.payloads, raw)


@lru_cache(maxsize=KEYS_REMEMBERED)
def _client_key(raw: bytes) -> VerifyingKey:
    return VerifyingKey.from_bytes(raw)


def verify_by_client(key: bytes, signature: bytes, message: bytes) -> bool:
    """Say whether `signature` over `message` is by the client with this key (65 bytes)."""
    try:
        _client_key(key).verify(signature, message)
    except VerificationError:
        return False
    return True


class EnvelopeVerifier:
    """Says whether envelopes are signed by their clients, and remembers those that are."""

    def __init__(self) -> None:
        self._valid: OrderedDict[bytes, None] = OrderedDict()

    def __call__(self, envelope: Envelope) -> bool:
        """Return True if the signature is the client's over the received bytes."""
        digest = envelope.digest()
        if digest in self._valid:
            return True
        if not verify_by_client(envelope.client, envelope.signature, envelope.signed):
            return False
        self._valid[digest] = None
        if len(self._valid) > ENVELOPES_REMEMBERED:
            self._valid.popitem(last=False)
        return True
