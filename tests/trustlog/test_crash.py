"""The process dies at every file operation, the power fails with it or later: nothing that was signed is forgotten."""

from __future__ import annotations

import itertools

import pytest

from tests.trustlog.support import CONTEXT, Crash, ForgetfulFiles, digests_of, identity_of
from trustlog import (
    AppendStatement,
    MisuseError,
    SealedStateError,
    create,
    find_contradiction,
    open_log,
    sealed,
)
from trustlog.sealed import SECTOR_SIZE, SealedJournal

LOSSES = [{"names": names, "content": content} for names in (False, True) for content in (False, True)]


class ForgottenError(AssertionError):
    """Something that was signed is gone."""


class History:
    """Everything that left the log, and the check that a later log stands by it."""

    def __init__(self):
        self.groups = []
        self.low = 1
        self.identity = None

    def append(self, log, *payloads):
        digests = digests_of(*payloads)
        self.groups.append((log.append(digests, context=CONTEXT), digests))

    def truncate(self, log, index):
        log.truncate(index, context=CONTEXT)
        self.low = index

    def check(self, log):
        last = max((AppendStatement.decode(group[0].statement).last for group in self.groups), default=0)
        if log.last < last:
            raise ForgottenError(f"the log forgot: it ends at {log.last}, but {last} was attested")
        if log.low < self.low:
            raise ForgottenError("the log forgot a truncation")
        for a, b in itertools.combinations(self.groups, 2):
            assert find_contradiction(identity_of(log), *a, *b) is None


def work(history, directory, files):
    """Three records to a file: creation, appends over two replacements, a truncation, a restart."""
    with create(directory, files=files) as log:
        for number in range(4):
            history.append(log, f"{number}", f"{number}'")
        history.truncate(log, 3)
    with open_log(directory, files=files) as log:
        for number in range(4, 8):
            history.append(log, f"{number}")


def reopen(history, directory, files):
    """Open what is left; None if the log never came into being, which is right only if nothing was signed."""
    try:
        return open_log(directory, files=files)
    except (MisuseError, SealedStateError) as error:
        if history.groups or "there is no log" not in str(error):
            raise ForgottenError(f"the log forgot everything: {error}") from error
        return None


def after(history, directory, files):
    """Open what is left, and go on with other entries."""
    log = reopen(history, directory, files)
    if log is None:
        return False
    with log:
        history.check(log)
        history.append(log, "after")
        history.check(log)
    return True


def steps_of(tmp_path, monkeypatch):
    files = ForgetfulFiles(tmp_path / "count")
    work(History(), tmp_path / "count", files)
    return files.steps


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(sealed, "SECTORS", 4)
    monkeypatch.setattr(sealed, "FILE_SIZE", 4 * SECTOR_SIZE)


def crash_everywhere(tmp_path, monkeypatch, continuation):
    """Run ``continuation`` after a death at every step, with every loss; returns how often the log was there."""
    survived = 0
    total = steps_of(tmp_path, monkeypatch)
    assert total > 60
    for step, (number, loss) in itertools.product(range(1, total + 1), enumerate(LOSSES)):
        directory = tmp_path / f"{step} {number}"
        files, history = ForgetfulFiles(directory, step), History()
        with pytest.raises(Crash):
            work(history, directory, files)
        files.crash_at = None
        survived += continuation(history, directory, files, loss)
    assert survived > 3 * total
    return survived


def test_power_fails_at_every_step(tmp_path, monkeypatch, small):
    def continuation(history, directory, files, loss):
        files.lose_power(**loss)
        return after(history, directory, files)

    crash_everywhere(tmp_path, monkeypatch, continuation)


def test_the_process_dies_at_every_step_and_the_power_fails_after_the_restart(tmp_path, monkeypatch, small):
    def continuation(history, directory, files, loss):
        log = reopen(history, directory, files)
        if log is None:
            return False
        with log:
            history.check(log)
            if log.last:
                digests = reissued_digests(log)
                history.groups.append((log.reissue(), digests))
        files.lose_power(**loss)
        return after(history, directory, files)

    crash_everywhere(tmp_path, monkeypatch, continuation)


def reissued_digests(log):
    first, last = log.last_group
    payloads = [text for number in range(4) for text in (f"{number}", f"{number}'")] + [f"{n}" for n in range(4, 8)]
    return digests_of(*payloads[first - 1 : last])


def drop(name):
    def method(*_args):
        return None

    return name, method


def test_the_check_catches_a_missing_sync(tmp_path, monkeypatch, small):
    monkeypatch.setattr(*(ForgetfulFiles, *drop("sync")))
    with pytest.raises(ForgottenError):
        test_power_fails_at_every_step(tmp_path, monkeypatch, None)


def test_the_check_catches_a_missing_sync_of_the_directory(tmp_path, monkeypatch, small):
    monkeypatch.setattr(*(ForgetfulFiles, *drop("sync_directory")))
    with pytest.raises(ForgottenError):
        test_power_fails_at_every_step(tmp_path, monkeypatch, None)


def test_the_check_catches_an_opening_that_trusts_the_page_cache(tmp_path, monkeypatch, small):
    load = SealedJournal._load

    def load_without_sync(self, data):
        files = self._files
        self._files = type(
            "Reader", (), {name: staticmethod(lambda *_: None) for name in ("write", "sync", "sync_directory")}
        )()
        load(self, data)
        self._files = files

    monkeypatch.setattr(SealedJournal, "_load", load_without_sync)
    with pytest.raises(ForgottenError):
        test_the_process_dies_at_every_step_and_the_power_fails_after_the_restart(tmp_path, monkeypatch, None)
