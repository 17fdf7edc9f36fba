"""Fetching the state after a stable checkpoint, from several replicas at once (design section 4.3).

A certificate shows the header; everything else is named by the header's digests and so needs nobody's word: the logs'
reduced states, then the batches that they name, and of the two maps what differs from what is here. A part that does
not verify changes nothing; whoever sent it is asked no more. Nothing is installed before everything is verified.
"""

from dataclasses import dataclass, field

from replica.core.batch import Batch, batch_digest, decode_batch
from replica.core.checkpoint import Header, batches_in_flight, distinct_digests, state_digest
from replica.core.events import AskPart
from replica.core.execution import Executor
from replica.core.genesis import Genesis
from replica.core.layout import LayoutError
from replica.core.logstate import LogState
from replica.core.sessions import record_bytes_max
from replica.core.snapshot import Fetched, Moved, PartWanted, Source
from replica.core.tree import VALUE_BYTES_MAX
from replica.core.treefetch import TreeFetch

PARTS_AT_ONCE_PER_PEER = 4
PART_DEADLINE_MS = 2000
# A source that did not answer so often in a row is asked no more.
SILENCES_MAX = 5


@dataclass(slots=True)
class _Peer:
    """A source: what it was asked, and until when it may answer."""

    asked: dict[PartWanted, int] = field(default_factory=dict)
    silences: int = 0


class PoisonedError(Exception):
    """A part that is not what its digest names; its sender is asked no more."""


