"""``trustlog``: one attested log by hand, and its verification anywhere with the public key alone."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

import click
from click.core import ParameterSource

from trustlog import software
from trustlog.cli.build import version_option
from trustlog.cli.common import DIRECTORY, Bytes32, opened, read_file, read_key, show
from trustlog.cli.completion import answer_shell, completion_command
from trustlog.cli.contract import CommandError, Exit, Output, example, output_option, run
from trustlog.cli.documents import Expectation, document, verify_document
from trustlog.cli.hostlog import STANDALONE_CONTEXT, HostLog
from trustlog.cli.lazy import LazyCommands
from trustlog.errors import MisuseError
from trustlog.log import AttestedLog
from trustlog.statements import NONCE_SIZE, U64_MAX, BackendKind
from trustlog.tpm.backend import TpmLog
from trustlog.tpm.chain import PCR_DEFAULT, PCR_MAX
from trustlog.tpm.enrol import create as create_tpm_log
from trustlog.tpm.folder import DEFAULT_ADDRESS
from trustlog.verification import LogIdentity

HONESTY = {
    "software": (
        "The software backend refuses damaged state, and a crash loses nothing that was signed. It does not "
        "protect against a thief of this directory (the sealing key lies in it), an old copy put back, or a "
        "host program that lies."
    ),
    "process": (
        "The process backend keeps this log from programs of other users, also from the replica that uses it. It "
        "does not protect against root, a thief of the disk, an old copy put back by root, or a replica that runs "
        "under the same user."
    ),
    "tpm": (
        "The TPM backend keeps the key and the head where root cannot reach them, and an old copy of this directory is "
        "refused. It does not protect against who copies a software TPM, or breaks a chip open. A reboot ends the log, "
        "unless it was closed before: trustlog tpm close."
    ),
}


_NONCE = click.option(
    "--nonce",
    type=Bytes32("nonce"),
    help="Your nonce, 64 hex digits, proves freshness; a new one if absent.",
)


_COMMANDS = LazyCommands(
    {
        "quote": "trustlog.cli.attestation:quote",
        "appraise": "trustlog.cli.attestation:appraise",
        "measure": "trustlog.cli.attestation:measure",
        "serve": "trustlog.cli.serve:serve",
        "tpm": "trustlog.cli.tpm:tpm_commands",
    }
)


@click.group(
    commands=_COMMANDS,
    epilog=example(
        "trustlog init mylog",
        'trustlog append mylog "first entry" -o json > append.json',
        "trustlog verify --key mylog/log.pub append.json",
    ),
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@version_option
def cli() -> None:
    """Keep an attested append-only log in a directory, and verify what such a log says."""


@cli.command(epilog=example("trustlog init mylog", "trustlog init --backend process mylog"))
@DIRECTORY
@click.option(
    "--backend",
    type=click.Choice(list(HONESTY)),
    default="software",
    show_default=True,
    help="process: only `trustlog serve` opens it; run this as the log's own user.",
)
@click.option(
    "--tpm", metavar="ADDRESS", help=f"tpm: its device, or socket of a software TPM.  [default: {DEFAULT_ADDRESS}]"
)
@click.option(
    "--pcr",
    type=click.IntRange(0, PCR_MAX),
    default=PCR_DEFAULT,
    show_default=True,
    help="tpm: the register that is the log's chain; nothing else may extend it.",
)
@output_option
def init(directory: Path, backend: str, tpm: str | None, pcr: int, output: Output) -> None:
    """Create an empty log with a new key in DIR, which must not exist. Its backend can never be changed."""
    if not directory.parent.is_dir():
        raise CommandError(f"{directory.parent} is not a directory", "create it first", Exit.USAGE, code="no-parent")
    is_pcr_given = click.get_current_context().get_parameter_source("pcr") is ParameterSource.COMMANDLINE
    if backend != "tpm" and (tpm is not None or is_pcr_given):
        raise click.UsageError("--tpm and --pcr are for --backend tpm")
    if backend == "tpm":
        made: AttestedLog | TpmLog = create_tpm_log(directory, address=tpm or DEFAULT_ADDRESS, pcr=pcr)
    else:
        made = software.create(directory, kind=BackendKind[backend.upper()])
    with made as log:
        data = {
            "created": str(directory),
            "log_id": log.log_id.hex(),
            "public_key": log.public_key.hex(),
            "public_key_file": str(directory / software.PUBLIC_KEY_FILE),
            "backend": log.kind.name.lower(),
            "protection": HONESTY[backend],
        }
        if isinstance(log, TpmLog) and any(log.config.pins.base):
            data["warning"] = (
                f"PCR {pcr} is not zero. Unless every boot leaves this value there, this log ends with the next "
                "reboot: if a log or another program extended it since the machine started, retire this one, reboot, "
                "and init again"
            )
    show(output, data)


@cli.command(
    epilog=example(
        'trustlog append mylog "first entry"',
        "printf 'a\\nb\\n' | trustlog append mylog - -o json > append.json",
    )
)
@DIRECTORY
@click.argument("text", default="-", metavar="[TEXT|-]")
@output_option
def append(directory: Path, text: str, output: Output) -> None:
    """Append TEXT as one entry, or with - every line of standard input as an entry of one group."""
    if text != "-":
        payloads = [text.encode("utf-8", "surrogateescape")]
    elif sys.stdin.isatty():
        raise click.UsageError("nothing to append: give a text, or lines on standard input")
    else:
        payloads = sys.stdin.buffer.read().removesuffix(b"\n").split(b"\n")
        payloads = [] if payloads == [b""] else payloads
    with opened(directory) as log:
        attestation, digests = HostLog(directory, log).append(payloads)
    show(output, document(attestation, digests=digests))


@cli.command(
    epilog=example(
        "trustlog lookup mylog 1",
        "trustlog lookup mylog 1 --nonce $(openssl rand -hex 32) -o json > lookup.json",
    )
)
@DIRECTORY
@click.argument("index", metavar="N", type=click.IntRange(1, U64_MAX))
@_NONCE
@output_option
def lookup(directory: Path, index: int, nonce: bytes | None, output: Output) -> None:
    """Have the log attest what stands at index N: assigned, unassigned, or forgotten."""
    with opened(directory) as log:
        attestation, payload = HostLog(directory, log).lookup(index, nonce or os.urandom(NONCE_SIZE))
    show(output, document(attestation, payload=payload))


@cli.command(epilog=example("trustlog end mylog -o json > end.json"))
@DIRECTORY
@_NONCE
@output_option
def end(directory: Path, nonce: bytes | None, output: Output) -> None:
    """Have the log attest where it ends now."""
    with opened(directory) as log:
        HostLog(directory, log)
        attestation = log.end(nonce=nonce or os.urandom(NONCE_SIZE), context=STANDALONE_CONTEXT)
    show(output, document(attestation))


@cli.command(epilog=example("trustlog truncate mylog 3"))
@DIRECTORY
@click.argument("index", metavar="N", type=click.IntRange(1, U64_MAX))
@output_option
def truncate(directory: Path, index: int, output: Output) -> None:
    """Have the log forget every entry below N, for ever. The host's payload file stays as it is."""
    with opened(directory) as log:
        HostLog(directory, log)
        if isinstance(log, TpmLog):
            raise MisuseError("a TPM attests no truncation: its host forgets what it likes")
        attestation = log.truncate(index, context=STANDALONE_CONTEXT)
    show(output, document(attestation))


