"""A live cluster, only looked at: what its replicas' stores hold of each log, and what they say of themselves.

Entries are read from the stores in the cluster's directory, read-only, and verified here with the keys in cluster.toml;
a replica on another machine has its log shown as its peers here hold it. Verdicts, views and slots are each
replica's own word, asked for by the status query that `trustlog-client status` sends. Nothing is written, appended
or ordered. A log's newest group may be missing for a while: its attestation is stored with the next one.
"""

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any, Final, Self

from client.api import Client
from client.errors import ClientError
from client.queries import ReplicaStatus
from replica.cluster.clusterfile import CLUSTER_FILE_NAME, load_cluster_file
from replica.cluster.home import ReplicaHome, load_home
from replica.cluster.provision import replica_folder_name
from replica.cluster.strict_toml import ConfigError
from replica.core.entries import PrePrepare, decode_entry
from replica.core.group import VerifiedGroup
from replica.core.layout import LayoutError
from replica.shell.store import StoreError, read_only_group
from replica.shell.verify import GroupVerifier
from replica.sim.words import entry_in_words
from trustlog import VerificationError

GROUPS_SHOWN: Final = 12
STATUS_S: Final = 2.0
# How long an answer is given again, however many ask.
FRESH_S: Final = 1.0


class LiveCluster:
    """A cluster's directory, and a client of it if the directory holds a client's key. Use it as a context."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.cluster = load_cluster_file(directory / CLUSTER_FILE_NAME)
        self._genesis = self.cluster.genesis
        self._verifier = GroupVerifier(self._genesis)
        self._client: Client | None = None
        self._problem = ""
        self._turn = asyncio.Lock()
        self._found: dict[str, Any] = {}
        self._found_at = -FRESH_S

    async def __aenter__(self) -> Self:
        try:
            self._client = await Client.from_dir(self._directory, deadline_s=STATUS_S).__aenter__()
        except (ConfigError, ClientError) as error:
            self._problem = f"what replicas say of themselves cannot be asked for: {error}"
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._client is not None:
            await self._client.close()

    async def look(self) -> dict[str, Any]:
        """Return what is there now, for the page."""
        async with self._turn:
            now = asyncio.get_running_loop().time()
            if now - self._found_at >= FRESH_S:
                logs = await asyncio.to_thread(self._logs)
                replicas = [self._as_data(status) for status in await self._statuses()]
                genesis = self._genesis
                about = {"name": genesis.name, "n": genesis.n, "f": genesis.f, "ordering": genesis.ordering.label}
                self._found = {**about, "problem": self._problem, "replicas": replicas, "logs": logs}
                self._found_at = asyncio.get_running_loop().time()
            return self._found

    async def _statuses(self) -> list[ReplicaStatus]:
        if self._client is None:
            places = self.cluster.replicas
            return [ReplicaStatus(p.number, p.address, reachable=False, problem="not asked") for p in places]
        return await self._client.status()

    def _as_data(self, status: ReplicaStatus) -> dict[str, Any]:
        report, log = status.report, status.report.get("log")
        kept = {
            name: report.get(name) for name in ("view", "executed", "stable", "primary", "mute", "suspects_primary")
        }
        own = log if isinstance(log, dict) else {}
        verdicts = report.get("verdicts")
        return {
            "number": status.number,
            "address": status.address,
            "reachable": status.reachable,
            "problem": status.problem,
            **kept,
            "log": {name: own.get(name) for name in ("last", "head", "backend", "protects")},
            "verdicts": [v for v in verdicts if isinstance(v, dict)] if isinstance(verdicts, list) else [],
        }

    # The logs.

    def _logs(self) -> list[dict[str, Any]]:
        homes = [home for number in range(self._genesis.n) if (home := self._home(number)) is not None]
        return [self._log(number, homes) for number in range(self._genesis.n)]

    def _home(self, number: int) -> ReplicaHome | None:
        folder = self._directory / replica_folder_name(number)
        try:
            return load_home(folder) if folder.is_dir() else None
        except ConfigError:
            return None

    def _log(self, log: int, homes: list[ReplicaHome]) -> dict[str, Any]:
        """Return the end of a log: as its author's store holds it, or else another's."""
        problem = "no replica's folder is here"
        for home in sorted(homes, key=lambda home: (home.number != log, home.number)):
            if home.settings.trusted_log.encrypt_store:
                problem = f"the store of {home.path.name} is sealed: only its replica can read it"
                continue
            try:
                groups = self._groups(home, log)
            except (sqlite3.Error, StoreError, LayoutError, VerificationError) as error:
                problem = f"{home.store_path.name} of {home.path.name}: {error}"
                continue
            if groups:
                shown = [self._group(group) for group in groups]
                return {"log": log, "held_by": home.number, "groups": shown, "problem": ""}
            problem = "nothing is there yet"
        return {"log": log, "held_by": None, "groups": [], "problem": problem}

    def _groups(self, home: ReplicaHome, log: int) -> list[VerifiedGroup]:
        """Return the last groups of a log in a store, oldest first, each verified."""
        if not home.store_path.exists():
            return []
        found: list[VerifiedGroup] = []
        index: int | None = None
        with closing(sqlite3.connect(f"{home.store_path.absolute().as_uri()}?mode=ro", uri=True)) as db:
            while len(found) < GROUPS_SHOWN and index != 0:
                row = read_only_group(db, log, index)
                if row is None:
                    break
                found.append(self._verifier.verify(log, row.raw))
                index = row.first - 1
        return found[::-1]

    def _group(self, group: VerifiedGroup) -> dict[str, Any]:
        entries = [self._entry(index, payload) for index, payload in enumerate(group.payloads, group.first)]
        place = {"first": group.first, "last": group.last, "head": group.head_after.hex()}
        return {**place, "head_before": group.head_before.hex(), "entries": entries}

    def _entry(self, index: int, payload: bytes) -> dict[str, Any]:
        words = entry_in_words(payload)
        try:
            entry = decode_entry(payload, self._genesis, self.cluster.cluster_id)
        except LayoutError as error:
            return {"index": index, "kind": "?", "text": f"no entry: {error}"}
        if isinstance(entry, PrePrepare):
            count = len(entry.batch.envelopes)
            words += f" ({count} request{'' if count == 1 else 's'})"
        return {"index": index, "kind": words.split(" ", 1)[0], "text": words}
