"""A replica's private folder: its settings, keys, trusted log and store.

    replica.toml    this replica's own settings; nothing in it has to be the same elsewhere
    tls.key         mode 0600; with a passphrase or without
    tls.crt         the certificate that stands in the list of members under which the replica works, at first in
                    cluster.toml
    tls.next.key, tls.next.crt
                    another key and certificate, until a list that has that certificate is in force (`.renewal`);
                    renewal.public.toml is the public part, for the operator
    log/            the trusted log (made by trustlog.create); log/log.pub is the key in cluster.toml. Where a
                    service that somebody else runs keeps the log, log.pub is all that is here
    store.sqlite    made by the daemon
    signing.key     with ordering = "pbft" only, which has no log/, store.sqlite and evidence/ (`load_any_home`);
                    started: it ran, and must not again
    evidence/       against other replicas, if there is any; mode 0700, made by the daemon

The folder has mode 0700. Most first failures of a cluster are two machines with different keys or files, so
`load_home` compares both with cluster.toml and names both digests when they differ.
"""

import hashlib
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric import ec

from replica.cluster.clusterfile import (
    ClusterFile,
    ReplicaPlace,
    load_any_cluster_file,
    load_cluster_file,
    log_kind_label,
)
from replica.cluster.environment import settings_of
from replica.cluster.keys import (
    KeptKey,
    LockedKeyError,
    certificate_der,
    certificate_public_key,
    is_encrypted,
    load_private_key,
    public_bytes,
)
from replica.cluster.memberlists import OWN_NAME, follow, read_links
from replica.cluster.passphrase import PassphraseSource
from replica.cluster.replicatoml import HomeError, Settings, TrustedLogSettings, load_settings
from replica.cluster.strict_toml import ConfigError, read_bounded
from replica.core.genesis import PUBLIC_KEY_SIZE
from trustlog import BackendKind

SETTINGS_NAME: Final = "replica.toml"
TLS_KEY_NAME: Final = "tls.key"
TLS_CERTIFICATE_NAME: Final = "tls.crt"
NEXT_KEY_NAME: Final = "tls.next.key"
NEXT_CERTIFICATE_NAME: Final = "tls.next.crt"
RENEWAL_FILE_NAME: Final = "renewal.public.toml"
SIGNING_KEY_NAME: Final = "signing.key"
STARTED_NAME: Final = "started"
LOG_NAME: Final = "log"
LOG_PUBLIC_KEY_NAME: Final = "log.pub"
LOG_STATE_NAME: Final = "log.state"
STORE_NAME: Final = "store.sqlite"
STATE_NAME: Final = "state.sqlite"
EVIDENCE_NAME: Final = "evidence"
CERTIFICATE_BYTES_MAX: Final = 64 * 1024
LOST_LOG_REMEDY: Final = (
    "put back what was moved away, as it was last; never put an old copy there: it would say again what was said, and "
    "the log be exposed for ever. A log that is gone is replaced: make a new one (trustlog-replica keygen, in a new "
    "folder) and have it take this one's place in the cluster (trustlog-replica member replace)"
)


class NoMemberError(HomeError):
    """The folder can be read, and its replica does not stand in the list of members that counts for it."""


class LostLogError(HomeError):
    """The trusted log that the folder held is not there."""


