"""Making clusters: all at once on one machine, or replica by replica so that no private key ever travels.

    init_cluster            everything in one directory
    keygen, then assemble   on each machine a private folder and a public file; from all of these cluster.toml

Whatever is made is first built under a temporary name beside its place and then renamed, so a failure leaves
nothing half made; nothing that exists is ever overwritten.
"""

import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import tomli_w

import trustlog
from replica.cluster.clusterfile import (
    CLUSTER_FILE_NAME,
    ClusterFile,
    ReplicaPlace,
    check_host,
    check_unique,
    dump_cluster_file,
    dump_log_key,
    load_any_cluster_file,
    log_kind_label,
    parse_cluster_file,
    read_log_key,
    read_place,
)
from replica.cluster.home import (
    LOG_NAME,
    NEXT_CERTIFICATE_NAME,
    RENEWAL_FILE_NAME,
    SETTINGS_NAME,
    SIGNING_KEY_NAME,
    TLS_CERTIFICATE_NAME,
    TLS_KEY_NAME,
    ReplicaHome,
    read_certificate,
)
from replica.cluster.keys import (
    ClientKey,
    certificate_pem,
    create_client_key,
    generate_private_key,
    make_certificate,
    public_bytes,
    write_new,
    write_private_key,
)
from replica.cluster.pbft import LIMITS as PBFT_LIMITS
from replica.cluster.pbft import PBFT, PbftGenesis, pbft_member, pbft_replica_count
from replica.cluster.ports import NoPortError, free_ports
from replica.cluster.renewal import make_next_pair
from replica.cluster.replicatoml import Settings, TrustedLogSettings, dump_settings
from replica.cluster.strict_toml import ConfigError, Table, parse_toml, read_bounded
from replica.cluster.writing import sync_directory, write_over
from replica.core.genesis import NONCE_SIZE, Founding, Genesis, Limits, Member, Ordering, new_genesis
from replica.core.quorum import FAULTS_MAX, replica_count
from trustlog import BackendKind
from trustlog.service.client import RemoteLog
from trustlog.software import PUBLIC_KEY_FILE
from trustlog.tpm.chain import PCR_DEFAULT, read_public_file
from trustlog.tpm.enrol import create as create_tpm_log
from trustlog.tpm.enrol import retire
from trustlog.tpm.folder import DEFAULT_ADDRESS


@dataclass(frozen=True, slots=True)
class TpmPlace:
    """Where a TPM is, and which of its PCRs becomes a log's chain."""

    address: str = DEFAULT_ADDRESS
    pcr: int = PCR_DEFAULT


@dataclass(frozen=True, slots=True)
class Foundation:
    """With what a new cluster begins that another one's state founds.

    founding: what its genesis says of that state. operators: keys that may change the members beside the new one's.
    fill: called with the directory once it has all but the state, to put that into the replicas' folders.
    """

    founding: Founding
    operators: tuple[bytes, ...]
    fill: Callable[[Path], None]


PUBLIC_FORMAT: Final = 1
DEFAULT_APPLICATION: Final = "replica.apps.kv:KeyValue"
DEFAULT_BASE_PORT: Final = 7100
DEFAULT_HOST: Final = "127.0.0.1"
CLIENT_NAME: Final = "client"
OPERATOR_NAME: Final = "operator"

_PUBLIC_HEADER: Final = """\
# The public part of one trustlog replica: send it to whoever runs trustlog-replica assemble.
# Nothing in here is secret, but it must arrive unchanged: compare its SHA-256 over another way if in doubt.

"""


class ProvisionError(ConfigError):
    """A cluster or a folder cannot be made; the text says why and what to do. Nothing was left behind."""


@dataclass(frozen=True, slots=True)
class PublicPart:
    """What others need to know of a replica: where it is met, its certificate, its log's key."""

    place: ReplicaPlace
    member: Member


def replica_folder_name(number: int) -> str:
    """Return the name of a replica's folder in a cluster's directory."""
    return f"replica-{number}"


