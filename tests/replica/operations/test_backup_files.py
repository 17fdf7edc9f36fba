"""The small files of a backup are those of one moment, whatever the replica writes while the backup is made."""

import tarfile
from contextlib import closing
from dataclasses import replace

import pytest

from replica.cluster.home import load_home
from replica.cluster.memberlists import read_links, write_links
from replica.cluster.provision import init_cluster
from replica.operations import backup
from replica.operations.backup import BackupError, make_backup
from replica.operations.restoring import unpack


@pytest.fixture
def home(tmp_path):
    init_cluster(tmp_path / "c", base_port=0)
    write_links(tmp_path / "c" / "replica-0" / "members.toml", [b"a" * 3000])
    return load_home_of_any_list(tmp_path / "c" / "replica-0")


def load_home_of_any_list(folder):
    """Load a home as if its lists held: what they say is nothing to a backup."""
    members = folder / "members.toml"
    aside = members.rename(folder / "aside")
    home = load_home(folder)
    aside.rename(members)
    return home


def packed(path, name):
    with closing(tarfile.open(path)) as opened:
        return opened.extractfile(name).read()


def test_a_list_that_comes_between_measuring_and_packing_does_not_spoil_it(home, tmp_path, monkeypatch):
    measure = backup._measure

    def measured(path):
        said = measure(path)
        write_links(home.members_path, [b"a" * 3000, b"b" * 3000])
        (home.path / "tls.key").write_text("another one, of another length")
        return said

    key = (home.path / "tls.key").read_bytes()
    monkeypatch.setattr(backup, "_measure", measured)
    make_backup(home, tmp_path / "backup")
    folder = unpack(tmp_path / "backup", tmp_path / "unpacked")
    assert read_links(folder / "members.toml") == (b"a" * 3000,)
    assert (folder / "tls.key").read_bytes() == key


def test_key_and_certificate_that_are_replaced_while_they_are_read_are_of_one_moment(home, tmp_path, monkeypatch):
    pair = {"tls.key": b"new key", "tls.crt": b"new certificate"}
    read = backup._read

    def read_and_replaced(path):
        content = read(path)
        if path.name == "tls.key":
            for name, new in pair.items():
                (home.path / name).write_bytes(new)
        return content

    monkeypatch.setattr(backup, "_read", read_and_replaced)
    make_backup(home, tmp_path / "backup")
    assert {name: packed(tmp_path / "backup", name) for name in pair} == pair


def test_files_that_never_rest_are_named(home, tmp_path, monkeypatch):
    read = backup._read

    def read_and_written(path):
        content = read(path)
        path.write_bytes(content + b"\n")
        return content

    monkeypatch.setattr(backup, "_read", read_and_written)
    with pytest.raises(BackupError, match="change all the time"):
        make_backup(home, tmp_path / "backup")
    assert not (tmp_path / "backup").exists()


def test_a_file_that_is_missing_is_named(home, tmp_path):
    (home.path / "tls.crt").unlink()
    with pytest.raises(BackupError, match=r"tls\.crt: is missing"):
        make_backup(home, tmp_path / "backup")


def test_a_renewed_pair_that_gets_its_last_names_meanwhile_is_packed(home, tmp_path, monkeypatch):
    """The home was loaded before that."""
    renewed = replace(home, is_renewed=True)
    (home.path / "tls.next.key").write_bytes(b"new key")
    (home.path / "tls.next.crt").write_bytes(b"new certificate")
    read = backup._read

    def read_and_renamed(path):
        content = read(path)
        if path.name == "tls.next.key":
            path.rename(home.path / "tls.key")
            (home.path / "tls.next.crt").rename(home.path / "tls.crt")
        return content

    monkeypatch.setattr(backup, "_read", read_and_renamed)
    make_backup(renewed, tmp_path / "backup")
    assert packed(tmp_path / "backup", "tls.key") == b"new key"
    assert packed(tmp_path / "backup", "tls.crt") == b"new certificate"
