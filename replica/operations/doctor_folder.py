"""Examining a replica's folder: its files, their modes, certificates, databases, and the disk below them.

Nothing is changed, and nothing is opened that a running replica needs for itself. Each check stands for itself, so
that one mistake does not hide the next; only what cannot be read at all ends the checks that build on it.
"""

import datetime as dt
import os
import resource
import shlex
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Final

from cryptography import x509

from replica.application import ApplicationLoadError, load_application
from replica.cluster.clusterfile import ClusterFile
from replica.cluster.environment import unknown_variables
from replica.cluster.home import (
    EVIDENCE_NAME,
    LOG_NAME,
    LOG_STATE_NAME,
    NEXT_KEY_NAME,
    RENEWAL_FILE_NAME,
    SETTINGS_NAME,
    STATE_NAME,
    STORE_NAME,
    TLS_CERTIFICATE_NAME,
    TLS_KEY_NAME,
    LostLogError,
    ReplicaHome,
    load_home,
    unlocked,
)
from replica.cluster.keys import is_encrypted
from replica.cluster.passphrase import PASSPHRASE_VARIABLE, PassphraseSource
from replica.cluster.replicatoml import load_settings
from replica.cluster.strict_toml import ConfigError
from replica.core.genesis import MIB
from replica.operations.doctor_log import examine_log
from replica.operations.findings import Finding, fine, problem, warning
from replica.shell import statestore, store
from replica.shell.atrest import CLEAR, Sealed
from replica.shell.evidence import EvidenceFolder
from replica.shell.sqlitefile import claim_trouble, damaged_files, find_foreign, read_claims, reading

EXPIRES_SOON: Final = dt.timedelta(days=30)
FREE_BYTES_LOW: Final = 1024 * MIB
FREE_BYTES_LEAST: Final = 64 * MIB
# The structure of larger files is left to `audit`, which shows how far it is.
CHECKED_BYTES_MAX: Final = 1024 * MIB
OPEN_FILES_LEAST: Final = 4096
NAMED_MAX: Final = 5  # files in one finding
# Files below the folder that are nobody else's business, and the mode that they have at the most.
_PRIVATE: Final = {
    TLS_KEY_NAME: 0o600,
    NEXT_KEY_NAME: 0o600,
    STORE_NAME: 0o600,
    STATE_NAME: 0o600,
    LOG_NAME: 0o700,
    f"{LOG_NAME}/seal.key": 0o600,
    f"{LOG_NAME}/log.state": 0o600,
    f"{LOG_NAME}/store.sealed": 0o600,
    EVIDENCE_NAME: 0o700,
}


def examine_folder(path: Path, now: dt.datetime) -> tuple[list[Finding], ReplicaHome | None]:
    """Examine a folder; also return it as loaded, if it can be used."""
    findings = list(_modes(path))
    home = None
    try:
        home = load_home(path)
        findings.append(fine("configuration", path, "settings, cluster.toml and keys fit together"))
    except LostLogError:
        home = load_home(path, with_keys=False)  # the other keys are the right ones; `examine_log` names the loss
    except ConfigError as error:
        findings.append(_unusable(path, error))
    if home is not None:
        findings += _keys(home)
        findings += certificates(home.cluster, now)
        findings += operators(home)
        findings += _next_certificate(home)
        findings += examine_log(home)
        findings += _databases(home)
        findings += _evidence(home)
        findings += _application(home)
    findings += _disk(path)
    findings += _limits()
    findings += _environment()
    return findings, home


def _keys(home: ReplicaHome) -> Iterator[Finding]:
    """Say of each private key whether it is encrypted, and whether the passphrase that a variable names opens it."""
    for path in home.private_key_paths:
        if not is_encrypted(path):
            text = "not encrypted: who reads the file has the key; a passphrase is optional (trustlog-replica keys)"
            yield fine("key", path, text)
            continue
        remedy, trouble = f"mend what {PASSPHRASE_VARIABLE} names, or unset it", ""
        try:
            given = PassphraseSource().given()
            if given is not None:
                waiting_trouble = unlocked(home, PassphraseSource()).waiting_trouble
                trouble = waiting_trouble if path == home.next_key_path else ""
        except ConfigError as error:
            trouble = str(error)
        if trouble:
            yield problem("key", path, trouble, remedy)
        else:
            opened = "; nobody named the passphrase here, so it was not opened"
            if given is not None:
                opened = f", and the passphrase {given.source} opens it"
            yield fine("key", path, f"encrypted{opened}")


