"""Evidence that rests on the log's own key: what it proves, that it says so, and that nothing in it can be changed."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.trustlog.appraisal.support import policy, refused
from tests.trustlog.support import CONTEXT, NONCE, OTHER_CONTEXT, OTHER_NONCE, fixed_key, flip
from trustlog import BackendKind, MisuseError, VerificationError, create, in_memory, measurement
from trustlog.appraisal import (
    Evidence,
    EvidenceLevel,
    QuotedPcrs,
    ShownAnchors,
    TpmEvidence,
    TsmEvidence,
    appraise,
    decode_evidence,
    make_evidence,
)
from trustlog.appraisal.evidence import EVIDENCE_BYTES_MAX

LOG = in_memory(fixed_key())
EVIDENCE = make_evidence(LOG, nonce=NONCE, context=CONTEXT)
KNOWN = {"nonce": NONCE, "context": CONTEXT, "public_key": LOG.public_key}


def test_what_is_proven_and_what_not():
    result = appraise(EVIDENCE, policy(), **KNOWN)
    assert result.levels == {EvidenceLevel.SELF_ASSERTED}
    assert (result.kind, result.public_key, result.epoch, result.fresh) == (
        BackendKind.SOFTWARE,
        LOG.public_key,
        0,
        True,
    )
    assert result.measurement == measurement.own_measurement(BackendKind.SOFTWARE)
    assert result.root == "the log's own key (self-asserted)"
    assert any("a program that lies can name any measurement" in one for one in result.not_proven)
    assert "accepted_measurements" in result.not_proven[-1]
    assert result.summary() == f"self-asserted, measured {result.measurement.hex()[:8]}…"
    assert not any("freshness" in one or "whose log" in one for one in result.not_proven)


def test_what_the_verifier_does_not_know_is_not_proven():
    result = appraise(EVIDENCE, policy(), nonce=None)
    assert not result.fresh
    assert any("freshness" in one for one in result.not_proven)
    assert any("whose log" in one for one in result.not_proven)


def test_a_log_in_a_process_of_its_own_is_self_asserted_too(tmp_path):
    with create(tmp_path / "log", kind=BackendKind.PROCESS) as log:
        result = appraise(make_evidence(log, nonce=NONCE, context=CONTEXT), policy(), nonce=NONCE)
    assert result.levels == {EvidenceLevel.SELF_ASSERTED}
    assert any("process of its own" in one for one in result.not_proven)


@pytest.mark.parametrize(
    ("expected", "reason"),
    [
        ({"nonce": OTHER_NONCE}, "wrong-nonce"),
        ({"context": OTHER_CONTEXT}, "wrong-context"),
        ({"public_key": in_memory().public_key}, "wrong-log"),
    ],
)
def test_what_differs_is_refused(expected, reason):
    assert refused(appraise, EVIDENCE, policy(), **(KNOWN | expected)) == reason


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f'accepted_measurements = ["{"ab" * 32}"]', "wrong-measurement"),
        ('accepted_kinds = ["process", "tpm"]', "wrong-kind"),
        (f'log_keys = ["{in_memory().public_key.hex()}"]', "wrong-log"),
        ('minimum_evidence = "hardware"', "insufficient-evidence"),
        ('minimum_evidence = "tpm"', "insufficient-evidence"),
    ],
)
def test_what_the_policy_does_not_accept_is_refused(text, reason):
    assert refused(appraise, EVIDENCE, policy(text), **KNOWN) == reason


def test_what_the_policy_accepts():
    text = f'accepted_measurements = ["{LOG.measurement.hex()}"]\nlog_keys = ["{LOG.public_key.hex()}"]'
    result = appraise(EVIDENCE, policy(text), nonce=NONCE)
    assert not any("accepted_measurements" in one or "whose log" in one for one in result.not_proven)


def test_evidence_that_rests_on_nothing_says_so():
    bare = replace(EVIDENCE, signature=b"")
    assert json.loads(bare.encode())["rests_on"] == "nothing"
    assert refused(appraise, bare, policy(), **KNOWN) == "bad-signature"


def test_a_software_log_has_no_measured_boot():
    with pytest.raises(MisuseError, match="only a log of the TPM backend"):
        make_evidence(LOG, nonce=NONCE, context=CONTEXT, measured_boot=True)


def test_a_foreign_manifest_is_refused_and_a_missing_one_is_said():
    assert refused(appraise, replace(EVIDENCE, manifest=b"other"), policy(), **KNOWN) == "wrong-manifest"
    result = appraise(replace(EVIDENCE, manifest=b""), policy(), **KNOWN)
    assert any("which files" in one for one in result.not_proven)


def test_every_flipped_bit_is_refused():
    for bit in range(len(EVIDENCE.statement) * 8):
        with pytest.raises(VerificationError):
            appraise(replace(EVIDENCE, statement=flip(EVIDENCE.statement, bit)), policy(), nonce=None)
    for bit in range(len(EVIDENCE.signature) * 8):
        changed = replace(EVIDENCE, signature=flip(EVIDENCE.signature, bit))
        assert refused(appraise, changed, policy(), **KNOWN) == "bad-signature"


def test_the_document_round_trips():
    tpm = TpmEvidence(
        QuotedPcrs(b"quote", b"s" * 64, {0: bytes(32), 23: b"\xff" * 32}),
        (b"event",),
        b"boot",
        b"ima",
        QuotedPcrs(b"other", b"t" * 64, {0: bytes(20)}),
        b"ak",
        b"ek",
        (b"der",),
        ShownAnchors(0x01000000, b"r" * 80, b"attest", b"u" * 64),
    )
    for evidence in (
        EVIDENCE,
        replace(EVIDENCE, tsm=TsmEvidence("sev_guest", b"report", (b"a", b"b"))),
        Evidence(EVIDENCE.statement, b"", b"", tpm=tpm),
    ):
        assert decode_evidence(evidence.encode()) == evidence
    content = json.loads(EVIDENCE.encode())
    assert content["rests_on"] == "self-asserted: the log key's own signature"
    assert content["measurement"] == LOG.measurement.hex()


QUOTED = {"quote": "", "signature": "", "pcrs": {}}
ANCHORS = {"index": 0x01FFFFFF, "records": "", "attest": "", "signature": ""}
WHOLE_TPM = {
    "sha256": QUOTED,
    "programs": [],
    "boot_log": "",
    "ima_list": "",
    "attestation_key": "",
    "endorsement_key": "",
    "certificates": [],
}
WRONG_MEMBERS = [
    {"schema_version": 2},
    {"schema_version": "1"},
    {"attestation": None},
    {"attestation": {"statement": EVIDENCE.statement.hex()}},
    {"attestation": {"statement": "00" * 220, "signature": ""}},
    {"attestation": {"statement": EVIDENCE.statement.hex().upper(), "signature": ""}},
    {"attestation": {"statement": " " + EVIDENCE.statement.hex(), "signature": ""}},
    {"manifest": "=="},
    {"manifest": "YQ=/"},
    {"manifest": "YR=="},
    {"manifest": 3},
    {"tsm": {}},
    {"tsm": {"provider": "x" * 65, "report": "", "certificates": []}},
    {"tsm": {"provider": "a\nb", "report": "", "certificates": []}},
    {"tsm": {"provider": "a", "report": "", "certificates": [""] * 9}},
    {"tsm": {"provider": "a", "report": "", "certificates": [3]}},
    {"tpm": 3},
    {"tpm": WHOLE_TPM | {"sha256": QUOTED | {"pcrs": {"24": "00" * 32}}}},
    {"tpm": WHOLE_TPM | {"sha256": QUOTED | {"pcrs": {"01": "00" * 32}}}},
    {"tpm": WHOLE_TPM | {"sha256": QUOTED | {"pcrs": {"1": "00" * 20}}}},
    {"tpm": WHOLE_TPM | {"programs": [""] * 257}},
    {"tpm": WHOLE_TPM | {"programs": ["00" * 257]}},
    {"tpm": WHOLE_TPM | {"anchors": ANCHORS | {"records": "YQ=="}}},
    {"tpm": WHOLE_TPM | {"anchors": ANCHORS | {"index": 0x02000000}}},
    {"tpm": WHOLE_TPM | {"anchors": ANCHORS | {"index": True}}},
]


def test_the_members_are_right_but_for_one_thing():
    for members in ({"tpm": WHOLE_TPM}, {"tpm": WHOLE_TPM | {"anchors": ANCHORS}}):
        decode_evidence(json.dumps(json.loads(EVIDENCE.encode()) | members).encode())


@pytest.mark.parametrize("members", WRONG_MEMBERS, ids=str)
def test_wrong_members_are_refused(members):
    document = json.loads(EVIDENCE.encode()) | members
    assert refused(decode_evidence, json.dumps(document).encode()) == "malformed"


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"3", b"\xff", b'{"a": 1, "a": 1}', b"[" * 100_000])
def test_what_is_no_document_is_refused(data):
    assert refused(decode_evidence, data) == "malformed"


def test_what_is_too_large_is_refused_before_it_is_read():
    assert refused(decode_evidence, b"[" * (EVIDENCE_BYTES_MAX + 1)) == "malformed"
    assert refused(decode_evidence, EVIDENCE.encode(), len(EVIDENCE.encode()) - 1) == "malformed"


@given(st.data())
def test_a_changed_document_is_refused_or_says_the_same(data):
    """Every byte: what passes with a change is the evidence that was made, or one with a member that nobody reads."""
    document = EVIDENCE.encode()
    position = data.draw(st.integers(0, len(document) - 1))
    changed = bytearray(document)
    changed[position] = data.draw(st.integers(0, 255))
    try:
        decoded = decode_evidence(bytes(changed))
        appraise(decoded, policy(), **KNOWN)
    except VerificationError:
        return
    assert decoded in (EVIDENCE, replace(EVIDENCE, manifest=b""))


@pytest.mark.parametrize(
    ("unit", "members"), [(b"{},", b""), (b"[],", b""), (b"0,", b""), (b'"",', b""), ("\U0001f600".encode(), b'"')]
)
def test_a_document_of_the_full_size_takes_no_more_memory_than_its_text(unit, members):
    opening, end = b'{"x": ' + (members or b"["), (members or b"0]") + b"}"
    data = opening + unit * ((EVIDENCE_BYTES_MAX - len(opening) - len(end)) // len(unit)) + end
    tracemalloc.start()
    try:
        with pytest.raises(VerificationError) as caught:
            decode_evidence(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert caught.value.reason == "malformed"
    assert peak < 2**20


def test_a_long_text_that_nobody_reads_takes_a_few_times_its_size():
    data = b'{"x": "' + b"a" * (EVIDENCE_BYTES_MAX - 9) + b'"}'
    tracemalloc.start()
    try:
        with pytest.raises(VerificationError):
            decode_evidence(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * EVIDENCE_BYTES_MAX