@dataclass(frozen=True, slots=True)
class ReplicaHome:
    """A replica's folder, checked against its cluster file, which was read from `cluster_path`.

    passphrase: of its private keys, once it was unlocked, if they have one. is_renewed: the list of members has the
    certificate in tls.next.crt. waiting_trouble: why tls.next.crt, which the list does not have, can be of no use when
    a list will; "" if it can, or there is none. kept: the listed certificate's key, once it was opened to be worked
    with. passphrases: where another passphrase is looked for later; None: the variable.
    """

    path: Path
    settings: Settings
    cluster: ClusterFile
    cluster_path: Path
    passphrase: bytes | None = field(default=None, repr=False)
    is_renewed: bool = False
    waiting_trouble: str = ""
    kept: KeptKey | None = field(default=None, repr=False, compare=False)
    passphrases: PassphraseSource | None = field(default=None, repr=False, compare=False)

    @property
    def number(self) -> int:
        """Return the replica's number."""
        return self.settings.number

    @property
    def place(self) -> ReplicaPlace:
        """Return the replica's own entry in the cluster file."""
        return self.cluster.replicas[self.number]

    @property
    def listen_address(self) -> tuple[str, int]:
        """Return host and port to listen on."""
        return self.settings.listen or (self.place.host, self.place.port)

    @property
    def key_path(self) -> Path:
        """Return the file of the TLS key."""
        # Of a renewed pair the key gets its last name first.
        is_next = self.is_renewed and self.next_key_path.exists()
        return self.next_key_path if is_next else self.path / TLS_KEY_NAME

    @property
    def certificate_path(self) -> Path:
        """Return the file of the TLS certificate."""
        return self.path / (NEXT_CERTIFICATE_NAME if self.is_renewed else TLS_CERTIFICATE_NAME)

    @property
    def next_certificate_path(self) -> Path:
        """Return the file of a certificate that waits, or is in force and has not the last name; it need not exist."""
        return self.path / NEXT_CERTIFICATE_NAME

    @property
    def next_key_path(self) -> Path:
        """Return the file of that certificate's key; it need not exist."""
        return self.path / NEXT_KEY_NAME

    @property
    def next_pair(self) -> tuple[Path, Path] | None:
        """Return the files of certificate and key that wait for a list of members that has them, None without any."""
        if self.is_renewed or self.waiting_trouble:
            return None
        pair = self.next_certificate_path, self.next_key_path
        return pair if all(path.exists() for path in pair) else None

    @property
    def signing_key_path(self) -> Path:
        """Return the file of the key that signs a PBFT replica's messages."""
        return self.path / SIGNING_KEY_NAME

    @property
    def log_path(self) -> Path:
        """Return the directory of the trusted log, for trustlog.open_log."""
        return self.path / LOG_NAME

    @property
    def store_path(self) -> Path:
        """Return the file of the store; it need not exist yet."""
        return self.path / STORE_NAME

    @property
    def state_path(self) -> Path:
        """Return the file of the agreed state; it need not exist yet."""
        return self.path / STATE_NAME

    @property
    def members_path(self) -> Path:
        """Return the file of lists of members under which this replica worked after the first; it need not exist."""
        return self.path / OWN_NAME

    @property
    def evidence_path(self) -> Path:
        """Return the folder of evidence against other replicas; it need not exist."""
        return self.path / EVIDENCE_NAME

    @property
    def private_key_paths(self) -> tuple[Path, ...]:
        """Return the files of its private keys; the log's is not among them."""
        if not self.cluster.has_logs:
            return self.key_path, self.signing_key_path
        waiting = self.next_pair
        return (self.key_path,) if waiting is None else (self.key_path, waiting[1])

    @property
    def tls_identities(self) -> tuple[tuple[Path, Path, bytes | None], ...]:
        """Return what this replica may show to peers: files of certificate and key, and the key's passphrase.

        First the pair that its list has, then the one that waits: peers who went over already know only that.
        """
        key = (self.key_path, self.passphrase) if self.kept is None else (self.kept.path, self.kept.passphrase)
        listed, waiting = (self.certificate_path, *key), self.next_pair
        return (listed,) if waiting is None else (listed, (*waiting, self.passphrase))

    def load_tls_key(self) -> ec.EllipticCurvePrivateKey:
        """Read the TLS key; ConfigError says what is wrong with its file, LockedKeyError that it was not unlocked."""
        return load_private_key(self.key_path, self.passphrase)

    def load_signing_key(self) -> ec.EllipticCurvePrivateKey:
        """Read the key that signs a PBFT replica's messages, as `load_tls_key` does."""
        return load_private_key(self.signing_key_path, self.passphrase)