def public_file_name(number: int) -> str:
    """Return the name of a replica's public file."""
    return f"replica-{number}.public.toml"


def init_cluster(
    directory: Path,
    *,
    f: int = 1,
    hosts: Sequence[str] = (DEFAULT_HOST,),
    base_port: int = DEFAULT_BASE_PORT,
    name: str | None = None,
    ordering: Ordering = Ordering.THREE_PHASE,
    application: str = DEFAULT_APPLICATION,
    limits: Limits | None = None,
    log_kind: BackendKind = BackendKind.SOFTWARE,
    encrypt_store: bool = False,
    passphrase: bytes | None = None,
    foundation: Foundation | None = None,
) -> ClusterFile:
    """Make a whole cluster in `directory`: cluster.toml, replica-0 … replica-2f (PBFT: 3f), client, operator.

    hosts: one for all replicas, or one each. base_port: the first replica on a host has it, the next on the
    same host has the next; 0 has the operating system choose free ports. log_kind: what keeps every replica's log,
    SOFTWARE or PROCESS; PBFT has none. encrypt_store: seal payloads at rest; PROCESS only. passphrase: with which every
    private key is encrypted but the logs'. foundation: with what it begins, if not with nothing. ProvisionError if that
    fails.
    """
    places = plan_addresses(f, hosts, base_port, ordering)
    trusted_log = TrustedLogSettings(log_kind, encrypt_store=encrypt_store)
    # The directory itself is public, as cluster.toml is; what is private in it has its own mode.
    with _built_beside(directory, 0o755) as building:
        parts = [
            _make_pbft_replica(building / replica_folder_name(number), number, host, port, passphrase)
            if ordering is PBFT
            else _make_replica(building / replica_folder_name(number), number, host, port, trusted_log, passphrase)
            for number, (host, port) in enumerate(places)
        ]
        operators: tuple[bytes, ...] = ()
        if ordering is not PBFT:
            (building / OPERATOR_NAME).mkdir(mode=0o700)
            operators = (create_client_key(building / OPERATOR_NAME, passphrase).public_key,)
            operators += () if foundation is None else foundation.operators
        raw = _cluster_bytes(
            parts,
            f,
            name=name or directory.resolve().name,
            ordering=ordering,
            application=application,
            limits=limits,
            operators=operators,
            founding=None if foundation is None else foundation.founding,
        )
        write_new(building / CLUSTER_FILE_NAME, raw, 0o644)
        if foundation is not None:
            foundation.fill(building)
        (building / CLIENT_NAME).mkdir(mode=0o700)
        create_client_key(building / CLIENT_NAME, passphrase)
    return load_any_cluster_file(directory)


def keygen(
    directory: Path,
    number: int,
    host: str,
    port: int,
    trusted_log: TrustedLogSettings = TrustedLogSettings(),  # noqa: B008 - frozen
    tpm: TpmPlace | None = None,
    passphrase: bytes | None = None,
) -> Path:
    """Make a replica's private folder and return the path of its public file, which lies in it.

    trusted_log: with a socket, the service that listens there is asked for its log's key, and no log is made.
    tpm: where the log's key and chain are made, if its backend is a TPM. passphrase: to encrypt the TLS key with.
    """
    if not 0 <= number <= 2 * FAULTS_MAX:
        raise ProvisionError(f"a replica's number is from 0 to {2 * FAULTS_MAX}, not {number}")
    try:
        check_host(host)
    except ValueError as error:
        raise ProvisionError(str(error)) from None
    if not 1 <= port <= 65535:
        raise ProvisionError(f"a port is from 1 to 65535, not {port}")
    with _built_beside(directory) as building:
        part = _make_replica(building, number, host, port, trusted_log, passphrase, tpm)
        write_new(building / public_file_name(number), dump_public_part(part), 0o644)
    return directory / public_file_name(number)


