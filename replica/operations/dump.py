"""A dump for a bug report: one archive with what somebody else needs to understand a replica, and no secret.

What is in it is chosen file by file, never "everything but": settings, cluster.toml, certificate, names and sizes of
files, what the databases hold in numbers, the doctor's findings, every replica's status, this replica's metrics, the
machine and the versions, and those of the program's own logs that whoever makes it names. Not in it: keys, the content
of operations, the application's state.

Then all of it is searched for the folder's own keys before it is written, whole and in part, in the forms in which
programs print keys. What is found ends the dump: a secret must not leave because somebody's log, or a version to come,
holds it unexpectedly.
"""

import base64
import datetime as dt
import io
import json
import os
import platform
import re
import resource
import sqlite3
import stat
import sys
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Final

from replica.cluster.home import LOG_NAME, LOG_PUBLIC_KEY_NAME, NEXT_KEY_NAME, SETTINGS_NAME, TLS_KEY_NAME, ReplicaHome
from replica.cluster.keys import CLIENT_KEY_NAME, LockedKeyError, is_encrypted, load_private_key, write_new
from replica.cluster.passphrase import PassphraseSource
from replica.cluster.provision import CLIENT_NAME, OPERATOR_NAME
from replica.core.genesis import MIB
from replica.operations.findings import Finding
from replica.shell.evidence import EvidenceFolder
from replica.shell.sqlitefile import reading

# Of each log file that is named, the end.
LOG_BYTES_MAX: Final = 4 * MIB
LOGS_MAX: Final = 16
FILES_MAX: Final = 1000
SECRET_BYTES_MAX: Final = 64 * 1024
# So many bytes of a key in a row are no accident.
PIECE: Final = 12

BASE64_PIECE: Final = 16
SCALAR_SIZE: Final = 32
ENCRYPTED_SIZE: Final = 128  # of a P-256 key with a passphrase: its last bytes, past what every such file begins with
# Where the log's private key stands in log.state, sealed; see trustlog.sealed.
SEALED_IDENTITY: Final = (45, 496)


class DumpError(Exception):
    """No dump was made; the text says why and what to do."""


def make_dump(
    home: ReplicaHome,
    out: Path,
    *,
    findings: list[Finding],
    statuses: list[dict[str, Any]],
    metrics: bytes | None,
    logs: list[Path],
) -> list[str]:
    """Write the dump to the new file `out` (tar, gzip, mode 0600); return the names of what is in it.

    statuses: one for each replica. metrics: of this replica, if it serves any. logs: files of the program's log.
    DumpError, or OSError.
    """
    if len(logs) > LOGS_MAX:
        raise DumpError(f"{len(logs)} files of logs, at most {LOGS_MAX} are taken")
    parts = {
        "about.json": _json(about(home)),
        "doctor.json": _json([finding.as_data() for finding in findings]),
        "status.json": _json(statuses),
        "files.json": _json(list(_files(home.path))),
        "databases.json": _json(_databases(home)),
        "replica.toml": (home.path / SETTINGS_NAME).read_bytes(),
        "cluster.toml": home.cluster_path.read_bytes(),
        "tls.crt": home.certificate_path.read_bytes(),
        "log.pub": (home.log_path / LOG_PUBLIC_KEY_NAME).read_bytes(),
        **({} if metrics is None else {"metrics.txt": metrics}),
        **{f"logs/{number}-{path.name}": _tail(path) for number, path in enumerate(logs)},
    }
    _refuse_secrets(parts, home.path)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, content in parts.items():
            member = tarfile.TarInfo(f"trustlog-dump/{name}")
            member.size, member.mode, member.mtime = len(content), 0o600, int(dt.datetime.now(dt.UTC).timestamp())
            archive.addfile(member, io.BytesIO(content))
    try:
        write_new(out, packed.getvalue(), 0o600)
    except FileExistsError:
        raise DumpError(f"{out}: exists already and is not overwritten; choose another name") from None
    return list(parts)


def about(home: ReplicaHome) -> dict[str, Any]:
    """Return what the machine and the program are."""
    return {
        "made_at": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "replica": home.number,
        "cluster_id": home.cluster.cluster_id.hex(),
        "cluster_file": home.cluster.digest.hex(),
        "python": sys.version,
        "platform": platform.platform(),
        "packages": dict(_packages()),
        "sqlite": sqlite3.sqlite_version,
        "processors": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "load": os.getloadavg(),
        "open_files_max": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "user": os.geteuid(),
        "environment": sorted(name for name in os.environ if name.startswith(("TRUSTLOG_", "PYTHON"))),
    }


def _packages() -> Iterator[tuple[str, str]]:
    try:
        yield "trustlog", version("trustlog")
        needed = requires("trustlog") or []
    except PackageNotFoundError:
        return
    for requirement in needed:
        name = re.split(r"[^A-Za-z0-9_.-]", requirement, maxsplit=1)[0]
        if "extra ==" not in requirement:
            yield name, version(name)


