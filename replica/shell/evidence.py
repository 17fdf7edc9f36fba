"""The evidence that a replica keeps: files in `<home>/evidence`, collected when it exposes a log, never overwritten.

    log-N-ID-fork.json              two contradicting statements of log N, for `trustlog verify`
    log-N-ID-entry-I-RULE.evidence  entry I of log N breaks RULE; layout in `replica.core.evidence`

ID is the beginning of the log's id, as a replica's number goes over to a new log when it is replaced: what was proven
of the old one is nothing against the new one. A name without it, as they were once, means the log that has had that
number from the first list of members on.

Names say what is claimed, so what is found again after a restart is not collected twice. A file appears whole and
durable, or not at all. What is collected comes from the replica's own store and state, in a thread of its own; as
groups get there a little after they were read, it is tried several times before less is kept (kind 4).
"""

import json
import os
import re
import sqlite3
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from replica.cluster.writing import sync_directory
from replica.core.chain import said_under
from replica.core.entries import CHECKPOINT, COMMIT, PREPARE
from replica.core.events import Exposed, Forked, Lied
from replica.core.evidence import Basis, Claim, Evidence, Kind
from replica.core.genesis import Genesis, Member
from replica.core.group import VerifiedGroup
from replica.core.layout import LayoutError
from replica.core.proving import (
    FALSE_CHECKPOINT,
    FALSE_COMMIT,
    FALSE_RESULT,
    FALSE_VOTE,
    MALFORMED,
    TooLargeError,
    UnprovenError,
    bare,
    collect_checkpoint,
    collect_replay,
)
from replica.shell.atrest import CLEAR, Clear
from replica.shell.statestore import PinnedState
from replica.shell.statetree import StateDamagedError
from replica.shell.store import StoreError, read_only_group
from replica.shell.verify import GroupVerifier
from trustlog import Attestation, LogIdentity, VerificationError, entry_digest, find_contradiction, log_id
from trustlog.cli.documents import DOCUMENT_SIZE_MAX, Expectation, contradiction_document, verify_document
from trustlog.receipts import RESULT

FILES_MAX = 64
BYTES_MAX = 256 * 1024 * 1024
# Lies of one log of which evidence is kept: one is enough to act upon.
LIES_PER_LOG_MAX = 4
# How often evidence is collected anew when the store did not hold all of it yet; tried when `retry` is called.
ATTEMPTS_MAX = 10
ID_SIZE = 8  # bytes of a log's id that a name begins with
FILE_NAME = re.compile(
    r"log-(?P<log>\d{1,5})-(?:(?P<id>[0-9a-f]{16})-)?"
    r"(?:(?P<fork>fork\.json)|entry-(?P<index>\d{1,20})-[a-z-]{1,40}\.evidence)"
)

_LIES = {PREPARE: FALSE_VOTE, COMMIT: FALSE_COMMIT, CHECKPOINT: FALSE_CHECKPOINT, RESULT: FALSE_RESULT}

Found = Exposed | Forked | Lied