def certificates(cluster: ClusterFile, now: dt.datetime) -> Iterator[Finding]:
    """Say of every certificate in cluster.toml whether it is valid; TLS refuses one that is not."""
    for place in cluster.replicas:
        certificate = x509.load_der_x509_certificate(place.certificate_der)
        ends, begins = certificate.not_valid_after_utc, certificate.not_valid_before_utc
        subject = f"replica {place.number}'s certificate"
        remedy = (
            f"make replica {place.number} a new key and certificate: trustlog-replica keys renew-certificate FOLDER on "
            "its machine, then trustlog-replica member renew"
        )
        if now > ends:
            yield problem("certificate", subject, f"expired on {ends:%Y-%m-%d}", remedy)
        elif now < begins:
            yield problem(
                "certificate", subject, f"is valid only from {begins:%Y-%m-%d} on", f"see the clock; or {remedy}"
            )
        elif ends - now < EXPIRES_SOON:
            yield warning("certificate", subject, f"expires on {ends:%Y-%m-%d}", remedy)
        else:
            yield fine("certificate", subject, f"is valid until {ends:%Y-%m-%d}")


def operators(home: ReplicaHome) -> Iterator[Finding]:
    """Say so if nobody can change members or clients, for ever: that is better known before a replica is lost."""
    if home.cluster.has_logs and not home.cluster.genesis.operators:
        text = "names no operator's key: no member can ever be replaced, and no client allowed or revoked"
        remedy = (
            "a new cluster has one: if this one is still empty, assemble it again with --operator; else stop all "
            "replicas and make one with its state (trustlog-replica refound)"
        )
        yield warning("operator", home.cluster_path, text, remedy)


def _next_certificate(home: ReplicaHome) -> Iterator[Finding]:
    """Say whether a certificate waits to be put in force, or is in force and was not worked with yet."""
    if home.waiting_trouble:
        path, remedy = home.next_certificate_path, "do that before the next change of members"
        yield problem("certificate", path, home.waiting_trouble, remedy)
    elif home.is_renewed:
        text = "is in force, and takes the old one's place when the replica starts"
        yield fine("certificate", home.certificate_path, text)
    elif home.next_pair is not None:
        remedy = f"put it in force: trustlog-replica member renew CLUSTER {home.path / RENEWAL_FILE_NAME}"
        yield warning("certificate", home.next_pair[0], "no list of members that is known here names it yet", remedy)


def _unusable(path: Path, error: ConfigError) -> Finding:
    try:
        load_settings(path / SETTINGS_NAME)
    except ConfigError:
        return problem(
            "configuration", path / SETTINGS_NAME, str(error), "mend that file; see: trustlog-replica config check"
        )
    return problem("configuration", path, str(error), "do what the text says, and run the doctor again")


def _modes(path: Path) -> Iterator[Finding]:
    if not path.is_dir():
        yield problem("folder", path, "there is no such folder", "give the folder that init or keygen made")
        return
    mode, owner = path.stat().st_mode, path.stat().st_uid
    if owner not in {os.geteuid(), 0} and os.geteuid() != 0:
        yield warning("mode", path, f"belongs to user {owner}", f"run the doctor as that user: sudo -u '#{owner}' …")
    bad = [(path, mode, 0o700)] if mode & 0o077 else []
    for name, most in _PRIVATE.items():
        file = path / name
        if name == LOG_NAME and not (file / LOG_STATE_NAME).exists():
            continue  # a service of its own keeps the log: all that is here is its public key
        try:
            found = file.lstat().st_mode
        except OSError:
            continue  # not there, or not ours to see: what needs it says so
        if stat.S_ISLNK(found):
            yield warning("mode", file, "is a link; its target's mode counts", "put the file itself there")
        elif stat.S_IMODE(found) & ~most:
            bad.append((file, found, most))
    for file, found, most in bad:
        yield problem(
            "mode",
            file,
            f"has mode {stat.S_IMODE(found):04o}: others may read it or change it",
            f"if nobody can have copied or changed it: chmod {most:o} {shlex.quote(str(file))}; else make new keys",
        )
    yield from _owners(path, owner)
    for name in (SETTINGS_NAME, TLS_KEY_NAME, TLS_CERTIFICATE_NAME):
        if (path / name).exists() and not os.access(path / name, os.R_OK):
            yield problem(
                "mode", path / name, "cannot be read by this user", "run as the replica's user, or give it the file"
            )
    if not bad:
        yield fine("mode", path, "closed to other users")


def _owners(path: Path, owner: int) -> Iterator[Finding]:
    """Name what belongs to another user than the folder, as when root made it: the replica may be unable to use it."""
    for folder in (path, path / LOG_NAME, path / EVIDENCE_NAME):
        try:
            others = {one.name: one.lstat().st_uid for one in folder.iterdir() if one.lstat().st_uid != owner}
        except OSError:
            continue  # not there, or not ours to see
        if others:
            names = ", ".join(sorted(others)[:NAMED_MAX]) + (" …" if len(others) > NAMED_MAX else "")
            text = (
                f"{names}: of another user ({', '.join(map(str, sorted(set(others.values()))))}) than {path} ({owner})"
            )
            remedy = (
                f"run programs as the replica's user, and give it the files: chown -R {owner} {shlex.quote(str(path))}"
            )
            yield problem("mode", folder, text, remedy)


