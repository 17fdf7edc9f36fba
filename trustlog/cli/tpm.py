"""``trustlog tpm``: enrolment of a TPM's log in four steps, its end before a reboot, and anchors.

The steps exchange JSON files; each is checked by whoever receives it. Keys of verifiers are PEM or log.pub-like hex.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
from cryptography import x509

from trustlog.cli.contract import CommandError, Exit, Output, example, key_values, output_option
from trustlog.cli.hostlog import HostLog
from trustlog.errors import MisuseError, VerificationError
from trustlog.hashing import HASH_SIZE
from trustlog.keys import SIGNATURE_SIZE
from trustlog.sealed import Files, lock_directory, write_new
from trustlog.statements import NONCE_SIZE
from trustlog.tpm import anchors
from trustlog.tpm.backend import ForeignValueError, RestartedError
from trustlog.tpm.chain import dump_public_file, initial_head, read_public_file
from trustlog.tpm.client import Signed, Tpm
from trustlog.tpm.credential import Credential
from trustlog.tpm.enrol import (
    UNREADABLE,
    Answer,
    Challenge,
    EnrolmentRequest,
    accept,
    answer,
    challenge,
    request,
    retire,
)
from trustlog.tpm.folder import CONFIG_FILE, PUBLIC_KEY_FILE, TpmConfig
from trustlog.tpm.opening import check_key, open_log, read_state
from trustlog.tpm.sealing import SEALED_FILE
from trustlog.tpm.structures import Public

FILE_SIZE_MAX = 16 * 2**20
_DIRECTORY = click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
_VERIFIER = click.option(
    "--verifier", required=True, type=click.Path(path_type=Path), help="Public key, hex: of who allows a new index."
)
_INDEX = click.option(
    "--index", default=hex(anchors.INDEX_DEFAULT), show_default=True, help="NV index, an owner's, in hex."
)


@click.group("tpm", epilog=example("trustlog init --backend tpm mylog", "trustlog tpm status mylog"))
def tpm_commands() -> None:
    """Enrol a log that a TPM 2.0 keeps, close it before a reboot, anchor its head."""


@tpm_commands.command(epilog=example("trustlog tpm status mylog"))
@_DIRECTORY
@output_option
def status(directory: Path, output: Output) -> Exit:
    """Open the log in DIR where its TPM stands, and say where that is.

    Exit 1 for a log that has ended: what its folder says of it, and why it says nothing more.
    """
    try:
        data = _status(directory)
    except (RestartedError, ForeignValueError) as error:
        _show(output, {**_of_folder(directory), "ended": str(error)})
        return Exit.NEGATIVE
    _show(output, data)
    return Exit.OK


def _status(directory: Path) -> dict[str, object]:
    with open_log(directory) as log:
        pins, automatic = log.config.pins, log.anchors
        return {
            "tpm": log.config.address,
            "pcr": pins.pcr,
            "base": pins.base.hex(),
            "resets": log.epoch >> 32,
            "restarts": log.epoch & 0xFFFFFFFF,
            "last": log.last,
            "head": log.head.hex(),
            "anchored_to": (None if automatic is None else automatic.anchored_to) or None,
            "anchor_trouble": None if automatic is None else automatic.trouble,
        }


def _of_folder(directory: Path) -> dict[str, object]:
    """Return what the folder of a log says that the TPM does not go on with."""
    config, state = TpmConfig.load(directory / CONFIG_FILE), read_state(directory)
    return {
        "tpm": config.address,
        "pcr": config.pins.pcr,
        "base": config.pins.base.hex(),
        "resets": state.epoch >> 32,
        "restarts": state.epoch & 0xFFFFFFFF,
        "last": state.last,
    }


@tpm_commands.command("request", epilog=example("trustlog tpm request mylog -o json > request.json"))
@_DIRECTORY
@output_option
def request_command(directory: Path, output: Output) -> None:
    """Step 1, on the log's machine: show which TPM it is, and the log's key."""
    config = TpmConfig.load(directory / CONFIG_FILE)
    with Tpm.open(config.address) as tpm:
        asked = request(tpm, config)
    _show(
        output,
        {
            "endorsement_key": asked.endorsement_key.hex(),
            "certificate": asked.certificate.hex(),
            "key": asked.key.hex(),
        },
    )


@tpm_commands.command(
    "challenge",
    epilog=example("trustlog tpm challenge request.json --ca maker.pem --secret secret.json -o json > challenge.json"),
)
@click.argument("request_file", metavar="REQUEST", type=click.Path(path_type=Path))
@click.option("--ca", type=click.Path(path_type=Path), help="PEM: certificates of TPM makers, roots and intermediate.")
@click.option("--any-tpm", is_flag=True, help="Take a TPM whose maker nobody vouches for: a software TPM.")
@click.option("--secret", required=True, type=click.Path(path_type=Path), help="New file for what stays here.")
@output_option
def challenge_command(*, request_file: Path, ca: Path | None, any_tpm: bool, secret: Path, output: Output) -> None:
    """Step 2, elsewhere: check the TPM's certificate and the log's key, and encrypt a secret for it."""
    if (ca is None) != any_tpm:
        raise click.UsageError("give --ca with the makers' certificates, or --any-tpm")
    try:
        roots = [] if ca is None else x509.load_pem_x509_certificates(ca.read_bytes())
    except UNREADABLE as error:
        raise CommandError(f"{ca}: {error}", "give certificates in PEM", Exit.USAGE, code="bad-certificates") from error
    sent = challenge(_request(_load(request_file)), roots, dt.datetime.now(dt.UTC))
    kept = {"secret": sent.secret.hex(), "asked": sent.asked.hex(), "endorsed": not any_tpm}
    write_new(Files(), secret, json.dumps(kept).encode(), 0o600)
    _show(output, {"blob": sent.credential.blob.hex(), "encrypted": sent.credential.secret.hex()})


@tpm_commands.command("answer", epilog=example("trustlog tpm answer mylog challenge.json -o json > answer.json"))
@_DIRECTORY
@click.argument("challenge_file", metavar="CHALLENGE", type=click.Path(path_type=Path))
@output_option
def answer_command(directory: Path, challenge_file: Path, output: Output) -> None:
    """Step 3, on the log's machine, before its first entry: decrypt the secret, quote the register."""
    sent = _load(challenge_file)
    with open_log(directory) as log:
        if log.last:
            raise MisuseError(f"the log has {log.last} entries: what is pinned is the register before the first one")
        config = log.config
    with Tpm.open(config.address) as tpm:
        said = answer(tpm, config, Credential(_bytes(sent, "blob"), _bytes(sent, "encrypted")))
    quote = {"attest": said.quote.attest.hex(), "signature": said.quote.signature.hex()}
    _show(output, {"secret": said.secret.hex(), "pcr": said.pcr, "base": said.base.hex(), **quote})


