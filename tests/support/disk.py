"""What a disk may hold after a power cut: from a recording of every file operation that a program really made.

The program runs once under strace, so what is recorded are the system calls of the SQLite and the Python that replicas
run on; nothing is replaced by a model but the disk itself. The model takes from POSIX and from the devices no more
than the code rests on:

  * What was written and not synced may be there or not, sector by sector of 512 bytes, in any combination.
  * A sector is written whole or not at all.
  * A new, renamed or removed name may be missing until its directory was synced; names change in order.
"""

import os
import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

SECTOR = 512
CALLS = "openat,pwrite64,write,fsync,fdatasync,rename,unlink,ftruncate"
# Others that change files: a program that makes them is not recorded whole.
CALLS_NOT = (
    "pwritev,pwritev2,writev,renameat,renameat2,unlinkat,linkat,truncate,fallocate,copy_file_range,sync_file_range"
)
_UNFINISHED = " <unfinished ...>"
_LINE = re.compile(r"(\d+) +(\w+)\((.*)\) += (-?\d+)(?:<.*>)?(?: .*)?")
_RESUMED = re.compile(r"(\d+) +<\.\.\. \w+ resumed>(.*)")
_FD = re.compile(r"\d+<([^>]*)>")


@dataclass(frozen=True, slots=True)
class Operation:
    """One call that succeeded. `name` is relative to the recorded folder; of the folder itself it is "."."""

    kind: str  # create, write, truncate, sync, rename, unlink
    name: str
    data: bytes = b""
    at: int = 0  # offset of a write, size after a truncation
    target: str = ""


def record(folder: Path, command: list[str], cwd: Path) -> list[Operation]:
    """Run a program, and return what it did to files below `folder`. Skips the test where there is no strace."""
    strace = shutil.which("strace")
    if strace is None:
        if os.environ.get("REQUIRE_TOOLS"):
            pytest.fail("strace is missing: install Debian's package strace")
        pytest.skip("strace is not installed")
    trace = folder.parent / f"{folder.name}.trace"
    what = f"trace={CALLS},{CALLS_NOT}"
    made = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    options = ["-f", "-y", "-xx", "-s", "10000000", "-o", trace, "-e", what]
    subprocess.run([strace, *options, *command], check=True, timeout=100, cwd=cwd)
    with trace.open() as lines:
        return list(_operations(lines, folder.resolve(), made))


def _operations(lines, folder: Path, made: set[str]) -> Iterator[Operation]:
    begun: dict[str, str] = {}
    for line in map(str.rstrip, lines):
        if line.endswith(_UNFINISHED):
            begun[line.split()[0]] = line.removesuffix(_UNFINISHED)
            continue
        resumed = _RESUMED.fullmatch(line)
        if resumed:
            line = begun.pop(resumed[1]) + resumed[2]  # noqa: PLW2901
        called = _LINE.fullmatch(line)
        if called and int(called[4]) >= 0:
            yield from _operation(called[2], called[3].split(", "), int(called[4]), folder, made)


def _operation(call: str, arguments: list[str], result: int, folder: Path, made: set[str]) -> Iterator[Operation]:
    """Yield the operation of one call, if it is about the folder."""
    spoken = _FD.fullmatch(arguments[0])
    place = arguments[1] if call == "openat" else spoken[1] if spoken else arguments[0]
    name = _name(place, folder)
    if name is None or name.endswith("-shm"):  # shared memory: made anew after a crash
        return
    if call in CALLS_NOT.split(","):
        raise AssertionError(f"{call} of {name} is not simulated: add it")
    if call == "openat":
        if "O_CREAT" in arguments[2] and name not in made:
            made.add(name)
            yield Operation("create", name)
        if "O_TRUNC" in arguments[2]:
            yield Operation("truncate", name)
    elif call in {"write", "pwrite64"}:
        data = _bytes(arguments[1])
        assert len(data) == result, f"a short write of {name} is not simulated"
        yield Operation("write", name, data, int(arguments[3]) if call == "pwrite64" else -1)
    elif call == "ftruncate":
        yield Operation("truncate", name, at=int(arguments[1]))
    elif call == "rename":
        target = _name(arguments[1], folder)
        made.discard(name)
        made.add(target)
        yield Operation("rename", name, target=target)
    elif call == "unlink":
        made.discard(name)
        yield Operation("unlink", name)
    else:
        yield Operation("sync", name)


