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
from typing import Any, Final, cast, get_args

import tomli_w
from cryptography.hazmat.primitives.asymmetric import ec

from replica.cluster.clusterfile import (
    ClusterFile,
    ReplicaPlace,
    load_any_cluster_file,
    load_cluster_file,
    log_kind_label,
    read_log_kind,
)
from replica.cluster.environment import (
    RETAIN_MIB_MAX,
    Durability,
    LogFormat,
    LogLevel,
    read_address,
    settings_of,
)
from replica.cluster.keys import (
    LockedKeyError,
    certificate_der,
    certificate_public_key,
    is_encrypted,
    load_private_key,
    public_bytes,
)
from replica.cluster.memberlists import OWN_NAME, follow, read_links
from replica.cluster.passphrase import PassphraseSource
from replica.cluster.strict_toml import ConfigError, Table, parse_toml, read_bounded
from replica.core.genesis import PUBLIC_KEY_SIZE
from replica.core.quorum import FAULTS_MAX
from trustlog import BackendKind

FORMAT: Final = 1
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
STORE_NAME: Final = "store.sqlite"
STATE_NAME: Final = "state.sqlite"
EVIDENCE_NAME: Final = "evidence"
DEFAULT_CLUSTER: Final = "../cluster.toml"
CERTIFICATE_BYTES_MAX: Final = 64 * 1024

_HEADER: Final = """\
# The settings of one trustlog replica. Optional keys and their defaults:
#   durability = "disk"      "memory" forgets everything with the process: for experiments only
#   log_level = "info"       "debug", "info", "warning" or "error"
#   log_format = "auto"      "console", "json"; "auto" is console on a terminal, else json
#   listen = "host:port"     where to listen, if not at the address in cluster.toml
#   http = "127.0.0.1:8100"  where to answer probes, metrics, status and reads over plain HTTP, if anywhere
#   retain_mib = 256         how much of the logs is kept on disk although a stable checkpoint covers it
#   [trusted_log]            what keeps this replica's log; it cannot be changed later
#   backend = "software"     in the replica's own process; "process": in a program of its own; "tpm"
#   socket = "/path"         of a service that somebody else runs (trustlog serve); without it, the replica starts it
#   encrypt_store = false    true: payloads at rest are sealed with a key that the log's service, or the TPM, keeps

"""


# The kinds of log that keep a key for payloads at rest.
STORE_KEY_BACKENDS = frozenset({BackendKind.PROCESS, BackendKind.TPM})


class HomeError(ConfigError):
    """A replica's folder cannot be used; the text names the file, what is wrong and what to do."""


@dataclass(frozen=True, slots=True)
class TrustedLogSettings:
    """What keeps the log. `socket` is None where the replica starts the log's service itself.

    encrypt_store: payloads at rest are sealed with a key that the log's service, or its TPM, keeps.
    """

    backend: BackendKind = BackendKind.SOFTWARE
    socket: Path | None = None
    encrypt_store: bool = False


@dataclass(frozen=True, slots=True)
class Settings:
    """The content of replica.toml.

    `listen` is None where the address in the cluster file is listened on, `http` where HTTP is not served.
    """

    number: int
    cluster: str = DEFAULT_CLUSTER
    durability: Durability = "disk"
    log_level: LogLevel = "info"
    log_format: LogFormat = "auto"
    listen: tuple[str, int] | None = None
    http: tuple[str, int] | None = None
    retain_mib: int = 256
    trusted_log: TrustedLogSettings = TrustedLogSettings()


