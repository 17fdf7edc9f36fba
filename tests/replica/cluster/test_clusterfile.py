import hashlib
import re
import tomllib
from dataclasses import replace

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from replica.cluster.clusterfile import (
    ClusterFileError,
    dump_cluster_file,
    format_address,
    load_cluster_file,
    parse_address,
    parse_cluster_file,
)
from replica.cluster.keys import generate_private_key, make_certificate
from replica.core.genesis import Limits, Ordering
from tests.replica.cluster.support import make_cluster


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    return make_cluster(tmp_path_factory.mktemp("clusterfile") / "with space") / "cluster.toml"


@pytest.fixture
def document(example):
    return tomllib.loads(example.read_text())


def parse(document):
    return parse_cluster_file(tomli_w.dumps(document).encode(), "x/cluster.toml")


def refused(document, *words):
    with pytest.raises(ClusterFileError) as caught:
        parse(document)
    for word in ("x/cluster.toml", *words):
        assert word in str(caught.value)


def test_round_trip_keeps_everything(example):
    cluster = load_cluster_file(example)
    assert cluster.digest == hashlib.sha256(example.read_bytes()).digest()
    assert cluster.cluster_id == cluster.genesis.cluster_id()
    assert cluster.genesis.limits == Limits()
    assert cluster.genesis.ordering is Ordering.THREE_PHASE
    assert [place.address for place in cluster.replicas] == [f"127.0.0.1:{port}" for port in (7100, 7101, 7102)]
    assert dump_cluster_file(cluster.genesis, cluster.replicas) == example.read_bytes()


def found(document, **changes):
    """Make it the file of a cluster that was founded with another one's state after slot 300."""
    digests = {
        name: f"{number:02x}" * 32 for number, name in enumerate(("cluster_id", "digest", "application", "table"))
    }
    document["genesis"]["founding"] = {"slot": 300, "time_ms": 17, **digests, **changes}
    return document


def test_a_founded_cluster_round_trip(document, example):
    plain = parse(document).cluster_id
    cluster = parse(found(document))
    founding = cluster.genesis.founding
    assert (founding.slot, founding.time_ms, founding.cluster_id, founding.table) == (300, 17, bytes(32), b"\3" * 32)
    assert cluster.genesis.base == 384, "the next multiple of the checkpoint interval"
    assert cluster.cluster_id != plain
    again = parse_cluster_file(dump_cluster_file(cluster.genesis, cluster.replicas))
    assert again.genesis == cluster.genesis
    assert parse(found(document, digest="55" * 32)).cluster_id != cluster.cluster_id


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"slot": 0}, ["genesis.founding.slot"]),
        ({"time_ms": -1}, ["genesis.founding.time_ms"]),
        ({"digest": "00" * 31}, ["genesis.founding.digest", "64 hexadecimal digits"]),
        ({"cluster_id": 7}, ["genesis.founding.cluster_id"]),
        ({"base": 384}, ["genesis.founding.base"]),
    ],
)
def test_a_founding_that_cannot_be(document, change, words):
    refused(found(document, **change), *words)


def test_directory_is_taken_for_the_file_in_it(example):
    assert load_cluster_file(example.parent) == load_cluster_file(example)


def test_every_agreed_value_reaches_the_cluster_id(document):
    seen = {parse(document).cluster_id}
    changes = [("name", "other"), ("nonce", "00" * 32), ("ordering", "two-phase"), ("application", "a.b:C")]
    for key, value in changes:
        seen.add(parse({**document, "genesis": {**document["genesis"], key: value}}).cluster_id)
    for key, value in document["genesis"]["limits"].items():
        limits = {
            **document["genesis"]["limits"],
            key: value - 1 if "max" in key and "session" not in key else value + 1,
        }
        if key == "checkpoint_interval":
            limits["window"] += 2
        seen.add(parse({**document, "genesis": {**document["genesis"], "limits": limits}}).cluster_id)
    assert len(seen) == 1 + len(changes) + len(document["genesis"]["limits"])


def test_address_changes_the_file_but_not_the_cluster(document):
    before = parse(document)
    document["replicas"][0]["address"] = "replica-0.example:7100"
    after = parse(document)
    assert after.cluster_id == before.cluster_id
    assert after.digest != before.digest


