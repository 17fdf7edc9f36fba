"""Replacing a file: the old content or the new one, whatever happens in between; and whose files they are.

What root does in a folder is done for whoever the folder belongs to, and who must be able to read it afterwards. That
user may not be trusted by root, and can exchange names in the folder at any moment: so no link is followed.
"""

import os
import stat
import tempfile
from pathlib import Path


def write_over(path: Path, content: bytes, mode: int, *, like: Path | None = None) -> None:
    """Put a file with this content and mode in the place of the one there was, durably; OSError if that fails.

    like: a file or folder to whose owner root gives it.
    """
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    building = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), mode)
            if like is not None and os.geteuid() == 0:
                owner = like.stat()
                os.fchown(file.fileno(), owner.st_uid, owner.st_gid)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        building.replace(path)
    except BaseException:
        building.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(folder: Path) -> None:
    """Make names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def give(path: Path, like: Path) -> None:
    """As root, give a file to whom another file or folder belongs; any other user's files are that user's anyway."""
    if os.geteuid() == 0:
        owner = like.stat()
        os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)


def give_all(folder: Path, owner: os.stat_result) -> None:
    """As root, give a folder, and all that is root's in it, to an owner."""
    if os.geteuid() != 0:
        return
    for _, folders, files, descriptor in os.fwalk(folder, follow_symlinks=False):
        for name in (".", *folders, *files):
            found = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
            # A file with another name elsewhere is perhaps not this folder's.
            if found.st_uid == 0 and (stat.S_ISDIR(found.st_mode) or found.st_nlink == 1):
                os.chown(name, owner.st_uid, owner.st_gid, dir_fd=descriptor, follow_symlinks=False)
