"""The file of --receipt: it appears whole or not at all, and nothing else is ever written to. And how a receipt reads."""

import os
import stat

import pytest

from client.cli import receipt_command
from client.cli.receipt_command import _Place, _quoted
from trustlog.cli.contract import CommandError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_two_commands_with_one_name(tmp_path):
    path = tmp_path / "r.json"
    with _Place(path) as first, _Place(path) as second:
        first.fill(b"first")
        with pytest.raises(CommandError, match="File exists"):
            second.fill(b"second")
    assert path.read_bytes() == b"first"
    assert names(tmp_path) == ["r.json"]


def test_what_a_kill_left_behind_is_never_written_to_again(tmp_path):
    killed = _Place(tmp_path / "r.json")
    killed.__enter__()
    killed.fill(b"first")  # and killed here, before it tidied up
    (tmp_path / "r.json").rename(tmp_path / "archive.json")
    with _Place(tmp_path / "r.json") as place:
        place.fill(b"second")
    assert (tmp_path / "archive.json").read_bytes() == b"first"
    assert (tmp_path / "r.json").read_bytes() == b"second"
    killed.__exit__()


def test_what_somebody_planted_is_not_followed(tmp_path, monkeypatch):
    """Even whoever knew the name of the file beside it could not have it write elsewhere."""
    monkeypatch.setattr(receipt_command.secrets, "token_hex", lambda _: "known")
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    (tmp_path / ".r.json.known").symlink_to(victim)
    with pytest.raises(CommandError, match="cannot be written"), _Place(tmp_path / "r.json"):
        pytest.fail("nothing may be executed")
    assert victim.read_bytes() == b"mine"
    assert names(tmp_path) == [".r.json.known", "victim"]


def test_a_file_system_without_links_is_found_out_first(tmp_path, monkeypatch):
    def link(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(receipt_command.os, "link", link)
    with pytest.raises(CommandError, match="cannot be written: Operation not permitted") as caught:
        _Place(tmp_path / "r.json").__enter__()
    assert "nothing was executed" in caught.value.hint
    assert names(tmp_path) == []


def test_who_may_read_it_is_the_users_choice(tmp_path):
    before = os.umask(0o027)
    try:
        with _Place(tmp_path / "r.json") as place:
            place.fill(b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "r.json").stat().st_mode) == 0o640


def test_no_two_words_read_alike():
    said = [b"a", b"a b", b'a" "b', b"\\xff", b"\xff", b"0xff", b"", b"line\nbreak", "\u202e".encode(), "é".encode()]
    shown = [_quoted(one) for one in said]
    assert len(set(shown)) == len(said)
    assert all(text.isprintable() for text in shown)
    assert shown[:4] == ['"a"', '"a b"', '"a\\" \\"b"', '"\\\\xff"']
    assert shown[4:7] == ["0xff", '"0xff"', '""']
