"""Today's members of a cluster whose members changed: cluster.toml and the chain of member lists that follows it.

cluster.toml, and with it the cluster's id, stays as it is for ever. What followed stands in a file of links, each of
which proves the next list of members to whoever knows the one before (`replica.core.chain`):

    format = 1
    links = ["…", …]     hexadecimal, list 1 first

A client finds it beside cluster.toml, as cluster.members.toml; a replica keeps its own, as members.toml in its folder,
because that says under which list it has worked. Nothing in such a file is believed: it is verified each time it is
read.

Links are kept for ever, and their sizes are not agreed: each replica proves a list with the attestations that it has.
So a file has a limit, for whoever reads it and whoever writes it, and a change is refused as long as it is only asked
for (`check_room`): at half of the limit, which leaves room for the largest link, and for larger proofs elsewhere.
With three members a link takes some 6 kB, and LISTS_MAX of them fit; with many it is the file that ends the changes.
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from replica.cluster.clusterfile import (
    CLUSTER_FILE_NAME,
    ClusterFile,
    ClusterFileError,
    ReplicaPlace,
    load_any_cluster_file,
    load_cluster_file,
)
from replica.cluster.identities import identity_of
from replica.cluster.strict_toml import ConfigError, Table, parse_toml, read_bounded
from replica.cluster.writing import sync_directory, write_over
from replica.core.chain import LINK_BYTES_MAX, check_link, decode_link
from replica.core.genesis import Genesis
from replica.core.layout import LayoutError
from replica.core.members import LISTS_MAX, Seat, decode_members
from replica.core.places import Place, decode_places
from replica.core.proof import EntryProof
from trustlog import VerificationError, verify_append

FORMAT: Final = 1
OWN_NAME: Final = "members.toml"
NOT_HOLDING: Final = ".does-not-hold"
FILE_BYTES_MAX: Final = 64 * 1024 * 1024
# Of a file of this size on, no change of the members is asked for any more.
FULL_BYTES: Final = FILE_BYTES_MAX // 2

# What a file holds beside links' digits, and what it takes for each, at the most.
FRAME_BYTES: Final = 512
LINE_BYTES: Final = 16

_HEADER: Final = """\
# Which members followed those of cluster.toml. Public, and believed by nobody: whoever reads it verifies it.

