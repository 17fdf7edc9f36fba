"""Another TLS key and certificate beside a log that stays: which pair is worked with, after any crash."""

import dataclasses
import os
import shutil

import pytest

from replica.cluster import passphrase as passphrases
from replica.cluster.clusterfile import dump_cluster_file, load_cluster_file
from replica.cluster.home import load_home, unlocked
from replica.cluster.keys import (
    certificate_pem,
    certificate_public_key,
    is_encrypted,
    load_private_key,
    make_certificate,
    public_bytes,
)
from replica.cluster.passphrase import PassphraseSource, change_passphrases, only_one
from replica.cluster.provision import load_public_part, renew_certificate
from replica.cluster.renewal import make_next_pair, settle
from replica.cluster.replicatoml import HomeError
from replica.cluster.strict_toml import ConfigError
from replica.wire.tls import server_context
from tests.replica.cluster.support import make_cluster

WORDS = b"correct horse"


@pytest.fixture
def cluster(tmp_path):
    return make_cluster(tmp_path / "c")


@pytest.fixture
def folder(cluster):
    return cluster / "replica-1"


def put_in_force(folder, der):
    """Have the replica's list of members name this certificate."""
    path = folder.parent / "cluster.toml"
    cluster = load_cluster_file(path)
    places = [dataclasses.replace(one, certificate_der=der) if one.number == 1 else one for one in cluster.replicas]
    path.write_bytes(dump_cluster_file(cluster.genesis, places))


def works_with(folder, der, passphrase=None):
    """Check that the replica shows this certificate, with its key."""
    home = load_home(folder)
    certificate, key, _ = home.tls_identities[0]
    server_context(certificate, key, [der], passphrase)
    assert public_bytes(load_private_key(key, passphrase).public_key()) == certificate_public_key(der)
    assert certificate.read_text() == certificate_pem(der)
    return home


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.startswith(("tls", "renewal")))


def test_a_new_pair_waits_beside_the_old_one_until_its_list_is_in_force(folder):
    home = load_home(folder)
    old = home.place.certificate_der
    public_file, part, is_new = renew_certificate(home)
    new = part.place.certificate_der
    assert (is_new, new != old, public_file) == (True, True, folder / "renewal.public.toml")
    assert load_public_part(public_file) == part
    assert dataclasses.replace(part.place, certificate_der=old) == home.place
    assert part.member == home.cluster.genesis.members[1]
    assert {(folder / name).stat().st_mode & 0o777 for name in ("tls.next.key", "tls.next.crt")} == {0o600}
    present = works_with(folder, old)
    assert [identity[0].name for identity in present.tls_identities] == ["tls.crt", "tls.next.crt"]
    assert settle(present) is present
    public_file.unlink()
    assert renew_certificate(present) == (public_file, part, False)

    put_in_force(folder, new)
    renewed = works_with(folder, new)
    assert renewed.is_renewed
    assert [identity[0].name for identity in renewed.tls_identities] == ["tls.next.crt"]
    settled = settle(renewed)
    assert not settled.is_renewed
    assert settled == works_with(folder, new)
    assert names(folder) == ["tls.crt", "tls.key"]
    assert make_next_pair(settled)


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("passphrase", [None, WORDS])
def test_a_crash_at_any_moment_leaves_the_right_pair(folder, stage, passphrase, tmp_path):
    """Stages of taking over: nothing renamed, the key, the certificate, all."""
    path = tmp_path / "words"
    path.write_bytes(WORDS)
    path.chmod(0o600)
    source = PassphraseSource(path)
    home = load_home(folder)
    if passphrase is not None:
        change_passphrases([home.key_path], source, passphrase)
    home = unlocked(load_home(folder), source)
    old, new = home.place.certificate_der, renew_certificate(home)[1].place.certificate_der
    assert is_encrypted(folder / "tls.next.key") is (passphrase is not None)
    works_with(folder, old, passphrase)
    put_in_force(folder, new)
    if stage >= 1:
        (folder / "tls.next.key").replace(folder / "tls.key")
    if stage >= 2:
        (folder / "tls.next.crt").replace(folder / "tls.crt")
    if stage >= 3:
        (folder / "renewal.public.toml").unlink()
    works_with(folder, new, passphrase)
    settled = settle(unlocked(load_home(folder), source))
    assert settled.passphrase == passphrase
    works_with(folder, new, passphrase)
    assert {"tls.next.key", "tls.next.crt"}.isdisjoint(names(folder))