def renew_certificate(home: ReplicaHome) -> tuple[Path, PublicPart, bool]:
    """Make a replica that keeps its log another key and certificate; return the public file, and what is in it.

    And whether they are new: those that wait already are shown again. home: unlocked. ConfigError if that fails.
    """
    is_new = make_next_pair(home)
    der = read_certificate(home.path / NEXT_CERTIFICATE_NAME)
    part = PublicPart(replace(home.place, certificate_der=der), home.cluster.genesis.members[home.number])
    path = home.path / RENEWAL_FILE_NAME
    try:
        write_over(path, dump_public_part(part), 0o644, like=home.key_path)
    except OSError as error:
        raise ProvisionError(f"{path}: cannot be written: {error.strerror}; run the same command again") from error
    return path, part, is_new


def make_client(directory: Path, passphrase: bytes | None = None) -> ClientKey:
    """Make a directory with a new client key; ProvisionError if there is something already."""
    with _built_beside(directory) as building:
        return create_client_key(building, passphrase)


def assemble(
    public_files: Sequence[Path],
    out: Path,
    *,
    name: str = "trustlog",
    ordering: Ordering = Ordering.THREE_PHASE,
    application: str = DEFAULT_APPLICATION,
    limits: Limits | None = None,
    enrolled: Mapping[int, Path] | None = None,
    operators: tuple[bytes, ...] = (),
) -> ClusterFile:
    """Write a cluster file from the public files of replicas 0 to 2f; their number gives f.

    enrolled: by a replica's number the file that `trustlog tpm accept` wrote for whoever enrolled its log. Its key and
    pins must be those of the public file, and the cluster file then says that the enrolment was shown. operators:
    public keys of those who may change the members later; without any, nobody ever can.
    """
    if ordering is PBFT:
        raise ProvisionError("a PBFT cluster is made on one machine: trustlog-replica init --ordering pbft")
    parts = sorted((load_public_part(path) for path in public_files), key=lambda part: part.place.number)
    f, odd = divmod(len(parts) - 1, 2)
    numbers = [part.place.number for part in parts]
    if f < 1 or odd:
        raise ProvisionError(f"{len(parts)} public files; a cluster has 2f + 1 replicas: 3, 5, 7 …")
    if numbers != list(range(len(parts))):
        raise ProvisionError(
            f"the public files have numbers {', '.join(map(str, numbers))}; a cluster of {len(parts)} needs "
            f"each of 0 to {len(parts) - 1} once: make the others with trustlog-replica keygen"
        )
    check_unique([part.place for part in parts], str(out))
    parts = _with_enrolment(parts, enrolled or {})
    agreed = {"name": name, "ordering": ordering, "application": application, "limits": limits}
    raw = _cluster_bytes(parts, f, **agreed, operators=operators)  # type: ignore[arg-type]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_new(out, raw, 0o644)
    except OSError as error:
        if isinstance(error, FileExistsError) and out.parent.is_dir():
            raise ProvisionError(
                f"{out}: exists already and is not overwritten; remove it or choose another name"
            ) from None
        raise ProvisionError(f"{out}: cannot be written: {error.strerror}") from error
    return parse_cluster_file(raw, str(out))


def _with_enrolment(parts: Sequence[PublicPart], enrolled: Mapping[int, Path]) -> list[PublicPart]:
    """Note whose enrolment is shown; ProvisionError if it is another log's, or of a log in no TPM."""
    shown = {number: _check_enrolment(parts, number, path) for number, path in sorted(enrolled.items())}
    return [shown.get(part.place.number, part) for part in parts]


def _check_enrolment(parts: Sequence[PublicPart], number: int, path: Path) -> PublicPart:
    part = next((one for one in parts if one.place.number == number), None)
    if part is None or part.member.log_kind != BackendKind.TPM:
        raise ProvisionError(f"{path}: replica {number} keeps no log in a TPM here; leave its enrolment out")
    try:
        key, pins = read_public_file(path)
    except (trustlog.TrustLogError, OSError) as error:
        raise ProvisionError(f"{path}: {error}; give the file that trustlog tpm accept wrote") from error
    accepted = (key.raw, pins.encode() if pins is not None else b"")
    if accepted != (part.member.log_public_key, part.member.log_pins):
        what = "key" if key.raw != part.member.log_public_key else "pinned value"
        raise ProvisionError(
            f"{path}: the {what} that was enrolled is another than in replica {number}'s public file; do not admit "
            "this log: find out which of the two is the replica's, and enrol it again"
        )
    return replace(part, place=replace(part.place, log_enrolled=True))


