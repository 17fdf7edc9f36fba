"""Trusted logs and signatures of the virtual world.

A simulated log chains digests exactly as the real one does and never attests two values at one index; only the
signature is a stand-in: SHA-256 over a secret that no strategy ever reads and the statement. In one run in a hundred
the logs are `trustlog.in_memory()` with keys from the seed, groups are verified by `trustlog.verify_append` and
clients sign with ECDSA. Groups travel as bytes and are verified by whoever receives them, in both kinds of run.

Nothing random is in a head or in a client's envelope, so trace hashes are reproducible in both.
"""

import hashlib
from typing import Protocol

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from replica.core import quorum
from replica.core.envelope import Envelope
from replica.core.genesis import Genesis, Limits, Member, Ordering
from replica.core.group import VerifiedGroup, decode_group, encode_group, encode_payloads
from replica.core.layout import LayoutError
from replica.core.places import Place
from replica.core.points import PRIME, is_point, squared_y
from replica.core.proof import EntryProof
from trustlog import (
    AppendStatement,
    Attestation,
    AttestedLog,
    BackendKind,
    LogIdentity,
    VerificationError,
    VerifyingKey,
    entry_digest,
    fold,
    genesis_head,
    in_memory,
    log_id,
    verify_append,
    verify_signature,
)

_DETERMINISTIC = ec.ECDSA(hashes.SHA256(), deterministic_signing=True)


def _secret(name: str) -> bytes:
    return hashlib.sha256(b"trustlog/sim\0" + name.encode()).digest()


def _private_key(name: str) -> ec.EllipticCurvePrivateKey:
    return ec.derive_private_key(int.from_bytes(_secret(name), "big") >> 1, ec.SECP256R1())