def _databases(home: ReplicaHome) -> Iterator[Finding]:
    foreign = find_foreign((home.store_path, home.state_path), home.cluster.cluster_id, home.number)
    if foreign is not None:
        yield problem("database", home.cluster_path, str(foreign), foreign.remedy)
    for path, version in ((home.store_path, store.SCHEMA_VERSION), (home.state_path, statestore.SCHEMA_VERSION)):
        remedy = (
            f"stop the replica and start it again: it saves what it can and fetches the rest; then audit {home.path}"
        )
        if not path.exists():
            yield fine("database", path, "is not there: made at the first start, or fetched from peers")
        elif path.stat().st_size > CHECKED_BYTES_MAX:
            yield fine("database", path, "is large, and was not read: trustlog-replica audit reads all of it")
        else:
            trouble = _structure(path)
            if trouble:
                yield problem("database", path, trouble, remedy)
            else:
                yield fine("database", path, "its structure is whole")
        yield from _schema(home, path, version)
        for _, aside in damaged_files(path):
            text = "a damaged file that was set aside"
            yield warning("database", aside, text, "look into why (the disk?), then delete it")


def _schema(home: ReplicaHome, path: Path, version: int) -> Iterator[Finding]:
    mark = Sealed.mark if home.settings.trusted_log.encrypt_store else CLEAR.mark
    own = f"{version}{mark}".encode()
    held = read_claims(path).get("schema", own) if path.exists() else own
    if held != own:
        yield problem("database", path, *claim_trouble("schema", held, own))


def _structure(path: Path) -> str:
    """Return what is wrong with a database's structure; nothing if all is well."""
    try:
        with reading(), closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as db:
            db.text_factory = bytes
            found = db.execute("pragma quick_check(3)").fetchall()
    except sqlite3.Error as error:
        return f"cannot be read: {error}"
    texts = [bytes(row[0]).decode(errors="replace") for row in found]
    return "" if texts == ["ok"] else f"is damaged: {'; '.join(texts)}"


def _evidence(home: ReplicaHome) -> Iterator[Finding]:
    files = EvidenceFolder(home.evidence_path).files()
    if files:
        names = ", ".join(file.name for file in files[:3]) + (" …" if len(files) > 3 else "")
        remedy = "verify it (trustlog-replica evidence verify), keep a copy, and replace that replica"
        yield warning("evidence", home.evidence_path, f"{len(files)} files against other replicas: {names}", remedy)


def _application(home: ReplicaHome) -> Iterator[Finding]:
    name = home.cluster.genesis.application
    try:
        load_application(name)
    except ApplicationLoadError as error:
        remedy = "`run` refuses to start without it; if it is started with a PYTHONPATH, give the doctor the same"
        yield warning("application", name, str(error), remedy)
    else:
        yield fine("application", name, "can be loaded here")


def _disk(path: Path) -> Iterator[Finding]:
    try:
        found = os.statvfs(path)
    except OSError as error:
        yield problem("disk", path, f"cannot be looked at: {error.strerror}", "see whether the disk is mounted")
        return
    free = found.f_bavail * found.f_frsize
    text = f"{free // MIB} MiB free of {found.f_blocks * found.f_frsize // MIB}"
    remedy = "make room: a replica whose disk is full stops before it says anything that it could forget"
    if found.f_flag & os.ST_RDONLY:
        yield problem(
            "disk", path, "is mounted read-only", "see the kernel's log for a failing disk; mount it writable"
        )
    elif free < FREE_BYTES_LEAST or (found.f_files and not found.f_favail):
        yield problem("disk", path, text + ("" if found.f_favail else ", no inode"), remedy)
    elif free < FREE_BYTES_LOW:
        yield warning("disk", path, text, remedy)
    else:
        yield fine("disk", path, text)


def _limits() -> Iterator[Finding]:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < OPEN_FILES_LEAST:
        remedy = f"raise it for the replica: ulimit -n {OPEN_FILES_LEAST}, or LimitNOFILE= in its systemd unit"
        yield warning("limits", "open files", f"{soft} at the most, here; 2,048 clients need more", remedy)


def _environment() -> Iterator[Finding]:
    for name, near in unknown_variables(os.environ).items():
        if near:
            text = f"is read by no program; did you mean {near}?"
            yield warning("configuration", name, text, "rename it, or unset it")
