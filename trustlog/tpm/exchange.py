"""One command to a TPM 2.0 and its response: the header, handles, authorizations, and patience while it is busy.

    command     u16 tag  u32 size  u32 code  handles  [u32 size of authorizations, authorizations]  parameters
    response    u16 tag  u32 size  u32 result  handles  [u32 size of parameters]  parameters  [authorizations]

("TPM 2.0 Library, Part 1: Architecture", section 18, and "Part 3: Commands", version 1.59.)
"""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Sequence

from trustlog.errors import VerificationError
from trustlog.tpm.session import SaltedSession
from trustlog.tpm.structures import STRUCTURE_SIZE_MAX, Reader, sized
from trustlog.tpm.wire import MEANINGS, TpmError, Wire

# The TPM asks for patience while it tests itself or is busy: so often, with such a pause.
RETRIES_MAX = 200
RETRY_PAUSE_S = 0.05

_ST_NO_SESSIONS, _ST_SESSIONS = 0x8001, 0x8002
_RS_PASSWORD = 0x40000009
_CONTINUE_SESSION = 0x01
_RETRY_CODES = frozenset({0x908, 0x90A, 0x922})  # yielded, testing, retry

_CODES = {
    "NV_UndefineSpace": 0x122,
    "EvictControl": 0x120,
    "Clear": 0x126,
    "NV_DefineSpace": 0x12A,
    "CreatePrimary": 0x131,
    "NV_Extend": 0x136,
    "PCR_Reset": 0x13D,
    "Startup": 0x144,
    "Shutdown": 0x145,
    "ActivateCredential": 0x147,
    "NV_Read": 0x14E,
    "PolicySecret": 0x151,
    "Create": 0x153,
    "Load": 0x157,
    "Quote": 0x158,
    "Unseal": 0x15E,
    "PolicySigned": 0x160,
    "FlushContext": 0x165,
    "LoadExternal": 0x167,
    "NV_ReadPublic": 0x169,
    "PolicyOR": 0x171,
    "ReadPublic": 0x173,
    "StartAuthSession": 0x176,
    "GetCapability": 0x17A,
    "PCR_Read": 0x17E,
    "PolicyPCR": 0x17F,
    "PCR_Extend": 0x182,
    "NV_Certify": 0x184,
    "PolicyNvWritten": 0x18F,
}


class Exchange:
    """Exchanges commands for responses, one after the other. Thread-safe. Every method may raise TpmError."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._lock = threading.Lock()

    @property
    def address(self) -> str:
        """Where this TPM is."""
        return self._wire.address

    def run(
        self,
        command: str,
        handles: Sequence[int] = (),
        parameters: bytes = b"",
        *,
        auths: Sequence[bytes] = (),
        handles_out: int = 0,
    ) -> Reader:
        """Run a command; returns its response's handles and parameters, to be read on."""
        body = b"".join(struct.pack(">I", handle) for handle in handles)
        if auths:
            joined = b"".join(auths)
            body += struct.pack(">I", len(joined)) + joined
        body += parameters
        tag = _ST_SESSIONS if auths else _ST_NO_SESSIONS
        request = struct.pack(">HII", tag, 10 + len(body), _CODES[command]) + body
        content = self._answer(command, request)
        if auths:
            place = 4 * handles_out
            size = int.from_bytes(content[place : place + 4], "big")
            content = content[:place] + content[place + 4 : place + 4 + size]
        return Reader(content)

    def run_salted(
        self,
        command: str,
        handle: int,
        name: bytes,
        session: SaltedSession,
        secret: bytes | None = None,
        parameters: bytes = b"",
    ) -> Reader:
        """Run a command on one handle with its first parameter (``secret``, if any) and its response's encrypted."""
        code = _CODES[command]
        session.begin()
        if secret is not None:
            parameters = sized(session.encrypt(secret)) + parameters
        authorization = session.authorize(code, name, parameters, decrypt=secret is not None)
        body = struct.pack(">II", handle, len(authorization)) + authorization + parameters
        content = Reader(self._answer(command, struct.pack(">HII", _ST_SESSIONS, 10 + len(body), code) + body))
        try:
            returned = content.take(content.number(4))
            return Reader(session.open(code, returned, content.rest()))
        except VerificationError as error:
            raise TpmError(f"{self.address}: TPM2_{command}: the response was changed on its way: {error}") from error

    def _answer(self, command: str, request: bytes) -> bytes:
        """Exchange a whole command for what follows its response's header."""
        if len(request) > STRUCTURE_SIZE_MAX:
            raise TpmError(f"TPM2_{command}: {len(request)} bytes are more than a TPM takes")
        response = self._exchange(request)
        code = int.from_bytes(response[6:10], "big")
        if code:
            error = TpmError("", code)
            meaning = MEANINGS.get(error.number, "see the TPM 2.0 Library, part 2, section 6.6")
            raise TpmError(f"{self.address}: TPM2_{command} was refused with {code:#05x}: {meaning}", code)
        return response[10:]

    def _exchange(self, request: bytes) -> bytes:
        with self._lock:
            for _ in range(RETRIES_MAX):
                response = self._wire.exchange(request)
                if int.from_bytes(response[6:10], "big") not in _RETRY_CODES:
                    break
                time.sleep(RETRY_PAUSE_S)
            return response


def session_auth(session: int) -> bytes:
    """Return the authorization by a policy session, which goes on after the command."""
    return struct.pack(">IHBH", session, 0, _CONTINUE_SESSION, 0)


def no_password() -> bytes:
    """Return the authorization by an empty password: what log keys have, as only root reaches the TPM."""
    return password(b"")


def password(auth: bytes) -> bytes:
    """Return the authorization by a password."""
    return struct.pack(">IHB", _RS_PASSWORD, 0, 0) + sized(auth)