def test_a_crash_while_the_pair_is_made(folder):
    home = load_home(folder)
    (folder / "tls.next.key").write_text("half a k")  # without a certificate nobody was shown it
    works_with(folder, home.place.certificate_der)
    assert make_next_pair(home)
    load_private_key(folder / "tls.next.key")


def test_a_key_that_is_lost_is_said(folder):
    home = load_home(folder)
    make_next_pair(home)
    (folder / "tls.next.key").unlink()
    works_with(folder, home.place.certificate_der)
    with pytest.raises(HomeError, match=r"tls\.next\.crt: its key tls\.next\.key is not here"):
        make_next_pair(home)
    shutil.copy(folder.with_name("replica-2") / "tls.key", folder / "tls.next.key")
    put_in_force(folder, renew_certificate(home)[1].place.certificate_der)
    with pytest.raises(HomeError, match=r"tls\.next\.key: not the key of .*tls\.next\.crt"):
        load_home(folder)


def test_what_is_in_force_must_be_taken_over_before_the_next(folder):
    put_in_force(folder, renew_certificate(load_home(folder))[1].place.certificate_der)
    with pytest.raises(HomeError, match="start it"):
        make_next_pair(load_home(folder))


def test_one_at_a_time(folder):
    home = load_home(folder)
    with only_one(folder), pytest.raises(ConfigError, match="another program is changing these keys"):
        make_next_pair(home)
    assert names(folder) == ["tls.crt", "tls.key"]


def test_a_list_with_a_third_certificate_is_refused(folder):
    home = load_home(folder)
    make_next_pair(home)
    put_in_force(folder, make_certificate(1, home.load_tls_key()))
    with pytest.raises(HomeError, match="SHA-256"):
        load_home(folder)


def test_a_failed_write_is_said(folder):
    home = load_home(folder)
    (folder / "tls.next.key").mkdir()
    with pytest.raises(ConfigError, match="no new key can be made here"):
        make_next_pair(home)
    (folder / "tls.next.key").rmdir()
    (folder / "renewal.public.toml").mkdir()
    with pytest.raises(ConfigError, match="cannot be written"):
        renew_certificate(home)
    (folder / "renewal.public.toml").rmdir()
    assert not renew_certificate(home)[2]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act for another user")
def test_what_root_makes_is_the_replicas_own(folder):
    """Whoever runs the replica must be able to read it, at once and after every later change."""
    owner = (65534, 65533)
    for path in (folder, *folder.rglob("*")):
        os.chown(path, *owner)
    renew_certificate(load_home(folder))
    der = renew_certificate(load_home(folder))[1].place.certificate_der
    assert names(folder) == ["renewal.public.toml", "tls.crt", "tls.key", "tls.next.crt", "tls.next.key"]
    change_passphrases([folder / "tls.next.key"], PassphraseSource(), WORDS)
    put_in_force(folder, der)
    settle(load_home(folder))
    assert {(one.lstat().st_uid, one.lstat().st_gid) for one in folder.rglob("*")} == {owner}


def test_a_pair_is_not_settled_while_its_passphrase_is_changed(folder, monkeypatch):
    """Or the old key's file, which was opened before, would take the new key's place."""
    der = renew_certificate(load_home(folder))[1].place.certificate_der
    present = load_home(folder)
    put_in_force(folder, der)
    settled, exchange = [], passphrases._exchange

    def over_just_now(*arguments):
        settled.append(settle(load_home(folder)) if not settled else None)
        exchange(*arguments)

    monkeypatch.setattr(passphrases, "_exchange", over_just_now)
    change_passphrases([present.key_path, present.next_key_path], PassphraseSource(), WORDS)
    assert settled[0].is_renewed
    works_with(folder, der, WORDS)
    assert not settle(load_home(folder)).is_renewed
    assert names(folder) == ["tls.crt", "tls.key"]
    works_with(folder, der, WORDS)
