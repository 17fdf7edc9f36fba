from __future__ import annotations

import os

import pytest

from tests.trustlog.support import ForgetfulFiles
from trustlog import MisuseError, SealedStateError, sealed
from trustlog.sealed import FILE_SIZE, SECTOR_SIZE, SECTORS, Files, SealedJournal

SEAL_KEY = bytes(range(32))
IDENTITY = b"\1" + b"k" * 32


def state(number):
    return number.to_bytes(128, "big")


def small(monkeypatch, sectors):
    monkeypatch.setattr(sealed, "SECTORS", sectors)
    monkeypatch.setattr(sealed, "FILE_SIZE", sectors * SECTOR_SIZE)


def make(path, count, files=None):
    journal = SealedJournal.create(path, SEAL_KEY, IDENTITY, state(1), files or Files())
    for number in range(2, count + 1):
        journal.save(state(number))
    return journal


def reopened(path, files=None):
    journal = SealedJournal.open(path, SEAL_KEY, files or Files())
    journal.close()
    return journal


def damaged(path, match):
    with pytest.raises(SealedStateError, match=match) as caught:
        reopened(path)
    assert str(path) in str(caught.value)
    assert "Nothing was signed with it" in str(caught.value)


def test_states_survive(tmp_path):
    path = tmp_path / "log.state"
    journal = make(path, 5)
    assert journal.states == [state(1)]
    journal.close()
    journal.close()
    assert path.stat().st_size == FILE_SIZE == 512 * 256
    assert path.stat().st_mode & 0o777 == 0o600
    again = SealedJournal.open(path, SEAL_KEY, Files())
    assert again.identity == IDENTITY
    assert again.states == [state(number) for number in range(1, 6)]
    again.save(state(6))
    again.close()
    assert reopened(path).states[-1] == state(6)


def test_nothing_readable_is_in_the_file(tmp_path):
    path = tmp_path / "log.state"
    make(path, 3).close()
    assert b"kkkkkkkk" not in path.read_bytes()


def test_a_full_file_is_replaced(tmp_path):
    path = tmp_path / "log.state"
    journal = make(path, SECTORS - 1)
    generation = path.read_bytes()[17:33]
    journal.save(state(1000))
    journal.save(state(1001))
    journal.close()
    assert path.read_bytes()[17:33] != generation
    again = reopened(path)
    assert again.states == [state(1000), state(1001)]
    assert again.identity == IDENTITY
    assert [entry.name for entry in tmp_path.iterdir()] == ["log.state"]


def test_a_left_over_of_an_interrupted_replacement_is_harmless(tmp_path):
    path = tmp_path / "log.state"
    journal = make(path, SECTORS - 1)
    (tmp_path / "log.state.new").write_bytes(b"half")
    journal.save(state(1000))
    journal.close()
    assert reopened(path).states == [state(1000)]


def test_create_refuses_an_existing_file(tmp_path):
    path = tmp_path / "log.state"
    make(path, 1).close()
    with pytest.raises(MisuseError, match="exists"):
        make(path, 1)
    assert reopened(path).states == [state(1)]


def test_an_oversized_state_is_refused(tmp_path):
    journal = make(tmp_path / "log.state", 1)
    with pytest.raises(MisuseError, match="482"):
        journal.save(bytes(483))
    journal.save(bytes(482))
    journal.close()
    assert reopened(tmp_path / "log.state").states == [state(1), bytes(482)]


@pytest.mark.parametrize("records", [1, 3, 7])
def test_every_flipped_bit_is_refused(tmp_path, monkeypatch, records):
    small(monkeypatch, 8)
    path = tmp_path / "log.state"
    make(path, records).close()
    data = path.read_bytes()
    assert len(data) == 8 * 512
    refused = 0
    with path.open("r+b", buffering=0) as stream:
        for offset, byte in enumerate(data):
            for bit in range(8) if records == 3 else (offset % 8,):
                os.pwrite(stream.fileno(), bytes([byte ^ 1 << bit]), offset)
                with pytest.raises(SealedStateError, match=f"offset {offset - offset % 512}:"):
                    reopened(path)
                refused += 1
            os.pwrite(stream.fileno(), bytes([byte]), offset)
    assert refused == len(data) * (8 if records == 3 else 1)
    assert len(reopened(path).states) == records


