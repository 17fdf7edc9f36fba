import dataclasses
import hashlib
import shutil
import stat
from pathlib import Path

import pytest

import trustlog
from replica.cluster.home import load_home
from replica.cluster.keys import certificate_pem, generate_private_key, make_certificate
from replica.cluster.replicatoml import HomeError, Settings, TrustedLogSettings, dump_settings, load_settings
from tests.replica.cluster.support import make_cluster, replace_once
from trustlog import BackendKind


@pytest.fixture
def cluster(tmp_path):
    return make_cluster(tmp_path / "c")


@pytest.fixture
def folder(cluster):
    return cluster / "replica-1"


def refused(folder, *words):
    with pytest.raises(HomeError) as caught:
        load_home(folder)
    for word in words:
        assert word in str(caught.value)


def test_home_of_a_new_cluster(folder):
    home = load_home(folder)
    assert home.number == 1
    assert home.listen_address == ("127.0.0.1", 7101)
    assert home.place is home.cluster.replicas[1]
    assert home.settings == Settings(1)
    assert not home.store_path.exists()
    with trustlog.open_log(home.log_path) as log:
        assert log.public_key == home.cluster.genesis.members[1].log_public_key
        assert log.kind == home.cluster.genesis.members[1].log_kind
    assert home.load_tls_key() is not None


def rewrite(path, **changes):
    path.write_bytes(dump_settings(dataclasses.replace(load_settings(path), **changes)))


def test_the_logs_backend_is_a_setting(tmp_path):
    cluster = make_cluster(tmp_path / "p", log_kind=BackendKind.PROCESS)
    home = load_home(cluster / "replica-1")
    assert home.settings.trusted_log == TrustedLogSettings(BackendKind.PROCESS)
    assert {member.log_kind for member in home.cluster.genesis.members} == {BackendKind.PROCESS}
    outside = TrustedLogSettings(BackendKind.PROCESS, Path("/run/trustlog-log/log.sock"), encrypt_store=True)
    rewrite(cluster / "replica-1" / "replica.toml", trusted_log=outside)
    assert load_home(cluster / "replica-1").settings.trusted_log == outside


def test_another_backend_than_the_cluster_files_is_refused(folder):
    rewrite(folder / "replica.toml", trusted_log=TrustedLogSettings(BackendKind.PROCESS))
    refused(folder, "replica.toml", "trusted_log.backend", '"process"', '"software"', "replica 1")


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ('backend = "proces"', ["trusted_log.backend", 'did you mean "process"?']),
        ('backend = "process"\nsocket = "run/log.sock"', ["trusted_log.socket", "whole path"]),
        ('backend = "software"\nsocket = "/run/s"', ["trusted_log.socket", "process"]),
        ('backend = "software"\nsockt = "/run/s"', ["trusted_log.sockt", "is not a key"]),
        ('backend = "software"\nencrypt_store = true', ["trusted_log.encrypt_store", "keeps a key"]),
        ('backend = "process"\nencrypt_store = 1', ["trusted_log.encrypt_store", "true or false"]),
        ("", ["trusted_log.backend", "is missing"]),
    ],
)
def test_mistakes_in_the_logs_settings(folder, table, words):
    with (folder / "replica.toml").open("a") as file:
        file.write(f"[trusted_log]\n{table}\n")
    refused(folder, "replica.toml", *words)


def test_private_folder_and_files(cluster, folder):
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((cluster / "client").stat().st_mode) == 0o700
    for private in [folder / "tls.key", folder / "replica.toml", folder / "log" / "seal.key"]:
        assert stat.S_IMODE(private.stat().st_mode) == 0o600
    # Whoever runs a client must be able to read this one.
    assert stat.S_IMODE((cluster / "cluster.toml").stat().st_mode) & 0o444 == 0o444
    assert stat.S_IMODE(cluster.stat().st_mode) == 0o755


def test_cluster_file_of_another_cluster_names_both_digests(tmp_path, cluster, folder):
    """The first failure everybody meets: two machines made their keys or files separately."""
    own = load_home(folder).place.fingerprint
    other = make_cluster(tmp_path / "other") / "cluster.toml"
    shutil.copy(other, cluster / "cluster.toml")
    expected = load_home(tmp_path / "other" / "replica-1").place.fingerprint
    refused(folder, "tls.crt", own.hex(), expected.hex(), "replica 1", "Copy the cluster.toml")


