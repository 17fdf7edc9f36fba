"""`trustlog-replica member`: who the members are, and changing them while the cluster runs."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.console import Group as Lines
from rich.text import Text

from replica.cli.operating import CLUSTER, Operator, cluster_file, deadline_option, operated, refreshed
from replica.cli.options import PROGRAM, Address
from replica.cluster.clusterfile import ClusterFile, check_unique, load_cluster_file, log_kind_label
from replica.cluster.home import SETTINGS_NAME, STORE_NAME
from replica.cluster.memberlists import (
    OWN_NAME,
    certificates_of,
    check_room,
    encode_place,
    load_present_cluster,
    members_path,
    places_of,
    seat_of,
    set_aside,
    write_links,
)
from replica.cluster.provision import PublicPart, load_public_part
from replica.cluster.strict_toml import ConfigError
from replica.core.envelope import RefusedError
from replica.core.members import MemberList, Seat, check_change
from replica.operations.asking import Answer, Outcome, ask_all
from replica.operations.changing import ChangeError, change, missing_of, refresh
from trustlog import log_id
from trustlog.cli.contract import CommandError, Exit, Output, example, grid, key_values, output_option

DEADLINE_S = 60.0

OPERATED = operated(DEADLINE_S, "the new list must be in force")
REASON = click.option("--reason", default="", help="A few words that stay with the list for ever.")


@click.group(
    "member",
    short_help="List, replace, renew, move, add and remove replicas of a running cluster.",
    epilog=example("trustlog-replica member list my-cluster"),
)
def member_commands() -> None:
    """Change who the members of a running cluster are: ordered like any operation, proven to whoever asks later.

    CLUSTER is cluster.toml or its directory. What followed cluster.toml is kept beside it, in cluster.members.toml:
    give that file to your clients too.
    """


@member_commands.command(
    "list", short_help="Say who the members are.", epilog=example("trustlog-replica member list my-cluster --update")
)
@CLUSTER
@click.option(
    "--update",
    is_flag=True,
    help="Write what is learnt into cluster.members.toml; one that does not follow cluster.toml is set aside.",
)
@deadline_option(DEADLINE_S, "the replicas must have answered")
@output_option
def list_command(*, cluster: Path, update: bool, deadline_s: float, output: Output) -> None:
    """Ask the replicas which lists of members followed, verify that, and say who the members are now.

    A list that is agreed and not yet in force is named too. Where nothing is ordered any more, because whoever asked
    for it gave up waiting, the same command again pushes on.
    """
    file = cluster_file(cluster)
    present = _updated(file, deadline_s) if update else refreshed(file, deadline_s)
    answers = asyncio.run(ask_all(present))
    _show(output, present, answers)


@member_commands.command(
    "replace",
    short_help="Put a replica with a new log in the place of one.",
    epilog=example(
        "trustlog-replica member replace my-cluster my-cluster/new-2/replica-2.public.toml",
    ),
)
@OPERATED
@click.argument("public_file", metavar="PUBLIC.toml", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@REASON
@output_option
def replace_command(*, operator: Operator, public_file: Path, reason: str, output: Output) -> None:
    """Replace the replica whose number PUBLIC.toml has: it lost its log, its TPM or its machine, or gets new keys.

    Make PUBLIC.toml, with the new replica's folder, by keygen before, and run that folder after. Nothing that the old
    log says counts after the change.
    """
    present = operator.present
    part = load_public_part(public_file)
    if part.place.number >= present.genesis.n:
        raise ChangeError(
            f"{public_file}: there is no replica {part.place.number}; for more of them: {PROGRAM} member add"
        )
    if _is_member(public_file, part, present):
        _in_force(output, operator, f"replica {part.place.number} has the log of {public_file}", [public_file])
        return
    seats = [seat_of(present, number) for number in range(present.genesis.n)]
    seats[part.place.number] = _seat(part, present)
    _change(output, operator, seats, reason, [public_file])


@member_commands.command(
    "renew",
    short_help="Give a replica another TLS certificate.",
    epilog=example("trustlog-replica member renew my-cluster my-cluster/replica-1/renewal.public.toml"),
)
@OPERATED
@click.argument("public_file", metavar="PUBLIC.toml", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@REASON
@output_option
def renew_command(*, operator: Operator, public_file: Path, reason: str, output: Output) -> None:
    """Give a replica, with the log and the address that it has, the certificate in PUBLIC.toml.

    `trustlog-replica keys renew-certificate` made it, with its key, in the replica's folder. The replica goes over to
    it by itself when the change is in force; from then on nobody takes the old one.
    """
    present, part = operator.present, load_public_part(public_file)
    number = part.place.number
    if number >= present.genesis.n:
        raise ChangeError(
            f"{public_file}: there is no replica {number}: {operator.file} has 0 to {present.genesis.n - 1}"
        )
    place, member = present.replicas[number], present.genesis.members[number]
    if replace(part.member, since=member.since) != member:
        raise ChangeError(
            f"{public_file}: this is another log than replica {number}'s, and only its certificate can be renewed; for "
            f"a new log: {PROGRAM} member replace"
        )
    der = part.place.certificate_der
    if der == place.certificate_der:
        more = f"for another one, {PROGRAM} keys renew-certificate makes it"
        _in_force(output, operator, f"replica {number} has the certificate of {public_file}; {more}", [])
        return
    if part.place.address != place.address:
        raise ChangeError(
            f"{public_file}: says {part.place.address}, and replica {number} is at {place.address} now: write the file "
            f"again ({PROGRAM} keys renew-certificate), or move the replica first ({PROGRAM} member move)"
        )
    if der in certificates_of(load_cluster_file(operator.file), present, number):
        raise ChangeError(
            f"{public_file}: replica {number} had this certificate before, and has its key no more: make another one "
            f"({PROGRAM} keys renew-certificate)"
        )
    renewed = replace(place, certificate_der=der)
    check_unique([renewed if other.number == number else other for other in present.replicas], str(public_file))
    seats = [seat_of(present, other) for other in range(present.genesis.n)]
    seats[number] = Seat(member, encode_place(renewed))
    _change(output, operator, seats, reason, [])


@member_commands.command(
    "move",
    short_help="Give a replica another address.",
    epilog=example("trustlog-replica member move my-cluster --number 2 --address 192.0.2.14:7100"),
)
@click.option("--number", type=click.IntRange(min=0), required=True, help="Of the replica that moves.")
@click.option("--address", type=Address(), required=True, help="Where it will be reached.")
@OPERATED
@REASON
@output_option
def move_command(*, operator: Operator, number: int, address: tuple[str, int], reason: str, output: Output) -> None:
    """Give a replica, with the log and the keys that it has, another address.

    It listens there by itself when the change is in force, unless its replica.toml says `listen`.
    """
    present = operator.present
    if number >= present.genesis.n:
        raise ChangeError(f"there is no replica {number}: {operator.file} has 0 to {present.genesis.n - 1}")
    moved = replace(present.replicas[number], host=address[0], port=address[1])
    if moved == present.replicas[number]:
        _in_force(output, operator, f"replica {number} is at {moved.address}", [])
        return
    seats = [seat_of(present, other) for other in range(present.genesis.n)]
    seats[number] = Seat(present.genesis.members[number], encode_place(moved))
    _change(output, operator, seats, reason, [])


@member_commands.command(
    "add",
    short_help="Add two replicas.",
    epilog=example("trustlog-replica member add my-cluster new-3/replica-3.public.toml new-4/replica-4.public.toml"),
)
@OPERATED
@click.argument(
    "public_files", metavar="PUBLIC.toml PUBLIC.toml", nargs=2, type=click.Path(path_type=Path, exists=True)
)
@REASON
@output_option
def add_command(*, operator: Operator, public_files: tuple[Path, ...], reason: str, output: Output) -> None:
    """Add the two replicas of these public files, numbered n and n + 1: one more fault is borne from then on."""
    present = operator.present
    files = sorted(((load_public_part(path), path) for path in public_files), key=lambda one: one[0].place.number)
    parts = [part for part, _ in files]
    n = present.genesis.n
    if all(_is_member(path, part, present) for part, path in files):
        numbers = " and ".join(str(part.place.number) for part in parts)
        _in_force(output, operator, f"replicas {numbers} have the logs of these files", public_files)
        return
    if [part.place.number for part in parts] != [n, n + 1]:
        raise ChangeError(f"the two to be added must have the numbers {n} and {n + 1}; make them with {PROGRAM} keygen")
    seats = [seat_of(present, number) for number in range(n)] + [_seat(part, present) for part in parts]
    _change(output, operator, seats, reason, public_files)


@member_commands.command(
    "remove",
    short_help="Remove the two replicas with the highest numbers.",
    epilog=example("trustlog-replica member remove my-cluster 3 4"),
)
@OPERATED
@click.argument("numbers", metavar="NUMBER NUMBER", nargs=2, type=click.IntRange(min=0))
@REASON
@output_option
def remove_command(*, operator: Operator, numbers: tuple[int, int], reason: str, output: Output) -> None:
    """Remove the two replicas with these numbers, the highest two: one fault less is borne from then on.

    Leave them running until `member list` shows that the others have gone over; then stop them for good. The same
    command again removes no others: it says that these are gone.
    """
    present = operator.present
    n, (first, second) = present.genesis.n, sorted(numbers)
    if n <= first < second < max(genesis.n for genesis in present.lists):
        _in_force(output, operator, f"replicas {first} and {second} are members no more", [])
        return
    if (first, second) != (n - 2, n - 1):
        raise ChangeError(
            f"replicas {first} and {second} cannot be removed: members are numbered from 0 on, so those with the two "
            f"highest numbers go, which are {n - 2} and {n - 1}; for another log in the place of one: {PROGRAM} member "
            "replace"
        )
    seats = [seat_of(present, number) for number in range(n - 2)]
    _change(output, operator, seats, reason, [])


def _is_member(public_file: Path, part: PublicPart, present: ClusterFile) -> bool:
    """Say whether a public file's replica is a member; ChangeError if it is, with another address or certificate."""
    number = part.place.number
    if number >= present.genesis.n:
        return False
    place, member = present.replicas[number], present.genesis.members[number]
    if replace(part.member, since=member.since) != member:
        return False
    if (part.place.address, part.place.certificate_der) != (place.address, place.certificate_der):
        raise ChangeError(
            f"{public_file}: replica {number} has this log already, and another address or certificate than the file "
            f"says, which {PROGRAM} member move and {PROGRAM} member renew change"
        )
    return True