@dataclass(frozen=True, slots=True)
class ReplicaHome:
    """A replica's folder, checked against its cluster file, which was read from `cluster_path`.

    passphrase: of its private keys, once it was unlocked, if they have one. is_renewed: the list of members has the
    certificate in tls.next.crt.
    """

    path: Path
    settings: Settings
    cluster: ClusterFile
    cluster_path: Path
    passphrase: bytes | None = field(default=None, repr=False)
    is_renewed: bool = False

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
        is_next = self.is_renewed and (self.path / NEXT_KEY_NAME).exists()
        return self.path / (NEXT_KEY_NAME if is_next else TLS_KEY_NAME)

    @property
    def certificate_path(self) -> Path:
        """Return the file of the TLS certificate."""
        return self.path / (NEXT_CERTIFICATE_NAME if self.is_renewed else TLS_CERTIFICATE_NAME)

    @property
    def next_pair(self) -> tuple[Path, Path] | None:
        """Return the files of certificate and key that wait for a list of members that has them, None without any."""
        pair = self.path / NEXT_CERTIFICATE_NAME, self.path / NEXT_KEY_NAME
        return pair if not self.is_renewed and all(path.exists() for path in pair) else None

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

    def under_next_list(self) -> "ReplicaHome":
        """Return this home under the list of members that its file leads to now.

        ConfigError if it leads nowhere, or to a list with another certificate than those that are here.
        """
        more = read_links(self.members_path)[len(self.cluster.links) :]
        later = _with_listed_pair(replace(self, cluster=follow(self.cluster, more, str(self.members_path))))
        _check_certificate(later)
        _check_tls_key(later)  # a passphrase that was changed meanwhile is said now
        return later

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
        pairs = (self.certificate_path, self.key_path), self.next_pair
        return tuple((*pair, self.passphrase) for pair in pairs if pair is not None)

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
        _check_certificate(home)
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
    """
    locked = [path for path in home.private_key_paths if is_encrypted(path)]
    if not locked:
        return home
    passphrase = source.for_key(locked[0])
    for path in locked:
        load_private_key(path, passphrase.secret, passphrase.source)
    opened = replace(home, passphrase=passphrase.secret)
    _check_tls_key(opened)
    if not opened.cluster.has_logs:
        _check_signing_key(opened)
    return opened


def load_settings(path: Path) -> Settings:
    """Read replica.toml; HomeError says what is wrong."""
    if not path.exists():
        raise HomeError(
            f"{path}: there is no such file, so {path.parent} is no replica's folder; "
            "give the folder that trustlog-replica init or keygen made, such as DIR/replica-0"
        )
    table = Table(str(path), parse_toml(read_bounded(path), str(path)).data)
    table.integer("format", FORMAT, FORMAT)
    settings = Settings(
        number=table.integer("number", 0, 2 * FAULTS_MAX),
        cluster=table.text("cluster", DEFAULT_CLUSTER),
        durability=cast("Durability", table.choice("durability", list(get_args(Durability)), "disk")),
        log_level=cast("LogLevel", table.choice("log_level", list(get_args(LogLevel)), "info")),
        log_format=cast("LogFormat", table.choice("log_format", list(get_args(LogFormat)), "auto")),
        listen=read_address(table, "listen"),
        http=read_address(table, "http"),
        retain_mib=table.integer("retain_mib", 0, RETAIN_MIB_MAX, 256),
        trusted_log=_trusted_log(table),
    )
    table.finish()
    return settings


def dump_settings(settings: Settings) -> bytes:
    """Return the bytes of a replica.toml without `listen` and `http`; keys that have their default are left out."""
    document: dict[str, Any] = {"format": FORMAT, "number": settings.number, "cluster": settings.cluster}
    default = Settings(settings.number)
    for key in ("durability", "log_level", "log_format"):
        if getattr(settings, key) != getattr(default, key):
            document[key] = getattr(settings, key)
    trusted = settings.trusted_log
    if trusted != default.trusted_log:
        document["trusted_log"] = {"backend": log_kind_label(trusted.backend)}
        if trusted.socket is not None:
            document["trusted_log"]["socket"] = str(trusted.socket)
        if trusted.encrypt_store:
            document["trusted_log"]["encrypt_store"] = True
    return (_HEADER + tomli_w.dumps(document)).encode()


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
    if settings.number >= cluster.genesis.n:
        raise HomeError(
            f"{path / SETTINGS_NAME}: number: {settings.number}, but {cluster_path} has replicas 0 to "
            f"{cluster.genesis.n - 1}; is it another cluster's file?{_no_members_file(path, cluster)}"
        )
    return _with_listed_pair(ReplicaHome(path, settings, cluster, cluster_path))


def _with_listed_pair(home: ReplicaHome) -> ReplicaHome:
    """Return the home with the pair whose certificate the list of members has: the renewed one, or else tls.crt's."""
    path = home.path / NEXT_CERTIFICATE_NAME
    return replace(home, is_renewed=path.exists() and read_certificate(path) == home.place.certificate_der)


