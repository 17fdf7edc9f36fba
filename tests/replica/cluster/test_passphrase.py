"""Passphrases of keys at rest: where they are looked for, what is refused, and changes that lose nothing when cut short."""

import fcntl
import os
import ssl
import stat

import pytest

from replica.cluster import keys, passphrase
from replica.cluster.home import load_any_home, load_home, unlocked
from replica.cluster.keys import LockedKeyError, is_encrypted, load_private_key, public_bytes
from replica.cluster.passphrase import PassphraseSource, change_passphrases, read_passphrase_file
from replica.cluster.pbft import PBFT
from replica.cluster.provision import ProvisionError, init_cluster, keygen, make_client
from replica.cluster.replicatoml import HomeError
from replica.cluster.strict_toml import ConfigError
from replica.wire.tls import client_context, server_context

WORDS = b"correct horse battery staple"
OTHER = b"something else"


def secret_file(path, content=WORDS + b"\n", mode=0o600):
    path.write_bytes(content)
    path.chmod(mode)
    return path


def of(secret):
    """A source that a person answers with this passphrase."""
    return PassphraseSource(ask=lambda _prompt: secret.decode(), environ={})


NOBODY = PassphraseSource(environ={})


@pytest.fixture
def key(tmp_path):
    """A key without a passphrase."""
    path = tmp_path / "tls.key"
    keys.write_private_key(path, keys.generate_private_key())
    return path


def identity(path, secret=None):
    return public_bytes(load_private_key(path, secret).public_key())


def test_an_encrypted_key_is_what_openssl_calls_one_and_opens_with_its_passphrase_only(tmp_path):
    path, made = tmp_path / "k", keys.generate_private_key()
    keys.write_private_key(path, made, WORDS)
    assert path.read_bytes().startswith(b"-----BEGIN ENCRYPTED PRIVATE KEY-----\n")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    scalar = made.private_numbers().private_value.to_bytes(32, "big")
    assert scalar not in path.read_bytes()
    assert identity(path, WORDS) == public_bytes(made.public_key())
    with pytest.raises(LockedKeyError, match="is encrypted, and no passphrase was given"):
        load_private_key(path)
    with pytest.raises(LockedKeyError, match=r"the passphrase in words\.txt does not open") as caught:
        load_private_key(path, OTHER, "in words.txt")
    assert OTHER.decode() not in str(caught.value)


def test_a_damaged_encrypted_key_is_refused_and_never_another_key(tmp_path):
    path = tmp_path / "k"
    keys.write_private_key(path, keys.generate_private_key(), WORDS)
    raw, was, refused = path.read_bytes(), identity(path, WORDS), 0
    for place in range(len(raw)):
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 4]) + raw[place + 1 :])
        try:
            found = identity(path, WORDS)
        except ConfigError:
            refused += 1
            continue
        assert found == was, place
    assert refused > 0.9 * len(raw)  # the rest are bits that PEM and base64 do not read


def test_the_option_stands_above_the_variable_and_that_above_a_person(tmp_path):
    first, second = secret_file(tmp_path / "1", b"one\n"), secret_file(tmp_path / "2", b"two\r\n")
    environ = {"TRUSTLOG_PASSPHRASE_FILE": str(second)}

    def person(prompt):
        assert prompt.startswith("Passphrase of ")
        return "three"

    assert PassphraseSource(first, person, environ).for_key(tmp_path).secret == b"one"
    assert PassphraseSource(None, person, environ).for_key(tmp_path).secret == b"two"
    assert PassphraseSource(None, person, {"TRUSTLOG_PASSPHRASE_FILE": ""}).for_key(tmp_path).secret == b"three"
    found = PassphraseSource(None, person, {}).for_key(tmp_path)
    assert found.secret == b"three"
    assert "three" not in repr(found)
    with pytest.raises(ConfigError, match="--passphrase-file or TRUSTLOG_PASSPHRASE_FILE"):
        PassphraseSource(None, None, {}).for_key(tmp_path)