@tpm_commands.command(
    "accept",
    epilog=example("trustlog tpm accept request.json answer.json --secret secret.json --out log.pub"),
)
@click.argument("request_file", metavar="REQUEST", type=click.Path(path_type=Path))
@click.argument("answer_file", metavar="ANSWER", type=click.Path(path_type=Path))
@click.option("--secret", required=True, type=click.Path(path_type=Path), help="The file that step 2 made.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="New file: the key and what is pinned.")
@output_option
def accept_command(*, request_file: Path, answer_file: Path, secret: Path, out: Path, output: Output) -> None:
    """Step 4, elsewhere: check the answer, and write down the log's key with what is pinned: what verifiers need."""
    asked, said, kept = _request(_load(request_file)), _load(answer_file), _load(secret)
    sent = Challenge(_bytes(kept, "secret"), Credential(b"", b""), _bytes(kept, "asked", 32))
    quote = Signed(_bytes(said, "attest"), _bytes(said, "signature"))
    pins = accept(asked, sent, Answer(_bytes(said, "secret"), _number(said, "pcr"), _bytes(said, "base"), quote))
    key = Public.parse(asked.key).key
    write_new(Files(), out, dump_public_file(key, pins), 0o644)
    endorsed = "by its maker's certificate" if kept.get("endorsed") is True else "not checked (--any-tpm)"
    data = {"public_key_file": str(out), "public_key": key.hex(), "pcr": pins.pcr, "base": pins.base.hex()}
    _show(output, {"accepted": True, **data, "pins": pins.encode().hex(), "endorsed": endorsed})


@tpm_commands.command(epilog=example("trustlog tpm close mylog"))
@_DIRECTORY
@output_option
def close(directory: Path, output: Output) -> None:
    """Say CLOSE, right before the machine is switched off: then the log goes on after the next boot.

    For a log that this program keeps; for a replica's there is trustlog-replica close.
    """
    with open_log(directory) as log:
        HostLog(directory, log).close_epoch(log)
        _show(output, {"closed_at": log.last})


@tpm_commands.command("retire", epilog=example("trustlog tpm retire oldlog --yes"))
@_DIRECTORY
@click.option("--yes", is_flag=True, required=True, help="The key is destroyed, and the log says nothing more.")
@output_option
def retire_command(*, directory: Path, yes: bool, output: Output) -> None:  # noqa: ARG001 - it must be given
    """Remove the key of a log that has ended from its TPM. A new log, pinned anew, takes its place: trustlog init."""
    with ExitStack() as stack:
        stack.callback(os.close, lock_directory(directory))
        config = TpmConfig.load(directory / CONFIG_FILE)
        key, _ = read_public_file(directory / PUBLIC_KEY_FILE)
        tpm = stack.enter_context(Tpm.open(config.address))
        check_key(tpm, config, key)  # a later log may have been given the handle
        retire(tpm, config)
    _show(output, {"retired": str(directory), "handle": f"{config.handle:#010x}"})


@tpm_commands.command(epilog=example("trustlog tpm reseal replica-0/log --measurement $MEASUREMENT"))
@_DIRECTORY
@click.option(
    "--measurement",
    metavar="HEX",
    help="Of the trustlog that comes next: trustlog measure --backend tpm prints it there.",
)
@click.option("--new-key", is_flag=True, help="Make a new key, for an empty store: the old one was lost.")
@output_option
def reseal(*, directory: Path, measurement: str | None, new_key: bool, output: Output) -> None:
    """Before trustlog or Python is upgraded: seal the store's key for the program that comes next as well.

    For a replica with a TPM's log and --encrypt-store, which must have been stopped. Without --measurement the key is
    sealed for this program alone, which takes it from those before.
    """
    successor = None if measurement is None else _bytes({"measurement": measurement}, "measurement", HASH_SIZE)
    with open_log(directory) as log:
        if new_key:
            log.create_store_key()
        if not new_key or successor is not None:
            log.reseal_store_key(successor)
        _show(output, {"resealed": str(directory / SEALED_FILE), "also_for": measurement or "no other program"})


@tpm_commands.command("anchor-begin", epilog=example("trustlog tpm anchor-begin mylog --verifier verifier.pub"))
@_DIRECTORY
@_VERIFIER
@_INDEX
@output_option
def anchor_begin(*, directory: Path, verifier: Path, index: str, output: Output) -> None:
    """Make the NV index for a log's anchors: prints what the verifier must sign, and reads the signature (hex)."""

    def sign(message: bytes) -> bytes:
        print(f"sign (ECDSA, P-256, SHA-256): {message.hex()}", file=sys.stderr, flush=True)  # noqa: T201 - a question
        try:
            signature = bytes.fromhex(sys.stdin.readline().strip())
        except ValueError:
            signature = b""
        if len(signature) != SIGNATURE_SIZE:
            raise CommandError(
                "the answer is no signature", "r and s, 128 hex digits", Exit.USAGE, code="bad-signature"
            )
        return signature

    with open_log(directory) as log:
        anchorage = anchors.Anchorage(log.client, _place(log.log_id, verifier, index), directory)
        anchorage.begin(initial_head(log.config.pins), sign)
    _show(output, {"anchored_to": 0, "index": index})


@tpm_commands.command(epilog=example("trustlog tpm anchor mylog --verifier verifier.pub -o json > anchors.json"))
@_DIRECTORY
@_VERIFIER
@_INDEX
@click.option("--nonce", help="Of who asks, 64 hex digits.")
@output_option
def anchor(*, directory: Path, verifier: Path, index: str, nonce: str | None, output: Output) -> None:
    """Anchor the log's head, and have the TPM certify all anchors; of a log that has ended, certify them only.

    A log that has an index anchors its head by itself, with an append every five minutes (later more seldom) and when
    it is closed.
    """
    asked = os.urandom(NONCE_SIZE) if nonce is None else _bytes({"nonce": nonce}, "nonce", NONCE_SIZE)
    try:
        with open_log(directory) as log:
            anchorage = anchors.Anchorage(log.client, _place(log.log_id, verifier, index), directory)
            anchorage.anchor(log.last, log.head)
            proof = anchorage.certify(log.config.handle, asked)
    except (RestartedError, ForeignValueError):
        # The log says nothing more; what was anchored still stands.
        config, (key, _) = TpmConfig.load(directory / CONFIG_FILE), read_public_file(directory / PUBLIC_KEY_FILE)
        with Tpm.open(config.address) as tpm:
            anchorage = anchors.Anchorage(tpm, _place(key.log_id, verifier, index), directory)
            proof = anchorage.certify(config.handle, asked)
    listed = [{"last": one.last, "head": one.head.hex()} for one in anchorage.anchors]
    said = {"anchored_to": listed[-1]["last"], "anchors": listed, "nonce": asked.hex()}
    _show(output, {**said, "attest": proof.attest.hex(), "signature": proof.signature.hex()})


@tpm_commands.command(
    "verify-anchors",
    epilog=example("trustlog tpm verify-anchors anchors.json --key log.pub --verifier verifier.pub --nonce $NONCE"),
)
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path))
@click.option("--key", required=True, type=click.Path(path_type=Path), help="log.pub, from enrolment.")
@_VERIFIER
@_INDEX
@click.option("--nonce", help="The nonce that you asked with; without it, freshness is not proven.")
@output_option
def verify_anchors(*, file: Path, key: Path, verifier: Path, index: str, nonce: str | None, output: Output) -> None:
    """Verify which heads of a log are anchored. Needs no TPM."""
    content = _load(file)
    log_key, pins = read_public_file(key)
    if pins is None:
        raise CommandError(f"{key} is not a TPM log's", "give the file of its enrolment", Exit.USAGE, code="bad-key")
    listed = content.get("anchors")
    if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
        raise VerificationError("malformed", "the document has no proper 'anchors'")
    said = [anchors.Anchor(_number(one, "last"), _bytes(one, "head", 32)) for one in listed]
    asked = content if nonce is None else {"nonce": nonce}
    proof = Signed(_bytes(content, "attest"), _bytes(content, "signature"))
    place = _place(log_key.log_id, verifier, index)
    anchors.verify_anchors(place, log_key, initial_head(pins), said, proof, _bytes(asked, "nonce", NONCE_SIZE))
    fresh = nonce is not None
    _show(output, {"verified": True, "fresh": fresh, "anchored_to": said[-1].last, "head": said[-1].head.hex()})