def _bytes(text: str) -> bytes:
    return bytes.fromhex(text.strip('"').replace("\\x", ""))


def _name(place: str, folder: Path) -> str | None:
    path = Path(os.fsdecode(_bytes(place)))
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else None


@dataclass(slots=True)
class _File:
    current: bytearray = field(default_factory=bytearray)
    synced: bytearray = field(default_factory=bytearray)
    pending: list[Operation] = field(default_factory=list)


class Disk:
    """Files of a folder as programs see them, and as the disk may hold them."""

    def __init__(self, folder: Path) -> None:
        """Begin with what is there, all of it synced."""
        self._names: dict[str, _File] = {}
        for path in folder.rglob("*"):
            if path.is_file():
                content = path.read_bytes()
                self._names[str(path.relative_to(folder))] = _File(bytearray(content), bytearray(content))
        self._synced_names = dict(self._names)
        self._pending_names: list[tuple[str, str, _File | None]] = []  # directory, name, file or removed

    def apply(self, operation: Operation) -> None:
        """Carry out what was recorded."""
        o = operation
        if o.kind == "create":
            self._set_name(o.name, _File())
        elif o.kind == "rename":
            file = self._names[o.name]
            self._set_name(o.target, file)
            self._set_name(o.name, None)
        elif o.kind == "unlink":
            self._set_name(o.name, None)
        elif o.kind != "sync":
            file = self._names[o.name]
            _change(file.current, o)
            file.pending.append(o)
        elif o.name in self._names:
            file = self._names[o.name]
            file.synced = bytearray(file.current)
            file.pending.clear()
        else:
            self._sync_names(o.name)

    def _set_name(self, name: str, file: _File | None) -> None:
        self._pending_names.append((str(Path(name).parent), name, file))
        _rename(self._names, name, file)

    def _sync_names(self, directory: str) -> None:
        for place, name, file in self._pending_names:
            if place == directory:
                _rename(self._synced_names, name, file)
        self._pending_names = [pending for pending in self._pending_names if pending[0] != directory]

    def kept(self) -> dict[str, bytes]:
        """Return the files if everything written reached the disk: the process died, the power stayed."""
        return {name: bytes(file.current) for name, file in self._names.items()}

    def lost(self) -> dict[str, bytes]:
        """Return them if nothing reached the disk that was not synced."""
        return {name: bytes(file.synced) for name, file in self._synced_names.items()}

    def some(self, chance: random.Random) -> dict[str, bytes]:
        """Return them if, of what was not synced, some sectors and the first few names reached the disk."""
        names = dict(self._synced_names)
        for _, name, file in self._pending_names[: chance.randint(0, len(self._pending_names))]:
            _rename(names, name, file)
        return {name: self._some(file, chance) for name, file in names.items()}

    def _some(self, file: _File, chance: random.Random) -> bytes:
        content = bytearray(file.synced)
        share = chance.choice([0.1, 0.5, 0.9])
        for operation in file.pending:
            for piece in _sectors(operation):
                if chance.random() < share:
                    _change(content, piece)
        return bytes(content)


def _rename(names: dict[str, _File], name: str, file: _File | None) -> None:
    if file is None:
        names.pop(name, None)
    else:
        names[name] = file


def _sectors(operation: Operation) -> Iterator[Operation]:
    """Cut a write where sectors end."""
    if operation.kind != "write":
        yield operation
        return
    at, data = operation.at, operation.data
    while data:
        size = SECTOR - at % SECTOR
        yield Operation("write", operation.name, data[:size], at)
        at, data = at + size, data[size:]


def _change(content: bytearray, operation: Operation) -> None:
    if operation.kind == "truncate":
        del content[operation.at :]
        content.extend(bytes(operation.at - len(content)))
        return
    at = len(content) if operation.at < 0 else operation.at
    content.extend(bytes(max(0, at + len(operation.data) - len(content))))
    content[at : at + len(operation.data)] = operation.data


def put(files: dict[str, bytes], folder: Path) -> None:
    """Make `folder` hold exactly these files, readable by their owner only."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.write_bytes(content)
        path.chmod(0o600)