def test_unknown_key_names_the_nearest(document):
    document["genesis"]["limits"]["windo"] = document["genesis"]["limits"].pop("window")
    refused(document, "genesis.limits.window", "is missing", '"windo"')
    document["genesis"]["limits"]["window"] = 256
    refused(document, "genesis.limits.windo:", 'did you mean "window"?')


@pytest.mark.parametrize("path", ["", "genesis", "genesis.limits", "genesis.members", "replicas"])
def test_unknown_key_is_an_error_everywhere(document, path):
    table = document
    for part in filter(None, path.split(".")):
        table = table[part]
    (table[0] if isinstance(table, list) else table)["zzz"] = 1
    refused(document, "zzz", "not a key that this program knows")


def leaves(table, path=()):
    for key, value in table.items() if isinstance(table, dict) else enumerate(table):
        if isinstance(value, dict | list):
            yield from leaves(value, (*path, key))
        yield (*path, key)


def at(document, path):
    for part in path:
        document = document[part]
    return document


def test_every_missing_and_every_mistyped_key_is_named(example):
    text = example.read_text()
    paths = list(leaves(tomllib.loads(text)))
    assert len(paths) > 30
    for *parents, key in paths:
        # Without operators it is the file of another cluster, and a good one.
        for change in ("mistype",) if "operators" in (*parents, key) else ("remove", "mistype"):
            document = tomllib.loads(text)
            table = at(document, parents)
            if change == "mistype":
                table[key] = 1.5
            else:
                del table[key]
            with pytest.raises(ClusterFileError, match=r"x/cluster.toml: "):
                parse(document)


def test_a_bool_is_no_number(document):
    document["genesis"]["f"] = True
    refused(document, "genesis.f", "must be a whole number, not bool")


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (["format"], 2, ["format", "from 1 to 1"]),
        (["genesis", "f"], 0, ["genesis.f"]),
        (["genesis", "f"], 2, ["f = 2 needs members 0 to 4"]),
        (["genesis", "f"], 10**30, ["genesis.f", "from 1 to 10"]),
        (["genesis", "name"], "a\x1b[31mb", ["control characters"]),
        (["genesis", "name"], "", ["name must have"]),
        (["genesis", "nonce"], "00" * 31, ["genesis.nonce", "64 hexadecimal digits"]),
        (["genesis", "nonce"], "0 " * 32, ["genesis.nonce"]),
        (["genesis", "ordering"], "three-phases", ['did you mean "three-phase"?']),
        (["genesis", "application"], "os.system('x')", ["module:Class"]),
        (["genesis", "limits", "window"], 128, ["window must be at least twice"]),
        (["genesis", "limits", "window"], 0, ["genesis.limits.window"]),
        (["genesis", "members", 1, "number"], 2, ["genesis.members[1].number"]),
        (["genesis", "members", 1, "log_kind"], "softwar", ['did you mean "software"?']),
        (["genesis", "members", 1, "log_public_key"], "04" + "11" * 64, ["members[1].log_public_key", "P-256"]),
        (["genesis", "members", 1, "log_public_key"], "02" + "11" * 32, ["members[1].log_public_key"]),
        (["replicas", 2, "number"], 1, ["replicas[2].number"]),
        (["replicas", 2, "address"], "127.0.0.1:7100", ["replicas 0 and 2 have one address"]),
        (["replicas", 2, "address"], "nowhere", ["replicas[2].address", "host:port"]),
        (["replicas", 2, "certificate"], "hello", ["replicas[2].certificate", "not a certificate"]),
    ],
)
def test_wrong_value_is_named(document, path, value, words):
    at(document, path[:-1])[path[-1]] = value
    refused(document, *words)


def test_members_and_replicas_must_match(document):
    document["replicas"].pop()
    refused(document, "2 replicas for 3 members")


def test_two_members_with_one_log_key(document):
    members = document["genesis"]["members"]
    members[1]["log_public_key"] = members[0]["log_public_key"]
    refused(document, "same log key")