def test_a_person_is_asked_once(tmp_path):
    asked = []
    source = PassphraseSource(ask=lambda prompt: asked.append(prompt) or "x", environ={})
    assert [source.for_key(tmp_path / name).secret for name in "ab"] == [b"x", b"x"]
    assert asked == [f"Passphrase of {tmp_path / 'a'}"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"\n", "empty"),
        (b"one\ntwo\n", "more than one line"),
        (b"one\0two", "more than one line"),
        (b"x" * 1024, "longer than 1023 bytes"),
        (b"x" * 5000, "larger than 1025 bytes"),
    ],
)
def test_what_is_no_passphrase_is_refused_and_not_quoted(tmp_path, content, words):
    path = secret_file(tmp_path / "secret", content)
    with pytest.raises(ConfigError, match=words) as caught:
        read_passphrase_file(path)
    assert str(path) in str(caught.value)
    assert "two" not in str(caught.value)


def test_the_longest_passphrase_works(tmp_path, key):
    longest = b"x" * keys.PASSPHRASE_BYTES_MAX
    assert read_passphrase_file(secret_file(tmp_path / "secret", longest + b"\r\n")) == longest
    change_passphrases([key], NOBODY, longest)
    assert identity(key, longest)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o620])
def test_a_passphrase_file_that_others_can_read_is_refused_as_a_key_is(tmp_path, mode):
    path = secret_file(tmp_path / "a secret", mode=mode)
    with pytest.raises(ConfigError, match=f"this passphrase is open to other users .mode {mode:04o}.; .*chmod 600 '"):
        read_passphrase_file(path)


def test_a_passphrase_file_that_is_missing_or_none(tmp_path):
    with pytest.raises(ConfigError, match="nothere: cannot be read: No such file"):
        read_passphrase_file(tmp_path / "nothere")
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(ConfigError, match="not a regular file"):
        read_passphrase_file(tmp_path / "pipe")


def test_set_change_and_remove(tmp_path, key):
    was = identity(key)
    assert change_passphrases([key], NOBODY, WORDS) == 1
    assert identity(key, WORDS) == was
    assert change_passphrases([key], of(WORDS), OTHER) == 1
    assert identity(key, OTHER) == was
    with pytest.raises(LockedKeyError, match="that was typed does not open"):
        change_passphrases([key], of(WORDS), b"third")
    assert change_passphrases([key], of(OTHER), None) == 1
    assert identity(key) == was
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["tls.key"]


def test_no_key_is_changed_if_one_cannot_be_opened(tmp_path, key):
    other = tmp_path / "client.key"
    keys.write_private_key(other, keys.generate_private_key(), OTHER)
    before = key.read_bytes(), other.read_bytes()
    with pytest.raises(LockedKeyError, match=r"client\.key"):
        change_passphrases([key, other], of(WORDS), b"third")
    assert (key.read_bytes(), other.read_bytes()) == before


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_crash_at_any_step_leaves_every_key_and_the_same_command_finishes(tmp_path, monkeypatch, call, nth):
    """The process ends there: nothing that would tidy up runs."""
    paths = [tmp_path / "tls.key", tmp_path / "signing.key"]
    for path in paths:
        keys.write_private_key(path, keys.generate_private_key(), OTHER)
    were = [identity(path, OTHER) for path in paths]
    calls = []

    class Crash(BaseException):
        pass

    def crashing(real):
        def wrapped(*args, **kwargs):
            calls.append(args)
            if len(calls) == nth:
                raise Crash
            return real(*args, **kwargs)

        return wrapped

    with monkeypatch.context() as patch:
        if call == "write":
            patch.setattr(passphrase, "write_private_key", crashing(passphrase.write_private_key))
        elif call == "fsync":
            patch.setattr(os, "fsync", crashing(os.fsync))
        else:
            patch.setattr(os, "rename", crashing(os.rename))
            patch.setattr(type(tmp_path), "replace", crashing(type(tmp_path).replace))
        if nth <= {"write": 2, "fsync": 4, "replace": 2}[call]:
            with pytest.raises(Crash):
                change_passphrases(paths, of(OTHER), WORDS)
        else:
            change_passphrases(paths, of(OTHER), WORDS)
    for path, was in zip(paths, were, strict=True):
        opened = []
        for secret in (OTHER, WORDS):
            try:
                opened.append(identity(path, secret))
            except LockedKeyError:
                continue
        assert opened == [was]
    change_passphrases(paths, of(OTHER), WORDS)
    assert [identity(path, WORDS) for path in paths] == were
    assert sorted(path.name for path in tmp_path.iterdir()) == ["signing.key", "tls.key"]


