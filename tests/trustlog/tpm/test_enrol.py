"""Enrolment against a software TPM: what is pinned, and every way in which a host could show something else."""

from __future__ import annotations

import datetime as dt
import struct
from dataclasses import replace

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tests.support.swtpm import manufacture, software_tpm
from tests.trustlog.support import flip
from tests.trustlog.tpm.support import Reader, add, attestation_key, forged_quote, public_of, sign
from trustlog import BackendKind, LogIdentity, VerificationError, VerifyingKey
from trustlog.tpm.chain import TpmPins
from trustlog.tpm.client import Signed
from trustlog.tpm.credential import Credential, make_credential, public_key_of
from trustlog.tpm.enrol import (
    ENDORSEMENT_USAGE,
    Answer,
    EnrolmentRequest,
    _nonce,
    accept,
    answer,
    challenge,
    check_certificate,
    create,
    reading_certificates,
    request,
)
from trustlog.tpm.exchange import no_password
from trustlog.tpm.folder import CONFIG_FILE, TpmConfig
from trustlog.tpm.opening import open_log
from trustlog.tpm.structures import (
    ALG_ECC,
    ALG_RSA,
    FIXED_PARENT,
    FIXED_TPM,
    RESTRICTED,
    RH_ENDORSEMENT,
    RH_OWNER,
    SENSITIVE_DATA_ORIGIN,
    SIGN,
    USER_WITH_AUTH,
    Public,
    attestation_key_template,
    endorsement_key_template,
    qualified_name,
    sized,
)
from trustlog.tpm.wire import TpmError

NOW = dt.datetime.now(dt.UTC) + dt.timedelta(hours=1)  # later than the certificates that the tests make


@pytest.fixture(scope="module")
def maker(tmp_path_factory):
    """A TPM maker's work: a state folder with an endorsement certificate, and the authority's certificates."""
    folder = tmp_path_factory.mktemp("maker")
    manufacture(folder / "state", folder / "authority")
    names = ("issuercert.pem", "swtpm-localca-rootca-cert.pem")
    roots = [x509.load_pem_x509_certificate((folder / "authority" / name).read_bytes()) for name in names]
    return folder / "state", roots


@pytest.fixture
def certified(maker):
    with software_tpm(maker[0]) as machine:
        yield machine


def enrolled(machine, folder, kind=ALG_RSA):
    create(folder, address=machine.address, endorsement_kind=kind).close()
    return TpmConfig.load(folder / CONFIG_FILE)


def retire(tpm, config):
    tpm.evict_control(config.handle, config.handle)


@pytest.mark.parametrize("kind", [ALG_RSA, ALG_ECC])
def test_a_log_is_enrolled_and_then_read_by_what_was_pinned(machine, tmp_path, kind):
    config = enrolled(machine, tmp_path / "log", kind)
    with machine.connect() as tpm:
        asked = request(tpm, config)
        sent = challenge(asked, [], NOW)
        answered = answer(tpm, config, sent.credential)
    pins = accept(asked, sent, answered)
    assert pins == config.pins
    assert asked.certificate == b""
    key = VerifyingKey.from_bytes(Public.parse(asked.key).key)
    with open_log(tmp_path / "log") as log:
        Reader(LogIdentity(key, BackendKind.TPM, tpm=pins)).read(*add(log, "one"))


def test_the_certificate_leads_to_the_makers_authority(maker, certified, tmp_path):
    roots = maker[1]
    config = enrolled(certified, tmp_path / "log")
    with certified.connect() as tpm:
        asked = request(tpm, config)
        sent = challenge(asked, roots, NOW)
        assert accept(asked, sent, answer(tpm, config, sent.credential)) == config.pins
        retire(tpm, config)
    key = Public.parse(asked.endorsement_key)
    assert check_certificate(asked.certificate, key, roots, NOW) == roots[1]

    def refused(match, der=asked.certificate, of=key, by=roots, now=NOW):
        with pytest.raises(VerificationError, match=match) as caught:
            check_certificate(der, of, by, now)
        assert caught.value.reason == "wrong-certificate"

    refused("no endorsement certificate", der=b"")
    refused("cannot be read", der=b"\x30\x82\x00\x01\x00")
    refused("no given authority issued", by=roots[:1])
    refused("no given authority issued", by=roots[1:])
    refused("not valid now", now=NOW - dt.timedelta(days=400))
    ek = Public.parse(endorsement_key_template(ALG_ECC))
    refused("for another key", of=replace(ek, key=Public.parse(asked.key).key))
    altered = bytearray(asked.certificate)
    altered[-1] ^= 1
    refused("no given authority issued", der=bytes(altered))
    with pytest.raises(VerificationError, match="no endorsement certificate"):
        challenge(replace(asked, certificate=b""), roots, NOW)


