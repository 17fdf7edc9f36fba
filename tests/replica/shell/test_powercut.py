"""The power fails after every file operation of a workload: nothing acknowledged is lost, and the log goes on.

What is recorded and what a disk may then hold: tests/support/disk.py. The workload: powercut_work.py.
"""

import hashlib
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing, nullcontext
from pathlib import Path

import pytest

from replica.core.genesis import Limits
from replica.core.group import decode_payloads
from replica.shell.outbox import settle_last_group
from replica.shell.sqlitefile import StoreError
from replica.shell.statestore import StateStore
from replica.shell.store import Store, StoredGroup, own_group
from tests.replica.shell.outbox_bench import CLUSTER_ID, CONTEXT
from tests.replica.shell.powercut_work import milestone, payload, state_at
from tests.replica.shell.test_store import CLUSTER_ID as STORE_CLUSTER_ID
from tests.replica.shell.test_store import fill, open_store
from tests.support.disk import Disk, put, record
from trustlog import (
    APPEND_SIZE,
    Attestation,
    BackendKind,
    LogIdentity,
    VerifyingKey,
    create,
    entry_digest,
    open_log,
    verify_append,
)
from trustlog.sealed import UnsyncedFiles

ROOT = Path(__file__).resolve().parents[3]
OPERATIONS = 200
SHARES = 8
STATES_BEFORE = 100


class LostError(AssertionError):
    """Something that was acknowledged is gone, or the replica cannot go on."""


class Recording:
    """What a program did to the files of a folder, and what was there before."""

    def __init__(self, folder: Path, *command: str) -> None:
        self._start = Disk(folder).kept()
        self._folder = folder
        self.operations = record(folder, [sys.executable, *command], cwd=ROOT)

    def images(self, steps: range, hear=lambda line: None) -> Iterator[tuple[str, dict[str, bytes]]]:
        """Yield what the disk may hold after each of these operations, and a name for it; tell what was said before."""
        put(self._start, self._folder)
        disk = Disk(self._folder)
        for step, operation in enumerate(self.operations):
            if operation.name == "said":
                hear(operation.data)
                continue
            disk.apply(operation)
            if step not in steps:
                continue
            where = f"after operation {step}, {operation.kind} {operation.name}"
            yield f"{where}, all kept", disk.kept()
            yield f"{where}, some kept", disk.some(random.Random(step))
            # What is lost changes when something is synced, and only then.
            if operation.kind == "sync" or step == steps.start:
                yield f"{where}, unsynced lost", disk.lost()


def work(folder: Path, operations: int, planted: str = "none") -> Recording:
    """Record the workload."""
    folder = folder / "work"
    folder.mkdir()
    with create(folder / "log", files=UnsyncedFiles()) as log:
        # So many states that the file of 255 is replaced on the way.
        for _ in range(STATES_BEFORE):
            log.truncate(1, context=CONTEXT)
    return Recording(folder, "-m", "tests.replica.shell.powercut_work", str(folder), str(operations), planted)


class Promise:
    """What the replica said before the power went: it must hold."""

    def __init__(self) -> None:
        self.own = 0  # the last index released
        self.causes = {1: 0, 2: 0}
        self.cuts = [0, 0, 0]
        self.slot = 0

    def hear(self, text: bytes) -> None:
        line = json.loads(text or b"{}")
        if "own" in line:
            self.own = line["own"][1]
            self.causes = {int(log): last for log, last in line["causes"].items()}
        self.cuts = line.get("cuts", self.cuts)
        self.slot = line.get("milestone", self.slot)


