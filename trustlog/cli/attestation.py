"""``trustlog quote``, ``appraise`` and ``measure``: remote attestation by hand."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import click
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from trustlog import appraisal
from trustlog.appraisal import tsm
from trustlog.appraisal.evidence import CERTIFICATE_BYTES_MAX, CERTIFICATES_MAX, EVIDENCE_BYTES_MAX, Evidence
from trustlog.cli.common import Bytes32, opened, read_file, read_key, show
from trustlog.cli.contract import CommandError, Exit, Output, example, grid, output_option
from trustlog.cli.hostlog import STANDALONE_CONTEXT
from trustlog.log import AttestedLog
from trustlog.measurement import manifest, measurement_of
from trustlog.service.client import RemoteLog, ServiceLostError
from trustlog.statements import NONCE_SIZE, BackendKind
from trustlog.tpm.backend import TpmLog
from trustlog.tpm.enrol import UNREADABLE

_KINDS = {kind.name.lower(): kind for kind in BackendKind}
_CONTEXT = click.option(
    "--context",
    type=Bytes32("context"),
    default=STANDALONE_CONTEXT,
    help="Where the evidence counts, 64 hex digits.  [default: logs kept by this program]",
)


@click.command(
    epilog=example(
        "trustlog quote mylog --nonce $NONCE -o json > evidence.json",
        "trustlog quote --socket /run/trustlog/log.socket --nonce $NONCE -o json > evidence.json",
    )
)
@click.argument("directory", metavar="[DIR]", required=False, type=click.Path(path_type=Path))
@click.option("--socket", type=click.Path(path_type=Path), help="Ask the service at this socket, instead of DIR.")
@click.option("--nonce", type=Bytes32("nonce"), help="The verifier's nonce, 64 hex digits; a new one if absent.")
@_CONTEXT
@click.option(
    "--tsm", "confidential", is_flag=True, help="Add the report of the confidential virtual machine we run in."
)
@click.option("--measured-boot", is_flag=True, help="Add the firmware's event log and IMA's list (TPM logs only).")
@click.option(
    "--certificate",
    "certificate_files",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Add a certificate of the chip's or the TPM's maker, PEM or DER; once per file.",
)
@output_option
def quote(
    *,
    directory: Path | None,
    socket: Path | None,
    nonce: bytes | None,
    context: bytes,
    confidential: bool,
    measured_boot: bool,
    certificate_files: tuple[Path, ...],
    output: Output,
) -> None:
    """Make evidence of which program holds the key of the log in DIR, for a verifier who chose a nonce."""
    certificates = tuple(one for path in certificate_files for one in _certificates(path))
    with _quotable(directory, socket) as log:
        evidence = appraisal.make_evidence(
            log,
            nonce=nonce or os.urandom(NONCE_SIZE),
            context=context,
            reporter=tsm.make_report if confidential else None,
            measured_boot=measured_boot,
        )
    document = _with_certificates(evidence, certificates).document()
    if output.format == "json":
        output.result(document, "")
        return
    show(
        output, {name: value for name, value in document.items() if not isinstance(value, dict) and name != "manifest"}
    )


@click.command(epilog=example("trustlog appraise --policy policy.toml evidence.json --nonce $NONCE --key log.pub"))
@click.option("--policy", "policy_file", required=True, type=click.Path(path_type=Path), help="The appraisal policy.")
@click.argument("file", type=click.Path(path_type=Path, allow_dash=True))
@click.option("--nonce", type=Bytes32("nonce"), help="The nonce you asked with: without it, freshness is not proven.")
@click.option("--key", type=click.Path(path_type=Path), help="The log's public key file: without it, any log passes.")
@_CONTEXT
@output_option
def appraise(
    *, policy_file: Path, file: Path, nonce: bytes | None, key: Path | None, context: bytes, output: Output
) -> None:
    """Judge evidence (- reads standard input) by a policy, offline: what was proven, by what root, and what was not.

    Exit 1 with the reason if the evidence fails the policy or does not prove what it says.
    """
    policy = appraisal.load_policy(policy_file)
    verifying_key, pins = (None, None) if key is None else read_key(key)
    evidence = appraisal.decode_evidence(read_file(file, EVIDENCE_BYTES_MAX))
    result = appraisal.appraise(
        evidence,
        policy,
        nonce=nonce,
        context=context,
        public_key=None if verifying_key is None else verifying_key.raw,
        now=datetime.now(UTC),
        pins=pins,
    )
    facts = result.facts()
    lines = [f"{name} {facts[name]}" for name in ("evidence", "kind", "log_id", "epoch", "measurement", "root")]
    lines += [f"proven {sentence}" for sentence in result.proven]
    lines += [f"NOT proven {sentence}" for sentence in result.not_proven]
    lines += [
        f"program {one.source} pcr {one.pcr} {one.algorithm}:{one.digest.hex()} {one.name or '-'}"
        f"{'' if one.name_proven else ' (name not proven)'}"
        for one in result.programs
    ]
    rows = [(word, rest) for word, _, rest in (_heading(line) for line in lines)]
    output.result({"appraised": True, **facts}, lines, grid(("", ""), rows))


@click.command(epilog=example("trustlog measure", "trustlog measure --manifest | sha256sum"))
@click.option("--backend", type=click.Choice(list(_KINDS)), default="software", show_default=True)
@click.option("--manifest", "only_manifest", is_flag=True, help="Print what the measurement is the SHA-256 of.")
@output_option
def measure(*, backend: str, only_manifest: bool, output: Output) -> None:
    """Measure the trusted part of this installation: its files and its interpreter's version."""
    text = manifest(_KINDS[backend])
    lines = text.decode("ascii").splitlines()
    measurement = measurement_of(text).hex()
    data = {"backend": backend, "measurement": measurement, "manifest": lines}
    output.result(data, lines if only_manifest else [f"measurement {measurement}", *lines])


