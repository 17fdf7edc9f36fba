"""Talks to a TPM 2.0: the commands that a log, its enrolment and remote attestation need, and no more.

Why an own client and not tpm2-pytss: the trusted base imports the standard library and `cryptography` only, so that
it can be read whole; tpm2-pytss is a compiled binding to four C libraries of which this would use the outermost few
calls. These commands are one request and one response of a fixed layout each ("TPM 2.0 Library, Part 3: Commands",
version 1.59), and a mistake in them costs a service, never safety: what counts is verified in ``quote``.

swtpm serves one client at a time, and nobody else clears away what a client leaves loaded: use ``loaded``.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from trustlog.errors import VerificationError
from trustlog.tpm.exchange import Exchange, password, session_auth
from trustlog.tpm.session import NONCE_SIZE, SaltedSession, share_salt
from trustlog.tpm.structures import (
    ALG_AES,
    ALG_CFB,
    ALG_ECDSA,
    ALG_NULL,
    ALG_SHA256,
    RH_ENDORSEMENT,
    RH_LOCKOUT,
    RH_NULL,
    RH_OWNER,
    NvPublic,
    Public,
    Reader,
    ecdsa_signature,
    pcr_selection,
    read_pcr_selection,
    sized,
)
from trustlog.tpm.wire import TIMEOUT_S, TpmError, Wire

NV_READ_MAX = 512  # every TPM returns so many bytes at once (TPM_PT_NV_BUFFER_MAX)

_SESSION_HMAC, _SESSION_POLICY, _SESSION_TRIAL = 0x00, 0x01, 0x03
_TRANSIENT, _CAP_HANDLES, _CAP_PROPERTIES = 0x80000000, 1, 6


@dataclass(frozen=True, slots=True)
class Signed:
    """A TPMS_ATTEST as the TPM returned it, with its signature (r‖s, 64 bytes)."""

    attest: bytes
    signature: bytes


class Tpm(Exchange):
    """A TPM and its commands. Thread-safe, as one command follows the other. Every method may raise TpmError."""

    @classmethod
    def open(cls, address: str, timeout_s: float = TIMEOUT_S) -> Self:
        """Connect to the TPM at ``address``: a device, a Unix socket's path, or host:port of swtpm."""
        return cls(Wire(address, timeout_s))

    def close(self) -> None:
        """Hang up."""
        self._wire.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # The machine (part 3, sections 9, 24, 30)

    def startup(self, *, clear: bool = True) -> None:
        """Begin after power on: firmware does it on real machines. Started already: nothing happens."""
        try:
            self.run("Startup", parameters=struct.pack(">H", 0 if clear else 1))
        except TpmError as error:
            if error.code != 0x100:
                raise

    def shutdown(self, *, clear: bool = True) -> None:
        """Prepare for power off: CLEAR for a reset, STATE for resume or restart."""
        self.run("Shutdown", parameters=struct.pack(">H", 0 if clear else 1))

    def clear(self, auth: bytes = b"") -> None:
        """TPM2_Clear: forget the owner, all keys below the storage and endorsement hierarchies, and the counts."""
        self.run("Clear", [RH_LOCKOUT], auths=[password(auth)])

    def get_property(self, number: int) -> int:
        """Return a property of the TPM (TPM_PT, part 2, section 6.13)."""
        reader = self._capability(_CAP_PROPERTIES, number, 1)
        count = reader.number(4)
        if count != 1 or reader.number(4) != number:
            raise TpmError(f"{self.address}: the TPM does not know its property {number:#x}")
        return reader.number(4)

    def handles(self, first: int, limit: int = 64) -> list[int]:
        """Return the handles that exist, from ``first`` on in its range (persistent: 0x81000000)."""
        reader = self._capability(_CAP_HANDLES, first, limit)
        return [reader.number(4) for _ in range(min(reader.number(4), limit))]

    def _capability(self, capability: int, first: int, count: int) -> Reader:
        reader = self.run("GetCapability", parameters=struct.pack(">III", capability, first, count))
        reader.take(1 + 4)  # more data, the capability again
        return reader

    # PCRs (part 3, section 22)

    def pcr_read(self, pcrs: Sequence[int], bank: int = ALG_SHA256) -> dict[int, bytes]:
        """Return the values of PCRs, all in one bank; TpmError if the bank does not exist."""
        values: dict[int, bytes] = {}
        while wanted := [pcr for pcr in pcrs if pcr not in values]:
            reader = self.run("PCR_Read", parameters=pcr_selection(wanted, bank))
            reader.take(4)  # update counter
            got = read_pcr_selection(reader).get(bank, ())
            if reader.number(4) != len(got) or not got:
                raise TpmError(f"{self.address}: PCRs {wanted} have no values in bank {bank:#06x}; is it allocated?")
            values |= {pcr: reader.sized() for pcr in got}
        return values

    def pcr_extend(self, pcr: int, digest: bytes) -> None:
        """Set a PCR of the SHA-256 bank to SHA-256(its value ‖ ``digest``)."""
        self.run("PCR_Extend", [pcr], struct.pack(">IH", 1, ALG_SHA256) + digest, auths=[password(b"")])

    def pcr_reset(self, pcr: int) -> None:
        """Set a PCR to zeros: at locality 0 possible with PCRs 16 and 23 only."""
        self.run("PCR_Reset", [pcr], auths=[password(b"")])

    def quote(
        self, key: int, pcrs: Sequence[int], extra_data: bytes, auth: bytes = b"", bank: int = ALG_SHA256
    ) -> Signed:
        """Have ``key`` sign one bank's PCRs, the clock's information, and ``extra_data``."""
        parameters = sized(extra_data) + struct.pack(">H", ALG_NULL) + pcr_selection(pcrs, bank)
        return _signed(self.run("Quote", [key], parameters, auths=[password(auth)]))

    # Objects (part 3, sections 12, 24, 28)

    def create_primary(self, hierarchy: int, template: bytes, auth: bytes = b"") -> tuple[int, Public]:
        """Make a primary key, the same for the same template; returns its transient handle and public area."""
        sensitive = sized(sized(b"") + sized(b""))
        parameters = sensitive + sized(template) + sized(b"") + struct.pack(">I", 0)
        reader = self.run("CreatePrimary", [hierarchy], parameters, auths=[password(auth)], handles_out=1)
        return reader.number(4), Public.parse(reader.sized())

    def create(self, parent: int, template: bytes, auths: Sequence[bytes]) -> tuple[bytes, bytes]:
        """Make a key under ``parent``; returns its private part, wrapped for that parent, and its TPMT_PUBLIC."""
        parameters = sized(sized(b"") + sized(b"")) + sized(template) + sized(b"") + struct.pack(">I", 0)
        reader = self.run("Create", [parent], parameters, auths=auths)
        return reader.sized(), reader.sized()

    def load(self, parent: int, private: bytes, public: bytes, auths: Sequence[bytes]) -> int:
        """Load a created key; returns its transient handle."""
        return self.run("Load", [parent], sized(private) + sized(public), auths=auths, handles_out=1).number(4)

    def create_sealed(
        self, parent: int, name: bytes, template: bytes, data: bytes, session: SaltedSession
    ) -> tuple[bytes, bytes]:
        """Make an object that seals ``data`` under ``parent``, called ``name``; returns what ``create`` does."""
        parameters = sized(template) + sized(b"") + struct.pack(">I", 0)
        sensitive = sized(b"") + sized(data)
        reader = self.run_salted("Create", parent, name, session, sensitive, parameters)
        return reader.sized(), reader.sized()

    def unseal(self, handle: int, name: bytes, session: SaltedSession) -> bytes:
        """Return the data of a loaded sealed object, called ``name``."""
        return self.run_salted("Unseal", handle, name, session).sized()

    def load_external(self, public: bytes) -> int:
        """Load a public key, to check signatures with; returns its transient handle."""
        parameters = sized(b"") + sized(public) + struct.pack(">I", RH_NULL)
        return self.run("LoadExternal", parameters=parameters, handles_out=1).number(4)

    def read_public(self, handle: int) -> tuple[Public, bytes]:
        """Return a loaded or persistent key's public area and its qualified name (34 bytes)."""
        reader = self.run("ReadPublic", [handle])
        public = Public.parse(reader.sized())
        reader.sized()  # the name, which follows from the public area
        return public, reader.sized()

    def evict_control(self, handle: int, persistent: int, auth: bytes = b"") -> None:
        """Keep a loaded key at a persistent handle; or, given that handle twice, forget it there."""
        parameters = struct.pack(">I", persistent)
        self.run("EvictControl", [RH_OWNER, handle], parameters, auths=[password(auth)])

    def flush(self, handle: int) -> None:
        """Forget a transient key or a session."""
        self.run("FlushContext", parameters=struct.pack(">I", handle))

    def activate_credential(
        self, key: int, endorsement_key: int, blob: bytes, secret: bytes, auths: Sequence[bytes]
    ) -> bytes:
        """Return what was encrypted for ``key``'s name; only the TPM that holds both keys can. auths: of both."""
        return self.run("ActivateCredential", [key, endorsement_key], sized(blob) + sized(secret), auths=auths).sized()

    @contextmanager
    def loaded(self, handle: int) -> Iterator[int]:
        """Forget ``handle`` at the end, whatever happens."""
        try:
            yield handle
        finally:
            with suppress(TpmError):
                self.flush(handle)

    # Policy sessions (part 3, sections 11, 23)

    @contextmanager
    def policy_session(self, *, trial: bool = False) -> Iterator[int]:
        """Start a policy session, or one that only computes a policy, and forget it at the end."""
        with self.fresh_session(trial=trial) as (session, _):
            yield session

    @contextmanager
    def fresh_session(self, *, trial: bool = False) -> Iterator[tuple[int, bytes]]:
        """Do the same, and yield the TPM's nonce as well: a signature over it counts in this session only."""
        kind = _SESSION_TRIAL if trial else _SESSION_POLICY
        nonce = sized(os.urandom(32))
        parameters = nonce + sized(b"") + struct.pack(">BHH", kind, ALG_NULL, ALG_SHA256)
        reader = self.run("StartAuthSession", [RH_NULL, RH_NULL], parameters, handles_out=1)
        session = reader.number(4)
        with self.loaded(session):
            yield session, reader.sized()

    @contextmanager
    def salted_session(self, key: int, public: Public, *, policy: bool) -> Iterator[SaltedSession]:
        """Start a session whose secrets only the TPM with this storage key (P-256) knows, and forget it at the end.

        policy: it authorizes by a policy; otherwise by an empty password.
        """
        salt, point = share_salt(public)
        nonce = os.urandom(NONCE_SIZE)
        parameters = sized(nonce) + sized(point) + bytes([_SESSION_POLICY if policy else _SESSION_HMAC])
        parameters += struct.pack(">HHHH", ALG_AES, 128, ALG_CFB, ALG_SHA256)
        reader = self.run("StartAuthSession", [key, RH_NULL], parameters, handles_out=1)
        handle = reader.number(4)
        with self.loaded(handle):
            yield SaltedSession(handle, salt, nonce, reader.sized())

    @contextmanager
    def endorsement_session(self, auth: bytes = b"") -> Iterator[bytes]:
        """Yield the authorization of the endorsement key: its policy is the endorsement hierarchy's password."""
        with self.policy_session() as session:
            parameters = sized(b"") * 3 + struct.pack(">i", 0)
            self.run("PolicySecret", [RH_ENDORSEMENT, session], parameters, auths=[password(auth)])
            yield session_auth(session)

    def policy_nv_written(self, session: int, *, written: bool) -> None:
        """Demand that the NV index was written, or was not."""
        self.run("PolicyNvWritten", [session], parameters=bytes([written]))

    def policy_pcr(self, session: int, pcrs: Sequence[int]) -> None:
        """Demand that these PCRs of the SHA-256 bank hold what they hold now."""
        self.run("PolicyPCR", [session], sized(b"") + pcr_selection(pcrs))

    def policy_or(self, session: int, branches: Sequence[bytes]) -> None:
        """Accept any of these policies (32 bytes each)."""
        parameters = struct.pack(">I", len(branches)) + b"".join(map(sized, branches))
        self.run("PolicyOR", [session], parameters)

    def policy_signed(self, session: int, key: int, nonce: bytes, reference: bytes, signature: bytes) -> None:
        """Accept with ``key``'s signature (r‖s) over nonce ‖ i32(0) ‖ reference; nonce: of this very session."""
        signed = struct.pack(">HH", ALG_ECDSA, ALG_SHA256) + sized(signature[:32]) + sized(signature[32:])
        parameters = sized(nonce) + sized(b"") + sized(reference) + struct.pack(">i", 0) + signed
        self.run("PolicySigned", [key, session], parameters)

    # NV indexes (part 3, section 31)

    def nv_define(self, public: bytes, auth: bytes = b"") -> None:
        """Make an NV index of the owner's from its TPMS_NV_PUBLIC, without an authorization of its own."""
        self.run("NV_DefineSpace", [RH_OWNER], sized(b"") + sized(public), auths=[password(auth)])

    def nv_undefine(self, index: int, auth: bytes = b"") -> None:
        """Remove an NV index of the owner's."""
        self.run("NV_UndefineSpace", [RH_OWNER, index], auths=[password(auth)])

    def nv_read_public(self, index: int) -> NvPublic:
        """Return an NV index's public area."""
        return NvPublic.parse(self.run("NV_ReadPublic", [index]).sized())

    def nv_extend(self, index: int, data: bytes, auth: bytes) -> None:
        """Set an index of type EXTEND to SHA-256(its value ‖ ``data``), with this authorization."""
        self.run("NV_Extend", [index, index], sized(data), auths=[auth])

    def nv_read(self, index: int, size: int, auth: bytes | None = None) -> bytes:
        """Return an NV index's content: as the owner (without a password), or with an authorization of the index."""
        handle = RH_OWNER if auth is None else index
        content = b""
        while len(content) < size:
            part = min(size - len(content), NV_READ_MAX)
            parameters = struct.pack(">HH", part, len(content))
            reader = self.run("NV_Read", [handle, index], parameters, auths=[auth or password(b"")])
            content += reader.sized()
        return content

    def nv_certify(self, key: int, index: int, size: int, extra_data: bytes, auth: bytes) -> Signed:
        """Have ``key`` sign an NV index's content, its name, the clock's information and ``extra_data``."""
        parameters = sized(extra_data) + struct.pack(">HHH", ALG_NULL, size, 0)
        auths = [password(b""), auth]
        return _signed(self.run("NV_Certify", [key, index, index], parameters, auths=auths))


def _signed(reader: Reader) -> Signed:
    try:
        attest = reader.sized()
        return Signed(attest, ecdsa_signature(reader.rest()))
    except VerificationError as error:
        raise TpmError(f"the TPM's signature cannot be used: {error}; is the key P-256 with SHA-256?") from error