class EvidenceFolder:
    """The files. Blocking; every method may be called from any thread, `write` from one at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def files(self) -> list[Path]:
        """Return all files of evidence, in the order of their names."""
        with suppress(FileNotFoundError):
            return sorted(file for file in self.path.iterdir() if FILE_NAME.fullmatch(file.name))
        return []

    def has_room(self, size: int) -> bool:
        """Say whether a file of `size` bytes may be added."""
        files = self.files()
        return len(files) < FILES_MAX and sum(file.stat().st_size for file in files) + size <= BYTES_MAX

    def write(self, name: str, content: bytes) -> bool:
        """Add a file, durably; False if there is one of that name, or no room. OSError if the disk fails."""
        target = self.path / name
        if target.exists() or not self.has_room(len(content)):
            return False
        self.path.mkdir(mode=0o700, exist_ok=True)
        partial = self.path / f".{name}.partial"
        partial.unlink(missing_ok=True)
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.link(partial, target)  # unlike a rename, this never replaces anything
        except FileExistsError:
            return False
        finally:
            partial.unlink(missing_ok=True)
        for directory in (self.path, self.path.parent):
            sync_directory(directory)
        return True

    def broken_logs(self, identities: list[LogIdentity]) -> set[int]:
        """Return the logs whose trusted part a file here proves broken; what does not verify is passed over."""
        found = set()
        for file in self.files():
            match = FILE_NAME.fullmatch(file.name)
            if match is None or match["fork"] is None or int(match["log"]) >= len(identities):
                continue
            with suppress(OSError, VerificationError), file.open("rb") as stream:
                log = int(match["log"])
                verify_document(stream.read(DOCUMENT_SIZE_MAX + 1), identities[log], Expectation(bytes(32)))
                found.add(log)
        return found


@dataclass(slots=True)
class _Wanted:
    """Evidence to be collected. ends: the last slot of the list of members, if it was known."""

    found: Found
    ends: int | None
    attempts: int = 0


class EvidenceKeeper:
    """Collects evidence in a thread of its own.

    folder, store_path, state_path: of the replica's home. log: structlog's.
    """

    def __init__(
        self,
        folder: EvidenceFolder,
        store_path: Path,
        state_path: Path,
        genesis: Genesis,
        log: Any,  # noqa: ANN401 - structlog
        seal: Clear = CLEAR,
        before: Genesis | None = None,
    ) -> None:
        self.folder = folder
        self.names: list[str] = [file.name for file in folder.files()]
        self._members = genesis.members
        self._collector = Collector(store_path, state_path, genesis, seal, before)
        self.broken = frozenset(folder.broken_logs(self._collector.verifier.identities))
        self._log = log
        self._wanted: deque[_Wanted] = deque()
        self._seen: set[tuple[type, int, int]] = set()
        self._lies: dict[int, int] = {}
        self._thread = ThreadPoolExecutor(1, "evidence")

    def want(self, found: Found, ends: int | None = None) -> None:
        """Collect evidence of what the core found, unless it is here; ends: the last slot of its list, once known."""
        what = (type(found), found.log, 0 if isinstance(found, Forked) else found.index)
        if what in self._seen or self._is_kept(found):
            return
        if isinstance(found, Lied):
            if self._lies.get(found.log, 0) >= LIES_PER_LOG_MAX:
                return
            self._lies[found.log] = self._lies.get(found.log, 0) + 1
        self._seen.add(what)
        self._try(_Wanted(found, ends))

    def retry(self) -> None:
        """Try again what could not be collected yet; to be called every second or two, as tries are counted."""
        for _ in range(len(self._wanted)):
            self._try(self._wanted.popleft())

    def of(self, log: int) -> list[str]:
        """Return the names of the files about the log that is a member now with this number."""
        return [match.string for match in self._about(log)]

    def _about(self, log: int) -> list[re.Match[str]]:
        member = self._members[log]
        matches = [match for match in map(FILE_NAME.fullmatch, self.names) if match and int(match["log"]) == log]
        return [match for match in matches if match["id"] == short_id(member) or (not match["id"] and not member.since)]

    def close(self) -> None:
        """Finish what is being collected; what waits is found again at the next start."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _is_kept(self, found: Found) -> bool:
        if isinstance(found, Forked):
            return any(match["fork"] for match in self._about(found.log))
        return any(match["index"] == str(found.index) for match in self._about(found.log))

    def _try(self, wanted: _Wanted) -> None:
        self._thread.submit(self._collect, wanted)

    def _collect(self, wanted: _Wanted) -> None:
        """Collect and write one file, in the keeper's own thread."""
        wanted.attempts += 1
        last = wanted.attempts >= ATTEMPTS_MAX
        try:
            file = self._collector.collect(wanted.found, wanted.ends, complete=not last)
            if file is None and not last:
                self._wanted.append(wanted)
                return
            if file is not None and self.folder.write(*file):
                self.names = [one.name for one in self.folder.files()]
                self._log.warning("evidence kept", file=str(self.folder.path / file[0]), bytes=len(file[1]))
                return
            why = "what it needs is not here any more" if file is None else f"{self.folder.path} is full"
            self._log.error("no evidence kept", log=wanted.found.log, why=why)
        except (OSError, StoreError, StateDamagedError, LayoutError, VerificationError, sqlite3.Error) as error:
            if last:
                self._log.error("no evidence kept", log=wanted.found.log, why=str(error))
            else:
                self._wanted.append(wanted)
        except Exception:  # noqa: BLE001 - logged as a whole
            # A mistake here must not pass unseen in a thread whose result nobody takes.
            self._log.exception("collecting evidence failed", log=wanted.found.log)