def dump_public_part(part: PublicPart) -> bytes:
    """Return the bytes of a replica's public file."""
    document = {
        "format": PUBLIC_FORMAT,
        "number": part.place.number,
        "address": part.place.address,
        **dump_log_key(part.member),
        "certificate": certificate_pem(part.place.certificate_der),
    }
    return (_PUBLIC_HEADER + tomli_w.dumps(document, multiline_strings=True)).encode()


def load_public_part(path: Path) -> PublicPart:
    """Read a replica's public file; ConfigError says what is wrong."""
    table = Table(str(path), parse_toml(read_bounded(path), str(path)).data)
    table.integer("format", PUBLIC_FORMAT, PUBLIC_FORMAT)
    number = table.integer("number", 0, 2 * FAULTS_MAX)
    place = read_place(table, number)
    member = read_log_key(table, number)
    table.finish()
    return PublicPart(place, member)


def plan_addresses(
    f: int, hosts: Sequence[str], base_port: int, ordering: Ordering = Ordering.THREE_PHASE
) -> list[tuple[str, int]]:
    """Return host and port of each of the 2f + 1 replicas (PBFT: 3f + 1); ProvisionError if that is impossible."""
    try:
        count = pbft_replica_count(f) if ordering is PBFT else replica_count(f)
        for host in hosts:
            check_host(host)
    except ValueError as error:
        raise ProvisionError(str(error)) from None
    if len(hosts) not in {1, count}:
        raise ProvisionError(f"{len(hosts)} hosts for {count} replicas (f = {f}); give one, or one for each")
    each = list(hosts) * (count if len(hosts) == 1 else 1)
    if base_port == 0:
        try:
            return list(zip(each, free_ports(each), strict=True))
        except NoPortError as error:
            raise ProvisionError(f"{error}; choose a base port") from error
    if not 1 <= base_port <= 65536 - count:
        raise ProvisionError(f"the base port is from 1 to {65536 - count}, or 0 for free ones, not {base_port}")
    # Different machines each begin at the base port; replicas on one machine follow each other.
    return [(host, base_port + each[:i].count(host)) for i, host in enumerate(each)]


def _make_replica(
    folder: Path,
    number: int,
    host: str,
    port: int,
    trusted_log: TrustedLogSettings,
    passphrase: bytes | None,
    tpm: TpmPlace | None = None,
) -> PublicPart:
    """Fill `folder`, which is made if it is missing, with a replica's settings, keys and empty log."""
    folder.mkdir(mode=0o700, exist_ok=True)
    key = generate_private_key()
    der = make_certificate(number, key)
    write_new(folder / SETTINGS_NAME, dump_settings(Settings(number, trusted_log=trusted_log)), 0o600)
    write_private_key(folder / TLS_KEY_NAME, key, passphrase)
    write_new(folder / TLS_CERTIFICATE_NAME, certificate_pem(der).encode(), 0o600)
    if trusted_log.backend is BackendKind.TPM:
        member = _make_tpm_log(folder / LOG_NAME, number, tpm or TpmPlace(), encrypt_store=trusted_log.encrypt_store)
    else:
        member = _make_log(folder / LOG_NAME, number, trusted_log)
    return PublicPart(ReplicaPlace(number, host, port, der), member)