def load_home(
    path: Path,
    flags: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
    *,
    with_keys: bool = True,
) -> ReplicaHome:
    """Read a replica's folder and compare it with its cluster file.

    flags: settings, by field, that stand above the environment's, which stand above replica.toml's. environ: instead
    of the process' own. HomeError says what is wrong, also when it is the cluster file. The trusted log itself is not
    opened, and an encrypted key is not looked into: most commands need none, and `unlocked` is for those that do.
    with_keys: whether its keys must be there, and the right ones; only who reads its data alone can do without.
    """
    try:
        home = _load_home(path, flags or {}, os.environ if environ is None else environ, load_cluster_file)
        if with_keys:
            _check_keys(home)
    except HomeError:
        raise
    except ConfigError as error:
        raise HomeError(str(error)) from error
    return home


def load_any_home(
    path: Path, flags: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None
) -> ReplicaHome:
    """Read a folder as `load_home` does, also that of a PBFT cluster's replica, which that refuses.

    HomeError also for settings of what a PBFT cluster lacks.
    """
    try:
        home = _load_home(path, flags or {}, os.environ if environ is None else environ, load_any_cluster_file)
        if home.cluster.has_logs:
            _check_keys(home)
            return home
        _check_pair(home)
        _check_pbft_settings(home)
        with suppress(LockedKeyError):
            _check_signing_key(home)
    except HomeError:
        raise
    except ConfigError as error:
        raise HomeError(str(error)) from error
    return home


def unlocked(home: ReplicaHome, source: PassphraseSource) -> ReplicaHome:
    """Return the home with the passphrase of its private keys, which is looked for only if one is encrypted.

    ConfigError if there is none or a wrong one, HomeError if what was encrypted are other keys than the certificate's.
    A key that only waits is no reason: the home then says what is wrong with it (`waiting_trouble`).
    """
    waiting = None if home.next_pair is None else home.next_pair[1]
    locked = [path for path in home.private_key_paths if is_encrypted(path)]
    if not locked:
        return home
    try:
        passphrase = source.for_key(locked[0])
    except ConfigError as error:
        if locked != [waiting]:
            raise
        return replace(home, waiting_trouble=waiting_text(str(error)))
    for path in locked:
        if path != waiting:
            load_private_key(path, passphrase.secret, passphrase.source)
    opened = replace(home, passphrase=passphrase.secret)
    check_tls_key(opened)
    if not opened.cluster.has_logs:
        _check_signing_key(opened)
    return with_listed_pair(opened)


def read_certificate(path: Path) -> bytes:
    """Return the DER of the certificate in a PEM file; ConfigError says what is wrong."""
    try:
        return certificate_der(read_bounded(path, CERTIFICATE_BYTES_MAX))
    except ValueError as error:
        raise ConfigError(f"{path}: {error}; restore it from the replica's entry in cluster.toml") from error


def read_log_public_key(directory: Path) -> bytes:
    """Return the public key (65 bytes) beside a trusted log; ConfigError says what is wrong."""
    path = directory / LOG_PUBLIC_KEY_NAME
    text, _, _ = read_bounded(path, 1024).strip().partition(b"\n")
    try:
        key = bytes.fromhex(text.decode("ascii"))
    except ValueError:
        key = b""
    if len(key) != PUBLIC_KEY_SIZE:
        raise ConfigError(f"{path}: not a log's public key ({2 * PUBLIC_KEY_SIZE} hexadecimal digits)")
    return key


def _load_home(
    path: Path, flags: Mapping[str, Any], environ: Mapping[str, str], load: Callable[[Path], ClusterFile]
) -> ReplicaHome:
    settings = replace(load_settings(path / SETTINGS_NAME), **{**settings_of(environ), **flags})
    cluster_path = (path / settings.cluster).resolve()
    if not cluster_path.exists():
        raise HomeError(
            f"{path / SETTINGS_NAME}: cluster: there is no file {cluster_path}; copy the cluster.toml that "
            "`trustlog-replica assemble` wrote to that place, or set the key `cluster`"
        )
    cluster = load(cluster_path)
    if cluster.has_logs:
        # Its own file says under which list it works; what an operator keeps beside cluster.toml may be ahead of that.
        cluster = follow(cluster, read_links(path / OWN_NAME), str(path / OWN_NAME))
    if (listed := _listed(path, cluster)) and settings.number not in listed:
        number = " and ".join(map(str, sorted(listed)))
        raise HomeError(
            f"{path / SETTINGS_NAME}: number: {settings.number}, but {cluster_path} lists this folder's log and "
            f"certificate as replica {number}'s; put the number right, or restore the folder's files from one copy"
        )
    if settings.number >= cluster.genesis.n:
        raise NoMemberError(
            f"{path / SETTINGS_NAME}: number: {settings.number}, but {cluster_path} has replicas 0 to "
            f"{cluster.genesis.n - 1}; is it another cluster's file?{_no_members_file(path, cluster)}"
        )
    return with_listed_pair(ReplicaHome(path, settings, cluster, cluster_path))


