"""Signatures: of groups by their logs, of envelopes by their clients. Every one is verified once."""

from collections import OrderedDict
from functools import lru_cache

from replica.cluster.memberlists import EntryVerifier
from replica.core.envelope import Envelope
from replica.core.genesis import Genesis
from replica.core.group import VerifiedGroup, decode_group
from replica.shell.measures import Distribution
from trustlog import (
    BackendKind,
    LogIdentity,
    VerificationError,
    VerifyingKey,
    entry_digest,
    heads_of,
    initial_head,
    verify_append,
)

KEYS_REMEMBERED = 4096
ENVELOPES_REMEMBERED = 65536


class GroupVerifier:
    """Verifies groups of one cluster's logs."""

    def __init__(self, genesis: Genesis) -> None:
        self._limits = genesis.limits
        self.entry = EntryVerifier(genesis)
        self._contexts = self.entry.contexts
        self._identities = self.entry.identities

    def context(self, log: int) -> bytes:
        """Return the context that every statement of a log must carry: of the list of members with which it came in."""
        return self._contexts[log]

    @property
    def identities(self) -> list[LogIdentity]:
        """Every log's key, kind and epoch."""
        return self._identities

    def initial_heads(self) -> list[bytes]:
        """Return every log's head before its first entry."""
        return [initial_head(identity) for identity in self._identities]

    def verify(self, log: int, raw: bytes) -> VerifiedGroup:
        """Verify a group of `log`: signature, log, kind, epoch, context, digests. LayoutError or VerificationError."""
        if not 0 <= log < len(self._identities):
            raise VerificationError("wrong-log", f"there is no replica {log}")
        group = decode_group(raw, self._limits)
        digests = [entry_digest(payload) for payload in group.payloads]
        said = verify_append(self._identities[log], group.attestation, digests, context=self._contexts[log])
        heads = heads_of(self._identities[log], said, digests)
        counted = said.kind is not BackendKind.TPM
        return VerifiedGroup(log, said.first, said.last, *heads, group.payloads, raw, counted)


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

    def __init__(self, seconds: Distribution | None = None) -> None:
        self._valid: OrderedDict[bytes, None] = OrderedDict()
        self._seconds = seconds or Distribution()  # that verifying took

    def __call__(self, envelope: Envelope) -> bool:
        """Return True if the signature is the client's over the received bytes."""
        digest = envelope.digest()
        if digest in self._valid:
            return True
        with self._seconds.timed():
            is_valid = verify_by_client(envelope.client, envelope.signature, envelope.signed)
        if not is_valid:
            return False
        self._valid[digest] = None
        if len(self._valid) > ENVELOPES_REMEMBERED:
            self._valid.popitem(last=False)
        return True