def _seat(part: PublicPart, present: ClusterFile) -> Seat:
    return Seat(replace(part.member, since=present.genesis.list_number + 1), encode_place(part.place))


def _updated(file: Path, deadline_s: float) -> ClusterFile:
    """Return what `refreshed` does, and keep it beside the cluster file.

    If what is there does not follow the cluster file, that one alone is begun with; the other is kept by another name.
    """
    known, beside = load_cluster_file(file), members_path(file)
    trouble = None
    try:
        known = load_present_cluster(file)
    except ConfigError as error:
        trouble = str(error)
    present = asyncio.run(refresh(known, deadline_s))
    if trouble is not None:
        click.echo(f"{trouble}\nit was not used, and is kept as {_set_aside(file, beside)}", err=True)
    if present.links:
        _keep(file, present)
    return present


def _set_aside(file: Path, beside: Path) -> Path:
    try:
        return set_aside(beside)
    except OSError as error:
        raise CommandError(
            f"{beside}: cannot be given another name: {error.strerror}",
            f"move it away, then: {PROGRAM} member list {file} --update",
        ) from error


def _keep(file: Path, present: ClusterFile) -> Path:
    path = members_path(file)
    try:
        write_links(path, present.links)
    except OSError as error:
        raise CommandError(
            f"{path}: cannot be written: {error.strerror}", f"write it later: {PROGRAM} member list {file} --update"
        ) from error
    return path


