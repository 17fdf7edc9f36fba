from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trustlog.support import (
    CONTEXT,
    NONCE,
    OTHER_CONTEXT,
    OTHER_NONCE,
    add,
    digests_of,
    fixed_key,
    flip,
    identity_of,
)
from trustlog import (
    Attestation,
    BackendKind,
    LogIdentity,
    Outcome,
    VerificationError,
    VerifyingKey,
    find_contradiction,
    in_memory,
    verify_append,
    verify_end,
    verify_lookup,
    verify_signature,
    verify_truncate,
)
from trustlog.keys import _CURVE_ORDER

LOG = in_memory(fixed_key())
IDENTITY = identity_of(LOG)
GROUP, DIGESTS = add(LOG, "one", "two", "three")
LOOKUP = LOG.lookup(2, nonce=NONCE, context=CONTEXT, group=(GROUP, DIGESTS))
END = LOG.end(nonce=NONCE, context=CONTEXT)
TRUNCATE = LOG.truncate(2, context=CONTEXT)


def check_append(attestation=GROUP, digests=DIGESTS, identity=IDENTITY, context=CONTEXT):
    return verify_append(identity, attestation, digests, context=context)


def check_lookup(attestation=LOOKUP, identity=IDENTITY, context=CONTEXT, nonce=NONCE, index=2):
    return verify_lookup(identity, attestation, context=context, nonce=nonce, index=index)


def check_end(attestation=END, identity=IDENTITY, context=CONTEXT, nonce=NONCE):
    return verify_end(identity, attestation, context=context, nonce=nonce)


def check_truncate(attestation=TRUNCATE, identity=IDENTITY, context=CONTEXT):
    return verify_truncate(identity, attestation, context=context)


CHECKS = [check_append, check_lookup, check_end, check_truncate]
ATTESTATIONS = [GROUP, LOOKUP, END, TRUNCATE]


def refused(reason, check, *args, **kwargs):
    with pytest.raises(VerificationError) as caught:
        check(*args, **kwargs)
    assert caught.value.reason == reason, caught.value


def test_honest_statements_verify():
    assert (check_append().first, check_append().last) == (1, 3)
    assert check_lookup().outcome is Outcome.ASSIGNED
    assert check_lookup().digest == DIGESTS[1]
    assert check_end().head == LOG.head
    assert check_truncate().low == 2


@pytest.mark.parametrize(("check", "attestation"), list(zip(CHECKS, ATTESTATIONS, strict=True)))
def test_every_flipped_bit_is_refused(check, attestation):
    for bit in range(8 * len(attestation.statement)):
        with pytest.raises(VerificationError):
            check(Attestation(flip(attestation.statement, bit), attestation.signature))
    for bit in range(8 * len(attestation.signature)):
        refused("bad-signature", check, Attestation(attestation.statement, flip(attestation.signature, bit)))


def test_every_flipped_bit_of_every_digest_is_refused():
    for position, digest in enumerate(DIGESTS):
        for bit in range(256):
            digests = [*DIGESTS[:position], flip(digest, bit), *DIGESTS[position + 1 :]]
            refused("wrong-head", check_append, digests=digests)


@settings(deadline=None, max_examples=60)
@given(st.data(), st.lists(st.binary(min_size=32, max_size=32), min_size=1, max_size=40))
def test_no_byte_of_a_group_can_change(data, digests):
    log = in_memory(fixed_key())
    attestation = log.append(digests, context=CONTEXT)
    parts = [attestation.statement, attestation.signature, *digests]
    position = data.draw(st.integers(0, len(parts) - 1))
    offset = data.draw(st.integers(0, len(parts[position]) - 1))
    value = data.draw(st.integers(0, 255).filter(lambda byte: byte != parts[position][offset]))
    parts[position] = parts[position][:offset] + bytes([value]) + parts[position][offset + 1 :]
    with pytest.raises(VerificationError):
        check_append(Attestation(parts[0], parts[1]), parts[2:])
    check_append(attestation, digests)


@pytest.mark.parametrize("check", CHECKS)
def test_identity_kind_epoch_and_context_are_compared(check):
    key = IDENTITY.key
    other = VerifyingKey.from_bytes(in_memory(fixed_key(2)).public_key)
    refused("wrong-log", check, identity=LogIdentity(other, BackendKind.SOFTWARE))
    refused("wrong-kind", check, identity=LogIdentity(key, BackendKind.TPM))
    refused("wrong-kind", check, identity=LogIdentity(key, frozenset({BackendKind.TPM, BackendKind.PROCESS})))
    refused("wrong-epoch", check, identity=LogIdentity(key, BackendKind.SOFTWARE, 1))
    refused("wrong-context", check, context=OTHER_CONTEXT)
    check(identity=LogIdentity(key, frozenset(BackendKind)))


