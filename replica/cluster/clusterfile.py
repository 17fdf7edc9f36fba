"""cluster.toml: the one public file of a cluster. Every replica and every client has the same copy of it.

    format = 1
    [genesis]                what all must agree on; its digest is the cluster id (see replica.core.genesis)
    name, nonce (hex, 32 bytes), f, ordering ("two-phase" or "three-phase"), application ("module:Class")
    [genesis.limits]         every field of Limits
    [[genesis.members]]      number, log_kind ("software", "process" or "tpm"), log_public_key (hex, 65 bytes)
                             and for a TPM's log log_pins (hex, 75 bytes: what its enrolment pinned)
    operators                optional: public keys (hex, 65 bytes) of those who may change the members later
    [genesis.founding]       of a cluster founded with another one's state (replica.core.founding): cluster_id, digest,
                             application, table (hex, 32 bytes each), slot, time_ms
    With ordering = "pbft" (a baseline without trusted logs, see replica.cluster.pbft) there are 3f+1 members, each with
    number and signing_public_key (hex, 65 bytes); only `load_any_cluster_file` reads that.
    [appraisal]              optional: what replicas demand of each other's evidence, an appraisal policy (see
                             trustlog.appraisal.policy, without its `format`); not agreed on, so it can be changed
    [[replicas]]             number, address ("host:port", "[IPv6]:port"), certificate (PEM, self-signed); for a TPM's
                             log perhaps log_enrolled = true: who assembled this file was shown the verifier's word

Nothing agreed has a default: two programs of different versions must not fill a gap differently and then disagree.
"""

import hashlib
import ipaddress
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Final

import tomli_w

from replica.cluster.keys import certificate_der, certificate_pem, certificate_public_key
from replica.cluster.pbft import FAULTS_MAX as PBFT_FAULTS_MAX
from replica.cluster.pbft import NO_LOGS, PBFT, PbftGenesis, pbft_member
from replica.cluster.strict_toml import ConfigError, Table, parse_toml, printable, read_bounded
from replica.core.genesis import (
    NONCE_SIZE,
    OPERATORS_MAX,
    PUBLIC_KEY_SIZE,
    Founding,
    Genesis,
    Limits,
    Member,
    Ordering,
    new_genesis,
)
from replica.core.layout import DIGEST_SIZE
from replica.core.quorum import FAULTS_MAX
from trustlog import TPM_PINS_SIZE, BackendKind, VerificationError, VerifyingKey
from trustlog.appraisal import EvidenceLevel, Policy, PolicyError, policy_of_table
from trustlog.tpm.chain import TpmPins

FORMAT: Final = 1
CLUSTER_FILE_NAME: Final = "cluster.toml"
REPLICAS_MAX: Final = 2 * FAULTS_MAX + 1

ORDERINGS: Final = {ordering.label: ordering for ordering in (*Ordering, PBFT)}
_LOG_KINDS: Final = {kind.name.lower(): kind for kind in BackendKind}
_APPLICATION: Final = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)
_HOST_LABEL: Final = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)", re.ASCII)

_HEADER: Final = """\
# The public file of a trustlog cluster: every replica and every client needs the same copy.
# Nothing here is secret. The digest of [genesis] is the cluster's id: change it, and it is another cluster.

"""


class ClusterFileError(ConfigError):
    """A cluster file cannot be used; the text names the file, the key, what is wrong and what to do."""


@dataclass(frozen=True, slots=True)
class ReplicaPlace:
    """Where a replica is met, and the TLS certificate (DER) by which it is known.

    log_enrolled: whether it was shown to who assembled the cluster file that the log's key is in a TPM (see
    `trustlog.tpm.enrol`). Never read from a replica's own public file: that would be its own word.
    """

    number: int
    host: str
    port: int
    certificate_der: bytes
    log_enrolled: bool = False

    @property
    def address(self) -> str:
        """Return "host:port", an IPv6 host in brackets."""
        return format_address(self.host, self.port)

    @property
    def fingerprint(self) -> bytes:
        """Return the 32-byte SHA-256 of the certificate."""
        return hashlib.sha256(self.certificate_der).digest()