def _files(folder: Path) -> Iterator[dict[str, Any]]:
    for number, path in enumerate(sorted(folder.rglob("*"))):
        if number == FILES_MAX:
            return
        found = path.lstat()
        yield {
            "name": str(path.relative_to(folder)),
            "mode": stat.filemode(found.st_mode),
            "bytes": found.st_size,
            "owner": found.st_uid,
            "changed": dt.datetime.fromtimestamp(found.st_mtime, dt.UTC).isoformat(timespec="seconds"),
        }


def _databases(home: ReplicaHome) -> dict[str, Any]:
    """Return what the databases hold in numbers, and what SQLite says of them; their content stays where it is."""
    questions = {
        home.store_path: {
            "logs": "select log, count(*), min(first), max(last), sum(length(payloads)) from groups group by log",
            "own_attestations": "select count(*) from own_attestations",
        },
        home.state_path: {
            "milestone": "select slot, length(header), length(certificate) from milestone",
            "parts": "select kind, count(*), sum(length(content)) from parts group by kind",
            "trees": "select tree, count(*), sum(keys) from buckets group by tree",
        },
    }
    found: dict[str, Any] = {}
    for path, asked in questions.items():
        if not path.exists():
            continue
        try:
            with reading(), closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as db:
                found[path.name] = {name: db.execute(query).fetchall() for name, query in asked.items()}
        except sqlite3.Error as error:
            found[path.name] = {"error": str(error)}
    evidence = EvidenceFolder(home.evidence_path).files()
    return {**found, "evidence": [file.name for file in evidence]}


def _tail(path: Path) -> bytes:
    with path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(max(0, size - LOG_BYTES_MAX))
        return file.read(LOG_BYTES_MAX)


def _json(content: object) -> bytes:
    return json.dumps(content, indent=1, default=str).encode() + b"\n"


def _refuse_secrets(parts: Mapping[str, bytes], folder: Path) -> None:
    """Raise DumpError if anything of the folder's keys, or the client's beside it, is in what would leave."""
    for path, secret in _secrets(folder):
        pieces = set(_pieces(secret))
        for name, content in parts.items():
            if any(piece in content for piece in pieces):
                raise DumpError(
                    f"{name} would hold a part of {path}: no dump was made. If that is a log, leave it out and take "
                    "that key out of use; else please report it, without the file"
                )


def _secrets(folder: Path) -> Iterator[tuple[Path, bytes]]:
    """Yield every secret that there is: 32 bytes of a private key, a sealing key, and the log's sealed identity.

    Of a key with a passphrase it is the end of what is encrypted, and the key itself only if TRUSTLOG_PASSPHRASE_FILE
    opens it.
    """
    beside = (folder.parent / name / CLIENT_KEY_NAME for name in (CLIENT_NAME, OPERATOR_NAME))
    for path in (folder / TLS_KEY_NAME, folder / NEXT_KEY_NAME, *beside):
        if not path.exists():
            continue
        passphrase = None
        if is_encrypted(path):
            yield path, _pem_content(path.read_bytes())[-ENCRYPTED_SIZE:]
            passphrase = PassphraseSource().given()
        with suppress(LockedKeyError):
            key = load_private_key(path, None if passphrase is None else passphrase.secret)
            yield path, key.private_numbers().private_value.to_bytes(SCALAR_SIZE, "big")
    for path, start, end in (
        (folder / LOG_NAME / "seal.key", 0, SECRET_BYTES_MAX),
        (folder / LOG_NAME / "log.state", *SEALED_IDENTITY),
    ):
        if path.exists():
            with path.open("rb") as file:
                file.seek(start)
                yield path, file.read(end - start)


def _pem_content(pem: bytes) -> bytes:
    """Return what a PEM file holds in base64; as it stands if that is damaged."""
    lines = b"".join(line for line in pem.splitlines() if b"-----" not in line and b":" not in line)
    try:
        return base64.b64decode(lines)
    except ValueError:
        return lines


def _pieces(secret: bytes) -> Iterator[bytes]:
    """Yield a secret in pieces: raw, in hexadecimal, and in base64 however it is aligned there."""
    for start in range(0, len(secret) - PIECE + 1, 4):
        piece = secret[start : start + PIECE]
        if len(set(piece)) > 4:  # a run of one byte is no secret
            yield from (piece, piece.hex().encode(), piece.hex().upper().encode())
    for shift in range(3):
        encoded = base64.b64encode(secret[shift:])
        for start in range(0, len(encoded) - 4 - BASE64_PIECE + 1, 4):
            if len(set(encoded[start : start + BASE64_PIECE])) > 4:
                yield encoded[start : start + BASE64_PIECE]
