"""Whatever this replica lacks and others have: entries, its own log's end, the state after a checkpoint.

Missing entries are asked for one log after the other (`fetching`). Where a peer's part of a log begins only behind
what is missing here, the entries were forgotten there because a checkpoint is stable; that checkpoint's state is then
asked for (`transfer`). A restarted replica asks what its peers hold of its own log (`homecoming`).

A state is of use if its cut skips what is missing here. A peer that went over to the next list of members has also
dropped, whole, the logs that left, beyond the last cut too. So of a log that something here waits for, and that was
asked for in vain, one peer's word that it is gone is enough for any state ahead of what is executed here: a liar costs
a transfer at the most, which a quorum certified, and which is given up as soon as the logs get as far.
"""

from collections import Counter
from collections.abc import Collection, Sequence

from replica.core.checkpoint import Header
from replica.core.events import (
    AskCheckpoint,
    CheckpointOffered,
    Effect,
    Fetch,
    HeadsReceived,
    Install,
    PartReceived,
    PeerHolds,
)
from replica.core.execution import Executor
from replica.core.fetching import Fetcher
from replica.core.genesis import Genesis
from replica.core.heads import HeadsComparer
from replica.core.homecoming import Homecoming
from replica.core.inbox import Inbox
from replica.core.transfer import PoisonedError, Transfer

# How long nothing more is asked of anybody about checkpoints after someone was asked.
OFFERS_PAUSE_MS = 500
# Questions about checkpoints that one peer may answer late.
OFFERS_OPEN_MAX = 4
# A newer checkpoint takes the place of one whose transfer has just begun, or of which no part came for so long.
YOUNG_MS = 500
STALLED_MS = 2000
# One that takes longer than this, and than twice as long the next time, may be replaced by what others offer.
TRANSFER_MS_FIRST = 300_000