@dataclass(frozen=True, slots=True)
class ClusterFile:
    """The content of a cluster file. `replicas[i]` has number i; `digest` is the file's SHA-256, 32 bytes.

    `appraisal`: what a peer's evidence must be. By default none is demanded: without hardware behind it, evidence is
    its author's own word, and a cluster must not stop for lack of that.
    lists, links: every list of members so far, the genesis first, and what proves those that followed it; `genesis` and
    `replicas` are the present ones (see `replica.cluster.memberlists`).
    """

    genesis: Genesis
    replicas: tuple[ReplicaPlace, ...]
    digest: bytes
    appraisal: Policy = field(default_factory=lambda: Policy(minimum_evidence=EvidenceLevel.NONE))
    lists: tuple[Genesis, ...] = ()
    links: tuple[bytes, ...] = ()

    @property
    def before(self) -> Genesis | None:
        """What was agreed under the list of members before the present one; None if there was none."""
        return self.lists[-2] if len(self.lists) > 1 else None

    @property
    def spans(self) -> tuple[tuple[Genesis, int | None], ...]:
        """Every list of members so far, the genesis first, each with its last slot; None of the present one."""
        return tuple(zip(self.lists, [*(one.base for one in self.lists[1:]), None], strict=True))

    @property
    def has_logs(self) -> bool:
        """Say whether replicas keep trusted logs: all but the PBFT baseline's do."""
        return not isinstance(self.genesis, PbftGenesis)

    @property
    def needed(self) -> int:
        """How many replicas must be up for operations to be ordered: n - f, which is f+1, and 2f+1 with PBFT."""
        return self.genesis.n - self.genesis.f

    @property
    def enrolled_keys(self) -> frozenset[bytes]:
        """The log keys of which the assembler was shown that they are in a TPM."""
        return frozenset(self.genesis.members[one.number].log_public_key for one in self.replicas if one.log_enrolled)

    @property
    def not_enrolled(self) -> tuple[int, ...]:
        """The replicas that say "tpm" of their logs, and nobody was shown it."""
        kinds = [member.log_kind for member in self.genesis.members]
        return tuple(
            one.number for one in self.replicas if kinds[one.number] == BackendKind.TPM and not one.log_enrolled
        )

    @property
    def cluster_id(self) -> bytes:
        """Return the 32-byte cluster id."""
        return self.genesis.cluster_id()


def parse_address(text: str) -> tuple[str, int]:
    """Split "host:port" or "[IPv6]:port" into host and port (1 to 65535); ValueError says what is wrong."""
    host, separator, port_text = text.rpartition(":")
    if not separator or not (port_text.isascii() and port_text.isdigit() and len(port_text) <= 5):
        raise ValueError(f'"{printable(text)}" is not of the form host:port')
    port = int(port_text)
    if not 1 <= port <= 65535:
        raise ValueError(f'the port in "{printable(text)}" is not from 1 to 65535')
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            raise ValueError(f'"{printable(host)}" in brackets is not an IPv6 address') from None
        return host, port
    check_host(host)
    if ":" in host:
        raise ValueError(f'an IPv6 address is written in brackets: "[{printable(host)}]:{port}"')
    return host, port


def is_loopback(host: str) -> bool:
    """Say whether an address or name is this machine's own, reachable from nowhere else."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def check_host(host: str) -> None:
    """Check that `host` is an IP address (IPv6 without brackets) or a host name; ValueError if not."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        labels = host.removesuffix(".").split(".")
        # "1.2.3" is neither an address nor a name that anyone means.
        named = all(_HOST_LABEL.fullmatch(label) for label in labels) and not labels[-1].isdigit()
        if len(host) > 253 or not named:
            raise ValueError(f'"{printable(host)}" is neither a host name nor an IP address') from None


def format_address(host: str, port: int) -> str:
    """Return "host:port", an IPv6 host in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def load_cluster_file(path: Path) -> ClusterFile:
    """Read a cluster file, or the cluster.toml in a directory; ClusterFileError says what is wrong.

    One without trusted logs is refused: whoever can do with such a cluster calls `load_any_cluster_file`.
    """
    cluster = load_any_cluster_file(path)
    if not cluster.has_logs:
        raise ClusterFileError(f"{path}: {NO_LOGS}")
    return cluster


def load_any_cluster_file(path: Path) -> ClusterFile:
    """Read a cluster file as `load_cluster_file` does, also that of a PBFT cluster."""
    if path.is_dir():
        path = path / CLUSTER_FILE_NAME
    try:
        return parse_cluster_file(read_bounded(path), str(path))
    except ConfigError as error:
        raise ClusterFileError(str(error)) from error


def parse_cluster_file(raw: bytes, name: str = CLUSTER_FILE_NAME) -> ClusterFile:
    """Read a cluster file's bytes; error texts call it `name`. ClusterFileError says what is wrong."""
    try:
        file = parse_toml(raw, name)
        top = Table(name, file.data)
        top.integer("format", FORMAT, FORMAT)
        genesis = _genesis(top.table("genesis"))
        replicas = _replicas(top, genesis.members)
        appraisal = _appraisal(top, name, genesis)
        top.finish()
    except (ConfigError, PolicyError) as error:
        raise ClusterFileError(str(error)) from error
    return ClusterFile(genesis, replicas, file.digest, appraisal, (genesis,))