"""


class EntryVerifier:
    """Says whether a log of one list of members attested the entry that is shown.

    identities, contexts: every log's, and what every statement of it must carry.
    """

    def __init__(self, genesis: Genesis) -> None:
        self.identities = [identity_of(member) for member in genesis.members]
        self.contexts = genesis.contexts()

    def __call__(self, log: int, proof: EntryProof) -> bool:
        """See `replica.core.checkpoint.VerifyProof`."""
        try:
            context = self.contexts[log]
            verify_append(self.identities[log], proof.attestation, list(proof.digests), context=context)
        except (VerificationError, IndexError):
            return False
        return True


def encode_place(place: ReplicaPlace) -> bytes:
    """Return what a list says of where a member is (`replica.core.places`)."""
    return Place(place.host, place.port, place.certificate_der, place.log_enrolled).encode()


def places_of(seats: Sequence[Seat]) -> tuple[ReplicaPlace, ...]:
    """Return where the members of a list are; LayoutError for a list that was never agreed."""
    return tuple(
        ReplicaPlace(number, place.host, place.port, place.certificate, place.enrolled)
        for number, place in enumerate(decode_places([seat.place for seat in seats]))
    )


def seat_of(cluster: ClusterFile, number: int) -> Seat:
    """Return a present member as the next list names it."""
    return Seat(cluster.genesis.members[number], encode_place(cluster.replicas[number]))


def follow(cluster: ClusterFile, links: Sequence[bytes], name: str) -> ClusterFile:
    """Return the cluster as it is after these links, which follow its present list; error texts call them `name`.

    ClusterFileError if one of them does not prove what it says.
    """
    for raw in links:
        before = cluster.genesis
        try:
            proven = check_link(decode_link(raw), before, EntryVerifier(before))
            places = places_of(proven.members.seats)
        except (LayoutError, ConfigError) as error:
            text = f"{name}: the link to list {before.list_number + 1} of members does not hold: {error}"
            raise ClusterFileError(
                f"{text}; fetch it again (trustlog-replica member list --update), or remove it, if cluster.toml is of "
                "a newer cluster"
            ) from error
        lists = (*cluster.lists, proven.genesis)
        cluster = replace(cluster, genesis=proven.genesis, replicas=places, lists=lists, links=(*cluster.links, raw))
    return cluster


def certificates_of(first: ClusterFile, present: ClusterFile, number: int) -> set[bytes]:
    """Return every certificate (DER) that the member `number` had in cluster.toml (`first`) or a list since."""
    lists = (
        decode_places([seat.place for seat in decode_members(decode_link(raw).members).seats]) for raw in present.links
    )
    later = {places[number].certificate for places in lists if number < len(places)}
    return later | {place.certificate_der for place in first.replicas if place.number == number}


def members_path(cluster_path: Path) -> Path:
    """Return the file of links beside a cluster file."""
    return cluster_path.with_name(f"{cluster_path.stem}.members.toml")


def read_links(path: Path) -> tuple[bytes, ...]:
    """Read a file of links; () if there is none; ConfigError says what is wrong. Nothing is verified here."""
    if not path.exists():
        return ()
    raw = read_bounded(path, FILE_BYTES_MAX)
    table = Table(str(path), parse_toml(raw, str(path), FILE_BYTES_MAX).data)
    table.integer("format", FORMAT, FORMAT)
    links = table.hexadecimals("links", LISTS_MAX, LINK_BYTES_MAX)
    table.finish()
    return links


def write_links(path: Path, links: Sequence[bytes]) -> None:
    """Put a file of links in the place of the one there was, durably; OSError if that fails.

    ConfigError for one that `read_links` would refuse; then the file is as it was.
    """
    if (size := _file_bytes(links)) > FILE_BYTES_MAX:
        raise ConfigError(
            f"{path}: {len(links)} lists of members take {size} bytes, the limit is {FILE_BYTES_MAX}, and the file was "
            "left as it is: no later list can be kept. A program with a higher limit can go on with it; without one, "
            "found a new cluster (trustlog-replica refound)"
        )
    # Not by tomli_w, which looks at each digit: this is written while clients wait.
    lines = [f"format = {FORMAT}\nlinks = [\n", *(f'    "{raw.hex()}",\n' for raw in links), "]\n"]
    write_over(path, (_HEADER + "".join(lines)).encode(), 0o644, like=path.parent)


def check_room(cluster: ClusterFile) -> None:
    """Raise ConfigError if one more list of members may be more than a file of links can hold somewhere."""
    if (size := _file_bytes(cluster.links)) >= FULL_BYTES:
        raise ConfigError(
            f"the {len(cluster.links)} lists of members that followed take {size} bytes, and no change is asked for "
            f"from {FULL_BYTES} on: replicas keep all of them and read {FILE_BYTES_MAX} at most. Keep the members as "
            "they are; to change them all the same, found a new cluster with the state of this one (trustlog-replica "
            "refound)"
        )


def _file_bytes(links: Sequence[bytes]) -> int:
    """Return how large a file of these links is at the most."""
    return FRAME_BYTES + sum(2 * len(raw) + LINE_BYTES for raw in links)


def set_aside(path: Path) -> Path:
    """Give a file of links that do not hold another name, which says so, and return it; OSError if that fails."""
    suffixes = itertools.chain(("",), (f"-{number}" for number in itertools.count(2)))
    places = (path.with_name(path.name + NOT_HOLDING + suffix) for suffix in suffixes)
    target = next(place for place in places if not place.exists())
    path.rename(target)
    sync_directory(path.parent)
    return target


def load_present_cluster(path: Path) -> ClusterFile:
    """Read a cluster file, or the one in a directory, and what followed it; ClusterFileError says what is wrong.

    A cluster without trusted logs is refused, as by `load_cluster_file`.
    """
    return _followed_by(load_cluster_file(path), path)


def load_any_present_cluster(path: Path) -> ClusterFile:
    """Read what `load_present_cluster` does, or a PBFT cluster's file, which nothing follows."""
    cluster = load_any_cluster_file(path)
    return _followed_by(cluster, path) if cluster.has_logs else cluster


def _followed_by(cluster: ClusterFile, path: Path) -> ClusterFile:
    beside = members_path(path / CLUSTER_FILE_NAME if path.is_dir() else path)
    try:
        return follow(cluster, read_links(beside), str(beside))
    except ClusterFileError:
        raise
    except ConfigError as error:
        raise ClusterFileError(str(error)) from error
