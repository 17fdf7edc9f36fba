"""Under which list of members an audit reads what a log said (`replica.core.members`).

A log goes over to the next list with CHECKPOINT of the last slot, or, if its replica was late, with a later one that is
of that list. So the CHECKPOINT before an entry tells whose rules it was said by; what is retained before the first one
may have been said under any list that the log was in.

A folder need not know of the last list: it was late, or its replica is no member any more. The state names the next
list if that was agreed by then. Beyond the state an audit executes nothing, so a list that was ordered there may be in
force from its slot on, or may have been refused: what follows is not judged.
"""

from replica.cluster.clusterfile import ClusterFile
from replica.core.entries import Checkpoint, Entry, PrePrepare, VerifyEnvelope, decode_judged
from replica.core.envelope import Administer
from replica.core.genesis import Genesis
from replica.core.layout import LayoutError
from replica.core.members import decode_members, last_slot


class Tenure:
    """The lists that one log was in, while what it said is read from front to back.

    checkpoint: slot of its last CHECKPOINT so far, 0 before.
    """

    def __init__(self, cluster: ClusterFile, log: int) -> None:
        member = cluster.genesis.members[log]
        self.checkpoint = 0
        self._spans = [(one, ends) for one, ends in cluster.spans if member in one.members]
        self._lists = [one for one, _ in self._spans]

    def read(self, payload: bytes, verify_envelope: VerifyEnvelope) -> Entry:
        """Decode the next entry under the list it was said under; LayoutError if no correct replica writes that."""
        errors = []
        for genesis in self._lists:
            try:
                entry = decode_judged(payload, genesis, genesis.cluster_id(), verify_envelope)
            except LayoutError as error:
                errors.append(error)
                continue
            if isinstance(entry, Checkpoint):
                self._passed(entry.slot)
            return entry
        raise errors[0]

    def _passed(self, slot: int) -> None:
        self.checkpoint = slot
        now = [one for one, ends in self._spans if one.base <= slot and (ends is None or slot < ends)]
        self._lists = now or self._lists  # a slot of before its time is one that it should not have said


def may_end_with(entry: Entry, genesis: Genesis, executed: int) -> int | None:
    """Return what the last slot of this list is if a list that is proposed here, above slot `executed`, is accepted."""
    if not isinstance(entry, PrePrepare) or entry.slot <= executed:
        return None
    for envelope in entry.batch.envelopes:
        if not isinstance(envelope.content, Administer):
            continue
        try:
            wanted = decode_members(envelope.content.command)
        except LayoutError:
            continue  # about clients, or nothing
        if wanted.number == genesis.list_number + 1 and envelope.client in genesis.operators:
            return last_slot(entry.slot, genesis.limits)
    return None
