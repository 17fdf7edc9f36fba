import os
import ssl
import stat

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from replica.cluster import keys
from replica.cluster.strict_toml import ConfigError
from trustlog import VerificationError, verify_signature


def test_signature_is_what_the_trusted_log_verifies():
    key = keys.ClientKey.generate()
    for i in range(64):  # short r or s must be padded
        signature = key.sign(b"message %d" % i)
        assert len(signature) == 64
        verify_signature(key.public_key, signature, b"message %d" % i)
    with pytest.raises(VerificationError):
        verify_signature(key.public_key, signature, b"another message")


def test_client_key_round_trip_and_modes(tmp_path):
    made = keys.create_client_key(tmp_path)
    assert keys.load_client_key(tmp_path).public_key == made.public_key
    assert stat.S_IMODE((tmp_path / "client.key").stat().st_mode) == 0o600
    assert (tmp_path / "client.pub").read_text() == made.public_key.hex() + "\n"
    with pytest.raises(FileExistsError):
        keys.create_client_key(tmp_path)


def test_private_key_is_never_readable_by_others_not_even_for_a_moment(tmp_path, monkeypatch):
    modes = []
    write = os.fsync

    def fsync(descriptor):
        modes.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
        write(descriptor)

    opened = []
    real_open = os.open

    def spy(path, flags, mode=0o777, **kwargs):
        opened.append((flags & os.O_EXCL, flags & os.O_CREAT, mode))
        return real_open(path, flags, mode, **kwargs)

    monkeypatch.setattr(os, "open", spy)
    monkeypatch.setattr(os, "fsync", fsync)
    before = os.umask(0)
    try:
        keys.write_private_key(tmp_path / "k", keys.generate_private_key())
    finally:
        os.umask(before)
    assert modes == [0o600]
    assert opened == [(os.O_EXCL, os.O_CREAT, 0o600)]


def test_private_key_is_not_written_through_a_link(tmp_path):
    (tmp_path / "k").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        keys.write_private_key(tmp_path / "k", keys.generate_private_key())
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o610])
def test_key_file_open_to_others_is_refused(tmp_path, mode):
    path = tmp_path / "with space.key"
    keys.write_private_key(path, keys.generate_private_key())
    path.chmod(mode)
    with pytest.raises(ConfigError, match=f"mode {mode:04o}.*chmod 600 '.*with space.key'"):
        keys.load_private_key(path)
    path.chmod(0o600)
    keys.load_private_key(path)


def pem_of(key, encryption=None):
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        encryption or serialization.NoEncryption(),
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a private key in PEM"),
        (b"secret words", "not a private key in PEM"),
        (pem_of(ec.generate_private_key(ec.SECP384R1())), "not a P-256 key"),
        (pem_of(rsa.generate_private_key(65537, 2048)), "not a P-256 key"),
        (
            pem_of(keys.generate_private_key(), serialization.BestAvailableEncryption(b"p")),
            "this private key is encrypted, and no passphrase was given",
        ),
        (b"x" * 20_000, "larger than"),
    ],
)
def test_other_content_is_refused_without_quoting_it(tmp_path, content, words):
    keys.write_new(tmp_path / "k", content, 0o600)
    with pytest.raises(ConfigError, match=words) as caught:
        keys.load_private_key(tmp_path / "k")
    assert "secret" not in str(caught.value)


def test_missing_key_file(tmp_path):
    with pytest.raises(ConfigError, match=r"client.key: cannot be read: No such file"):
        keys.load_client_key(tmp_path)


def test_representation_shows_no_secret():
    assert "private" not in repr(keys.ClientKey.generate())


def test_certificate_is_an_end_entity_for_ever():
    key = keys.generate_private_key()
    der = keys.make_certificate(7, key)
    certificate = x509.load_der_x509_certificate(der)
    assert certificate.subject.rfc4514_string() == "CN=trustlog replica 7"
    assert certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    assert certificate.not_valid_before_utc.year == 1970
    assert certificate.not_valid_after_utc.year == 9999
    assert keys.certificate_public_key(der) == keys.public_bytes(key.public_key())
    assert keys.certificate_der(keys.certificate_pem(der).encode()) == der
    # What Python's own TLS makes of the PEM is the same DER.
    assert ssl.PEM_cert_to_DER_cert(keys.certificate_pem(der)) == der


def test_certificate_signed_by_another_key_is_refused():
    own = x509.load_der_x509_certificate(keys.make_certificate(0, keys.generate_private_key()))
    forged = (
        x509.CertificateBuilder()
        .subject_name(own.subject)
        .issuer_name(own.subject)
        .public_key(own.public_key())
        .serial_number(1)
        .not_valid_before(own.not_valid_before_utc)
        .not_valid_after(own.not_valid_after_utc)
        .sign(keys.generate_private_key(), own.signature_hash_algorithm)
    )
    with pytest.raises(ValueError, match="not signed by its own key"):
        keys.certificate_der(forged.public_bytes(serialization.Encoding.PEM))
