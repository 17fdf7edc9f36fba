"""Logs with real keys: groups whose attestations verify, for what is shown to those who do not read the log."""

from __future__ import annotations

from dataclasses import replace

from cryptography.hazmat.primitives.asymmetric import ec

from replica.core.genesis import Genesis, Member
from replica.core.group import VerifiedGroup, encode_group, encode_payloads
from replica.core.proof import EntryProof
from tests.replica.core.harness import make_genesis
from trustlog import (
    BackendKind,
    LogIdentity,
    VerificationError,
    VerifyingKey,
    entry_digest,
    in_memory,
    verify_append,
)


class SignedLog:
    """Log `author` of a cluster of `SignedCluster`."""

    def __init__(self, author: int) -> None:
        self.author = author
        self._log = in_memory(ec.derive_private_key(1000 + author, ec.SECP256R1()))
        self.public_key = self._log.public_key
        self.identity = LogIdentity(VerifyingKey.from_bytes(self.public_key), BackendKind.SOFTWARE)

    def say(self, context: bytes, *payloads: bytes) -> VerifiedGroup:
        before = self._log.head
        attestation = self._log.append([entry_digest(payload) for payload in payloads], context=context)
        first, last = self._log.last - len(payloads) + 1, self._log.last
        raw = encode_group(attestation, encode_payloads(payloads))
        return VerifiedGroup(self.author, first, last, before, self._log.head, payloads, raw)


class SignedCluster:
    def __init__(self, f: int = 1) -> None:
        self.logs = [SignedLog(author) for author in range(2 * f + 1)]
        members = tuple(Member(log.author, 1, log.public_key) for log in self.logs)
        self.genesis: Genesis = replace(make_genesis(f), members=members)
        self.context = self.genesis.context()

    def say(self, author: int, *payloads: bytes) -> VerifiedGroup:
        return self.logs[author].say(self.context, *payloads)

    def verify(self, log: int, proof: EntryProof) -> bool:
        """Say whether `log` attested what is shown; with nothing but its public key."""
        try:
            verify_append(self.logs[log].identity, proof.attestation, proof.digests, context=self.context)
        except VerificationError:
            return False
        return True
