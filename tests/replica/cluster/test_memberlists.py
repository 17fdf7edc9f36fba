"""Files of links: whatever may be written can be read again, and no change is asked for that could not be written."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from replica.cli.member import _change
from replica.cluster import memberlists
from replica.cluster.clusterfile import load_cluster_file
from replica.cluster.memberlists import check_room, read_links, seat_of, write_links
from replica.cluster.strict_toml import FILE_BYTES_MAX, ConfigError
from replica.core.chain import LINK_BYTES_MAX, Link
from replica.core.checkpoint import Header
from replica.core.members import LISTS_MAX, MemberList
from tests.replica.cluster.support import make_cluster
from trustlog import ATTESTATION_SIZE_MAX
from trustlog.cli.contract import Output

PROOF_OF_ONE = ATTESTATION_SIZE_MAX + 8 + 32 + 100


@pytest.fixture
def cluster(tmp_path):
    return load_cluster_file(make_cluster(tmp_path / "c"))


def link_of_three(cluster):
    """Return what has the size of a link between lists of three members, proven by small groups of TPM logs."""
    listed = MemberList(1, 5000, tuple(seat_of(cluster, number) for number in range(3)), "once a year").encode()
    digests = (b"h" * 32,) * 3
    header = Header(1, 1, b"a" * 32, b"t" * 32, (1,) * 3, digests, digests, 1, b"m" * 32).encode()
    return Link(header, bytes(2 + 2 * (6 + PROOF_OF_ONE)), listed).encode()


def test_as_many_lists_as_there_may_be_are_written_and_read(cluster, tmp_path):
    path = tmp_path / "members.toml"
    links = [number.to_bytes(4) + link_of_three(cluster) for number in range(LISTS_MAX)]
    check_room(replace(cluster, links=tuple(links[:-1])))
    for count in (0, 1, 300, LISTS_MAX):
        write_links(path, links[:count])
        assert read_links(path) == tuple(links[:count])
        assert path.stat().st_size <= memberlists._file_bytes(links[:count])
        assert (path.stat().st_size > FILE_BYTES_MAX) == (count >= 300), "more than another file may have"


def test_one_more_link_fits_after_every_change_that_is_asked_for():
    assert memberlists.FULL_BYTES + 2 * LINK_BYTES_MAX + memberlists.LINE_BYTES <= memberlists.FILE_BYTES_MAX


def test_what_could_not_be_read_is_not_written(tmp_path, monkeypatch):
    path = tmp_path / "members.toml"
    write_links(path, [b"a" * 100])
    before = path.read_bytes()
    monkeypatch.setattr(memberlists, "FILE_BYTES_MAX", 1000)
    with pytest.raises(ConfigError, match=r"members\.toml: 2 lists of members take \d+ bytes, the limit is 1000"):
        write_links(path, [b"a" * 100, b"b" * 200])
    assert path.read_bytes() == before
    monkeypatch.setattr(memberlists, "FILE_BYTES_MAX", len(before) - 1)
    with pytest.raises(ConfigError, match=f"larger than {len(before) - 1} bytes"):
        read_links(path)


def test_a_full_file_ends_the_changes_before_they_are_asked_for(cluster, monkeypatch):
    monkeypatch.setattr(memberlists, "FULL_BYTES", 600)
    check_room(cluster)
    with pytest.raises(ConfigError, match="the 1 lists of members that followed take"):
        check_room(replace(cluster, links=(b"a" * 50,)))
    monkeypatch.setattr(memberlists, "FULL_BYTES", 1)
    seats = [seat_of(cluster, number) for number in range(3)]
    with pytest.raises(ConfigError, match="no change is asked for"):
        _change(Output("json"), SimpleNamespace(present=cluster, key=None), seats, "", [])