def _no_members_file(path: Path, cluster: ClusterFile) -> str:
    """Say what a new replica of a running cluster lacks, if it may be that, as one more sentence; else nothing."""
    if not cluster.has_logs or cluster.links:
        return ""
    return (
        f" If members changed, and this replica came in with a later list: {path / OWN_NAME} is missing; copy today's "
        "cluster.members.toml to that place (trustlog-replica member list --update writes it)"
    )


def _trusted_log(table: Table) -> TrustedLogSettings:
    inner = table.optional_table("trusted_log")
    if inner is None:
        return TrustedLogSettings()
    backend = read_log_kind(inner, "backend")
    socket = inner.text("socket", "") or None
    if socket is not None and not socket.startswith("/"):
        raise inner.error("socket", "must be the whole path of a socket, from / on")
    if socket is not None and backend is not BackendKind.PROCESS:
        raise inner.error("socket", 'belongs to backend = "process" only; leave it out')
    encrypt = inner.boolean("encrypt_store", default=False)
    if encrypt and backend not in STORE_KEY_BACKENDS:
        raise inner.error("encrypt_store", 'needs a log that keeps a key: backend = "process" or "tpm"')
    inner.finish()
    return TrustedLogSettings(backend, None if socket is None else Path(socket), encrypt)


def _check_keys(home: ReplicaHome) -> None:
    """Refuse a folder whose keys are not those that the other replicas expect."""
    own, listed = home.settings.trusted_log.backend, home.cluster.genesis.members[home.number].log_kind
    if own != listed:
        raise HomeError(
            f'{home.path / SETTINGS_NAME}: trusted_log.backend: "{log_kind_label(own)}", but {home.cluster_path} lists '
            f'"{log_kind_label(listed)}" for replica {home.number}; a log keeps its backend for ever: restore the file.'
            f"{_no_members_file(home.path, home.cluster)}"
        )
    _check_certificate(home)
    pins = read_bounded(home.log_path / LOG_PUBLIC_KEY_NAME, 1024).split(b"\n")[1:2]
    listed_pins = home.cluster.genesis.members[home.number].log_pins
    if own == BackendKind.TPM and pins != [listed_pins.hex().encode()]:
        raise _differ(home, home.log_path / LOG_PUBLIC_KEY_NAME, b"".join(pins), "pinned value", listed_pins)
    log_key = read_log_public_key(home.log_path)
    expected = home.cluster.genesis.members[home.number].log_public_key
    if log_key != expected:
        raise _differ(home, home.log_path / LOG_PUBLIC_KEY_NAME, log_key, "log key", expected)


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


def _check_certificate(home: ReplicaHome) -> None:
    der = read_certificate(home.certificate_path)
    if der != home.place.certificate_der:
        raise _differ(home, home.certificate_path, der, "certificate", home.place.certificate_der)
    with suppress(LockedKeyError):
        _check_tls_key(home)


def _check_tls_key(home: ReplicaHome) -> None:
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
    return HomeError(
        f"{path}: this {what} has SHA-256 {own_digest}, but {home.cluster_path} lists {listed_digest} "
        f"for replica {home.number}: this folder belongs to another cluster, or to other keys. "
        "Copy the cluster.toml that was assembled from this folder's public file to that place, or run the "
        f"folder that belongs to this cluster.toml.{_no_members_file(home.path, home.cluster)}"
    )
