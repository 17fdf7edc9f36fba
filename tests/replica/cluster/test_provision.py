import os
import stat

import pytest

import trustlog
from replica.cluster import provision
from replica.cluster.clusterfile import load_cluster_file
from replica.cluster.home import load_home
from replica.cluster.keys import load_client_key
from replica.cluster.provision import ProvisionError, assemble, init_cluster, keygen, plan_addresses
from replica.cluster.strict_toml import ConfigError
from replica.core.genesis import Limits, Ordering
from tests.replica.cluster.support import replace_once


def names(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("f", [1, 2])
def test_init_makes_everything(tmp_path, f):
    limits = Limits(checkpoint_interval=8, window=16)
    target = tmp_path / "a b"
    cluster = init_cluster(target, f=f, base_port=0, ordering=Ordering.TWO_PHASE, application="m:C", limits=limits)
    folders = [f"replica-{i}" for i in range(2 * f + 1)]
    assert names(target) == sorted(["client", "cluster.toml", "operator", *folders])
    assert names(tmp_path) == ["a b"]
    assert cluster == load_cluster_file(target)
    assert (cluster.genesis.name, cluster.genesis.f, cluster.genesis.limits) == ("a b", f, limits)
    assert cluster.genesis.application == "m:C"
    assert [load_home(target / folder).number for folder in folders] == list(range(2 * f + 1))
    assert len(load_client_key(target / "client").public_key) == 65
    assert cluster.genesis.operators == (load_client_key(target / "operator").public_key,)


def test_two_clusters_are_never_the_same(tmp_path):
    ids = {init_cluster(tmp_path / str(i), name="same").cluster_id for i in range(2)}
    assert len(ids) == 2


def test_existing_directory_is_not_touched(tmp_path):
    target = tmp_path / "c"
    target.mkdir()
    (target / "precious").write_text("x")
    for make in (lambda: init_cluster(target), lambda: keygen(target, 0, "h", 1)):
        with pytest.raises(ProvisionError, match="not overwritten"):
            make()
    assert names(tmp_path) == ["c"]
    assert names(target) == ["precious"]
    (target / "precious").unlink()
    init_cluster(target)  # an empty one is as good as none


def test_current_directory_is_not_pulled_away(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ProvisionError, match="current directory"):
        init_cluster(provision.Path())


def test_dangling_link_is_not_followed(tmp_path):
    (tmp_path / "c").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ProvisionError, match="not overwritten"):
        init_cluster(tmp_path / "c")
    assert names(tmp_path) == ["c"]


@pytest.mark.parametrize("call", range(6))
def test_a_failure_leaves_nothing_half_made(tmp_path, monkeypatch, call):
    calls = []
    real = provision.write_new

    def failing(path, content, mode):
        calls.append(path)
        if len(calls) > call:
            raise OSError(28, "No space left on device", str(path))
        real(path, content, mode)

    monkeypatch.setattr(provision, "write_new", failing)
    with pytest.raises(ProvisionError, match="No space left"):
        init_cluster(tmp_path / "c")
    assert names(tmp_path) == []


def test_a_directory_made_meanwhile_wins(tmp_path, monkeypatch):
    real = provision.create_client_key

    def create(directory, passphrase):
        (tmp_path / "c").mkdir(exist_ok=True)
        (tmp_path / "c" / "theirs").write_text("x")
        return real(directory, passphrase)

    monkeypatch.setattr(provision, "create_client_key", create)
    with pytest.raises(ProvisionError, match="Directory not empty"):
        init_cluster(tmp_path / "c")
    assert names(tmp_path / "c") == ["theirs"]
    assert names(tmp_path) == ["c"]


def test_parent_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ProvisionError, match="cannot be made"):
        init_cluster(tmp_path / "file" / "c")


def test_ports_by_host():
    assert plan_addresses(1, ["h"], 7100) == [("h", 7100), ("h", 7101), ("h", 7102)]
    assert plan_addresses(1, ["a", "b", "c"], 7100) == [("a", 7100), ("b", 7100), ("c", 7100)]
    assert plan_addresses(1, ["a", "b", "a"], 7100) == [("a", 7100), ("b", 7100), ("a", 7101)]
    assert plan_addresses(1, ["::1"], 7100)[1] == ("::1", 7101)