def _certificate(
    subject_key, issuer_key, *, subject="TPM", issuer="Root", ca=False, sign=True, usage=None, expired=False
):
    name = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)]) for text in (subject, issuer)]
    end = NOW + dt.timedelta(days=-1 if expired else 1)
    builder = x509.CertificateBuilder(name[1], name[0], subject_key, 1, NOW - dt.timedelta(days=2), end)
    builder = builder.add_extension(x509.BasicConstraints(ca, None), critical=True)
    uses = x509.KeyUsage(False, False, True, False, False, sign, False, False, False)
    builder = builder.add_extension(uses, critical=True)
    if usage:
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
    return builder.sign(issuer_key, hashes.SHA256())


def test_only_an_authority_certifies_an_endorsement_key():
    root_key, tpm_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    numbers = tpm_key.public_key().public_numbers()
    point = b"\x04" + numbers.x.to_bytes(32, "big") + numbers.y.to_bytes(32, "big")
    key = replace(Public.parse(endorsement_key_template(ALG_ECC)), key=point)

    def root(**how):
        return _certificate(root_key.public_key(), root_key, subject="Root", **how)

    good = _certificate(tpm_key.public_key(), root_key)
    der = good.public_bytes(Encoding.DER)
    assert check_certificate(der, key, [root(ca=True)], NOW)
    for wrong in (root(ca=False), root(ca=True, sign=False), root(ca=True, expired=True)):
        with pytest.raises(VerificationError):
            check_certificate(der, key, [wrong], NOW)
    server = _certificate(tpm_key.public_key(), root_key, usage=ExtendedKeyUsageOID.SERVER_AUTH)
    with pytest.raises(VerificationError, match="not one of an endorsement key"):
        check_certificate(server.public_bytes(Encoding.DER), key, [root(ca=True)], NOW)
    # Two authorities that certify each other end no chain.
    a = _certificate(root_key.public_key(), tpm_key, subject="Root", issuer="Other", ca=True)
    b = _certificate(tpm_key.public_key(), root_key, subject="Other", issuer="Root", ca=True)
    with pytest.raises(VerificationError, match="more than 6"):
        check_certificate(der, key, [a, b], NOW)


def _with_names(subject_key, issuer_key, *, subject, issuer, ca):
    """A certificate with all the parts that are looked at, and one, alternative names, that a reader may stumble on."""
    name = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)]) for text in (subject, issuer)]
    builder = x509.CertificateBuilder(
        name[1], name[0], subject_key, 5, NOW - dt.timedelta(days=2), NOW + dt.timedelta(days=1)
    )
    builder = builder.add_extension(x509.BasicConstraints(ca, None), critical=True)
    uses = x509.KeyUsage(False, False, False, False, not ca, ca, False, False, False)
    builder = builder.add_extension(uses, critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ENDORSEMENT_USAGE]), critical=False)
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("a")]), critical=False)
    return builder.sign(issuer_key, hashes.SHA256()).public_bytes(Encoding.DER)


def reason_of(call, *arguments):
    """Return why a call refuses, None if it does not."""
    try:
        call(*arguments)
    except VerificationError as error:
        return error.reason
    return None


def test_every_flipped_bit_of_a_certificate_is_a_wrong_certificate():
    """The library raises errors of many kinds, some only when a field is looked at; none of them escapes."""
    root_key, tpm_key = (ec.derive_private_key(number, ec.SECP256R1()) for number in (1, 2))
    numbers = tpm_key.public_key().public_numbers()
    point = b"\x04" + numbers.x.to_bytes(32, "big") + numbers.y.to_bytes(32, "big")
    key = replace(Public.parse(endorsement_key_template(ALG_ECC)), key=point)
    leaf = _with_names(tpm_key.public_key(), root_key, subject="TPM", issuer="Root", ca=False)
    root = _with_names(root_key.public_key(), root_key, subject="Root", issuer="Root", ca=True)

    def check(leaf, root):
        with reading_certificates():
            others = [x509.load_der_x509_certificate(root)]
        return check_certificate(leaf, key, others, NOW)

    check(leaf, root)
    for number, der in enumerate((leaf, root)):
        # How many bits of the signature's last byte are none is in nobody's signature.
        uncovered = len(der) - len(x509.load_der_x509_certificate(der).signature) - 1
        for bit in range(len(der) * 8):
            changed = [leaf, root]
            changed[number] = flip(der, bit)
            assert reason_of(check, *changed) == "wrong-certificate" or bit // 8 == uncovered