def _make_pbft_replica(folder: Path, number: int, host: str, port: int, passphrase: bytes | None) -> PublicPart:
    """Make `folder` with the settings and keys of a replica that keeps nothing else."""
    folder.mkdir(mode=0o700)
    key, signing = generate_private_key(), generate_private_key()
    der = make_certificate(number, key)
    write_new(folder / SETTINGS_NAME, dump_settings(Settings(number, durability="memory")), 0o600)
    write_private_key(folder / TLS_KEY_NAME, key, passphrase)
    write_new(folder / TLS_CERTIFICATE_NAME, certificate_pem(der).encode(), 0o600)
    write_private_key(folder / SIGNING_KEY_NAME, signing, passphrase)
    return PublicPart(ReplicaPlace(number, host, port, der), pbft_member(number, public_bytes(signing.public_key())))


def _make_tpm_log(folder: Path, number: int, tpm: TpmPlace, *, encrypt_store: bool) -> Member:
    try:
        with create_tpm_log(folder, address=tpm.address, pcr=tpm.pcr) as log:
            if encrypt_store:
                try:
                    log.create_store_key()
                except BaseException:
                    retire(log.client, log.config)
                    raise
            return Member(number, log.kind, log.public_key, log.config.pins.encode())
    except trustlog.TrustLogError as error:
        raise ProvisionError(f"no log can be made in a TPM: {error}") from error


def _make_log(folder: Path, number: int, trusted_log: TrustedLogSettings) -> Member:
    """Make an empty log, or a folder with the public key of the one that a service keeps."""
    if trusted_log.socket is None:
        with trustlog.create(folder, kind=trusted_log.backend) as log:
            return Member(number, log.kind, log.public_key)
    try:
        with RemoteLog.connect(trusted_log.socket) as served:
            if served.kind is not trusted_log.backend or served.last != 0:
                raise ProvisionError(
                    f"the service at {trusted_log.socket} keeps a log of kind {log_kind_label(served.kind)} with "
                    f"{served.last} entries; a replica needs an empty one: trustlog init --backend process DIR"
                )
            folder.mkdir(mode=0o700)
            write_new(folder / PUBLIC_KEY_FILE, served.public_key.hex().encode() + b"\n", 0o644)
            return Member(number, served.kind, served.public_key)
    except trustlog.TrustLogError as error:
        raise ProvisionError(f"{trusted_log.socket}: {error}; start it first: trustlog serve --help") from error


def _cluster_bytes(
    parts: Sequence[PublicPart],
    f: int,
    *,
    name: str,
    ordering: Ordering,
    application: str,
    limits: Limits | None,
    operators: tuple[bytes, ...],
    founding: Founding | None = None,
) -> bytes:
    members = tuple(part.member for part in parts)
    nonce = secrets.token_bytes(NONCE_SIZE)
    try:
        genesis: Genesis
        if ordering is PBFT:
            genesis = PbftGenesis(name, nonce, f, ordering, application, limits or PBFT_LIMITS, members)
        else:
            genesis = new_genesis(
                name, nonce, f, ordering, application, limits or Limits(), members, operators, founding
            )
    except ValueError as error:
        raise ProvisionError(str(error)) from error
    return dump_cluster_file(genesis, [part.place for part in parts])


def check_new(directory: Path) -> None:
    """Refuse a directory that holds something already."""
    if directory.resolve() == Path.cwd():
        raise ProvisionError(f"{directory}: is the current directory; name a new one in it")
    if directory.is_symlink() or (directory.exists() and not _is_empty_directory(directory)):
        raise ProvisionError(f"{directory}: exists already and is not overwritten; choose another name or remove it")


@contextmanager
def _built_beside(directory: Path, mode: int = 0o700) -> Iterator[Path]:
    """Yield a temporary directory that becomes `directory` with `mode`, or vanishes if the body raises."""
    check_new(directory)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    except OSError as error:
        raise ProvisionError(f"{directory}: cannot be made: {error.strerror}") from error
    try:
        yield building
        building.chmod(mode)
        sync_directory(building)
        # Renaming onto a directory succeeds only if that one is still empty.
        building.rename(directory)
        sync_directory(directory.parent)
    except OSError as error:
        raise ProvisionError(f"{directory}: cannot be made: {error.strerror or error}") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _is_empty_directory(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())