def dump_cluster_file(genesis: Genesis, replicas: Sequence[ReplicaPlace]) -> bytes:
    """Return the file's bytes, after reading them back: what could not be loaded is not written."""
    document = {
        "format": FORMAT,
        "genesis": {
            "name": genesis.name,
            "nonce": genesis.nonce.hex(),
            "f": genesis.f,
            "ordering": genesis.ordering.label,
            "application": genesis.application,
            "limits": asdict(genesis.limits),
            **({"operators": [key.hex() for key in genesis.operators]} if genesis.operators else {}),
            **({} if genesis.founding is None else {"founding": _dump_founding(genesis.founding)}),
            "members": [{"number": member.number, **_dump_key(genesis, member)} for member in genesis.members],
        },
        "replicas": [
            {
                "number": place.number,
                "address": place.address,
                "certificate": certificate_pem(place.certificate_der),
                **({"log_enrolled": True} if place.log_enrolled else {}),
            }
            for place in replicas
        ],
    }
    raw = (_HEADER + tomli_w.dumps(document, multiline_strings=True)).encode()
    parse_cluster_file(raw, "the cluster file to be written")
    return raw


def log_kind_label(kind: int) -> str:
    """Return a log backend's name as configuration has it: "software", "process" or "tpm"."""
    return BackendKind(kind).name.lower()


def read_log_kind(table: Table, key: str) -> BackendKind:
    """Read a backend's name; ConfigError if there is none such."""
    return _LOG_KINDS[table.choice(key, list(_LOG_KINDS))]


def dump_log_key(member: Member) -> dict[str, str]:
    """Return what `read_log_key` reads."""
    said = {"log_kind": log_kind_label(member.log_kind), "log_public_key": member.log_public_key.hex()}
    return said | ({"log_pins": member.log_pins.hex()} if member.log_pins else {})


def _dump_founding(founding: Founding) -> dict[str, str | int]:
    return {name: value.hex() if isinstance(value, bytes) else value for name, value in asdict(founding).items()}


def _read_founding(table: Table | None) -> Founding | None:
    if table is None:
        return None
    cluster_id, digest, application, state = (
        table.hexadecimal(name, DIGEST_SIZE) for name in ("cluster_id", "digest", "application", "table")
    )
    made = Founding(cluster_id, table.integer("slot", 1), digest, table.integer("time_ms", 0), application, state)
    table.finish()
    return made


def _dump_key(genesis: Genesis, member: Member) -> dict[str, str]:
    if isinstance(genesis, PbftGenesis):
        return {"signing_public_key": member.log_public_key.hex()}
    return dump_log_key(member)


def _read_signing_key(table: Table, number: int) -> Member:
    key = table.hexadecimal("signing_public_key", PUBLIC_KEY_SIZE)
    try:
        VerifyingKey.from_bytes(key)
    except VerificationError as error:
        raise table.error("signing_public_key", f"{error}; copy the file again from where it was made") from error
    return pbft_member(number, key)


def read_log_key(table: Table, number: int) -> Member:
    """Read `log_kind`, `log_public_key` and a TPM's `log_pins`; ConfigError unless the key is a point of the curve."""
    kind = read_log_kind(table, "log_kind")
    key = table.hexadecimal("log_public_key", PUBLIC_KEY_SIZE)
    try:
        VerifyingKey.from_bytes(key)
    except VerificationError as error:
        raise table.error("log_public_key", f"{error}; copy it again from the replica's public file") from error
    if kind is not BackendKind.TPM:
        return Member(number, kind, key)
    pins = table.hexadecimal("log_pins", TPM_PINS_SIZE)
    try:
        TpmPins.decode(pins)
    except VerificationError as error:
        raise table.error("log_pins", f"{error}; copy them again from the replica's public file") from error
    return Member(number, kind, key, pins)


