"""Which program holds the key: a measurement of the trusted part's files, taken before the key is used.

The measurement is the SHA-256 of a *manifest*, a text that anybody can write down again (ASCII, one line feed
after every line, the last one too):

    trustlog/measurement 1 tpm              version of this layout, and the backend's kind
    interpreter cpython 3.11.2
    cryptography 46.0.5                     the one library that the trusted part uses
    <64 hex digits>  trustlog/errors.py     SHA-256 of every file, as sha256sum prints it, in order of its name
    <64 hex digits>  trustlog/hashing.py

The files are all Python files that lie directly in trustlog/, and those of the backend in use: trustlog/service/ for
the process backend, trustlog/tpm/ for the TPM backend. A file that was added counts like one that was changed. What
the manifest does not hold: the interpreter's and the library's own files (nor `_cffi_backend`, which it loads),
what they compiled the files to, the kernel, the command line.

A program that lies can report another's measurement. Who may be believed is a matter of the evidence that it
travels in (RFC 9334, section 7; see the README of trustlog/appraisal).
"""

from __future__ import annotations

import hashlib
import platform
import sys
from functools import cache
from pathlib import Path

import cryptography

from trustlog.errors import MisuseError
from trustlog.statements import BackendKind

MANIFEST_VERSION = 1
FILES_MAX = 256
FILE_BYTES_MAX = 2**20
MANIFEST_BYTES_MAX = 64 * 1024

_PACKAGE = Path(__file__).resolve().parent
# Beside the files in the package itself.
_FOLDERS = {BackendKind.SOFTWARE: (), BackendKind.PROCESS: ("service",), BackendKind.TPM: ("tpm",)}


def manifest(kind: BackendKind, package: Path = _PACKAGE) -> bytes:
    """Return the manifest of the trusted part of ``kind``, of the files that stand in ``package`` now.

    MisuseError if a file cannot be read or the limits are exceeded (256 files of 1 MiB).
    """
    folders = [package, *(package / name for name in _FOLDERS[kind])]
    # By name in the manifest, not by path object: the order of file systems and locales must not count.
    paths = sorted((path for folder in folders for path in folder.glob("*.py")), key=lambda one: _name(one, package))
    if not 1 <= len(paths) <= FILES_MAX:
        raise MisuseError(f"{package}: {len(paths)} source files to measure instead of 1 … {FILES_MAX}")
    lines = [
        f"trustlog/measurement {MANIFEST_VERSION} {kind.name.lower()}",
        f"interpreter {sys.implementation.name} {platform.python_version()}",
        f"cryptography {cryptography.__version__}",
        *(f"{hashlib.sha256(_read(path)).hexdigest()}  {_name(path, package)}" for path in paths),
    ]
    return "".join(f"{line}\n" for line in lines).encode()


def measurement_of(manifest_text: bytes) -> bytes:
    """Return the measurement (32 bytes) that a manifest stands for."""
    return hashlib.sha256(manifest_text).digest()


@cache
def own_manifest(kind: BackendKind) -> bytes:
    """Return the manifest as it was when this process first asked: every way to open a log asks before it has a key."""
    return manifest(kind)


def own_measurement(kind: BackendKind) -> bytes:
    """Return the measurement (32 bytes) of the trusted part that runs in this process."""
    return measurement_of(own_manifest(kind))


def _name(path: Path, package: Path) -> str:
    return f"trustlog/{path.relative_to(package).as_posix()}"


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise MisuseError(f"{path}: cannot be measured: {error.strerror or error}; install trustlog anew") from error
    if len(content) > FILE_BYTES_MAX:
        raise MisuseError(f"{path}: cannot be measured: larger than {FILE_BYTES_MAX} bytes; install trustlog anew")
    return content