def stand_in_key(number: int) -> bytes:
    """Return a point of P-256 that stands for a public key: nobody knows the private one."""
    x = int.from_bytes(hashlib.sha256(b"sim key %d" % number).digest(), "big")
    while True:
        # p is 3 modulo 4, so this is a root of what has one.
        y = pow(squared_y(x), (PRIME + 1) // 4, PRIME)
        raw = b"\x04" + x.to_bytes(32, "big") + y.to_bytes(32, "big")
        if is_point(raw):
            return raw
        x += 1


def place_of(number: int) -> bytes:
    """Return what a list of members says of where one is: virtual replicas are nowhere."""
    return Place(f"replica-{number}", 1, b"certificate %d" % number).encode()


class ClientKey:
    """A client's key: signs envelopes."""

    def __init__(self, name: int, *, real: bool) -> None:
        self._real = _private_key(f"client {name}") if real else None
        if self._real is not None:
            self.public = self._real.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
        else:
            self.public = stand_in_key(name)

    def sign(self, message: bytes) -> bytes:
        """Return 64 bytes."""
        if self._real is None:
            return _stand_in_signature(self.public, message)
        r, s = decode_dss_signature(self._real.sign(message, _DETERMINISTIC))
        return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def _stand_in_signature(public: bytes, message: bytes) -> bytes:
    # Whoever holds a public key could compute it; no strategy in this package does.
    return hashlib.sha256(b"sim signature\0" + public + message).digest() * 2


class Log(Protocol):
    """One replica's trusted log."""

    public_key: bytes
    context: bytes

    @property
    def last(self) -> int:
        """The last index assigned."""

    @property
    def head(self) -> bytes:
        """The chain's head, 32 bytes."""

    @property
    def low(self) -> int:
        """The lowest index that is not forgotten."""

    def append(self, payloads: tuple[bytes, ...]) -> bytes:
        """Append these payloads as one group; return it as it travels."""

    def truncate(self, index: int) -> None:
        """Forget what lies below an index; what was forgotten before stays so."""


class StandInLog:
    """The trusted part without its cryptography."""

    def __init__(self, number: int) -> None:
        self.public_key = stand_in_key(number)
        self.id = log_id(self.public_key)
        self.last = 0
        self.low = 1
        self.head = genesis_head(self.id, 0)
        self.context = bytes(32)

    def append(self, payloads: tuple[bytes, ...]) -> bytes:
        """See `Log`."""
        digests = [entry_digest(payload) for payload in payloads]
        before, first = self.head, self.last + 1
        self.last += len(payloads)
        self.head = fold(before, first, digests)
        statement = AppendStatement(
            BackendKind.SOFTWARE, self.context, self.id, 0, first, self.last, before, self.head
        ).encode()
        signature = _stand_in_signature(self.public_key, statement)
        return encode_group(Attestation(statement, signature), encode_payloads(payloads))

    def truncate(self, index: int) -> None:
        """See `Log`."""
        self.low = max(self.low, index)

    def clone(self) -> "StandInLog":
        """Return a second trusted part with the same key and state: what must never exist."""
        twin = StandInLog.__new__(StandInLog)
        twin.public_key, twin.id, twin.last, twin.head = self.public_key, self.id, self.last, self.head
        twin.low, twin.context = self.low, self.context
        return twin


class RealLog:
    """The real trusted part, in memory."""

    def __init__(self, number: int) -> None:
        self._log: AttestedLog = in_memory(_private_key(f"log {number}"))
        self.public_key = self._log.public_key
        self.context = bytes(32)

    @property
    def last(self) -> int:
        """See `Log`."""
        return self._log.last

    @property
    def head(self) -> bytes:
        """See `Log`."""
        return self._log.head

    def append(self, payloads: tuple[bytes, ...]) -> bytes:
        """See `Log`."""
        attestation = self._log.append([entry_digest(payload) for payload in payloads], context=self.context)
        return encode_group(attestation, encode_payloads(payloads))

    @property
    def low(self) -> int:
        """See `Log`."""
        return self._log.low

    def truncate(self, index: int) -> None:
        """See `Log`."""
        if index > self.low:
            self._log.truncate(index, context=self.context)


def make_log(name: int, context: bytes, *, real: bool) -> Log:
    """Make a log that comes in later; name: a number that no other log of the run has."""
    log: Log = RealLog(name) if real else StandInLog(name)
    log.context = context
    return log


def make_cluster(
    f: int, ordering: Ordering, limits: Limits, seed: int, *, real: bool, operators: tuple[bytes, ...] = ()
) -> tuple[Genesis, list[Log]]:
    """Make the logs of a cluster of 2f + 1 and what its members agree on."""
    logs: list[Log] = [RealLog(i) if real else StandInLog(i) for i in range(quorum.replica_count(f))]
    genesis = Genesis(
        name="sim",
        nonce=seed.to_bytes(32, "big"),
        f=f,
        ordering=ordering,
        application="replica.apps.kv:KeyValue",
        limits=limits,
        members=tuple(Member(i, BackendKind.SOFTWARE, log.public_key) for i, log in enumerate(logs)),
        operators=operators,
    )
    for log in logs:
        log.context = genesis.context()
    return genesis, logs


class Verifier:
    """Verifies groups and envelopes, each once per run: the answer is a function of the bytes."""

    def __init__(self, genesis: Genesis, *, real: bool) -> None:
        self._limits = genesis.limits
        self._contexts = genesis.contexts()
        self._real = real
        self._keys = [m.log_public_key for m in genesis.members]
        self._identities = [
            LogIdentity(VerifyingKey.from_bytes(m.log_public_key), BackendKind.SOFTWARE) if real else None
            for m in genesis.members
        ]
        self._groups: dict[tuple[int, bytes], VerifiedGroup | None] = {}
        self._envelopes: dict[bytes, bool] = {}

    def heads(self) -> list[bytes]:
        """Return every log's head before its first entry."""
        return [genesis_head(log_id(key), 0) for key in self._keys]

    def key(self, log: int) -> bytes:
        """Return the log's public key."""
        return self._keys[log]

    def group(self, log: int, raw: bytes) -> VerifiedGroup | None:
        """Return the group if `log` attested it, else None."""
        key = (log, raw)
        if key not in self._groups:
            self._groups[key] = self._verify(log, raw)
        return self._groups[key]

    def entry(self, log: int, proof: EntryProof) -> bool:
        """Say whether `log` attested the entry that is shown."""
        try:
            self._verify_statement(log, proof.attestation, list(proof.digests))
        except (LayoutError, VerificationError):
            return False
        return True

    def envelope(self, envelope: Envelope) -> bool:
        """Say whether the envelope's client signed it."""
        known = self._envelopes.get(envelope.raw)
        if known is None:
            known = self._envelopes[envelope.raw] = self._is_signed(envelope)
        return known

    def _is_signed(self, envelope: Envelope) -> bool:
        if not self._real:
            return envelope.signature == _stand_in_signature(envelope.client, envelope.signed)
        try:
            verify_signature(envelope.client, envelope.signature, envelope.signed)
        except VerificationError:
            return False
        return True

    def _verify(self, log: int, raw: bytes) -> VerifiedGroup | None:
        try:
            group = decode_group(raw, self._limits)
            digests = [entry_digest(payload) for payload in group.payloads]
            said = self._verify_statement(log, group.attestation, digests)
        except (LayoutError, VerificationError):
            return None
        return VerifiedGroup(log, said.first, said.last, said.head_before, said.head_after, group.payloads, raw)

    def _verify_statement(self, log: int, attestation: Attestation, digests: list[bytes]) -> AppendStatement:
        if not 0 <= log < len(self._keys):
            raise VerificationError("wrong-log", f"there is no replica {log}")
        identity, context = self._identities[log], self._contexts[log]
        if identity is not None:
            return verify_append(identity, attestation, digests, context=context)
        said = AppendStatement.decode(attestation.statement)
        if said.log_id != log_id(self._keys[log]) or said.context != context or said.epoch:
            raise VerificationError("wrong-log", "the statement is another log's")
        if said.last - said.first + 1 != len(digests):
            raise VerificationError("wrong-count", "as many digests as the statement says")
        if fold(said.head_before, said.first, digests) != said.head_after:
            raise VerificationError("wrong-head", "the digests do not lead to the attested head")
        if attestation.signature != _stand_in_signature(self._keys[log], attestation.statement):
            raise VerificationError("bad-signature", "signature does not verify")
        return said
