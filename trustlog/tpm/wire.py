"""The way to a TPM: one command and its response at a time, and what a refusal means.

Addresses: a device (``/dev/tpmrm0``, the kernel's resource manager), or swtpm's data socket: a path, or host:port.
"""

from __future__ import annotations

import os
import select
import socket
import stat
import time
from pathlib import Path

from trustlog.errors import TrustLogError
from trustlog.tpm.structures import STRUCTURE_SIZE_MAX

# A physical chip may take many seconds to make an RSA key, and most of one to sign.
TIMEOUT_S = 120.0
CONNECT_PAUSE_S = 0.01

# The results that a caller or a reader meets (part 2, section 6.6).
MEANINGS = {
    0x100: "not initialized, or started already",
    0x101: "failure mode",
    0x120: "disabled",
    0x14A: "NV index is not written yet",
    0x14B: "NV space is full",
    0x14C: "defined already",
    0x149: "not authorized for this NV index",
    0x902: "out of memory for objects: something was left loaded",
    0x903: "out of memory for sessions",
    0x907: "not possible at this locality",
    0x920: "NV memory is busy",
    0x921: "locked out: too many wrong authorizations",
    0x923: "NV memory is not available",
    0x082: "wrong attributes",
    0x083: "hash algorithm not supported",
    0x084: "value out of range",
    0x085: "wrong hierarchy",
    0x08B: "no such handle",
    0x08E: "wrong authorization",
    0x092: "wrong type",
    0x095: "wrong size",
    0x099: "policy does not fit",
    0x09B: "wrong signature",
    0x09D: "policy fails",
    0x09F: "integrity check fails",
    0x0A2: "wrong authorization",
}


class TpmError(TrustLogError):
    """The TPM refused a command, or could not be reached. code: its result (u32); 0 if there was none."""

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.code = code

    @property
    def number(self) -> int:
        """The result without the place (handle, session, parameter) that it is about."""
        return self.code & 0xBF if self.code & 0x80 else self.code


class Wire:
    """Carries one command and its response at a time to the TPM at ``address``."""

    def __init__(self, address: str, timeout_s: float = TIMEOUT_S) -> None:
        self.address = address
        self._timeout_s = timeout_s
        self._socket: socket.socket | None = None
        self._device = -1
        try:
            self._open()
        except (OSError, ValueError) as error:
            self.close()
            why = error.strerror if isinstance(error, OSError) else "no such device, socket or host:port"
            raise TpmError(
                f"{address}: cannot be opened: {why}; is there a TPM 2.0, and may this user use it (group tss)?"
            ) from error

    def _open(self) -> None:
        path = Path(self.address)
        if not path.exists() and ":" in self.address:
            host, _, port = self.address.rpartition(":")
            self._socket = socket.create_connection((host.strip("[]"), int(port)), self._timeout_s)
        elif stat.S_ISSOCK(path.stat().st_mode):
            self._socket = socket.socket(socket.AF_UNIX)
            self._connect(self._socket)
        else:
            self._device = os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def _connect(self, link: socket.socket) -> None:
        """Connect, waiting while others queue for the one place that a software TPM has."""
        link.settimeout(self._timeout_s)
        deadline = time.monotonic() + self._timeout_s
        while True:
            try:
                link.connect(self.address)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(CONNECT_PAUSE_S)
            else:
                return

    def exchange(self, command: bytes) -> bytes:
        """Send a whole command and return the whole response; TpmError if there is none."""
        try:
            response = self._exchange(command)
        except OSError as error:
            self.close()
            why = "no answer in time; is another program using it?" if isinstance(error, TimeoutError) else str(error)
            raise TpmError(f"{self.address}: the TPM cannot be reached: {why}") from error
        if len(response) < 10 or int.from_bytes(response[2:6], "big") != len(response):
            self.close()
            raise TpmError(f"{self.address}: the TPM's answer is cut off")
        return response

    def _exchange(self, command: bytes) -> bytes:
        if self._socket is None:
            if self._device < 0:
                raise ConnectionError("the connection is closed")
            os.write(self._device, command)  # the kernel takes a command whole or not at all
            if not select.select([self._device], [], [], self._timeout_s)[0]:
                raise TimeoutError
            return os.read(self._device, STRUCTURE_SIZE_MAX)
        self._socket.sendall(command)
        response = self._receive(10)
        size = int.from_bytes(response[2:6], "big")
        return response + self._receive(min(size, STRUCTURE_SIZE_MAX) - 10)

    def _receive(self, size: int) -> bytes:
        received = b""
        while self._socket is not None and len(received) < size:
            part = self._socket.recv(size - len(received))
            if not part:
                raise ConnectionError("the connection was closed")
            received += part
        return received

    def close(self) -> None:
        """Hang up; harmless when repeated."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._device >= 0:
            os.close(self._device)
            self._device = -1