def test_log_of_another_generation_names_both_digests(folder):
    home = load_home(folder)
    shutil.rmtree(folder / "log")
    trustlog.create(folder / "log").close()
    new = bytes.fromhex((folder / "log" / "log.pub").read_text())
    listed = home.cluster.genesis.members[1].log_public_key
    digests = [hashlib.sha256(key).hexdigest() for key in (new, listed)]
    refused(folder, "log.pub", "log key", *digests)


def test_certificate_with_another_key(folder):
    shutil.copy(folder.with_name("replica-0") / "tls.key", folder / "tls.key")
    refused(folder, "tls.key", "not the key of", "tls.crt")


def test_number_of_another_replica(folder):
    replace_once(folder / "replica.toml", "number = 1", "number = 2")
    refused(folder, "replica.toml", "number: 2", "as replica 1's")
    replace_once(folder / "replica.toml", "number = 2", "number = 3")
    refused(folder, "replica.toml", "number: 3", "as replica 1's")


def test_readable_key_is_refused(folder):
    (folder / "tls.key").chmod(0o644)
    refused(folder, "tls.key", "chmod 600")


@pytest.mark.parametrize("name", ["tls.key", "tls.crt", "log/log.pub"])
def test_missing_file_is_named(folder, name):
    (folder / name).unlink()
    refused(folder, name, "No such file")


@pytest.mark.parametrize("name", ["tls.key", "tls.crt", "log/log.pub"])
def test_damaged_file_is_named(folder, name):
    (folder / name).write_text("damaged")
    refused(folder, name)


def test_second_certificate(folder):
    key = generate_private_key()
    (folder / "tls.crt").write_text(certificate_pem(make_certificate(1, key)))
    refused(folder, "tls.crt", "SHA-256")


def test_folder_that_is_none(tmp_path, cluster):
    refused(tmp_path / "nowhere", "replica.toml", "no replica's folder", "init")
    refused(cluster, "replica.toml", "no replica's folder")


def test_missing_cluster_file_says_where_it_belongs(cluster, folder):
    (cluster / "cluster.toml").unlink()
    refused(folder, "cluster.toml", "assemble", "`cluster`")


def test_damaged_cluster_file_is_a_home_error_too(cluster, folder):
    (cluster / "cluster.toml").write_text("format = 1\n")
    refused(folder, "cluster.toml: genesis: is missing")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('durabilty = "disk"', ["replica.toml: durabilty", 'did you mean "durability"?']),
        ('durability = "ram"', ["durability", '"disk", "memory"']),
        ('log_level = "inf"', ['did you mean "info"?']),
        ("log_level = 3", ["log_level: must be a text"]),
        ('log_format = "xml"', ["log_format"]),
        ('listen = "7100"', ["listen", "host:port"]),
        ("number = 2", ["replica.toml", "line"]),
    ],
)
def test_wrong_setting_is_named(folder, line, words):
    with (folder / "replica.toml").open("a") as file:
        file.write(line + "\n")
    refused(folder, *words)


def test_settings_round_trip_and_listen(folder):
    path = folder / "replica.toml"
    settings = Settings(1, "../cluster.toml", "memory", "debug", "json")
    path.write_bytes(dump_settings(settings) + b'listen = "0.0.0.0:9000"\n')
    assert load_settings(path) == dataclasses.replace(settings, listen=("0.0.0.0", 9000))
    assert load_home(folder).listen_address == ("0.0.0.0", 9000)


def test_cluster_directory_can_be_moved(tmp_path, cluster):
    moved = cluster.rename(tmp_path / "moved to")
    assert load_home(moved / "replica-0").number == 0


def test_http_address(folder):
    with (folder / "replica.toml").open("a") as file:
        file.write('http = "127.0.0.1:8123"\n')
    assert load_home(folder).settings.http == ("127.0.0.1", 8123)
    replace_once(folder / "replica.toml", "127.0.0.1:8123", "127.0.0.1")
    refused(folder, "replica.toml", "http", "host:port")