@pytest.mark.parametrize("check", CHECKS)
def test_no_statement_passes_as_another(check):
    own = ATTESTATIONS[CHECKS.index(check)]
    for attestation in ATTESTATIONS:
        if attestation is not own:
            refused("wrong-statement", check, attestation)
            refused("bad-signature", check, Attestation(own.statement, attestation.signature))


def test_counts_and_sizes_of_digests():
    refused("wrong-count", check_append, digests=DIGESTS[:2])
    refused("wrong-count", check_append, digests=[*DIGESTS, DIGESTS[0]])
    refused("wrong-count", check_append, digests=[])
    refused("malformed", check_append, digests=[DIGESTS[0][:31], *DIGESTS[1:]])
    refused("malformed", check_append, digests=[DIGESTS[0] + DIGESTS[1], b"", DIGESTS[2]])
    refused("wrong-head", check_append, digests=[DIGESTS[1], DIGESTS[0], DIGESTS[2]])


def test_a_group_beyond_the_limit_is_refused_whoever_signed_it():
    log = in_memory(fixed_key())
    digests = digests_of("x") * 1025
    # An honest log refuses this too; here its own limit is taken away.
    state = log._state
    fields = (0, 1, 1025, 1, bytes(32), state.head, CONTEXT)
    attestation = log._sign(log._append_statement(type(state)(*fields)))
    refused("wrong-count", check_append, attestation, digests)


def test_answers_to_other_questions():
    refused("wrong-nonce", check_lookup, nonce=OTHER_NONCE)
    refused("wrong-nonce", check_end, nonce=OTHER_NONCE)
    refused("wrong-nonce", check_end, nonce=b"")
    refused("wrong-range", check_lookup, index=3)


def test_public_keys():
    raw = LOG.public_key
    key = VerifyingKey.from_bytes(raw)
    assert (key.raw, key.log_id) == (raw, LOG.log_id)
    assert key == IDENTITY.key
    assert hash(key) == hash(IDENTITY.key)
    assert key != raw
    assert LOG.log_id.hex()[:16] in repr(key)
    compressed = bytes([2 + raw[64] % 2]) + raw[1:33]
    for bad in (b"", raw[:64], raw + b"\0", compressed, b"\x06" + raw[1:], flip(raw, 300), b"\4" + bytes(64)):
        refused("malformed", VerifyingKey.from_bytes, bad)


def test_signatures_out_of_range():
    r, s = END.signature[:32], END.signature[32:]
    order = _CURVE_ORDER.to_bytes(32, "big")
    for bad in (b"", END.signature[:63], END.signature + b"\0", bytes(64), bytes(32) + s, r + bytes(32)):
        refused("bad-signature", verify_signature, LOG.public_key, bad, END.statement)
    for bad in (order + s, r + order, b"\xff" * 64):
        refused("bad-signature", verify_signature, LOG.public_key, bad, END.statement)
    verify_signature(LOG.public_key, END.signature, END.statement)
    refused("malformed", verify_signature, b"", END.signature, END.statement)


def twins():
    return in_memory(fixed_key()), in_memory(fixed_key())


def test_one_history_is_no_contradiction():
    a, b = twins()
    one, two, three = add(a, "1", "2"), add(a, "3"), add(a, "4")
    for left in (one, two, three):
        for right in (one, two, three):
            assert find_contradiction(IDENTITY, *left, *right) is None
    same, _ = add(b, "1", "2")
    assert find_contradiction(IDENTITY, *one, same, one[1]) is None, "another signature of one statement"


def test_contradictions_are_found_in_either_order():
    a, b = twins()
    groups_a = [add(a, "1", "2"), add(a, "3")]
    groups_b = [add(b, "1", "x"), add(b, "3")]
    overlap = find_contradiction(IDENTITY, *groups_a[0], *groups_b[0])
    assert overlap == "index 1 was attested twice: in 1 … 2 and in 1 … 2"
    fork = "two histories: the head at 2 was attested with two values"
    assert find_contradiction(IDENTITY, *groups_a[0], *groups_b[1]) == fork
    assert find_contradiction(IDENTITY, *groups_b[1], *groups_a[0]) == fork


def test_other_bounds_or_another_context_are_a_contradiction():
    a, b = twins()
    whole = add(a, "1", "2")
    add(b, "1")
    assert "index 2" in find_contradiction(IDENTITY, *add(b, "2"), *whole)
    c = in_memory(fixed_key())
    elsewhere = c.append(whole[1], context=OTHER_CONTEXT)
    assert "attested twice" in find_contradiction(IDENTITY, *whole, elsewhere, whole[1])


def test_a_forged_group_contradicts_nothing():
    a, b = twins()
    attestation, digests = add(b, "x")
    forged = Attestation(attestation.statement, bytes(63) + b"\1")
    refused("bad-signature", find_contradiction, IDENTITY, *add(a, "1"), forged, digests)