def _place(log_id: bytes, verifier: Path, index: str) -> anchors.AnchorIndex:
    key, _ = read_public_file(verifier)
    try:
        return anchors.AnchorIndex(int(index, 16), log_id, key)
    except ValueError as error:
        raise click.UsageError(f"{index} is no NV index: give one like {anchors.INDEX_DEFAULT:#x}") from error


def _load(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        raw = stream.read(FILE_SIZE_MAX + 1)
    try:
        content = json.loads(raw) if len(raw) <= FILE_SIZE_MAX else None
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise VerificationError("malformed", f"{path} is not a JSON object of at most {FILE_SIZE_MAX} bytes")
    return content


def _bytes(content: Mapping[str, Any], name: str, size: int | None = None) -> bytes:
    try:
        value = bytes.fromhex(content[name])
    except (KeyError, ValueError, TypeError) as error:
        raise VerificationError("malformed", f"the document has no proper {name!r}") from error
    if size is not None and len(value) != size:
        raise VerificationError("malformed", f"{name!r} has {len(value)} bytes instead of {size}")
    return value


def _number(content: Mapping[str, Any], name: str) -> int:
    value = content.get(name)
    if type(value) is not int or not 0 <= value < 2**64:
        raise VerificationError("malformed", f"the document has no proper {name!r}")
    return value


def _request(content: Mapping[str, Any]) -> EnrolmentRequest:
    return EnrolmentRequest(*(_bytes(content, name) for name in ("endorsement_key", "certificate", "key")))


def _show(output: Output, data: Mapping[str, object]) -> None:
    shown = {name: value for name, value in data.items() if not isinstance(value, list)}
    words = {None: "-", True: "yes", False: "no"}
    shown = {
        name: words[value] if value is None or value is True or value is False else value
        for name, value in shown.items()
    }
    output.result(dict(data), [f"{name} {value}" for name, value in shown.items()], key_values(shown))
