"""Faulty replicas that lie about who the members are (design section 4.4)."""

from dataclasses import replace
from typing import TYPE_CHECKING

from replica.core.chain import Link
from replica.core.checkpoint import decode_header, encode_certificate
from replica.core.entries import Checkpoint
from replica.core.genesis import Genesis, Member
from replica.core.members import MemberList, Seat
from replica.core.proof import EntryProof, prove
from replica.sim.library import Kept
from replica.sim.logs import Log, Verifier, make_log, place_of
from replica.sim.messages import Offer
from replica.sim.strategies import Strategy
from trustlog import BackendKind

if TYPE_CHECKING:
    from replica.sim.faulty import FaultyReplica

_LOGS_FROM = 5000


class ForgedList(Strategy):
    """Offers those who were away a list of members of its own making, the asker and new logs of its own, and its state.

    Those logs say what they like, so that everything fits but one thing: no quorum of the list before attested it.
    """

    name = "forged-list"

    def join(self, host: "FaultyReplica") -> None:
        """See `Strategy`."""
        super().join(host)
        self._logs: dict[tuple[int, int], Log] = {}  # list and number -> a log of its own

    def instead(self, to: int, message: object) -> object:
        """See `Strategy`."""
        kept = self.host.kept
        if not isinstance(message, Offer) or kept is None or message.links or to >= self.host.genesis.n:
            return message
        if kept.genesis.list_number != self.host.genesis.list_number:
            return message
        self.did()
        return self._forged(to, kept)

    def _forged(self, to: int, kept: Kept) -> Offer:
        before = kept.genesis
        number, interval = before.list_number + 1, before.limits.checkpoint_interval
        context = before.context(number)
        for i in range(before.n):
            if (number, i) not in self._logs:
                name = _LOGS_FROM + 100 * self.host.node + len(self._logs)
                self._logs[number, i] = make_log(name, context, real=self.host.setting.real_signatures)
        members = tuple(
            before.members[i]
            if i == to
            else Member(i, BackendKind.SOFTWARE, self._logs[number, i].public_key, b"", number)
            for i in range(before.n)
        )
        header = decode_header(kept.header, before.n)
        listed = MemberList(number, header.slot, tuple(Seat(member, place_of(member.number)) for member in members))
        after = listed.genesis(before)
        ended = replace(header, members=listed.digest)
        said = replace(ended, slot=header.slot + interval, list_number=number)
        others = [i for i in range(before.n) if i != to][: after.quorum]
        proofs = {i: self._attested(i, after, Checkpoint(said.slot, said.digest)) for i in others}
        link = Link(ended.encode(), kept.certificate, listed.encode())
        return Offer(said.encode(), encode_certificate(proofs), (link.encode(),))

    def _attested(self, number: int, genesis: Genesis, entry: Checkpoint) -> EntryProof:
        log = self._logs[genesis.list_number, number]
        group = Verifier(genesis, real=self.host.setting.real_signatures).group(number, log.append((entry.encode(),)))
        if group is None:
            raise RuntimeError("a log of its own attested what does not verify")
        return prove(group, group.first)