def test_a_full_disk_leaves_the_key(key, monkeypatch):
    before = key.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(passphrase, "write_private_key", full)
        with pytest.raises(ConfigError, match="No space left on device; the key is there"):
            change_passphrases([key], NOBODY, WORDS)
    assert key.read_bytes() == before


def test_a_file_that_holds_another_key_never_takes_the_place(key, monkeypatch):
    before = key.read_bytes()
    real = keys.write_private_key
    monkeypatch.setattr(
        passphrase, "write_private_key", lambda path, _, secret: real(path, keys.generate_private_key(), secret)
    )
    with pytest.raises(ConfigError, match="is another key"):
        change_passphrases([key], NOBODY, WORDS)
    assert key.read_bytes() == before


def test_two_at_the_same_time(key):
    descriptor = os.open(key.parent, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)  # so that one who took no more than this would not notice
        with pytest.raises(ConfigError, match="another program is changing these keys"):
            change_passphrases([key], NOBODY, WORDS)
    finally:
        os.close(descriptor)
    assert change_passphrases([key], NOBODY, WORDS) == 1


def test_a_home_is_read_without_the_passphrase_and_runs_with_it(tmp_path):
    init_cluster(tmp_path / "c", base_port=0, passphrase=WORDS)
    home = load_home(tmp_path / "c" / "replica-1")
    assert is_encrypted(home.key_path)
    assert is_encrypted(tmp_path / "c" / "client" / "client.key")
    with pytest.raises(LockedKeyError, match="no passphrase was given"):
        unlocked(home, NOBODY)
    with pytest.raises(LockedKeyError, match="that was typed does not open"):
        unlocked(home, of(OTHER))
    opened = unlocked(home, of(WORDS))
    assert WORDS.decode() not in repr(opened)
    members = [place.certificate_der for place in home.cluster.replicas]
    server_context(opened.certificate_path, opened.key_path, members, opened.passphrase)
    client_context(members[0], *opened.tls_identities[0])
    # Without one, OpenSSL must not ask on a terminal in its own words.
    with pytest.raises(ssl.SSLError):
        client_context(members[0], *home.tls_identities[0])


def test_nobody_is_asked_for_keys_without_a_passphrase(tmp_path):
    init_cluster(tmp_path / "c", base_port=0)

    def never(prompt):
        raise AssertionError(prompt)

    home = load_home(tmp_path / "c" / "replica-0")
    assert unlocked(home, PassphraseSource(tmp_path / "no such file", never, {})) is home


def test_another_encrypted_key_than_the_certificates_is_noticed_when_it_is_opened(tmp_path):
    init_cluster(tmp_path / "c", base_port=0, passphrase=WORDS)
    folder = tmp_path / "c" / "replica-1"
    (folder / "tls.key").write_bytes((tmp_path / "c" / "replica-2" / "tls.key").read_bytes())
    with pytest.raises(HomeError, match="not the key of"):
        unlocked(load_home(folder), of(WORDS))


def test_a_pbft_replicas_two_keys(tmp_path):
    init_cluster(tmp_path / "c", base_port=0, ordering=PBFT, passphrase=WORDS)
    folder = tmp_path / "c" / "replica-1"
    home = load_any_home(folder)
    assert [is_encrypted(path) for path in home.private_key_paths] == [True, True]
    assert public_bytes(unlocked(home, of(WORDS)).load_signing_key().public_key())
    (folder / "signing.key").write_bytes((tmp_path / "c" / "replica-2" / "signing.key").read_bytes())
    with pytest.raises(HomeError, match="signing key"):
        unlocked(load_any_home(folder), of(WORDS))
    change_passphrases(home.private_key_paths, of(WORDS), None)
    with pytest.raises(HomeError, match="signing key"):
        load_any_home(folder)


def test_keygen_and_client_key(tmp_path):
    keygen(tmp_path / "r", 0, "127.0.0.1", 7100, passphrase=WORDS)
    assert is_encrypted(tmp_path / "r" / "tls.key")
    made = make_client(tmp_path / "client", WORDS)
    assert keys.load_client_key(tmp_path / "client", WORDS).public_key == made.public_key
    with pytest.raises(ProvisionError, match="exists already"):
        make_client(tmp_path / "client", WORDS)
