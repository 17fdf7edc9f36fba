"""Founding a new cluster with what survivors of a lost one have (`replica.core.founding`).

More than f replicas are gone for good, so the old cluster can never decide anything again, and nobody may speak for
the logs that are lost. An operator decides, never the software: what the survivors do not have is given up. The plan
says what that is; only who names its last slot has it carried out.

    carried over    the application's state, and which of its versions is in force; who may be a client; name, ordering,
                    limits and application; the operators' keys; that payloads at rest are sealed
    made anew       the cluster's id, the logs, all keys of replicas, a key for a client and one more operator
    left out        cluster.toml's [appraisal]: it is about the old logs and their machines, and new logs that cannot
                    show what it demands would never talk to each other
    given up        what was executed after the last slot that a survivor shows; sessions; the members' history
"""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from replica.cluster.home import ReplicaHome, load_home
from replica.cluster.provision import Foundation, replica_folder_name
from replica.core.checkpoint import decode_header
from replica.core.execution import Executor
from replica.core.founding import carried_over, founding_of, founding_state
from replica.core.genesis import OPERATORS_MAX, Founding, Genesis
from replica.core.snapshot import Milestone
from replica.core.state import BucketedMap
from replica.operations.survivors import Survivor, SurvivorError, read_survivors
from replica.shell.atrest import CLEAR
from replica.shell.keeper import write_milestone
from replica.shell.opening import open_trusted_log, payload_seal
from replica.shell.statestore import StateStore
from trustlog.appraisal import EvidenceLevel, Policy


@dataclass(frozen=True, slots=True)
class Plan:
    """What a new cluster would begin with. best: the survivor whose state that is. survivors: all that were named.

    base: the slot after which the new cluster's first one comes. keys: of the application. version: of it, in force.
    listed: whether only clients that were allowed may work.
    """

    best: Survivor
    survivors: tuple[Survivor, ...]
    founding: Founding
    base: int
    keys: int
    version: int
    listed: bool
    _executor: Executor
    _table: BucketedMap
    _log: Any

    @property
    def genesis(self) -> Genesis:
        """What is agreed in the old cluster."""
        return self.best.home.cluster.genesis

    @property
    def has_appraisal(self) -> bool:
        """Say whether the old cluster's file demands something of its replicas' evidence, which no new one does."""
        return self.best.home.cluster.appraisal != Policy(minimum_evidence=EvidenceLevel.NONE)

    @property
    def encrypts_store(self) -> bool:
        """Say whether the survivor's payloads at rest are sealed."""
        return self.best.home.settings.trusted_log.encrypt_store

    def losses(self) -> list[str]:
        """Return what is given up, in sentences."""
        slot, top = self.best.executed, max(one.top for one in self.survivors)
        texts = [f"every operation executed after slot {slot}, acknowledged or not: no survivor named here shows more"]
        if top > slot:
            texts.append(
                f"slots {slot + 1} to {top}: survivors hold votes for them and cannot show that they were decided; "
                "replicas that are lost may have acknowledged them to clients"
            )
        texts += [
            "all sessions: what clients had under way may have been executed, and sent again is executed again",
            "the old cluster for ever: as soon as clients work with the new one, never start a replica of the old one",
        ]
        if self.has_appraisal:
            texts.append(
                "what [appraisal] in the old cluster.toml demands of replicas' evidence: it is not carried over, and "
                "the new cluster demands nothing until you write it a table of its own"
            )
        missing = self.genesis.n - len({one.home.number for one in self.survivors})
        if missing:
            texts.append(
                f"what the other {missing} of {self.genesis.n} replicas have, if any of them still exists: name its "
                "folder or backup as well, before you give anything up"
            )
        return texts

    def foundation(self) -> Foundation:
        """Return what `init_cluster` makes a cluster of."""
        operators = self.genesis.operators[: OPERATORS_MAX - 1]  # one is made
        return Foundation(self.founding, operators, self._fill)

    def _fill(self, directory: Path) -> None:
        """Put the state into every replica's folder in `directory`, sealed if its payloads are."""
        home = load_home(directory / replica_folder_name(0), environ={})
        genesis = home.cluster.genesis
        milestone = founding_state(genesis, self._executor.state.frozen(), self._table.frozen()).milestone()
        for number in range(genesis.n):
            self._write(load_home(directory / replica_folder_name(number), environ={}), milestone)

    def _write(self, home: ReplicaHome, milestone: Milestone) -> None:
        seal = CLEAR
        if home.settings.trusted_log.encrypt_store:
            with closing(open_trusted_log(home, self._log)) as trusted:
                seal = payload_seal(home, trusted)
        mine = (home.cluster.cluster_id, home.number)
        with closing(StateStore(home.state_path, *mine, seal=seal)) as store:
            write_milestone(store, milestone, decode_header(milestone.header, home.cluster.genesis.n))


@contextmanager
def planned(places: Sequence[Path], beside: Path, log: Any) -> Iterator[Plan]:  # noqa: ANN401 - structlog
    """Read survivors and say what a new cluster would begin with; copies are made beside `beside`, and vanish.

    SurvivorError, ConfigError or OSError if that cannot be. Survivors are not changed.
    """
    beside.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{beside.name}.survivors.", dir=beside.parent))
    try:
        best, survivors = read_survivors(places, work, log)
        yield _plan(best, survivors, log)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _plan(best: Survivor, survivors: Sequence[Survivor], log: Any) -> Plan:  # noqa: ANN401 - structlog
    executor, cluster = best.executor, best.home.cluster
    if executor is None or not best.executed:
        named = ", ".join(os.fspath(one.place) for one in survivors)
        raise SurvivorError(
            f"{named}: nothing was executed there, so there is nothing to go on from: make a new cluster"
        )
    table = carried_over(executor)
    founding = founding_of(cluster.cluster_id, executor, table)
    return Plan(
        best,
        tuple(survivors),
        founding,
        founding.base(cluster.genesis.limits.checkpoint_interval),
        len(executor.state),
        executor.versions.present,
        bool(executor.clients.mode),
        executor,
        table,
        log,
    )