def check(promise: Promise, folder: Path) -> None:
    """Start what is in `folder`, as a replica does after a crash; LostError if anything promised is not there."""
    with ExitStack() as stack:
        try:
            log = stack.enter_context(open_log(folder / "log", files=UnsyncedFiles()))
            store = stack.enter_context(closing(Store(folder / "store.sqlite", CLUSTER_ID, 0, durable=False)))
            settle_last_group(0, log, store)
            held = {number: list(store.groups(number)) for number in (0, 1, 2)}
            state = stack.enter_context(closing(StateStore(folder / "state.db", CLUSTER_ID, 0, durable=False)))
            check_state(promise, state)
        except StoreError as error:
            raise LostError(f"it cannot start: {error}") from error
        ends = {0: promise.own, **promise.causes}
        for number, groups in held.items():
            check_log(number, groups, promise.cuts[number], ends[number])
        own_end = held[0][-1].last if held[0] else 0
        if own_end != log.last:
            raise LostError(f"the store ends at {own_end}, the trusted log at {log.last}")
        go_on(log, store, held[0])


def check_log(number: int, groups: list[StoredGroup], cut: int, end: int) -> None:
    """Check that a log is there from its cut to its end, with what it said."""
    first = groups[0].first if groups else 1
    if first > cut + 1:
        raise LostError(f"log {number} begins at {first}, the cut is {cut}")
    expected = first
    for group in groups:
        said = decode_payloads(group.payloads, 0, Limits())
        if group.first == expected and said == tuple(payload(number, i) for i in range(group.first, group.last + 1)):
            expected = group.last + 1
        elif number == 0 or group.first <= end:
            raise LostError(f"log {number} has {group.first} to {group.last}, or other content, at {expected}")
    if expected <= end:
        raise LostError(f"log {number} ends at {expected - 1}, {end} was released or is a cause of what was")


def check_state(promise: Promise, state: StateStore) -> None:
    view = state.load()
    if view is None:
        if promise.slot:
            raise LostError(f"there is no milestone, {promise.slot} was persisted")
        return
    with view:
        if view.slot < promise.slot:
            raise LostError(f"the milestone is {view.slot}, {promise.slot} was persisted")
        if dict(view.trees[0].entries()) != state_at(view.slot) or view.header != b"header %d" % view.slot:
            raise LostError(f"the state of milestone {view.slot} is another")


def go_on(log, store, groups) -> None:
    """Check that the last group is attested, and that the next one follows it."""
    identity = LogIdentity(VerifyingKey.from_bytes(log.public_key), BackendKind.SOFTWARE)
    if groups:
        last = groups[-1]
        if any(group.attestation is None for group in groups):
            raise LostError("an own group has no attestation")
        attestation = Attestation(last.attestation[:APPEND_SIZE], last.attestation[APPEND_SIZE:])
        digests = [entry_digest(said) for said in decode_payloads(last.payloads, 0, Limits())]
        assert verify_append(identity, attestation, digests, context=CONTEXT).last == log.last
    index = log.last + 1
    store.write([], None, own_group(0, index, (b"after",)))
    log.append([entry_digest(b"after")], context=CONTEXT)
    settle_last_group(0, log, store)
    assert store.last_group(0).last == log.last == index


def cut_power(recording: Recording, folder: Path, steps: range) -> Counter:
    """Check every image of the disk after each of these operations; count them by what was lost.

    What was checked already, the same image after the same promise, is not checked again.
    """
    promise, seen = Promise(), Counter()
    checked: set[str] = set()
    for where, files in recording.images(steps, promise.hear):
        seen[where.split(", ")[-1]] += 1
        case = fingerprint(promise, files)
        if case in checked:
            continue
        checked.add(case)
        put(files, folder)
        try:
            check(promise, folder)
        except LostError as error:
            raise LostError(f"{where}: {error}") from error
    return seen


def fingerprint(promise: Promise, files: dict[str, bytes]) -> str:
    digests = {name: hashlib.sha256(files[name]).hexdigest() for name in sorted(files)}
    return json.dumps([vars(promise), digests])


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    return work(tmp_path_factory.mktemp("powercut"), OPERATIONS)


