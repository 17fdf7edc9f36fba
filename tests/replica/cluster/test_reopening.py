"""What a running replica needs of its key files when it goes over to another list of members."""

import dataclasses

import pytest

from replica.cluster import reopening
from replica.cluster.clusterfile import load_cluster_file
from replica.cluster.home import load_home, unlocked
from replica.cluster.keys import KeptKey, LockedKeyError, certificate_pem, is_encrypted, make_certificate
from replica.cluster.passphrase import PassphraseSource, change_passphrases
from replica.cluster.provision import renew_certificate
from replica.cluster.reopening import under_next_list, with_key_kept
from replica.cluster.strict_toml import ConfigError
from replica.wire.tls import client_context, server_context
from tests.replica.cluster.support import make_cluster
from tests.replica.cluster.test_renewal import put_in_force

OLD, NEW = b"correct horse", b"battery staple"
NOBODY = PassphraseSource(environ={})


@pytest.fixture
def folder(tmp_path):
    return make_cluster(tmp_path / "c") / "replica-1"


@pytest.fixture
def words(tmp_path):
    path = tmp_path / "words"
    path.touch(0o600)
    path.write_bytes(OLD)
    return path


def started(folder, source=NOBODY):
    return with_key_kept(dataclasses.replace(unlocked(load_home(folder), source), passphrases=source))


def works(home):
    """Check that the daemon could make its TLS contexts; return how many pairs it may show."""
    members = [place.certificate_der for place in home.cluster.replicas]
    certificate, key, passphrase = home.tls_identities[0]
    server_context(certificate, key, members, passphrase)
    for identity in home.tls_identities:
        client_context(members[0], *identity)
    return len(home.tls_identities)


@pytest.fixture
def lists(monkeypatch, folder):
    """Have the next list be what cluster.toml says by then."""
    monkeypatch.setattr(reopening, "follow", lambda *_: load_cluster_file(folder.parent))


def test_another_passphrase_for_the_listed_key_is_no_matter(folder):
    """Set while it runs, then taken away, then the file is gone: the certificate is the same, so nothing is opened."""
    home = started(folder)
    key = folder / "tls.key"
    change_passphrases([key], NOBODY, NEW)
    assert works(under_next_list(home)) == 1
    change_passphrases([key], PassphraseSource(ask=lambda _: NEW.decode(), environ={}), OLD)
    assert works(under_next_list(under_next_list(home))) == 1
    key.unlink()
    assert works(under_next_list(home)) == 1


def test_a_typed_passphrase_that_was_changed(folder):
    typed = PassphraseSource(ask=lambda _: OLD.decode(), environ={})
    change_passphrases([folder / "tls.key"], NOBODY, OLD)
    home = started(folder, typed)
    change_passphrases([folder / "tls.key"], typed, NEW)
    assert works(under_next_list(home)) == 1


@pytest.mark.parametrize("by_variable", [False, True])
def test_a_new_certificate_is_opened_with_what_the_file_holds_by_then(folder, words, lists, monkeypatch, by_variable):
    source = PassphraseSource(None if by_variable else words)
    if by_variable:
        monkeypatch.setenv("TRUSTLOG_PASSPHRASE_FILE", str(words))
    home = started(folder, source)
    home = dataclasses.replace(home, passphrases=None) if by_variable else home
    der = renew_certificate(home)[1].place.certificate_der
    waiting = [folder / "tls.key", folder / "tls.next.key"]
    change_passphrases(waiting, NOBODY, NEW)
    words.write_bytes(NEW)
    put_in_force(folder, der)
    later = under_next_list(home)
    assert (later.is_renewed, later.passphrase, works(later)) == (True, NEW, 1)
    change_passphrases(waiting, PassphraseSource(words), OLD)
    assert works(under_next_list(later)) == 1


def test_a_new_certificate_whose_passphrase_nobody_names_is_said(folder, lists):
    home = started(folder)
    der = renew_certificate(home)[1].place.certificate_der
    change_passphrases([folder / "tls.next.key"], NOBODY, NEW)
    waiting = under_next_list(home)
    assert works(waiting) == 1
    assert "tls.next.key: its passphrase is another one" in waiting.waiting_trouble
    put_in_force(folder, der)
    with pytest.raises(
        LockedKeyError, match=r"tls\.next\.key: its passphrase is another one .* start the replica again"
    ):
        under_next_list(waiting)