def _change(
    output: Output, operator: Operator, seats: Sequence[Seat], reason: str, public_files: Sequence[Path]
) -> None:
    present, key = operator.present, operator.key
    wanted = MemberList(present.genesis.list_number + 1, 0, tuple(seats), reason)
    check_room(present)
    try:
        check_change(present.genesis, wanted, {})
    except RefusedError as error:
        raise ChangeError(str(error)) from error
    check_unique(places_of(seats), "the list to be")
    answers = asyncio.run(ask_all(present))
    alive = [answer.number for answer in answers if answer.outcome is Outcome.ANSWERED]
    staying = [member.number for member in wanted.members if member in present.genesis.members]
    after = wanted.genesis(present.genesis)
    trouble = missing_of(present, staying, alive, max(present.genesis.quorum, after.quorum))
    if trouble is not None:
        raise CommandError(trouble, "see trustlog-replica status", Exit.NEGATIVE, code="not-enough-alive")
    done = asyncio.run(
        change(present, key, wanted, deadline_s=operator.deadline_s, say=lambda text: click.echo(text, err=True))
    )
    _done(output, operator.file, done, public_files, is_changed=True)


def _in_force(output: Output, operator: Operator, what: str, public_files: Sequence[Path]) -> None:
    """Say that nothing is left to be ordered, and write what a command that was interrupted did not come to."""
    click.echo(f"nothing is changed: {what}", err=True)
    _done(output, operator.file, operator.present, public_files, is_changed=False)


