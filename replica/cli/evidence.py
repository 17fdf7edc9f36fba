"""`trustlog-replica evidence`: what a replica keeps against others, and what a file of evidence proves.

Verifying needs the cluster file and nothing else: whose log it is, and which keys count, comes from there alone.
"""

from pathlib import Path
from typing import Any

import click

from replica.cluster.clusterfile import ClusterFile
from replica.cluster.home import EVIDENCE_NAME, SIGNING_KEY_NAME
from replica.cluster.identities import identity_of
from replica.cluster.memberlists import load_present_cluster
from replica.cluster.pbft import NO_LOGS
from replica.cluster.strict_toml import ConfigError, read_bounded
from replica.core.evidence import CLAIM_BYTES_MAX, EVIDENCE_BYTES_MAX, Kind, decode_claim
from replica.core.genesis import Member
from replica.core.layout import LayoutError
from replica.core.proving import UnprovenError, examine_under
from replica.shell.evidence import FILE_NAME, EvidenceFolder
from replica.shell.verify import EnvelopeVerifier, GroupVerifier
from trustlog import VerificationError, log_id
from trustlog.cli.contract import CommandError, Exit, Output, example, grid, key_values, output_option
from trustlog.cli.documents import DOCUMENT_SIZE_MAX, Expectation, verify_document

FORKED = "forked"


@click.group(
    "evidence",
    short_help="What a replica keeps against others, and what it proves.",
    epilog=example(
        "trustlog-replica evidence list my-cluster/replica-0",
        "trustlog-replica evidence verify FILE --cluster my-cluster/cluster.toml",
    ),
)
def evidence_commands() -> None:
    """List and verify evidence: who broke which rule, shown to anybody who has the cluster file."""


@evidence_commands.command(
    "list",
    short_help="List the evidence in a replica's folder.",
    epilog=example("trustlog-replica evidence list my-cluster/replica-0"),
)
@click.argument("folder", metavar="DIR/replica-N", type=click.Path(path_type=Path, exists=True, file_okay=False))
@output_option
def list_command(*, folder: Path, output: Output) -> None:
    """List the evidence in a replica's folder DIR/replica-N, running or not. Nothing is verified here.

    With -o plain, each file is a line of five fields with a space between them: log; rule; index of the entry, or -;
    how it is shown (entry, replay, checkpoint, fork, bare: not self-contained, damaged); file.
    """
    if (folder / SIGNING_KEY_NAME).exists():
        raise ConfigError(f"{folder}: {NO_LOGS}")
    files = [_listed(path) for path in EvidenceFolder(folder / EVIDENCE_NAME).files()]
    names = ("log", "rule", "index", "kind", "file")
    rows = [["-" if file[name] is None else file[name] for name in names] for file in files]
    plain = [" ".join(map(str, row)) for row in rows]
    shown = grid(names, rows) if rows else "no evidence"
    output.result({"evidence": files}, plain, shown)


@evidence_commands.command(
    "verify",
    short_help="Say what a file of evidence proves.",
    epilog=example(
        "trustlog-replica evidence verify log-2-3f9a51c07be2d684-entry-57-wrong-view.evidence "
        "--cluster my-cluster/cluster.toml"
    ),
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--cluster",
    "cluster_path",
    type=click.Path(path_type=Path),
    required=True,
    help="The cluster file, cluster.toml: whose keys count. With the newest cluster.members.toml beside it.",
)
@output_option
def verify_command(*, file: Path, cluster_path: Path, output: Output) -> None:
    """Say what a file of evidence proves: which replica broke which rule with which entry of its log.

    It names that log's id, and the lists of members that it was in: a replica that was replaced since has another log.

    Exit 1 with the reason if it proves nothing. Needs no network and no key but the public ones in the cluster file.
    """
    cluster = load_present_cluster(cluster_path)
    raw = read_bounded(file, max(EVIDENCE_BYTES_MAX, DOCUMENT_SIZE_MAX))
    data = _proven_fork(raw, cluster) if raw[:1] == b"{" else _proven(raw, cluster)
    text = f"log {data['log']} of replica {data['log']} {data['what']}; {_whose(data, cluster)}"
    output.result({"proven": True, **data}, text, key_values({"proven": text}))


def _proven(raw: bytes, cluster: ClusterFile) -> dict[str, Any]:
    try:
        claim, text, member = examine_under(raw, cluster.spans, GroupVerifier, EnvelopeVerifier())
    except UnprovenError as error:
        raise _nothing(str(error)) from error
    what = f"broke rule {claim.rule} at index {claim.index}: {text}"
    found = {"log": claim.log, "rule": claim.rule, "index": claim.index, "text": text, "what": what}
    return found | _tenure(member, cluster)


def _proven_fork(raw: bytes, cluster: ClusterFile) -> dict[str, Any]:
    """Find whose key signed both statements, as the cluster file says: of its kind, and with what is pinned there."""
    reason = "its statements are of no log of this cluster"
    for member in dict.fromkeys(member for genesis in cluster.lists for member in genesis.members):
        try:
            said = verify_document(raw, identity_of(member), Expectation(bytes(32)))
        except VerificationError as error:
            reason = reason if error.reason == "wrong-log" else str(error)
            continue
        if "contradiction" not in said:
            raise _nothing("it is a statement of that log, and contradicts nothing")
        text = str(said["contradiction"])
        what = f"attested two histories, so its trusted part is broken: {text}"
        found = {"log": member.number, "rule": FORKED, "index": None, "text": text, "what": what}
        return found | _tenure(member, cluster)
    raise _nothing(reason)


def _tenure(member: Member, cluster: ClusterFile) -> dict[str, Any]:
    """Return which log that is, and the lists of members that it was in."""
    lists = [genesis.list_number for genesis in cluster.lists if member in genesis.members]
    return {"log_id": log_id(member.log_public_key).hex(), "lists": lists}


def _whose(data: dict[str, Any], cluster: ClusterFile) -> str:
    first, last = data["lists"][0], data["lists"][-1]
    if last == cluster.genesis.list_number:
        return f"log id {data['log_id']}, a member since list {first}"
    lists = f"list {first}" if first == last else f"lists {first} to {last}"
    return f"log id {data['log_id']}, a member of {lists} and of none since"


def _nothing(reason: str) -> CommandError:
    hint = "do not act on this file; ask for the original, and check that the cluster file is the right one"
    return CommandError(f"proves nothing: {reason}", hint, Exit.NEGATIVE, code="not-proven")


def _listed(path: Path) -> dict[str, Any]:
    match = FILE_NAME.fullmatch(path.name)
    about: dict[str, Any] = {"file": str(path), "bytes": path.stat().st_size}
    if match is not None and match["fork"]:
        return {"log": int(match["log"]), "rule": FORKED, "index": None, "kind": "fork", **about}
    try:
        with path.open("rb") as stream:
            kind, _, claim = decode_claim(stream.read(CLAIM_BYTES_MAX))
    except (OSError, LayoutError):
        return {"log": None, "rule": None, "index": None, "kind": "damaged", **about}
    return {"log": claim.log, "rule": claim.rule, "index": claim.index, "kind": Kind(kind).name.lower(), **about}