@contextmanager
def _quotable(directory: Path | None, socket: Path | None) -> Iterator[AttestedLog | RemoteLog | TpmLog]:
    """Open whatever keeps the log: a service, a TPM, or this process."""
    if (directory is None) == (socket is None):
        raise click.UsageError("give either the log's directory or --socket")
    if socket is not None:
        try:
            with RemoteLog.connect(socket) as remote:
                yield remote
        except ServiceLostError as error:
            if isinstance(error.__cause__, PermissionError):
                raise CommandError(
                    f"{socket}: permission denied for user {os.geteuid()}",
                    "ask as the user that `trustlog serve --client-user` names, or as root",
                    Exit.USAGE,
                    code="os-error",
                ) from error
            raise CommandError(
                str(error), "is `trustlog serve` running?", Exit.UNREACHABLE, code="no-service"
            ) from error
    elif directory is not None:
        with opened(directory) as log:
            yield log


def _with_certificates(evidence: Evidence, certificates: tuple[bytes, ...]) -> Evidence:
    """Add certificates to the report that is there: a verifier needs the whole chain."""
    if not certificates:
        return evidence
    if evidence.tsm is not None:
        every = _at_most((*evidence.tsm.certificates, *certificates))
        return replace(evidence, tsm=replace(evidence.tsm, certificates=every))
    if evidence.tpm is not None:
        every = _at_most((*evidence.tpm.certificates, *certificates))
        return replace(evidence, tpm=replace(evidence.tpm, certificates=every))
    raise click.UsageError("--certificate belongs to a TPM's quote, or to the report that --tsm asks for")


def _at_most(certificates: tuple[bytes, ...]) -> tuple[bytes, ...]:
    if len(certificates) > CERTIFICATES_MAX:
        raise click.UsageError(f"{len(certificates)} certificates; evidence holds at most {CERTIFICATES_MAX}")
    return certificates


def _heading(line: str) -> tuple[str, str, str]:
    if line.startswith("NOT proven "):
        return "NOT proven", " ", line.removeprefix("NOT proven ")
    return line.partition(" ")


def _certificates(path: Path) -> list[bytes]:
    """Return the DER of the certificates in a file; CommandError if it holds none."""
    content = read_file(path, CERTIFICATES_MAX * CERTIFICATE_BYTES_MAX * 2)
    if b"-----BEGIN CERTIFICATE-----" not in content:
        return [content]
    try:
        # Parsed only to take the armour off: what they are worth is for the verifier.
        return [one.public_bytes(Encoding.DER) for one in x509.load_pem_x509_certificates(content)]
    except UNREADABLE as error:
        raise CommandError(f"{path} holds no proper certificates", "", Exit.USAGE, code="bad-certificate") from error
