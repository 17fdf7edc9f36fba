"""The file and the folders of a PBFT cluster: what is agreed, and that nothing else takes it for a cluster with logs."""

from dataclasses import replace

import pytest

from replica.cluster.clusterfile import ClusterFileError, load_any_cluster_file, load_cluster_file
from replica.cluster.home import load_any_home, load_home
from replica.cluster.identities import members_of
from replica.cluster.pbft import LIMITS, NO_LOGS, PBFT, PbftGenesis, pbft_member
from replica.cluster.provision import ProvisionError, assemble, init_cluster
from replica.cluster.replicatoml import HomeError
from replica.core.genesis import Limits, Member, Ordering

FOUNDING = "\n".join(
    [
        "slot = 1",
        "time_ms = 1",
        *(f'{name} = "{"00" * 32}"' for name in ("cluster_id", "digest", "application", "table")),
    ]
)


@pytest.fixture
def made(tmp_path):
    init_cluster(tmp_path / "c", base_port=0, ordering=PBFT)
    return tmp_path / "c"


def changed(made, old: str, new: str):
    path = made / "cluster.toml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    return path


def test_it_has_3f_plus_1_replicas_with_keys_and_no_logs(made):
    cluster = load_any_cluster_file(made)
    genesis = cluster.genesis
    assert (genesis.n, genesis.f, genesis.quorum, cluster.needed, cluster.has_logs) == (4, 1, 2, 3, False)
    assert sorted(path.name for path in (made / "replica-3").iterdir()) == [
        "replica.toml",
        "signing.key",
        "tls.crt",
        "tls.key",
    ]
    assert {path.stat().st_mode & 0o777 for path in (made / "replica-3").iterdir()} == {0o600}
    home = load_any_home(made / "replica-3", environ={})
    assert home.cluster.cluster_id == genesis.cluster_id()


@pytest.mark.parametrize("f", [2, 3])
def test_more_faults(tmp_path, f):
    assert init_cluster(tmp_path / "c", f=f, base_port=0, ordering=PBFT).genesis.n == 3 * f + 1


def test_whoever_needs_logs_does_not_get_it(made):
    with pytest.raises(ClusterFileError, match="no trusted logs"):
        load_cluster_file(made)
    with pytest.raises(HomeError, match="no trusted logs"):
        load_home(made / "replica-0", environ={})
    genesis = load_any_cluster_file(made).genesis
    with pytest.raises(ValueError, match="no trusted logs"):
        genesis.context()
    with pytest.raises(ValueError, match="0 is not a valid BackendKind"):
        members_of(genesis)
    assert PBFT not in list(Ordering)


def test_every_agreed_value_is_in_its_id(made):
    genesis = load_any_cluster_file(made).genesis
    other = tuple(pbft_member(number, bytes([4, number]) + bytes(63)) for number in range(4))
    ids = {
        genesis.cluster_id(),
        replace(genesis, name="other").cluster_id(),
        replace(genesis, nonce=bytes(32)).cluster_id(),
        replace(genesis, application="a:B").cluster_id(),
        replace(genesis, limits=replace(LIMITS, session_window=5000)).cluster_id(),
        replace(genesis, members=other).cluster_id(),
    }
    assert len(ids) == 6


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"f": 2}, "members 0 to 6"),
        ({"f": 4}, "from 1 to 3"),
        ({"limits": Limits()}, "window times batch_bytes_max"),
        ({"nonce": b"1"}, "nonce"),
        ({"name": ""}, "name"),
        ({"members": lambda members: members[:3]}, "members 0 to 3"),
        ({"members": lambda members: (*members[:3], pbft_member(3, members[0].log_public_key))}, "same signing key"),
        ({"members": lambda members: (*members[:3], Member(3, 1, members[3].log_public_key))}, "no logs"),
        ({"members": lambda members: (*members[:3], pbft_member(3, b"short"))}, "65 bytes"),
    ],
)
def test_values_that_no_such_cluster_can_run_with(made, changes, says):
    genesis = load_any_cluster_file(made).genesis
    given = {name: value(genesis.members) if callable(value) else value for name, value in changes.items()}
    with pytest.raises(ValueError, match=says):
        replace(genesis, **given)


def test_the_same_genesis_is_no_other_ordering(made):
    genesis = load_any_cluster_file(made).genesis
    path = changed(made, 'ordering = "pbft"', 'ordering = "three-phase"')
    with pytest.raises(ClusterFileError, match="log_kind"):
        load_any_cluster_file(path)
    assert isinstance(genesis, PbftGenesis)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('signing_public_key = "04', 'signing_public_key = "05', "signing_public_key"),
        ("[[replicas]]", '[appraisal]\nminimum_evidence = "self-asserted"\n\n[[replicas]]', "no trusted logs"),
        ("[[replicas]]", f"[genesis.founding]\n{FOUNDING}\n[[replicas]]", "genesis.founding: a PBFT cluster"),
    ],
)
def test_files_that_are_wrong(made, old, new, says):
    with pytest.raises(ClusterFileError, match=says):
        load_any_cluster_file(changed(made, old, new))


def test_a_folder_with_another_key_is_refused(made):
    (made / "replica-0" / "signing.key").write_bytes((made / "replica-1" / "signing.key").read_bytes())
    with pytest.raises(HomeError, match="signing key has SHA-256"):
        load_any_home(made / "replica-0", environ={})


def test_it_is_not_assembled_from_public_files_of_logs(tmp_path):
    with pytest.raises(ProvisionError, match="made on one machine"):
        assemble([], tmp_path / "cluster.toml", ordering=PBFT)


def test_no_context_is_said_in_words_that_help():
    assert "three-phase" in NO_LOGS