def test_a_pair_that_waits_is_shown_with_the_passphrase_that_it_has(folder, words):
    change_passphrases([folder / "tls.key"], NOBODY, OLD)
    home = started(folder, PassphraseSource(words))
    renew_certificate(home)
    assert works(under_next_list(home)) == 2
    change_passphrases([folder / "tls.next.key"], PassphraseSource(words), NEW)
    late = under_next_list(home)
    assert works(late) == 1
    assert "does not open this private key" in late.waiting_trouble
    words.write_bytes(NEW)
    later = under_next_list(late)
    assert (works(later), later.waiting_trouble) == (2, "")


def test_a_key_that_is_kept_is_in_no_file_and_ends_with_it(folder):
    kept = KeptKey(folder / "tls.key", None)
    assert kept.path.read_bytes() == (folder / "tls.key").read_bytes()
    assert str(kept.path.readlink()).startswith("/memfd:")
    path = kept.path
    del kept
    assert not path.exists()


def test_without_such_memory_the_file_is_opened_each_time(folder, monkeypatch):
    def none(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("os.memfd_create", none)
    home = started(folder)
    assert works(under_next_list(home)) == 1
    change_passphrases([folder / "tls.key"], NOBODY, NEW)
    with pytest.raises(LockedKeyError, match="its passphrase is another one"):
        under_next_list(home)


def spoil(folder, how):
    certificate, key = folder / "tls.next.crt", folder / "tls.next.key"
    if how == "no certificate":
        certificate.write_text("half a cert")
    elif how == "another's key":
        key.write_bytes((folder.with_name("replica-2") / "tls.key").read_bytes())
    elif how == "no key":
        key.unlink()
    elif how == "a key that is open to others":
        key.chmod(0o644)
    else:
        key.write_text("half a key")


SPOILT = ["no certificate", "another's key", "no key", "a key that is open to others", "half a key"]


@pytest.mark.parametrize("how", SPOILT)
def test_a_bad_pair_that_only_waits_stops_nobody_and_is_said(folder, how):
    """At the start and at a change of members; with its certificate in the list, it does."""
    home = started(folder)
    der = renew_certificate(home)[1].place.certificate_der
    spoil(folder, how)
    for found in (started(folder), under_next_list(home)):
        assert works(found) == 1
        assert str(folder / "tls.next.") in found.waiting_trouble
        assert "put the right files back" in found.waiting_trouble
    with pytest.raises(ConfigError, match="put the right files back"):
        renew_certificate(load_home(folder))
    put_in_force(folder, der)
    if how != "no key":  # its key has its last name already, for all that one can see
        with pytest.raises(ConfigError, match=r"tls\.next\."):
            started(folder)


def test_an_encrypted_key_that_waits_and_that_nothing_opens_stops_nobody(folder):
    renew_certificate(load_home(folder))
    change_passphrases([folder / "tls.next.key"], NOBODY, NEW)
    home = unlocked(load_home(folder), NOBODY)
    assert works(home) == 1
    assert "no passphrase was given" in home.waiting_trouble
    change_passphrases([folder / "tls.key"], NOBODY, OLD)
    home = unlocked(load_home(folder), PassphraseSource(ask=lambda _: OLD.decode(), environ={}))
    assert (works(home), "does not open" in home.waiting_trouble) == (1, True)
    with pytest.raises(LockedKeyError):
        unlocked(load_home(folder), NOBODY)
    assert is_encrypted(folder / "tls.key")


def test_a_certificate_that_is_none_of_both_is_refused(folder, lists):
    home = started(folder)
    renew_certificate(home)
    put_in_force(folder, make_certificate(1, home.load_tls_key()))
    (folder / "tls.next.crt").write_text(certificate_pem(make_certificate(1, home.load_tls_key())))
    with pytest.raises(ConfigError):
        under_next_list(home)