def test_a_primary_key_is_refused_whatever_the_host_says(machine):
    """It decrypts the challenge, has all attributes, and is in the right TPM: its qualified name gives it away."""
    with machine.connect() as tpm:
        ek, ek_public = tpm.create_primary(RH_ENDORSEMENT, endorsement_key_template(ALG_ECC))
        with tpm.loaded(ek):
            for hierarchy in (RH_ENDORSEMENT, RH_OWNER):
                primary, public = tpm.create_primary(hierarchy, attestation_key_template())
                with tpm.loaded(primary):
                    signer = tpm.read_public(primary)[1]
                    refused_signer(tpm, primary, public, signer, ek_public)


def refused_signer(tpm, handle, public, signer, ek_public):
    asked = EnrolmentRequest(ek_public.raw, b"", public.raw)
    config = TpmConfig(tpm.address, handle, ALG_ECC, TpmPins(14, bytes(32), signer, 0))
    sent = challenge(asked, [], NOW)
    answered = answer(tpm, config, sent.credential)
    assert answered.secret == sent.secret
    with pytest.raises(VerificationError) as caught:
        accept(asked, sent, answered)
    assert caught.value.reason == "wrong-signer"


@pytest.mark.parametrize("bit", [FIXED_TPM, FIXED_PARENT, SENSITIVE_DATA_ORIGIN, RESTRICTED, 1 << 17, 1 << 2])
def test_a_key_with_other_attributes_is_refused(bit):
    template = bytearray(attestation_key_template())
    ek = replace(Public.parse(endorsement_key_template(ALG_ECC)))
    attributes = int.from_bytes(template[4:8], "big") ^ bit
    template[4:8] = attributes.to_bytes(4, "big")
    with pytest.raises(VerificationError, match="the log's key has attributes") as caught:
        challenge(EnrolmentRequest(ek.raw, b"", bytes(template)), [], NOW)
    assert caught.value.reason == "wrong-key"


def test_another_kind_of_endorsement_key_is_refused(machine):
    """A key that the host can make with any private part it likes may wear the name of an endorsement key's child."""
    template = bytearray(endorsement_key_template(ALG_ECC))
    template[7] ^= FIXED_TPM
    with pytest.raises(VerificationError, match="not of the TCG's template"):
        challenge(EnrolmentRequest(bytes(template), b"", attestation_key_template()), [], NOW)


def test_another_tpm_cannot_answer(machine, tmp_path):
    with software_tpm(tmp_path / "other-state") as other:
        config, elsewhere = enrolled(machine, tmp_path / "log"), enrolled(other, tmp_path / "other")
        with machine.connect() as tpm, other.connect() as other_tpm:
            asked, other_asked = request(tpm, config), request(other_tpm, elsewhere)
            sent = challenge(asked, [], NOW)
            with pytest.raises(TpmError, match="ActivateCredential was refused"):
                answer(other_tpm, elsewhere, sent.credential)
            # A host with a real TPM and a key elsewhere: the name in the challenge is another key's.
            mixed = challenge(replace(asked, key=other_asked.key), [], NOW)
            with pytest.raises(TpmError, match="integrity check fails"):
                answer(tpm, config, mixed.credential)
            answered = answer(tpm, config, sent.credential)
    with pytest.raises(VerificationError, match="was not decrypted"):
        accept(asked, sent, replace(answered, secret=bytes(32)))


def test_an_answer_is_believed_whole_or_not_at_all(machine, tmp_path):
    config = enrolled(machine, tmp_path / "log")
    with machine.connect() as tpm:
        asked = request(tpm, config)
        sent = challenge(asked, [], NOW)
        answered = answer(tpm, config, sent.credential)
        old = tpm.quote(config.handle, [14], bytes(32))
        tpm.pcr_extend(14, bytes(32))
        other = tpm.quote(config.handle, [23], b"")
    for wrong, reason in [
        (replace(answered, base=bytes([1]) * 32), "wrong-pcr"),
        (replace(answered, pcr=13), "wrong-selection"),
        (replace(answered, quote=old), "wrong-nonce"),
        (replace(answered, quote=other), "wrong-nonce"),
        (replace(answered, quote=Signed(answered.quote.attest, bytes(63) + b"\1")), "bad-signature"),
    ]:
        with pytest.raises(VerificationError) as caught:
            accept(asked, sent, wrong)
        assert caught.value.reason == reason
    assert isinstance(answered, Answer)


