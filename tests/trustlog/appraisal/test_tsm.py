"""The Linux tsm interface, against a simulated configfs folder; and reports for other statements."""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.trustlog.appraisal.support import SimulatedTsm, certificate_table, policy, refused
from tests.trustlog.support import CONTEXT, NONCE, OTHER_CONTEXT, OTHER_NONCE, fixed_key
from trustlog import MisuseError, QuoteStatement, in_memory
from trustlog.appraisal import appraise, decode_evidence, make_evidence, tsm
from trustlog.appraisal.tsm import ConfigFs, TsmError, make_report, parse_certificate_table, report_data

LOG = in_memory(fixed_key())
SAID = QuoteStatement.decode(LOG.quote(nonce=NONCE, context=CONTEXT).statement)


def test_the_inblob_by_hand():
    configuration = hashlib.sha256(b"\x01\x01" + CONTEXT + LOG.measurement).digest()
    expected = b"trustlog/tsm\0\0\0\0" + NONCE + LOG.public_key + bytes(8) + configuration
    assert report_data(SAID) == hashlib.sha512(expected).digest()


def test_the_inblob_binds_every_field():
    other = in_memory()
    changed = [
        replace(SAID, nonce=OTHER_NONCE),
        replace(SAID, context=OTHER_CONTEXT),
        replace(SAID, epoch=1),
        replace(SAID, measurement=bytes(32)),
        replace(SAID, kind=2),
        QuoteStatement.decode(other.quote(nonce=NONCE, context=CONTEXT).statement),
    ]
    assert len({report_data(one) for one in [SAID, *changed]}) == 7


def test_a_report_is_made(tmp_path):
    folder = SimulatedTsm(lambda inblob: b"signed:" + inblob, auxiliary=certificate_table(b"one", b"two"))
    made = make_report(b"i" * 64, tmp_path, folder)
    assert (made.provider, made.report, made.certificates) == ("sev_guest", b"signed:" + b"i" * 64, (b"one", b"two"))
    assert folder.made == []


def test_other_providers_have_no_certificate_table(tmp_path):
    folder = SimulatedTsm(lambda inblob: inblob, provider="tdx_guest", auxiliary=b"whatever")
    assert make_report(bytes(64), tmp_path, folder).certificates == ()
    assert make_report(bytes(64), tmp_path, SimulatedTsm(lambda inblob: inblob, missing=["auxblob"])).certificates == ()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"fail": "make"}, MisuseError, "no confidential virtual machine"),
        ({"fail": "outblob"}, TsmError, "outblob: Input/output error: the platform gave no report"),
        ({"missing": ["provider"]}, TsmError, "provider: No such file"),
        ({"interfere": 1}, TsmError, "another program wrote to this request"),
        ({"auxiliary": b"short"}, TsmError, "has no end"),
    ],
)
def test_trouble_is_named_and_the_request_removed(tmp_path, options, error, message):
    folder = SimulatedTsm(lambda inblob: inblob, **options)
    with pytest.raises(error, match=message):
        make_report(bytes(64), tmp_path, folder)
    assert folder.made == []


def test_answers_are_bounded(tmp_path):
    with pytest.raises(TsmError, match="more than 65536 bytes"):
        make_report(bytes(64), tmp_path, SimulatedTsm(lambda _: bytes(70_000)))
    folder = SimulatedTsm(lambda inblob: inblob)
    folder.generation = "x"
    with pytest.raises(TsmError, match="not a number"):
        tsm._generation(tmp_path, folder)


def test_the_real_files_are_used_as_documented(tmp_path):
    files = ConfigFs()
    files.make(tmp_path / "r")
    (tmp_path / "r" / "inblob").write_bytes(b"")
    files.write(tmp_path / "r" / "inblob", b"x" * 64)
    assert files.read(tmp_path / "r" / "inblob", 10) == b"x" * 11
    (tmp_path / "r" / "inblob").unlink()
    files.remove(tmp_path / "r")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(MisuseError, match="configfs"):
        make_report(bytes(64), tmp_path / "nothing here")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (b"g" * 16 + bytes(4) + b"\x01\0\0\0" + bytes(23), "has no end"),
        (b"g" * 16 + b"\xff\xff\xff\xff" + b"\x01\0\0\0" + bytes(24), "outside of itself"),
        (b"g" * 16 + bytes(8) + bytes(24), "outside of itself"),
        (certificate_table(*[b"c"] * 9), "more than 8"),
    ],
)
def test_damaged_tables(table, message):
    with pytest.raises(TsmError, match=message):
        parse_certificate_table(table)


@given(st.binary(max_size=200))
def test_arbitrary_tables_never_escape_as_another_error(table):
    with contextlib.suppress(TsmError):
        parse_certificate_table(table)


def test_reports_that_nobody_asked_to_judge_are_said_not_to_be():
    evidence = make_evidence(
        LOG, nonce=NONCE, context=CONTEXT, reporter=lambda inblob: make_report(inblob, files=SimulatedTsm(lambda b: b))
    )
    assert decode_evidence(evidence.encode()) == evidence
    assert evidence.tsm.report == report_data(SAID)
    result = appraise(evidence, policy(), nonce=NONCE)
    assert result.level_names == "self-asserted"
    assert any("names no [sev-snp] roots" in one for one in result.not_proven)
    roots = f'[sev-snp]\nroots = ["{"00" * 32}"]'
    assert refused(appraise, evidence, policy(roots), nonce=NONCE) == "snp-malformed"
    foreign = replace(evidence, tsm=replace(evidence.tsm, provider="tdx_guest"))
    assert refused(appraise, foreign, policy(roots), nonce=NONCE) == "wrong-provider"
