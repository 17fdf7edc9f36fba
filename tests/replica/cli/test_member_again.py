"""The same `member` command once more, whatever came of the first one; and lists that do not follow cluster.toml."""

import json
from dataclasses import replace

import pytest

from replica.cli import member, operating
from replica.cli.main import main
from replica.cluster.memberlists import members_path, places_of, read_links, seat_of, write_links
from replica.cluster.provision import init_cluster, keygen, load_public_part
from replica.core.members import MemberList, Seat
from replica.operations.asking import Answer, Outcome
from tests.support.ports import free_port


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "c"


@pytest.fixture
def seven(directory):
    return init_cluster(directory, f=3, base_port=0)


def followed(cluster, seats, reason=""):
    """The cluster under one more list; what would prove it is nothing to these commands."""
    genesis = cluster.genesis
    made = MemberList(genesis.list_number + 1, 100 * (genesis.list_number + 1), tuple(seats), reason).genesis(genesis)
    links = (*cluster.links, b"link %d" % made.list_number)
    return replace(cluster, genesis=made, replicas=places_of(seats), lists=(*cluster.lists, made), links=links)


def first_seats(cluster, count):
    return [seat_of(cluster, number) for number in range(count)]


@pytest.fixture
def call(capsys, monkeypatch):
    """Return what gives a command to a cluster whose replicas show these lists; `ordered` is what it asked for."""

    def prepared(present, *words):
        ordered = []

        async def changed(cluster, key, wanted, **_):
            ordered.append(wanted)
            return followed(cluster, wanted.seats)

        async def answers(cluster):
            return [Answer(place, Outcome.ANSWERED, report={}) for place in cluster.replicas]

        monkeypatch.setattr(operating, "refreshed", lambda file, deadline_s: present)
        monkeypatch.setattr(member, "change", changed)
        monkeypatch.setattr(member, "ask_all", answers)
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in ("member", *words, "-o", "json")])
        out, err = capsys.readouterr()
        return ended.value.code, json.loads(out) if out else {}, " ".join((out + err).split()), ordered

    return prepared


def test_remove_names_whom_and_removes_no_others_when_it_is_given_again(call, directory, seven):
    code, said, _, ordered = call(seven, "remove", directory, 6, 5)
    assert (code, said["changed"], len(ordered[0].seats)) == (0, True, 5)
    five = followed(seven, first_seats(seven, 5))
    members_path(directory / "cluster.toml").unlink()
    code, said, err, ordered = call(five, "remove", directory, 5, 6)
    assert (code, said["changed"], said["list"], ordered) == (0, False, 1, [])
    assert "nothing is changed: replicas 5 and 6 are members no more" in err
    assert read_links(members_path(directory / "cluster.toml")) == five.links
    three = followed(five, first_seats(seven, 3))
    for pair in ((3, 4), (5, 6)):
        assert call(three, "remove", directory, *pair)[1]["changed"] is False


@pytest.mark.parametrize("pair", [(3, 4), (4, 6), (5, 5), (7, 8), (6, 7), (0, 1)])
def test_only_those_with_the_highest_numbers_can_go(call, directory, seven, pair):
    code, _, err, ordered = call(seven, "remove", directory, *pair)
    assert (code, ordered) == (2, [])
    assert "highest numbers go, which are 5 and 6" in err


def test_remove_that_does_not_say_whom_is_used_wrongly(call, directory, seven):
    assert call(seven, "remove", directory)[0] == 2


def added(directory, cluster, *numbers):
    """Public files of new replicas, and the seats that they get."""
    files = [keygen(directory / f"new-{number}", number, "127.0.0.1", free_port()) for number in numbers]
    parts = [load_public_part(path) for path in files]
    since = cluster.genesis.list_number + 1
    return files, [Seat(replace(part.member, since=since), member.encode_place(part.place)) for part in parts]


def test_add_again_writes_what_the_new_replicas_need(call, directory):
    three = init_cluster(directory, base_port=0)
    files, seats = added(directory, three, 3, 4)
    five = followed(three, [*first_seats(three, 3), *seats])
    code, said, err, ordered = call(five, "add", directory, *reversed(files))
    assert (code, said["changed"], ordered) == (0, False, [])
    assert "nothing is changed: replicas 3 and 4 have the logs of these files" in err
    for file in files:
        assert read_links(file.parent / "members.toml") == five.links
    assert read_links(members_path(directory / "cluster.toml")) == five.links
    # One of them has run since, and keeps the list under which it has worked.
    write_links(files[0].parent / "members.toml", [b"its own"])
    (files[0].parent / "store.sqlite").touch()
    write_links(files[1].parent / "members.toml", [b"a copy"])
    call(five, "add", directory, *files)
    assert read_links(files[0].parent / "members.toml") == (b"its own",)
    assert read_links(files[1].parent / "members.toml") == five.links