@cli.command(epilog=example('trustlog verify --key log.pub lookup.json --nonce $NONCE --payload "first entry"'))
@click.option("--key", required=True, type=click.Path(path_type=Path), help="Public key file, log.pub.")
@click.argument("file", type=click.Path(path_type=Path, allow_dash=True))
@click.option("--nonce", type=Bytes32("nonce"), help="The nonce you asked with: without it, freshness is not proven.")
@click.option("--index", type=click.IntRange(1, U64_MAX), help="The index you asked for.")
@click.option(
    "--context",
    type=Bytes32("context"),
    default=STANDALONE_CONTEXT,
    help="Where the statement counts, 64 hex digits.  [default: logs kept by this program]",
)
@click.option("--payload", "payloads", multiple=True, help="Expected payload; once per entry, in order.")
@output_option
def verify(
    *,
    key: Path,
    file: Path,
    nonce: bytes | None,
    index: int | None,
    context: bytes,
    payloads: tuple[str, ...],
    output: Output,
) -> None:
    """Verify a JSON document that another command wrote (- reads standard input). Needs no log directory.

    Exit 1 with the reason if it does not prove what it says, or cannot prove what you ask: only lookup and end
    have a nonce, only lookup an index, only append and lookup payloads. Two append statements that contradict
    each other (a replica's evidence) are verified as what they are: proof that the log's trusted part is broken.
    """
    expected_payloads = [payload.encode("utf-8", "surrogateescape") for payload in payloads]
    expected = Expectation(context, nonce, index, expected_payloads)
    verifying_key, pins = read_key(key)
    said = verify_document(read_file(file), LogIdentity.published(verifying_key, pins), expected)
    fresh = {"fresh": nonce is not None} if "nonce" in said else {}
    show(output, {"verified": True, **fresh, **said})


cli.add_command(completion_command(cli, "trustlog"))


def main() -> NoReturn:
    """Entry point of the ``trustlog`` program."""
    answer_shell(cli, "trustlog")
    run(cli, prog_name="trustlog")


if __name__ == "__main__":
    main()
