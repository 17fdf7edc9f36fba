"""What the tests of remote attestation share: policies in a line, and a simulated tsm folder."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from trustlog import VerificationError
from trustlog.appraisal import parse_policy


def policy(text: str = "") -> object:
    return parse_policy(f"format = 1\n{text}".encode(), "policy.toml")


def refused(call, *arguments, **options) -> str:
    """Return the reason for which a call refuses."""
    with pytest.raises(VerificationError) as caught:
        call(*arguments, **options)
    return caught.value.reason


class SimulatedTsm:
    """A configfs folder of a guest: the attributes that Linux documents, backed by ``sign(inblob) -> outblob``.

    interfere: writes of another program between ours and the reading. missing: attributes that are not there.
    """

    def __init__(self, sign, provider="sev_guest", auxiliary=b"", interfere=0, missing=(), fail=None) -> None:
        self.sign = sign
        self.provider = provider
        self.auxiliary = auxiliary
        self.interfere = interfere
        self.missing = missing
        self.fail = fail
        self.made: list[str] = []
        self.inblob: bytes | None = None
        self.generation = 7

    def make(self, directory: Path) -> None:
        if self.fail == "make":
            raise FileNotFoundError(2, "No such file or directory", str(directory))
        self.made.append(directory.name)

    def remove(self, directory: Path) -> None:
        self.made.remove(directory.name)

    def write(self, path: Path, content: bytes) -> None:
        assert path.name == "inblob"
        assert path.parent.name in self.made
        assert len(content) == 64
        self.inblob = content
        self.generation += 1 + self.interfere

    def read(self, path: Path, size_max: int) -> bytes:
        if path.name in self.missing:
            raise FileNotFoundError(2, "No such file or directory", str(path))
        if self.fail == path.name:
            raise OSError(5, "Input/output error", str(path))
        content = {
            "generation": f"{self.generation}\n".encode(),
            "provider": f"{self.provider}\n".encode(),
            "outblob": b"" if self.inblob is None else self.sign(self.inblob),
            "auxblob": self.auxiliary,
        }[path.name]
        return content[: size_max + 1]


def certificate_table(*certificates: bytes) -> bytes:
    """A GHCB certificate table, laid out by hand."""
    offset = 24 * (len(certificates) + 1)
    head = b""
    for number, one in enumerate(certificates):
        guid = hashlib.sha256(bytes([number])).digest()[:16]
        head += guid + offset.to_bytes(4, "little") + len(one).to_bytes(4, "little")
        offset += len(one)
    return head + bytes(24) + b"".join(certificates)
