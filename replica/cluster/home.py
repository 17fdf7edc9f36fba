"""A replica's private folder: its settings, keys, trusted log and store.

    replica.toml    this replica's own settings; nothing in it has to be the same elsewhere
    tls.key         mode 0600
    tls.crt         the certificate that stands in cluster.toml
    log/            the trusted log (made by trustlog.create); log/log.pub is the key in cluster.toml
    store.sqlite    made by the daemon

The folder has mode 0700. Most first failures of a cluster are two machines with different keys or files, so
`load_home` compares both with cluster.toml and names both digests when they differ.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, cast

import tomli_w
from cryptography.hazmat.primitives.asymmetric import ec

from replica.cluster.clusterfile import ClusterFile, ReplicaPlace, load_cluster_file, parse_address
from replica.cluster.keys import certificate_der, certificate_public_key, load_private_key, public_bytes
from replica.cluster.strict_toml import ConfigError, Table, parse_toml, read_bounded
from replica.core.genesis import PUBLIC_KEY_SIZE
from replica.core.quorum import FAULTS_MAX

FORMAT: Final = 1
SETTINGS_NAME: Final = "replica.toml"
TLS_KEY_NAME: Final = "tls.key"
TLS_CERTIFICATE_NAME: Final = "tls.crt"
LOG_NAME: Final = "log"
LOG_PUBLIC_KEY_NAME: Final = "log.pub"
STORE_NAME: Final = "store.sqlite"
DEFAULT_CLUSTER: Final = "../cluster.toml"
CERTIFICATE_BYTES_MAX: Final = 64 * 1024

Durability = Literal["disk", "memory"]
LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["auto", "console", "json"]

_HEADER: Final = """\
# The settings of one trustlog replica. Optional keys and their defaults:
#   durability = "disk"      "memory" forgets everything with the process: for experiments only
#   log_level = "info"       "debug", "info", "warning" or "error"
#   log_format = "auto"      "console", "json"; "auto" is console on a terminal, else json
#   listen = "host:port"     where to listen, if not at the address in cluster.toml

"""


class HomeError(ConfigError):
    """A replica's folder cannot be used; the text names the file, what is wrong and what to do."""


@dataclass(frozen=True, slots=True)
class Settings:
    """The content of replica.toml. `listen` is None where the address in the cluster file is listened on."""

    number: int
    cluster: str = DEFAULT_CLUSTER
    durability: Durability = "disk"
    log_level: LogLevel = "info"
    log_format: LogFormat = "auto"
    listen: tuple[str, int] | None = None


@dataclass(frozen=True, slots=True)
class ReplicaHome:
    """A replica's folder, checked against its cluster file, which was read from `cluster_path`."""

    path: Path
    settings: Settings
    cluster: ClusterFile
    cluster_path: Path

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
        return self.path / TLS_KEY_NAME

    @property
    def certificate_path(self) -> Path:
        """Return the file of the TLS certificate."""
        return self.path / TLS_CERTIFICATE_NAME

    @property
    def log_path(self) -> Path:
        """Return the directory of the trusted log, for trustlog.open_log."""
        return self.path / LOG_NAME

    @property
    def store_path(self) -> Path:
        """Return the file of the store; it need not exist yet."""
        return self.path / STORE_NAME

    def load_tls_key(self) -> ec.EllipticCurvePrivateKey:
        """Read the TLS key; ConfigError says what is wrong with its file."""
        return load_private_key(self.key_path)


def load_home(path: Path) -> ReplicaHome:
    """Read a replica's folder and compare it with its cluster file.

    HomeError says what is wrong, also when it is the cluster file. The trusted log itself is not opened.
    """
    try:
        return _load_home(path)
    except HomeError:
        raise
    except ConfigError as error:
        raise HomeError(str(error)) from error


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
        durability=cast("Durability", table.choice("durability", ["disk", "memory"], "disk")),
        log_level=cast("LogLevel", table.choice("log_level", ["debug", "info", "warning", "error"], "info")),
        log_format=cast("LogFormat", table.choice("log_format", ["auto", "console", "json"], "auto")),
        listen=_listen(table),
    )
    table.finish()
    return settings


def dump_settings(settings: Settings) -> bytes:
    """Return the bytes of a replica.toml without `listen`; keys that have their default are left out."""
    document: dict[str, Any] = {"format": FORMAT, "number": settings.number, "cluster": settings.cluster}
    default = Settings(settings.number)
    for key in ("durability", "log_level", "log_format"):
        if getattr(settings, key) != getattr(default, key):
            document[key] = getattr(settings, key)
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
    text = read_bounded(path, 1024).strip()
    try:
        key = bytes.fromhex(text.decode("ascii"))
    except ValueError:
        key = b""
    if len(key) != PUBLIC_KEY_SIZE:
        raise ConfigError(f"{path}: not a log's public key ({2 * PUBLIC_KEY_SIZE} hexadecimal digits)")
    return key


def _load_home(path: Path) -> ReplicaHome:
    settings = load_settings(path / SETTINGS_NAME)
    cluster_path = (path / settings.cluster).resolve()
    if not cluster_path.exists():
        raise HomeError(
            f"{path / SETTINGS_NAME}: cluster: there is no file {cluster_path}; copy the cluster.toml that "
            "`trustlog-replica assemble` wrote to that place, or set the key `cluster`"
        )
    cluster = load_cluster_file(cluster_path)
    if settings.number >= cluster.genesis.n:
        raise HomeError(
            f"{path / SETTINGS_NAME}: number: {settings.number}, but {cluster_path} has replicas 0 to "
            f"{cluster.genesis.n - 1}; is it another cluster's file?"
        )
    home = ReplicaHome(path, settings, cluster, cluster_path)
    _check_keys(home)
    return home


def _listen(table: Table) -> tuple[str, int] | None:
    text = table.text("listen", "")
    if not text:
        return None
    try:
        return parse_address(text)
    except ValueError as error:
        raise table.error("listen", str(error)) from None


def _check_keys(home: ReplicaHome) -> None:
    """Refuse a folder whose keys are not those that the other replicas expect."""
    der = read_certificate(home.certificate_path)
    if der != home.place.certificate_der:
        raise _differ(home, home.certificate_path, der, "certificate", home.place.certificate_der)
    if public_bytes(home.load_tls_key().public_key()) != certificate_public_key(der):
        raise HomeError(
            f"{home.key_path}: not the key of {home.certificate_path}; restore both files from the same copy"
        )
    log_key = read_log_public_key(home.log_path)
    expected = home.cluster.genesis.members[home.number].log_public_key
    if log_key != expected:
        raise _differ(home, home.log_path / LOG_PUBLIC_KEY_NAME, log_key, "log key", expected)


def _differ(home: ReplicaHome, path: Path, own: bytes, what: str, listed: bytes) -> HomeError:
    own_digest, listed_digest = (hashlib.sha256(value).hexdigest() for value in (own, listed))
    return HomeError(
        f"{path}: this {what} has SHA-256 {own_digest}, but {home.cluster_path} lists {listed_digest} "
        f"for replica {home.number}: this folder belongs to another cluster, or to other keys. "
        "Copy the cluster.toml that was assembled from this folder's public file to that place, or run the "
        "folder that belongs to this cluster.toml"
    )
