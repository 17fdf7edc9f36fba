"""Quotes and certified NV indexes: what is believed, and that nothing else is; no TPM is needed for these."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trustlog.support import fixed_key, flip
from tests.trustlog.tpm.support import SIGNER, attest_header, forged_certification, forged_quote, public_of, sign
from trustlog import VerificationError, VerifyingKey
from trustlog.tpm.quote import (
    TYPE_NV_CERTIFY,
    describe_selection,
    parse_nv_certification,
    parse_quote,
    verify_nv_certification,
    verify_quote,
)
from trustlog.tpm.structures import (
    ALG_ECC,
    ALG_RSA,
    ALG_SHA1,
    NvPublic,
    Public,
    Reader,
    attestation_key_template,
    ecdsa_signature,
    endorsement_key_template,
    pcr_selection,
    read_pcr_selection,
    sized,
)

KEY = fixed_key()
VERIFYING = VerifyingKey.from_bytes(public_of(KEY))
VALUE = bytes(range(100, 132))
NAME = b"\x00\x0b" + bytes(range(50, 82))


def refused(reason, attest, values=None, signature=None, **expected):
    with pytest.raises(VerificationError) as caught:
        verify_quote(VERIFYING, attest, signature or sign(KEY, attest), values or {14: VALUE}, **expected)
    assert caught.value.reason == reason


def test_a_quote_says_pcrs_clock_and_extra_data():
    attest = forged_quote({14: VALUE}, b"nonce")
    quote = verify_quote(VERIFYING, attest, sign(KEY, attest), {14: VALUE}, nonce=b"nonce", signer=SIGNER)
    assert quote.selection == {11: (14,)}
    assert (quote.clock.reset_count, quote.clock.restart_count, quote.clock.safe) == (7, 2, False)
    assert quote.clock.epoch == 7 << 32 | 2


def test_a_quote_of_several_pcrs_is_over_their_values_in_rising_order():
    values = {7: VALUE, 0: bytes(32)}
    attest = forged_quote(values)
    verify_quote(VERIFYING, attest, sign(KEY, attest), {0: bytes(32), 7: VALUE})
    refused("wrong-pcr", attest, {0: VALUE, 7: bytes(32)})


@pytest.mark.parametrize(
    "selection",
    [
        pcr_selection([23]),
        pcr_selection([14, 23]),
        pcr_selection([]),
        pcr_selection([14], ALG_SHA1),
        struct.pack(">I", 0),
        struct.pack(">I", 2) + pcr_selection([14])[4:] + pcr_selection([23], ALG_SHA1)[4:],
    ],
    ids=["another", "one more", "none", "another bank", "no bank", "a second bank"],
)
def test_the_selection_is_compared_exactly(selection):
    refused("wrong-selection", forged_quote({14: VALUE}, selection=selection))


def test_what_else_differs_is_named():
    refused("wrong-pcr", forged_quote({14: bytes(32)}))
    refused("wrong-nonce", forged_quote({14: VALUE}, b"old"), nonce=b"new")
    refused("wrong-signer", forged_quote({14: VALUE}, signer=NAME), signer=SIGNER)
    refused("malformed", forged_quote({14: VALUE}, magic=0xFF544348))
    refused("wrong-statement", forged_certification(NAME, VALUE))
    refused("bad-signature", forged_quote({14: VALUE}), signature=sign(fixed_key(2), forged_quote({14: VALUE})))
    refused("wrong-selection", forged_quote({14: VALUE}), values={13: VALUE})


def test_every_altered_bit_of_a_quote_and_its_signature_is_refused():
    attest = forged_quote({14: VALUE}, bytes(32))
    signature = sign(KEY, attest)
    for bit in range(8 * len(attest)):
        with pytest.raises(VerificationError):
            verify_quote(VERIFYING, flip(attest, bit), signature, {14: VALUE})
    for bit in range(8 * len(signature)):
        with pytest.raises(VerificationError):
            verify_quote(VERIFYING, attest, flip(signature, bit), {14: VALUE})


def test_a_quote_ends_where_it_should():
    attest = forged_quote({14: VALUE})
    refused("malformed", attest + b"\0")
    for size in range(len(attest)):
        refused("malformed", attest[:size])


def test_a_certified_index_is_believed_by_its_name_only():
    attest = forged_certification(NAME, VALUE)
    assert verify_nv_certification(VERIFYING, attest, sign(KEY, attest), name=NAME, signer=SIGNER).content == VALUE
    for wrong, reason in [
        (forged_certification(SIGNER, VALUE), "wrong-index"),
        (forged_certification(NAME, VALUE, offset=1), "wrong-index"),
        (forged_certification(NAME, VALUE, signer=NAME), "wrong-signer"),
        (forged_quote({14: VALUE}), "wrong-statement"),
    ]:
        with pytest.raises(VerificationError) as caught:
            verify_nv_certification(VERIFYING, wrong, sign(KEY, wrong), name=NAME, signer=SIGNER)
        assert caught.value.reason == reason
    for bit in range(8 * len(attest)):
        with pytest.raises(VerificationError):
            verify_nv_certification(VERIFYING, flip(attest, bit), sign(KEY, attest), name=NAME)


def test_digests_and_signatures_of_other_sizes_are_refused():
    refused("malformed", forged_quote({14: VALUE})[:-34] + sized(bytes(48)))
    with pytest.raises(VerificationError, match="r or s has more"):
        ecdsa_signature(b"\x00\x18\x00\x0b" + sized(bytes(33)) + sized(bytes(32)))


def test_a_yes_no_is_yes_or_no():
    attest = bytearray(forged_quote({14: VALUE}))
    attest[6 + 36 + 2 + 16] = 2
    refused("malformed", bytes(attest))


PARSERS = [
    parse_quote,
    parse_nv_certification,
    Public.parse,
    NvPublic.parse,
    ecdsa_signature,
    lambda data: read_pcr_selection(Reader(data)),
]
SEEDS = [
    forged_quote({14: VALUE}),
    forged_certification(NAME, VALUE),
    attestation_key_template(),
    endorsement_key_template(ALG_RSA),
    endorsement_key_template(ALG_ECC),
    pcr_selection([1, 14]),
    b"\x00\x18\x00\x0b" + sized(bytes(32)) * 2,
]


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(PARSERS),
    st.one_of(
        st.binary(max_size=300),
        st.builds(
            lambda seed, at, new, cut: (seed[: at % len(seed)] + new + seed[at % len(seed) + 1 :])[: cut or None],
            st.sampled_from(SEEDS),
            st.integers(0, 400),
            st.binary(max_size=4),
            st.integers(0, 400),
        ),
    ),
)
def test_no_bytes_do_more_than_be_refused(parse, data):
    reason = None
    try:
        parse(data)
    except VerificationError as error:
        reason = error.reason
    assert reason in {None, "malformed", "wrong-statement"}


def test_limits_hold_before_memory_is_spent():
    for data in (bytes(5000), attest_header(TYPE_NV_CERTIFY) + b"\xff\xff", b"\xff\xff\xff\xff" + bytes(100)):
        with pytest.raises(VerificationError, match="malformed"):
            parse_nv_certification(data) if data[0] else Reader(data)
    with pytest.raises(VerificationError, match="banks"):
        read_pcr_selection(Reader(b"\xff\xff\xff\xff"))
    with pytest.raises(VerificationError, match="twice"):
        read_pcr_selection(Reader(struct.pack(">I", 2) + pcr_selection([1])[4:] * 2))
    with pytest.raises(ValueError, match="PCRs run from 0 to 23"):
        pcr_selection([24])


def test_other_keys_and_signatures_than_ours_are_refused():
    template = attestation_key_template()
    for wrong in (b"\x00\x08" + template[2:], template[:2] + b"\x00\x0c" + template[4:], template + b"\0"):
        with pytest.raises(VerificationError):
            Public.parse(wrong)
    for wrong in (b"\x00\x14\x00\x0b", b"\x00\x18\x00\x0b" + sized(bytes(33)) + sized(bytes(32))):
        with pytest.raises(VerificationError):
            ecdsa_signature(wrong + sized(b""))
    with pytest.raises(VerificationError, match="coordinate"):
        Public.parse(template[:-4] + sized(bytes(33)) + sized(b""))
    with pytest.raises(VerificationError, match="name algorithm"):
        NvPublic.parse(struct.pack(">IHIHH", 1, 4, 0, 0, 0))


def test_a_selection_is_named_as_the_tools_name_it():
    assert describe_selection({11: (0, 7), 4: (14,)}) == "sha256:0,7+sha1:14"
    assert describe_selection({0x27: ()}) == "0x27:"
    assert describe_selection({}) == "none"