def _listed(path: Path, cluster: ClusterFile) -> set[int]:
    """Return as which members a folder's log and certificate are listed, whatever its settings say."""
    found = set()
    with suppress(ConfigError):
        der = read_certificate(path / TLS_CERTIFICATE_NAME)
        found |= {place.number for place in cluster.replicas if place.certificate_der == der}
    if not cluster.has_logs:
        return found
    with suppress(ConfigError):
        key = read_log_public_key(path / LOG_NAME)
        found |= {member.number for member in cluster.genesis.members if member.log_public_key == key}
    return found


def with_listed_pair(home: ReplicaHome) -> ReplicaHome:
    """Return the home with the pair whose certificate the list of members has: the renewed one, or else tls.crt's.

    What is wrong with a pair that waits is said by the home; an encrypted key is looked into only with a passphrase.
    """
    path, is_renewed, trouble = home.next_certificate_path, False, ""
    if path.exists():
        try:
            der = read_certificate(path)
            is_renewed = der == home.place.certificate_der
            trouble = "" if is_renewed else _key_trouble(home, der)
        except ConfigError as error:
            trouble = str(error)
    return replace(home, is_renewed=is_renewed, waiting_trouble=waiting_text(trouble) if trouble else "")


def _key_trouble(home: ReplicaHome, certificate: bytes) -> str:
    """Return what is wrong with the key of a certificate that waits; "" if nothing is, or it was not unlocked."""
    path = home.next_key_path
    if not path.exists():
        return f"{home.next_certificate_path}: its key {path.name} is not here"
    try:
        key = load_private_key(path, home.passphrase)
    except LockedKeyError as error:
        return "" if home.passphrase is None else str(error)
    if public_bytes(key.public_key()) != certificate_public_key(certificate):
        return f"{path}: not the key of {home.next_certificate_path}"
    return ""


def waiting_text(text: str) -> str:
    """Return what is wrong with a pair that waits, and what to do about it."""
    return (
        f"{text}. That pair cannot be worked with when a list of members names it: put the right files back, readable "
        f"for the replica's user, or, if no list does and none is asked for (trustlog-replica member list), remove "
        f"{NEXT_CERTIFICATE_NAME} and {NEXT_KEY_NAME} and make another one (trustlog-replica keys renew-certificate)"
    )


def _no_members_file(path: Path, cluster: ClusterFile) -> str:
    """Say what a new replica of a running cluster lacks, if it may be that, as one more sentence; else nothing."""
    if not cluster.has_logs or cluster.links:
        return ""
    return (
        f" If members changed, and this replica came in with a later list: {path / OWN_NAME} is missing; copy today's "
        "cluster.members.toml to that place (trustlog-replica member list --update writes it)"
    )


def _check_keys(home: ReplicaHome) -> None:
    """Refuse a folder whose keys are not those that the other replicas expect."""
    own, listed = home.settings.trusted_log.backend, home.cluster.genesis.members[home.number].log_kind
    if own != listed:
        text = (
            f'{home.path / SETTINGS_NAME}: trusted_log.backend: "{log_kind_label(own)}", but {home.cluster_path} lists '
            f'"{log_kind_label(listed)}" for replica {home.number}; a log keeps its backend for ever: restore the file.'
        )
        raise _no_member(home, text)
    _check_pair(home)
    _check_log_is_there(home)
    pins = read_bounded(home.log_path / LOG_PUBLIC_KEY_NAME, 1024).split(b"\n")[1:2]
    listed_pins = home.cluster.genesis.members[home.number].log_pins
    if own == BackendKind.TPM and pins != [listed_pins.hex().encode()]:
        raise _differ(home, home.log_path / LOG_PUBLIC_KEY_NAME, b"".join(pins), "pinned value", listed_pins)
    log_key = read_log_public_key(home.log_path)
    expected = home.cluster.genesis.members[home.number].log_public_key
    if log_key != expected:
        raise _differ(home, home.log_path / LOG_PUBLIC_KEY_NAME, log_key, "log key", expected)


