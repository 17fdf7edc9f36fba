"""replica.toml: one replica's own settings. What else is in its folder, see `replica.cluster.home`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast, get_args

import tomli_w

from replica.cluster.clusterfile import log_kind_label, read_log_kind
from replica.cluster.environment import RETAIN_MIB_MAX, Durability, LogFormat, LogLevel, read_address
from replica.cluster.strict_toml import ConfigError, Table, parse_toml, read_bounded
from replica.core.quorum import FAULTS_MAX
from trustlog import BackendKind

FORMAT: Final = 1
DEFAULT_CLUSTER: Final = "../cluster.toml"

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