class CatchUp:
    """The questions of replica `number`, and what it does with the answers."""

    def __init__(self, number: int, genesis: Genesis, inboxes: Sequence[Inbox], executor: Executor) -> None:
        self.fetcher = Fetcher(number, genesis.n)
        self.homecoming = Homecoming(number, genesis.n, genesis.f)
        self._heads = HeadsComparer(number)
        self.transfer: Transfer | None = None
        self.refusals = Counter[str]()
        self._number = number
        self._genesis = genesis
        self._inboxes = inboxes
        self._executor = executor
        self._installing = 0  # the slot whose state is being installed: this core's time is over
        self._offers: dict[int, CheckpointOffered] = {}  # each peer's last
        self._asked_offers = Counter[int]()
        self._gone: dict[int, int] = {}  # logs asked for of which a peer keeps nothing beyond this entry, the last here
        self._begun_at = 0
        self._moved_at = 0  # when a part came last
        self._transfer_ms = TRANSFER_MS_FIRST
        self._slow: set[int] = set()  # sources of what took too long
        self._ask_offers_at = 0
        self._ask_own_at = 0
        # Without the state with which its list of members begins, a replica can read nothing.
        self.needs_state = False

    def due(self, now_ms: int, blind: Collection[int]) -> list[Effect]:
        """Return the questions to ask now."""
        own = self._inboxes[self._number]
        questions: list[Effect] = [*self.homecoming.due(now_ms, own)]
        questions += self.fetcher.due(now_ms, self._inboxes, blind)
        if self.needs_state and self.transfer is None:
            questions += self._ask_for_state(now_ms)
        if self.transfer is not None:
            if self._executor.slot >= self.transfer.slot or not self.transfer.sources:
                self._give_up(self.transfer)  # overtaken by the logs, or nobody is left to ask
            questions += self._go_on(now_ms)
        return questions

    def peer_holds(self, event: PeerHolds, now_ms: int) -> list[Effect]:
        """Take a peer's answer to a question about a log."""
        inbox = self._inboxes[event.log]
        # The own log too can be gone elsewhere, and one whose author is silent down to its last entry.
        is_gone = inbox.received + 1 < event.first
        if is_gone and self.fetcher.asks_for(event.log):
            self._gone[event.log] = inbox.received
        if event.log == self._number:
            self.homecoming.heard(event.peer, event.last)
            if event.last > inbox.received and not is_gone and now_ms >= self._ask_own_at:
                # More than is here: it must show it. Either the store lost it, or the trusted state was rolled back.
                self._ask_own_at = now_ms + OFFERS_PAUSE_MS
                return [Fetch(self._number, inbox.received + 1, event.peer)]
        return [*self._ask_for_state(now_ms)] if is_gone else []

    def _ask_for_state(self, now_ms: int) -> list[AskCheckpoint]:
        if now_ms < self._ask_offers_at or self._installing:
            return []
        self._ask_offers_at = now_ms + OFFERS_PAUSE_MS
        # All are asked: several sources are quicker than one, and one may be silent.
        peers = [peer for peer in range(self._genesis.n) if peer != self._number]
        for peer in peers:
            self._asked_offers[peer] = min(self._asked_offers[peer] + 1, OFFERS_OPEN_MAX)
        return [AskCheckpoint(peer) for peer in peers]

    def heads(self, event: HeadsReceived, blind: Collection[int], now_ms: int) -> list[Effect]:
        """Compare what a peer says of the logs' ends; ask for what contradicts."""
        return [*self._heads.compare(event, self._inboxes, blind, now_ms)]

    def offered(self, event: CheckpointOffered, now_ms: int) -> list[Effect]:
        """Take a peer's checkpoint, whose certificate was verified; one that nobody asked for is refused."""
        if not self._asked_offers[event.peer]:
            self.refusals["offer-unasked"] += 1
            return []
        self._asked_offers[event.peer] -= 1
        self._offers[event.peer] = event
        return self._go_on(now_ms)

    def _is_of_use(self, offer: CheckpointOffered) -> bool:
        header = offer.header
        if self.needs_state:
            return header.slot >= self._genesis.base
        if offer.before is not None:
            return False
        skips = any(at > inbox.received for at, inbox in zip(header.cut, self._inboxes, strict=True))
        # What was executed here was read here, cuts included: no log, not even the own one, lacks what lies before.
        return header.slot > self._executor.slot and (skips or self._waits_in_vain)

    @property
    def _waits_in_vain(self) -> bool:
        """Say whether a log that is still asked for was said to be gone beyond where it ends here."""
        return any(self.fetcher.asks_for(log) and self._inboxes[log].received == at for log, at in self._gone.items())

    def _go_on(self, now_ms: int) -> list[Effect]:
        """Begin with the newest checkpoint offered, or go on with the transfer under way; return what to ask.

        One that moves is not given up for a newer one: under load there always is a newer one, and peers keep what
        they offered. One that does not move is: its only source may be faulty, and its certificate old but true. So is
        one that moves too slowly, if someone else has anything to offer: a faulty source may send a part now and then.

        While a state is being installed, which can take longer than fetching it did, none is fetched: installed later,
        a newer one would take the next core back from where it had read on to.
        """
        if self._installing:
            return []
        offers = [offer for _, offer in sorted(self._offers.items()) if self._is_of_use(offer)]
        if self.transfer is not None and now_ms - self._begun_at >= self._transfer_ms:
            self._outlive(self.transfer, offers)
        newest = max(offers, key=lambda offer: (offer.peer not in self._slow, offer.header.slot), default=None)
        if newest is not None and self._may_begin(newest.header, now_ms):
            genesis = newest.before or self._genesis
            self.transfer = Transfer(newest.header, newest.certificate, genesis, self._executor)
            self._begun_at = self._moved_at = now_ms
        if self.transfer is None:
            return []
        for offer in offers:
            if offer.header == self.transfer.header:
                self.transfer.add_source(offer.peer)
        return [*self.transfer.due(now_ms)]

    def _may_begin(self, header: Header, now_ms: int) -> bool:
        if self.transfer is None:
            return True
        is_idle = now_ms - self._begun_at < YOUNG_MS or now_ms - self._moved_at >= STALLED_MS
        return header.slot > self.transfer.slot and (is_idle or not self.transfer.sources)

    def _outlive(self, transfer: Transfer, offers: Sequence[CheckpointOffered]) -> None:
        """Give up a transfer that takes too long, if others offer something; they have twice as long."""
        slow = {*transfer.sources}
        if any(offer.peer not in slow | self._slow for offer in offers):
            self._slow |= slow
        elif any(offer.peer not in slow for offer in offers):
            self._slow = slow  # everybody was slow once: who was slow last comes last
        else:
            return
        self._transfer_ms *= 2
        self.transfer = None

    def _give_up(self, transfer: Transfer) -> None:
        """Forget a transfer, and who offered it: they do not have it, or said what is not, or it is of no use."""
        self.transfer = None
        self._offers = {peer: offer for peer, offer in self._offers.items() if offer.header != transfer.header}

    def part(self, event: PartReceived, now_ms: int) -> list[Effect]:
        """Take a part of the state; Install once everything is here."""
        transfer = self.transfer
        if transfer is None or event.slot != transfer.slot:
            return []
        try:
            if transfer.take(event.peer, event.want, event.data):
                self._moved_at = now_ms
        except PoisonedError:
            self.refusals["part-poisoned" if event.data is not None else "part-gone"] += 1
        if transfer.is_complete:
            self._give_up(transfer)
            self._installing = transfer.slot
            return [Install(transfer.fetched())]
        if not transfer.sources:
            self._give_up(transfer)
        return self._go_on(now_ms)