def _check_log_is_there(home: ReplicaHome) -> None:
    path, member = home.log_path / LOG_PUBLIC_KEY_NAME, home.cluster.genesis.members[home.number]
    if os.path.lexists(path):
        return
    if home.settings.trusted_log.socket is None and not (home.log_path / LOG_STATE_NAME).exists():
        raise LostLogError(
            f"{home.log_path}: this replica's trusted log is lost: {LOG_PUBLIC_KEY_NAME} and {LOG_STATE_NAME} are not "
            f"there; {LOST_LOG_REMEDY}"
        )
    lines = [key.hex() for key in (member.log_public_key, member.log_pins) if key]
    raise HomeError(
        f"{path}: cannot be read: No such file or directory. Nothing in it is secret: make it again, with "
        f"{'this line' if len(lines) == 1 else 'these lines'} in it: {' and '.join(lines)}"
    )


def _check_pbft_settings(home: ReplicaHome) -> None:
    """Refuse what was asked for and would not happen."""
    settings, file = home.settings, home.path / SETTINGS_NAME
    asked = {
        'durability = "disk"': settings.durability == "disk",
        "http": settings.http is not None,
        "[trusted_log]": settings.trusted_log != TrustedLogSettings(),
    }
    for name, is_asked in asked.items():
        if is_asked:
            raise HomeError(
                f"{file}: {name}: not in a PBFT cluster, which keeps nothing on disk, has no trusted logs and serves "
                'no HTTP; take it away (durability must be "memory"), also from the options and the environment'
            )


def _check_pair(home: ReplicaHome) -> None:
    check_certificate(home)
    with suppress(LockedKeyError):
        check_tls_key(home)


def check_certificate(home: ReplicaHome) -> None:
    """Raise HomeError unless the certificate that is worked with is the one in the list of members."""
    der = read_certificate(home.certificate_path)
    if der != home.place.certificate_der:
        if home.waiting_trouble:
            raise HomeError(f"{home.waiting_trouble}. {TLS_CERTIFICATE_NAME} is not the certificate that the list has")
        raise _differ(home, home.certificate_path, der, "certificate", home.place.certificate_der)


def check_tls_key(home: ReplicaHome) -> None:
    """Raise HomeError unless the key's file holds the certificate's key, LockedKeyError if it was not unlocked."""
    if public_bytes(home.load_tls_key().public_key()) != certificate_public_key(home.place.certificate_der):
        raise HomeError(
            f"{home.key_path}: not the key of {home.certificate_path}; restore both files from the same copy"
        )


def _check_signing_key(home: ReplicaHome) -> None:
    expected = home.cluster.genesis.members[home.number].log_public_key
    signing = public_bytes(home.load_signing_key().public_key())
    if signing != expected:
        raise _differ(home, home.signing_key_path, signing, "signing key", expected)


def _differ(home: ReplicaHome, path: Path, own: bytes, what: str, listed: bytes) -> HomeError:
    own_digest, listed_digest = (hashlib.sha256(value).hexdigest() for value in (own, listed))
    return _no_member(
        home,
        f"{path}: this {what} has SHA-256 {own_digest}, but {home.cluster_path} lists {listed_digest} "
        f"for replica {home.number}: this folder belongs to another cluster, or to other keys. "
        "Copy the cluster.toml that was assembled from this folder's public file to that place, or run the "
        "folder that belongs to this cluster.toml.",
    )


def _no_member(home: ReplicaHome, text: str) -> HomeError:
    """Return the error for a folder that is not as its list has it: of no member only if nothing of it is listed."""
    if _listed(home.path, home.cluster):
        return HomeError(text)
    return NoMemberError(text + _no_members_file(home.path, home.cluster))
