"""Whose the files are that root makes in another user's folder."""

import os

import pytest

from replica.cluster.writing import give, give_all, write_over

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
OWNER = (65534, 65533)


def owner(path):
    found = path.lstat()
    return found.st_uid, found.st_gid


@pytest.fixture
def folder(tmp_path):
    """Another user's, with what root made in it."""
    path = tmp_path / "folder"
    (path / "inner").mkdir(parents=True)
    (path / "inner" / "file").touch()
    os.chown(path, *OWNER)
    return path


def test_everything_that_root_made_is_given_and_nothing_else(folder, tmp_path):
    outside = [tmp_path / "outside", tmp_path / "linked"]
    for path in outside:
        path.touch()
    (folder / "link").symlink_to(outside[0])
    (folder / "second name").hardlink_to(outside[1])
    (folder / "third").touch()
    os.chown(folder / "third", 1234, 1234)
    give_all(folder, folder.stat())
    assert {owner(folder / name) for name in (".", "inner", "inner/file", "link")} == {OWNER}
    assert [owner(path) for path in outside] == [(0, 0), (0, 0)]
    assert owner(folder / "third") == (1234, 1234)


def test_a_file_that_is_written_over_belongs_to_whom_it_should(folder):
    write_over(folder / "new", b"x", 0o600, like=folder)
    write_over(folder / "mine", b"x", 0o600)
    assert [owner(folder / name) for name in ("new", "mine")] == [OWNER, (0, 0)]
    give(folder / "mine", folder)
    assert owner(folder / "mine") == OWNER