@pytest.mark.parametrize(
    ("f", "hosts", "port", "words"),
    [
        (0, ["h"], 1, "f must be"),
        (11, ["h"], 1, "f must be"),
        (1, ["a", "b"], 1, "2 hosts for 3 replicas"),
        (1, [], 1, "0 hosts"),
        (1, ["a b"], 1, "neither a host name"),
        (1, ["h"], 65535, "base port"),
        (1, ["h"], -1, "base port"),
        (1, ["192.0.2.1"], 0, "no free port of 192.0.2.1"),
    ],
)
def test_impossible_plans(f, hosts, port, words):
    with pytest.raises(ProvisionError, match=words):
        plan_addresses(f, hosts, port)


@pytest.fixture
def public_files(tmp_path):
    return [keygen(tmp_path / f"m{i}" / f"replica-{i}", i, f"host-{i}", 7100) for i in range(3)]


def test_keygen_and_assemble(tmp_path, public_files):
    assert [path.name for path in public_files] == [f"replica-{i}.public.toml" for i in range(3)]
    assert stat.S_IMODE(public_files[0].parent.stat().st_mode) == 0o700
    out = tmp_path / "cluster.toml"
    cluster = assemble(list(reversed(public_files)), out, name="n")
    assert cluster == load_cluster_file(out)
    assert [place.address for place in cluster.replicas] == [f"host-{i}:7100" for i in range(3)]
    for i, public in enumerate(public_files):
        (public.parent.parent / "cluster.toml").write_bytes(out.read_bytes())
        assert load_home(public.parent).number == i
    with pytest.raises(ProvisionError, match="not overwritten"):
        assemble(public_files, out)


def test_public_file_holds_nothing_private(public_files):
    text = public_files[0].read_text()
    assert "PRIVATE" not in text
    with trustlog.open_log(public_files[0].parent / "log") as log:
        assert log.public_key.hex() in text


def test_assemble_makes_missing_parents(tmp_path, public_files):
    out = tmp_path / "my-cluster" / "deep" / "cluster.toml"
    assemble(public_files, out)
    assert load_cluster_file(out.parent).genesis.f == 1
    (tmp_path / "file").write_text("")
    with pytest.raises(ProvisionError, match="cannot be written"):
        assemble(public_files, tmp_path / "file" / "cluster.toml")


def test_assemble_wants_each_number_once(tmp_path, public_files):
    out = tmp_path / "cluster.toml"
    for files, words in [
        (public_files[:2], "2 public files"),
        (public_files[:1], "1 public files"),
        ([*public_files[:2], public_files[1]], "numbers 0, 1, 1"),
        ([*public_files, keygen(tmp_path / "x", 3, "h", 1)], "4 public files"),
        ([*public_files[:2], tmp_path / "x" / "replica-3.public.toml"], "numbers 0, 1, 3"),
    ]:
        with pytest.raises(ProvisionError, match=words):
            assemble(files, out)
    assert not out.exists()


def test_assemble_refuses_shared_keys_and_addresses(tmp_path, public_files):
    out = tmp_path / "cluster.toml"
    first, second = public_files[:2]
    text = second.read_text()
    second.write_text(first.read_text().replace("number = 0", "number = 1"))
    with pytest.raises(ConfigError, match="replicas 0 and 1 have one address"):
        assemble(public_files, out)
    replace_once(second, "host-0:7100", "host-1:7100")
    with pytest.raises(ConfigError, match="replicas 0 and 1 have one TLS key"):
        assemble(public_files, out)
    lines = {line.split(" = ")[0]: line for line in first.read_text().splitlines()}
    own = {line.split(" = ")[0]: line for line in text.splitlines()}
    second.write_text(text.replace(own["log_public_key"], lines["log_public_key"]))
    with pytest.raises(ProvisionError, match="same log key"):
        assemble(public_files, out)
    assert not out.exists()


def test_public_file_with_mistakes_is_named(tmp_path, public_files):
    replace_once(public_files[2], "log_kind", "log_kin")
    with pytest.raises(ConfigError, match=r"replica-2.public.toml: log_kind: is missing"):
        assemble(public_files, tmp_path / "cluster.toml")


@pytest.mark.parametrize(("number", "host", "port"), [(-1, "h", 1), (21, "h", 1), (0, "h h", 1), (0, "h", 0)])
def test_keygen_refuses_nonsense(tmp_path, number, host, port):
    with pytest.raises(ProvisionError):
        keygen(tmp_path / "r", number, host, port)
    assert names(tmp_path) == []


def test_umask_does_not_open_anything(tmp_path):
    before = os.umask(0)
    try:
        init_cluster(tmp_path / "c")
    finally:
        os.umask(before)
    public = {"cluster.toml", "client.pub", "log.pub"}
    for path in (tmp_path / "c").rglob("*"):
        if path.name not in public:
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