def test_the_workload_does_everything(recording):
    done = Counter((operation.kind, operation.name) for operation in recording.operations)
    said = Counter(key for o in recording.operations if o.name == "said" and o.data for key in json.loads(o.data))
    assert (said["own"], said["milestone"], said["cuts"]) == (OPERATIONS, 10, 10)
    # The write-ahead logs were moved into the files, and begun again.
    assert done["write", "store.sqlite"] > 100
    assert done["write", "state.db"] >= 10
    assert done["truncate", "store.sqlite"] >= 3, "pages were given back"
    assert done["truncate", "state.db"] >= 3
    assert done["sync", "store.sqlite-wal"] >= OPERATIONS
    assert done["sync", "log/log.state"] >= OPERATIONS
    assert done["rename", "log/log.state.new"] == 1
    assert done["unlink", "store.sqlite-wal"] == 2


@pytest.mark.parametrize("share", range(SHARES))
def test_the_power_fails_after_every_operation(recording, tmp_path, share):
    count = len(recording.operations)
    steps = range(count * share // SHARES, count * (share + 1) // SHARES)
    seen = cut_power(recording, tmp_path / "after", steps)
    assert len(seen) == 3
    assert min(seen.values()) > 50


@pytest.mark.parametrize(
    ("planted", "finding"),
    [
        ("unsynced store", "store ends at .*, the trusted log at|store.sqlite: the file is damaged"),
        pytest.param("unsynced log", "log 0 ends at .* was released", marks=pytest.mark.long),
        pytest.param("unsynced state", "milestone.* was persisted|state.db: damaged", marks=pytest.mark.long),
        ("attests first", "store ends at .*, the trusted log at"),
        ("forgets causes", "log [12] ends at .* a cause of what was"),
    ],
)
def test_a_planted_defect_is_found(tmp_path, planted, finding):
    recording = work(tmp_path, 40, planted)
    with pytest.raises(LostError, match=finding):
        cut_power(recording, tmp_path / "after", range(len(recording.operations)))


def crashed_store(folder: Path) -> tuple[Path, dict]:
    """Return a folder with the store of a replica that was killed, its write-ahead log full, and what it holds."""
    with closing(open_store(folder)) as store:
        held = fill(store, groups=30)
        files = {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.endswith("-shm")}
    put(files, folder / "work")
    return folder / "work", held


def test_the_power_fails_during_a_salvage(tmp_path):
    folder, held = crashed_store(tmp_path)
    program = f"from pathlib import Path; from replica.shell.salvage import salvage; salvage(Path({str(folder)!r}) / 'store.sqlite', {STORE_CLUSTER_ID!r}, 0)"
    recording = Recording(folder, "-c", program)
    count = 0
    for where, files in recording.images(range(len(recording.operations))):
        put(files, tmp_path / "after")
        with closing(open_store(tmp_path / "after", durable=False)) as store:
            assert {log: list(store.groups(log)) for log in held} == held, where
        count += 1
    assert count > 50


def test_the_power_fails_while_a_damaged_state_is_replaced(tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    with closing(StateStore(folder / "state.db", CLUSTER_ID, 0)) as state:
        state.write(milestone(1, None))
    program = (
        "from pathlib import Path; from replica.shell.statestore import StateStore; "
        "from tests.replica.shell.powercut_work import milestone; "
        f"state = StateStore(Path({str(folder)!r}) / 'state.db', {CLUSTER_ID!r}, 0); "
        "state.write(milestone(2, None), replace_all=True); state.discard(); "
        "state.write(milestone(3, None), replace_all=True); state.close()"
    )
    recording = Recording(folder, "-c", program)
    seen = set()
    for _, files in recording.images(range(len(recording.operations))):
        put(files, tmp_path / "after")
        with closing(StateStore(tmp_path / "after" / "state.db", CLUSTER_ID, 0, durable=False)) as state:
            check_state(Promise(), state)
            view = state.load() or nullcontext()
            with view:
                seen.add(getattr(view, "slot", None))
    assert seen == {1, 2, None, 3}