def _done(output: Output, file: Path, done: ClusterFile, public_files: Sequence[Path], *, is_changed: bool) -> None:
    data: dict[str, Any] = {"changed": is_changed, "list": done.genesis.list_number, "after": done.genesis.base}
    steps = [_hand_over(public_file, done) for public_file in public_files]
    if done.links:
        data["members_file"] = str(_keep(file, done))
        steps.append(
            f"give {data['members_file']} to your clients, beside their cluster.toml; those that run learn it by "
            "themselves"
        )
    plain = [f"{name}={data[name]}" for name in ("list", "after", "members_file") if name in data]
    data["next"] = steps
    output.result(data, plain, Lines(key_values({k: data[k] for k in ("list", "after")}), *map(Text, steps)))


def _hand_over(public_file: Path, done: ClusterFile) -> str:
    """Give the new replica the chain of lists, if its folder is here; return what is to be done next.

    One that has run keeps its own: that says under which list it has worked.
    """
    folder = public_file.parent
    if not (folder / SETTINGS_NAME).exists():
        return f"copy the members file into the new replica's folder as {OWN_NAME}, then {PROGRAM} run it"
    has_run = (folder / OWN_NAME).exists() and (folder / STORE_NAME).exists()
    if done.links and not has_run:
        write_links(folder / OWN_NAME, done.links)
    return f"next: {PROGRAM} run {folder}"


def _show(output: Output, present: ClusterFile, answers: Sequence[Answer]) -> None:
    genesis = present.genesis
    rows: list[dict[str, Any]] = []
    for place, member, answer in zip(present.replicas, genesis.members, answers, strict=True):
        said = answer.report.get("members")
        number = said.get("list") if isinstance(said, dict) else None
        rows.append(
            {
                "number": place.number,
                "address": place.address,
                "since_list": member.since,
                "log_backend": log_kind_label(member.log_kind),
                "log_id": log_id(member.log_public_key).hex(),
                "certificate_sha256": place.fingerprint.hex(),
                "works_under_list": number if type(number) is int else None,
                "problem": answer.problem,
            }
        )
    ends = _agreed_end(present, answers)
    following = None if ends is None else {"list": genesis.list_number + 1, "after": ends}
    data = {
        "list": genesis.list_number,
        "after": genesis.base,
        "f": genesis.f,
        "following": following,
        "replicas": rows,
    }
    names = ("number", "address", "since_list", "log_backend", "log_id", "works_under_list", "problem")
    plain = [" ".join("-" if row[name] in {None, ""} else str(row[name]) for name in names) for row in rows]
    table = grid(
        ["replica", "address", "since list", "log", "log id", "works under", "problem"],
        [[f"{row[name]}"[:16] if name == "log_id" else _word(row[name]) for name in names] for row in rows],
        whole=("address", "log id"),
    )
    if ends is not None:
        text = f"list {genesis.list_number + 1} of members is agreed and not yet in force; it will be after slot {ends}"
        click.echo(text, err=True)
    summary = {"list": genesis.list_number, "in force after slot": genesis.base, "f": genesis.f}
    output.result(data, plain, Lines(key_values(summary), table))


def _agreed_end(present: ClusterFile, answers: Sequence[Answer]) -> int | None:
    """Return the last slot of the present list, if f + 1 of its replicas say alike that there is one."""
    said = [answer.report.get("members") for answer in answers]
    under = [one for one in said if isinstance(one, dict) and one.get("list") == present.genesis.list_number]
    ends = Counter(one["ends"] for one in under if type(one.get("ends")) is int)
    return next((end for end, count in ends.items() if count >= present.genesis.quorum), None)


def _word(value: object) -> str:
    return "-" if value in {None, ""} else str(value)