def test_two_replicas_with_one_tls_key(example):
    cluster = load_cluster_file(example)
    key = generate_private_key()
    twins = [replace(place, certificate_der=make_certificate(place.number, key)) for place in cluster.replicas]
    with pytest.raises(ClusterFileError, match="replicas 0 and 1 have one TLS key"):
        dump_cluster_file(cluster.genesis, twins)


def test_damaged_certificate_is_refused(document):
    pem = document["replicas"][0]["certificate"]
    lines = pem.splitlines()
    # A flipped character in the signature still parses; it must not verify.
    lines[-2] = ("A" if lines[-2][0] != "A" else "B") + lines[-2][1:]
    document["replicas"][0]["certificate"] = "\n".join(lines)
    refused(document, "replicas[0].certificate")


def test_two_certificates_are_refused(document):
    document["replicas"][0]["certificate"] *= 2
    refused(document, "2 certificates")


def test_syntax_error_names_the_line():
    with pytest.raises(ClusterFileError, match="at line 2"):
        parse_cluster_file(b"format = 1\n= 2\n")


@pytest.mark.parametrize("raw", [b"\xff", b"a = " + b"[" * 100_000, b"a = " + b"9" * 10_000])
def test_hostile_bytes(raw):
    with pytest.raises(ClusterFileError, match=r"cluster.toml: "):
        parse_cluster_file(raw)


def test_oversized_file_is_refused_before_parsing(tmp_path):
    path = tmp_path / "cluster.toml"
    path.write_bytes(b"#" * (1024 * 1024 + 1))
    with pytest.raises(ClusterFileError, match="larger than 1048576 bytes"):
        load_cluster_file(path)
    with pytest.raises(ClusterFileError, match="the limit is 1048576"):
        parse_cluster_file(path.read_bytes())


def test_missing_file_and_what_is_no_file(tmp_path):
    with pytest.raises(ClusterFileError, match="No such file"):
        load_cluster_file(tmp_path / "cluster.toml")
    with pytest.raises(ClusterFileError, match="not a regular file"):
        load_cluster_file_of_fifo(tmp_path / "fifo")


def load_cluster_file_of_fifo(path):
    import os

    os.mkfifo(path)
    return load_cluster_file(path)


def test_single_changed_characters_never_pass_unnoticed(example):
    """Whatever one character becomes, the file is refused, or the same cluster, or visibly another one."""
    original = load_cluster_file(example)
    text = example.read_text()
    start = text.index("[genesis]")
    for position in range(start, start + 900):
        changed = text[:position] + ("7" if text[position] != "7" else "3") + text[position + 1 :]
        try:
            cluster = parse_cluster_file(changed.encode())
        except ClusterFileError:
            continue
        assert cluster.digest != original.digest
        assert (cluster.cluster_id == original.cluster_id) == (cluster.genesis == original.genesis)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:1", ("127.0.0.1", 1)),
        ("[::1]:65535", ("::1", 65535)),
        ("a-b.example:7100", ("a-b.example", 7100)),
        ("localhost:80", ("localhost", 80)),
    ],
)
def test_addresses(text, address):
    assert parse_address(text) == address
    assert format_address(*address) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        ":1",
        "a:",
        "a:0",
        "a:65536",
        "a:+1",
        "a:1_0",
        "a:٣",
        "::1:7100",
        "[::1]",
        "[1.2.3.4]:1",
        "a b:1",
        "-a:1",
        "a..b:1",
        "1.2.3:1",
        "256.1.1.1:1",
        "a\n:1",
        "[::1:1",
        "a" * 64 + ":1",
        "a:1\n",
        "[]:1",
    ],
)
def test_bad_addresses(text):
    with pytest.raises(ValueError, match=r"host|port|IPv6") as caught:
        parse_address(text)
    assert str(caught.value).isprintable()


@given(st.text(max_size=40))
def test_any_text_is_an_address_or_a_value_error(text):
    try:
        host, port = parse_address(text)
    except ValueError:
        return
    assert parse_address(format_address(host, port)) == (host, port)


def test_error_texts_cannot_steer_a_terminal(document):
    document["\x1b[2J" + "k" * 500] = 1
    with pytest.raises(ClusterFileError) as caught:
        parse(document)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


def test_header_says_what_the_file_is(example):
    assert re.match(r"# The public file of a trustlog cluster", example.read_text())