class Collector:
    """Makes evidence of what the store and the state file of a replica hold, running or not.

    before: what was agreed under the list of members before, whose last state the file may hold.
    """

    def __init__(
        self,
        store_path: Path,
        state_path: Path,
        genesis: Genesis,
        seal: Clear = CLEAR,
        before: Genesis | None = None,
    ) -> None:
        self.verifier = GroupVerifier(genesis)
        self._before = before
        self._seal = seal
        self._store_path = store_path
        self._state_path = state_path
        self._genesis = genesis

    def collect(self, found: Found, ends: int | None = None, *, complete: bool = True) -> tuple[str, bytes] | None:
        """Return a file's name and content; None if something is missing. complete: rather nothing than less.

        ends: see `replica.core.proving.Replay`.
        """
        if isinstance(found, Forked):
            return self._fork(found)
        if isinstance(found, Exposed) and found.violation.rule == MALFORMED:
            return self._named(bare(Claim(found.log, found.index, MALFORMED), found.group, self._genesis, Kind.ENTRY))
        evidence = self._of_others(found, ends, complete=complete)
        return None if evidence is None else self._named(evidence)

    def _of_others(self, found: Exposed | Lied, ends: int | None, *, complete: bool) -> Evidence | None:
        """Return evidence that rests on more than the one entry."""
        basis, starts = self._basis()
        group = found.group if isinstance(found, Exposed) else self._group(found.log, found.index)
        if group is None:
            return None
        rule = found.violation.rule if isinstance(found, Exposed) else _lie(group, found.index)
        claim = Claim(found.log, found.index, rule)
        if rule == FALSE_RESULT:
            return bare(claim, group, self._genesis)
        try:
            if rule == FALSE_CHECKPOINT:
                evidence = collect_checkpoint(group, found.index, starts, self._genesis, self._groups)
            else:
                what = (found.log, found.index, self._genesis, self.verifier, basis, self._groups)
                evidence = collect_replay(*what, ends)
        except (TooLargeError, UnprovenError):
            return bare(claim, group, self._genesis)
        return evidence if evidence is not None or complete else bare(claim, group, self._genesis)

    def _basis(self) -> tuple[Basis | None, tuple[int, ...]]:
        """Return the persisted milestone to read on from, and every log's first index beyond it."""
        n = self._genesis.n
        if self._state_path.exists():
            with closing(PinnedState(self._state_path, self._seal)) as view:
                if view.exists:
                    header, said_by = said_under(view.header, self._genesis, self._before)
                    # The last milestone of the list before is none to read on from under this one.
                    if said_by is self._genesis:
                        return Basis(view.header, view.certificate, view.logs), tuple(at + 1 for at in header.cut)
        return None, (1,) * n

    def _groups(self, log: int, first: int) -> Iterator[VerifiedGroup]:
        """Yield the groups of `log` from index `first` on, as far as they are whole and without gaps."""
        with closing(sqlite3.connect(f"{self._store_path.absolute().as_uri()}?mode=ro", uri=True)) as db:
            while (row := read_only_group(db, log, first, self._seal)) is not None:
                group = self.verifier.verify(log, row.raw)
                if group.first > first:
                    return
                first = group.last + 1
                yield group

    def _group(self, log: int, index: int) -> VerifiedGroup | None:
        return next((group for group in self._groups(log, index) if group.first <= index), None)

    def _fork(self, found: Forked) -> tuple[str, bytes] | None:
        """Return the document of the group that was refused and one that is here and contradicts it."""
        new = found.group
        for known in self._groups(found.log, max(new.first - 1, 1)):
            if known.first > new.last + 1:
                break
            sides = [part for group in (known, new) for part in _attested(group)]
            if find_contradiction(self.verifier.identities[found.log], *sides) is not None:  # type: ignore[arg-type]
                content = json.dumps(contradiction_document(*sides))  # type: ignore[arg-type]
                return f"{self._log_name(found.log)}-fork.json", content.encode()
        return None

    def _log_name(self, log: int) -> str:
        return f"log-{log}-{short_id(self._genesis.members[log])}"

    def _named(self, evidence: Evidence) -> tuple[str, bytes]:
        claim = evidence.claim
        return f"{self._log_name(claim.log)}-entry-{claim.index}-{claim.rule}.evidence", evidence.encode()


def short_id(member: Member) -> str:
    """Return what a name says of which log it is about."""
    return log_id(member.log_public_key)[:ID_SIZE].hex()


def _lie(group: VerifiedGroup, index: int) -> str:
    return _LIES[group.payloads[index - group.first][0]]


def _attested(group: VerifiedGroup) -> tuple[Attestation, list[bytes]]:
    return Attestation.of_group(group.raw), [entry_digest(payload) for payload in group.payloads]