def read_place(table: Table, number: int) -> ReplicaPlace:
    """Read `address` and `certificate`; ConfigError if they are none."""
    try:
        host, port = parse_address(table.text("address"))
    except ValueError as error:
        raise table.error("address", str(error)) from None
    try:
        der = certificate_der(table.text("certificate").encode())
    except ValueError as error:
        raise table.error("certificate", f"{error}; copy it again from the replica's tls.crt") from None
    return ReplicaPlace(number, host, port, der)


def check_unique(places: Sequence[ReplicaPlace], file_name: str) -> None:
    """Refuse replicas that share an address or a TLS key: one of them would be met in the other's name."""
    addresses: dict[str, int] = {}
    keys: dict[bytes, int] = {}
    for place in places:
        same_address = addresses.setdefault(place.address.lower(), place.number)
        same_key = keys.setdefault(_known_by(place.certificate_der), place.number)
        for what, first in (("address", same_address), ("TLS key", same_key)):
            if first != place.number:
                raise ConfigError(
                    f"{file_name}: replicas {first} and {place.number} have one {what}; give each its own"
                )


def _known_by(certificate: bytes) -> bytes:
    """Return the key in a certificate; itself if there is none, as a list of members may have it."""
    try:
        return certificate_public_key(certificate)
    except (ValueError, TypeError):
        return certificate


def _appraisal(top: Table, name: str, genesis: Genesis) -> Policy:
    policy = policy_of_table(top.raw_table("appraisal"), f"{name}: appraisal", EvidenceLevel.NONE)
    if isinstance(genesis, PbftGenesis) and policy.minimum_evidence is not EvidenceLevel.NONE:
        raise top.error("appraisal.minimum_evidence", NO_LOGS)
    if policy.tpm.require_measured_boot:
        raise top.error("appraisal.tpm.require_measured_boot", "replicas show each other no lists of a measured boot")
    return policy


def _genesis(table: Table) -> Genesis:
    name = table.text("name")
    if not name.isprintable():
        raise table.error("name", "must not hold control characters")
    nonce = table.hexadecimal("nonce", NONCE_SIZE)
    ordering = ORDERINGS[table.choice("ordering", list(ORDERINGS))]
    f = table.integer("f", 1, PBFT_FAULTS_MAX if ordering is PBFT else FAULTS_MAX)
    application = table.text("application")
    if not _APPLICATION.fullmatch(application):
        raise table.error("application", f'"{printable(application)}" is not of the form module:Class')
    limits = table.table("limits")
    values = {field.name: limits.integer(field.name, 1) for field in fields(Limits)}
    limits.finish()
    members = []
    for position, member in enumerate(table.tables("members", REPLICAS_MAX)):
        member.integer("number", position, position)
        members.append((_read_signing_key if ordering is PBFT else read_log_key)(member, position))
        member.finish()
    operators = table.hexadecimals("operators", OPERATORS_MAX, PUBLIC_KEY_SIZE)
    founding = _read_founding(table.optional_table("founding"))
    table.finish()
    for key, given in (("operators", operators), ("founding", founding)):
        if given and ordering is PBFT:
            raise table.error(key, "a PBFT cluster, a baseline, has none: its members and state only end; leave it out")
    agreed = (name, nonce, f, ordering, application, Limits(**values), tuple(members))
    try:
        return PbftGenesis(*agreed) if ordering is PBFT else new_genesis(*agreed, operators, founding)
    except ValueError as error:
        raise ConfigError(
            f"{table.file_name}: genesis: {error}; restore the file from a copy: every replica and client has the "
            "same, and one that is made anew is another cluster's"
        ) from error


def _replicas(top: Table, members: Sequence[Member]) -> tuple[ReplicaPlace, ...]:
    tables = top.tables("replicas", REPLICAS_MAX)
    if len(tables) != len(members):
        raise top.error("replicas", f"{len(tables)} replicas for {len(members)} members; each member needs one")
    places = []
    for position, (table, member) in enumerate(zip(tables, members, strict=True)):
        table.integer("number", position, position)
        enrolled = table.boolean("log_enrolled", default=False)
        if enrolled and member.log_kind != BackendKind.TPM:
            raise table.error("log_enrolled", "only a TPM's log can have been enrolled; leave it out")
        places.append(replace(read_place(table, position), log_enrolled=enrolled))
        table.finish()
    check_unique(places, top.file_name)
    return tuple(places)