class Transfer:
    """One transfer of the state that `header` names. Times in milliseconds."""

    def __init__(self, header: Header, certificate: bytes, genesis: Genesis, mine: Executor) -> None:
        self.header = header
        self.certificate = certificate
        self._genesis = genesis
        self._peers: dict[int, _Peer] = {}
        self._refused: set[int] = set()  # they sent what it is not, or have it no more
        self._states: dict[int, LogState] = {}
        self._batches: dict[int, Batch] = {}
        self._bytes_taken = 0
        self._slicing: dict[Source, int] = {}  # who sends a bucket slice by slice
        self._named: list[bytes] | None = None  # the batches' digests, once the logs' states are known
        self._trees = {
            Source.APPLICATION: TreeFetch(header.application, mine.state, VALUE_BYTES_MAX),
            Source.TABLE: TreeFetch(header.table, mine.table.records, record_bytes_max(genesis.limits)),
        }

    @property
    def slot(self) -> int:
        """The slot whose state is fetched."""
        return self.header.slot

    @property
    def is_complete(self) -> bool:
        """Say whether everything is here and verified."""
        if self._named is None or len(self._batches) < len(self._named):
            return False
        return all(tree.is_complete for tree in self._trees.values())

    @property
    def sources(self) -> tuple[int, ...]:
        """The replicas that are asked."""
        return tuple(self._peers)

    def add_source(self, peer: int) -> None:
        """Ask `peer` too, which offered the same state; not if what it sent of it was refused."""
        if peer not in self._refused:
            self._peers.setdefault(peer, _Peer())

    def drop_source(self, peer: int) -> None:
        """Ask `peer` no more; what it was asked, others will be."""
        dropped = self._peers.pop(peer, None)
        for wanted in dropped.asked if dropped is not None else ():
            self._lost(wanted)

    def due(self, now_ms: int) -> list[AskPart]:
        """Return the questions to ask now."""
        for number, peer in list(self._peers.items()):
            late = [wanted for wanted, deadline in peer.asked.items() if now_ms >= deadline]
            for wanted in late:
                del peer.asked[wanted]
                self._lost(wanted)
            peer.silences += bool(late)
            if peer.silences > SILENCES_MAX:
                self.drop_source(number)
        questions = []
        # Those that answer come first, so that what a silent one left over is not asked of it again.
        for number, peer in sorted(self._peers.items(), key=lambda item: item[1].silences):
            # One that is slow to answer is asked one thing at a time.
            room = (1 if peer.silences else PARTS_AT_ONCE_PER_PEER) - len(peer.asked)
            for wanted in self._wanted(room) if room > 0 else ():
                # Slices of one bucket prove nothing one by one: all are asked of one source, as long as it is there.
                asked = self._slicing[wanted.source] if wanted.want and wanted.want.offset else number
                if asked not in self._peers:
                    self._lost(wanted)  # begin again with the first slice: nobody else can be blamed for those before
                    continue
                self._peers[asked].asked[wanted] = now_ms + PART_DEADLINE_MS
                questions.append(AskPart(asked, self.slot, wanted))
        return questions

    def take(self, number: int, wanted: PartWanted, data: bytes | None) -> bool:
        """Take what `number` sent; False if it came too late or was never asked for.

        PoisonedError, changing nothing, if it is not what was asked for.
        """
        peer = self._peers.get(number)
        if peer is None or peer.asked.pop(wanted, None) is None:
            return False
        peer.silences = 0
        try:
            if data is not None:
                self._take(number, wanted, data)
                self._bytes_taken += len(data)
                return True
            why = "it does not have that state any more"
        except LayoutError as error:
            why = str(error)
        self._lost(wanted)
        self.drop_source(number)
        self._refused.add(number)
        raise PoisonedError(f"replica {number}, {wanted.source.name.lower()}: {why}")

    def fetched(self) -> Fetched:
        """Return what came, once it is complete; LayoutError if a root is no map's, which no correct replica says."""
        states = tuple(self._states[log] for log in range(self._genesis.n))
        batches = tuple(batch for _, batch in sorted(self._batches.items()))
        application, table = (self._trees[source].result() for source in (Source.APPLICATION, Source.TABLE))
        return Fetched(self.header, self.certificate, states, batches, application, table, self._moved)

    @property
    def _moved(self) -> Moved:
        progress = self._trees[Source.APPLICATION].progress
        return Moved(self._bytes_taken, progress.buckets_fetched, progress.keys_fetched)

    def _is_asked(self, wanted: PartWanted) -> bool:
        return any(wanted in peer.asked for peer in self._peers.values())

    def _wanted(self, count: int) -> list[PartWanted]:
        """Return up to `count` parts that are missing and not asked for."""
        blobs = [PartWanted(Source.LOGS, log) for log in range(self._genesis.n) if log not in self._states]
        named = self._named or ()
        blobs += [PartWanted(Source.BATCHES, i) for i in range(len(named)) if i not in self._batches]
        found = [wanted for wanted in blobs if not self._is_asked(wanted)][:count]
        for source, tree in self._trees.items():
            found += [PartWanted(source, want=want) for want in tree.wants(count - len(found))]
        return found

    def _lost(self, wanted: PartWanted) -> None:
        if wanted.want is not None:
            self._trees[wanted.source].lost(wanted.want)

    def _take(self, number: int, wanted: PartWanted, data: bytes) -> None:
        if wanted.source is Source.LOGS:
            self._take_log(wanted.number, data)
        elif wanted.source is Source.BATCHES:
            self._take_batch(wanted.number, data)
        elif wanted.want is not None:
            tree = self._trees[wanted.source]
            tree.take(wanted.want, data)
            if tree.slicing == wanted.want.node:
                self._slicing[wanted.source] = number

    def _take_log(self, log: int, data: bytes) -> None:
        if state_digest(data) != self.header.logs[log]:
            raise LayoutError(f"not the reduced state of log {log}")
        self._states[log] = LogState.decode(data)
        if len(self._states) == self._genesis.n:
            states = [self._states[i] for i in range(self._genesis.n)]
            self._named = distinct_digests(batches_in_flight(states))

    def _take_batch(self, place: int, data: bytes) -> None:
        if self._named is None or batch_digest(data) != self._named[place]:
            raise LayoutError("not the batch that was asked for")
        self._batches[place] = decode_batch(data, self._genesis.cluster_id(), self._genesis.limits)