def test_every_flipped_byte_of_a_full_size_file_is_refused(tmp_path):
    """The same at full size; a sector that authenticates is not unsealed again for each of its neighbours' bytes."""
    path = tmp_path / "log.state"
    make(path, 100).close()
    data = path.read_bytes()
    journal = SealedJournal(path, SEAL_KEY, Files())
    seal = sealed._Seal(SEAL_KEY, data[:33])
    for sector in range(SECTORS):
        content = data[sector * 512 : (sector + 1) * 512]
        for offset in range(512):
            changed = content[:offset] + bytes([content[offset] ^ 0x10]) + content[offset + 1 :]
            if sector <= 100 and not (sector == 0 and offset < 33):
                with pytest.raises(sealed.InvalidTag):
                    seal.unseal(sector, changed)
            else:
                assert changed != bytes(512)
    for sector in range(SECTORS):
        offset = sector * 512 + (sector * 37) % 512
        path.write_bytes(data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :])
        damaged(path, f"offset {sector * 512}:")
    journal.close()


def test_lengths(tmp_path):
    path = tmp_path / "log.state"
    make(path, 3).close()
    data = path.read_bytes()
    for size in (0, 1, 33, 511, 512, 1024, FILE_SIZE - 512, FILE_SIZE - 1):
        path.write_bytes(data[:size])
        damaged(path, f"offset {size}: the file has {size} bytes")
    for extra in (b"\0", bytes(512), b"x" * 100000):
        path.write_bytes(data + extra)
        damaged(path, f"the file has {FILE_SIZE + len(extra)} bytes")


def sectors_of(path):
    data = path.read_bytes()
    return [data[start : start + 512] for start in range(0, len(data), 512)]


def test_zeroed_records(tmp_path):
    path = tmp_path / "log.state"
    make(path, 4).close()
    whole = sectors_of(path)
    for sector, match in (
        (0, "magic"),
        (1, "first record is missing"),
        (2, "record 3 follows"),
        (3, "record 4 follows"),
    ):
        path.write_bytes(b"".join([*whole[:sector], bytes(512), *whole[sector + 1 :]]))
        damaged(path, match)


def test_records_that_moved(tmp_path):
    path, other = tmp_path / "log.state", tmp_path / "other.state"
    make(path, 4).close()
    make(other, 4).close()
    whole, foreign = sectors_of(path), sectors_of(other)
    for changed in (
        [whole[0], whole[2], whole[1], *whole[3:]],
        [*whole[:5], whole[4], *whole[6:]],
        [*whole[:4], whole[1], *whole[5:]],
        [*whole[:4], foreign[4], *whole[5:]],
        [foreign[0], *whole[1:]],
    ):
        path.write_bytes(b"".join(changed))
        damaged(path, "does not authenticate")


def test_a_foreign_key(tmp_path):
    path = tmp_path / "log.state"
    make(path, 2).close()
    with pytest.raises(SealedStateError, match="the header does not authenticate"):
        SealedJournal.open(path, bytes(32), Files())


def test_symbolic_links_are_not_followed(tmp_path):
    make(tmp_path / "real.state", 2).close()
    (tmp_path / "log.state").symlink_to(tmp_path / "real.state")
    with pytest.raises(OSError, match="symbolic"):
        reopened(tmp_path / "log.state")


def test_partial_reads_and_writes_are_completed(tmp_path, monkeypatch):
    path = tmp_path / "log.state"
    pread, pwrite = os.pread, os.pwrite
    monkeypatch.setattr(os, "pread", lambda fd, size, offset: pread(fd, min(size, 1000), offset))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:777], offset))
    make(path, 3).close()
    assert reopened(path).states[-1] == state(3)


@pytest.mark.parametrize("operation", ["write", "written", "sync", "synced"])
def test_errors_of_the_disk_pass_through(tmp_path, operation):
    files = ForgetfulFiles(tmp_path)
    journal = make(tmp_path / "log.state", 2, files)
    files.failing = {operation}
    with pytest.raises(OSError, match="Input/output"):
        journal.save(state(3))
    journal.close()
    files.failing = set()
    assert reopened(tmp_path / "log.state", files).states[-1] in (state(2), state(3))


def test_what_opening_returns_is_synced_before_it_is_used(tmp_path):
    files = ForgetfulFiles(tmp_path)
    journal = make(tmp_path / "log.state", 2, files)
    files.failing = {"sync"}
    with pytest.raises(OSError, match="Input/output"):
        journal.save(state(3))
    journal.close()
    files.failing = set()
    assert reopened(tmp_path / "log.state", files).states[-1] == state(3)
    files.lose_power(names=False, content=False)
    assert reopened(tmp_path / "log.state", files).states[-1] == state(3)