def test_replace_again(call, directory):
    three = init_cluster(directory, base_port=0)
    files, seats = added(directory, three, 2)
    after = followed(three, [*first_seats(three, 2), *seats])
    code, said, err, ordered = call(after, "replace", directory, files[0])
    assert (code, said["changed"], ordered) == (0, False, [])
    assert "nothing is changed: replica 2 has the log of" in err
    assert read_links(files[0].parent / "members.toml") == after.links
    assert said["members_file"] == str(members_path(directory / "cluster.toml"))
    moved = followed(
        after, [*first_seats(after, 2), Seat(seats[0].member, member.encode_place(replace(after.replicas[2], port=9)))]
    )
    code, _, err, ordered = call(moved, "replace", directory, files[0])
    assert (code, ordered) == (2, [])
    assert "replica 2 has this log already, and another address" in err


def test_move_and_renew_again(call, directory):
    three = init_cluster(directory, base_port=0)
    place = three.replicas[1]
    code, said, err, ordered = call(three, "move", directory, "--number", 1, "--address", place.address)
    assert (code, said["changed"], ordered) == (0, False, [])
    assert f"nothing is changed: replica 1 is at {place.address}" in err
    assert not members_path(directory / "cluster.toml").exists(), "no list followed yet"
    renewed = replace(place, certificate_der=three.replicas[0].certificate_der + b"\0")
    after = replace(three, replicas=(three.replicas[0], renewed, three.replicas[2]), links=(b"link",))
    public = directory / "renewal.public.toml"
    part = member.PublicPart(renewed, three.genesis.members[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(member, "load_public_part", lambda path: part)
        public.touch()
        code, said, err, ordered = call(after, "renew", directory, public)
    assert (code, said["changed"], ordered) == (0, False, [])
    assert "nothing is changed: replica 1 has the certificate of" in err
    assert read_links(members_path(directory / "cluster.toml")) == (b"link",)


@pytest.fixture
def updated(call, monkeypatch):
    """Return what updates the lists of a cluster whose replicas show `present` to whoever knows `begun`."""

    def prepared(begun, present, *words):
        asked = []

        async def refresh(cluster, deadline_s):
            asked.append((cluster.cluster_id, cluster.links))
            return present

        monkeypatch.setattr(member, "refresh", refresh)
        monkeypatch.setattr(operating, "refresh", refresh)
        code, said, err, _ = call(present, "list", *words)
        return code, said, err, asked

    return prepared


@pytest.mark.parametrize("content", ["links of another cluster", "damaged"])
def test_lists_of_an_older_cluster_are_set_aside(updated, directory, content):
    three = init_cluster(directory, base_port=0)
    file = members_path(directory / "cluster.toml")

    def put():
        if content == "damaged":
            file.write_text("links = [")
        else:
            write_links(file, [b"of another cluster"])
        return file.read_bytes()

    old = put()
    after = followed(three, first_seats(three, 3))
    code, said, err, asked = updated(three, after, directory, "--update")
    assert (code, said["list"]) == (0, 1)
    assert asked == [(three.cluster_id, ())], "cluster.toml alone is begun with"
    aside = file.with_name("cluster.members.toml.does-not-hold")
    assert f"is kept as {aside}" in err
    assert aside.read_bytes() == old
    assert read_links(file) == after.links
    # Once more, and no list followed in this cluster: the name that is taken is left alone.
    put()
    assert updated(three, three, directory, "--update")[0] == 0
    assert not file.exists()
    assert sorted(path.name for path in directory.glob("*hold*")) == [aside.name, f"{aside.name}-2"]


def test_without_update_it_is_said_what_to_do_and_nothing_is_changed(directory, capsys):
    init_cluster(directory, base_port=0)
    file = members_path(directory / "cluster.toml")
    write_links(file, [b"of another cluster"])
    with pytest.raises(SystemExit) as ended:
        main(["member", "list", str(directory)])
    assert ended.value.code == 2
    text = " ".join(capsys.readouterr().err.split())
    assert "member list --update), or remove it, if cluster.toml is of a newer cluster" in text
    assert read_links(file) == (b"of another cluster",)