def test_only_the_request_that_was_challenged_is_accepted(machine, tmp_path):
    """Its keys were checked; what comes in its place was not: here a key in software, with a quote of its own making."""
    config = enrolled(machine, tmp_path / "log")
    with machine.connect() as tpm:
        asked = request(tpm, config)
        sent = challenge(asked, [], NOW)
        answered = answer(tpm, config, sent.credential)
    soft = ec.generate_private_key(ec.SECP256R1())
    point = public_of(soft)
    template = attestation_key_template()
    head = template[:4] + struct.pack(">I", USER_WITH_AUTH | SIGN) + template[8:-4]
    key = head + sized(point[1:33]) + sized(point[33:])
    above = qualified_name(RH_ENDORSEMENT.to_bytes(4, "big"), Public.parse(asked.endorsement_key).name)
    signer = qualified_name(above, Public.parse(key).name)
    quote = forged_quote({14: bytes(32)}, _nonce(sent.secret), signer=signer)
    forged = replace(answered, base=bytes(32), quote=Signed(quote, sign(soft, quote)))
    swapped = replace(asked, key=key)

    def refused(asked, sent, reason):
        with pytest.raises(VerificationError) as caught:
            accept(asked, sent, forged)
        assert caught.value.reason == reason

    refused(swapped, sent, "wrong-request")
    refused(replace(asked, certificate=b"another"), sent, "wrong-request")
    # Also who was tricked into challenging it pins no such key, nor one below another kind of endorsement key.
    refused(swapped, replace(sent, asked=swapped.digest()), "wrong-key")
    loose = replace(asked, endorsement_key=asked.key)
    refused(loose, replace(sent, asked=loose.digest()), "wrong-key")
    assert accept(asked, sent, answered) == config.pins


def test_a_challenge_that_was_altered_is_not_decrypted(machine, tmp_path):
    config = enrolled(machine, tmp_path / "log")
    with machine.connect() as tpm:
        asked = request(tpm, config)
        blob, secret = challenge(asked, [], NOW).credential
        for wrong in (Credential(blob[:-1] + bytes([blob[-1] ^ 1]), secret), Credential(blob, bytes(len(secret)))):
            with pytest.raises(TpmError):
                answer(tpm, config, wrong)


def test_a_credential_is_decrypted_by_a_real_tpm_for_both_kinds_of_endorsement_key(tpm):
    with attestation_key(tpm) as (handle, public, _):
        for kind in (ALG_RSA, ALG_ECC):
            ek, ek_public = tpm.create_primary(RH_ENDORSEMENT, endorsement_key_template(kind))
            credential = make_credential(ek_public, public.name, b"a secret")
            with tpm.loaded(ek), tpm.endorsement_session() as auth:
                opened = tpm.activate_credential(handle, ek, credential.blob, credential.secret, [no_password(), auth])
            assert opened == b"a secret"


def test_a_key_that_is_no_key_is_refused():
    for kind in (ALG_RSA, ALG_ECC):
        with pytest.raises(VerificationError, match=r"its public key is none|its RSA key has 0 bits"):
            public_key_of(Public.parse(endorsement_key_template(kind)))


@pytest.mark.parametrize(
    "key", [b"\x01", b"\x80" + bytes(254), b"\x7f" + bytes(255), b"\x80" + bytes(256), b"\x80" + bytes(255)]
)
def test_an_rsa_key_of_another_size_or_with_an_even_modulus_is_refused(key):
    with pytest.raises(VerificationError, match=r"its RSA key has|its public key is none"):
        make_credential(replace(Public.parse(endorsement_key_template(ALG_RSA)), key=key), bytes(34), b"secret")


def test_a_tpm_without_a_free_handle_says_so(machine, tmp_path, monkeypatch):
    monkeypatch.setattr("trustlog.tpm.enrol.HANDLES", range(0x81017400, 0x81017402))
    first = enrolled(machine, tmp_path / "a")
    second = enrolled(machine, tmp_path / "b")
    assert (first.handle, second.handle) == (0x81017400, 0x81017401)
    with pytest.raises(TpmError, match="handles 0x81017400 … 0x81017401 are taken"):
        enrolled(machine, tmp_path / "c")
    assert not (tmp_path / "c").exists()
