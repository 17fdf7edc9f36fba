"""Planted bugs about the application's version; see `replica.sim.planted`, `replica.sim.controls_versions`."""
# ruff: noqa: ANN401, SLF001

from typing import Any

from replica.application import Context
from replica.core.execution import Executor
from replica.core.versions import Versions
from replica.sim.planted import Patch
from replica.sim.replica import CorrectReplica
from replica.sim.watched import WatchedKeyValue

ONE = 1


def at_once_at_one() -> list[Patch]:
    """Put a version in force in the slot of its command, at one replica."""
    right_core, right = CorrectReplica._make_core, Executor._administer

    def make_core(host: Any, snapshot: Any) -> Any:
        core = right_core(host, snapshot)
        core.executor.knows_version += host.number == ONE  # a mark: nobody goes so far
        return core

    def administer(executor: Any, content: Any, slot: int) -> Any:
        reply = right(executor, content, slot)
        if executor.knows_version > WatchedKeyValue.version:
            executor.versions.end_slot()
            executor._context.version = executor.versions.present
        return reply

    return [(CorrectReplica, "_make_core", make_core), (Executor, "_administer", administer)]


def not_restored() -> list[Patch]:
    """Begin with version 0 after a state transfer, or a restart."""
    return [(Versions, "restored", Versions)]


class _Old(WatchedKeyValue):
    version = 0

    def apply(self, operation: bytes, context: Context) -> bytes:
        context.version = 0
        return super().apply(operation, context)


def old_code_goes_on() -> list[Patch]:
    """Execute what the code does not know, as the code knows it, at one replica."""
    right = CorrectReplica._application

    def application(host: Any) -> Any:
        made = right(host)
        return _Old(made._heard) if host.number == ONE else made

    return [(CorrectReplica, "_application", application), (Executor, "outdated", None)]
