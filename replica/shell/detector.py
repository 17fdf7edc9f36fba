"""The failure detector of a daemon: what it sees of every log, its verdicts, and the evidence that it keeps."""

import asyncio
from typing import TYPE_CHECKING, Any

from replica.core.events import Exposed, Forked, Lied
from replica.core.verdicts import Sight, Standing, Verdicts
from replica.shell.evidence import EvidenceFolder, EvidenceKeeper

if TYPE_CHECKING:
    from replica.shell.node import Node


class Detector:
    """One replica's opinion of all."""

    def __init__(self, node: "Node") -> None:
        home = node.home
        folder = EvidenceFolder(home.evidence_path)
        paths = (home.store_path, home.state_path)
        cluster = home.cluster
        self.keeper = EvidenceKeeper(folder, *paths, cluster.genesis, node.log, node.seal, cluster.before)
        self.verdicts = Verdicts(home.number, home.cluster.genesis.n)
        self._node = node
        self._indexes: dict[int, int] = {}  # of the entries that exposed their logs

    # What the core found

    def on_exposed(self, effect: Exposed) -> None:
        """Say so, and keep evidence."""
        self._indexes[effect.log] = effect.index
        self._node.measures.exposures[effect.log] += 1
        self._node.log.error(
            "replica exposed: its log breaks a rule and is read no further",
            log=effect.log,
            index=effect.index,
            rule=effect.violation.rule,
            text=effect.violation.text,
        )
        self._want(effect)

    def on_lie(self, effect: Lied) -> None:
        """Say so, and keep evidence."""
        self._node.refusals["lie"] += 1
        self._node.log.warning("replica lied; not counted", log=effect.log, index=effect.index, text=effect.text)
        self._want(effect)

    def on_forked(self, effect: Forked) -> None:
        """Say so, and keep evidence."""
        self._indexes[effect.log] = effect.index
        self._node.measures.exposures[effect.log] += 1
        self._node.log.critical(
            "trusted log broken: two attestations contradict each other; the log is read no further",
            log=effect.log,
            index=effect.index,
        )
        self._want(effect)

    def _want(self, found: Exposed | Lied | Forked) -> None:
        self.keeper.want(found, self._node.core.ends)

    # Opinions

    def tick(self) -> None:
        """Look at every log, and try again to collect what evidence is wanted; to be called every second or two."""
        self.look()
        self.keeper.retry()

    def look(self) -> None:
        """Look at every log."""
        core = self._node.core
        now_ms = self._now_ms()
        sights = [self._sight(log, now_ms) for log in range(core.genesis.n)]
        before = [self.verdicts[log].standing for log in range(core.genesis.n)]
        self.verdicts.look(now_ms, core.executed, sights, awake=core.is_live and core.transfer is None)
        for log, was in enumerate(before):
            if was is Standing.TRUSTED and self.verdicts[log].standing is Standing.SUSPECTED:
                self._node.measures.suspicions[log] += 1

    def report(self, log: int) -> dict[str, Any]:
        """Return the verdict on `log` for the status report."""
        verdict = self.verdicts[log]
        found = self._node.core.exposed.get(log)
        if found is not None and verdict.standing in {Standing.TRUSTED, Standing.SUSPECTED}:
            self.look()  # it was found since
            verdict = self.verdicts[log]
        since_s = None if verdict.since_ms is None else (self._now_ms() - verdict.since_ms) // 1000
        return {
            "replica": log,
            "verdict": verdict.standing.value,
            "reason": verdict.reason or None,
            "text": verdict.text or None,
            "for_s": since_s,
            "index": self._indexes.get(log),
            "evidence": self.keeper.of(log),
        }

    def _sight(self, log: int, now_ms: int) -> Sight:
        core, link = self._node.core, self._node.links.get(log)
        heard = now_ms if link is None else int(1000 * max(link.heard, self._node.server.heard_from(log)))
        position = core.read(log), core.received(log), core.seen(log)
        return Sight(heard, *position, core.lacks(log), core.exposed.get(log))

    def _now_ms(self) -> int:
        return int(asyncio.get_running_loop().time() * 1000)
