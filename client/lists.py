"""Which replicas there are now: what a running client learns of lists of members that follow the one it began with.

It asks each replica that welcomes it what followed the last list that it knows, and all of them again now and then. A
replica that goes over to another list hangs up, so a client hears of the change as soon as it is back. What is shown is
a link of the chain (`replica.core.chain`): f+1 logs of the list before attested it, one of them a correct replica's.
Whatever else is shown is refused, counted and changes nothing.
"""

from collections import Counter
from typing import Final

from replica.cluster.clusterfile import ClusterFile, ClusterFileError
from replica.cluster.memberlists import follow
from replica.wire.messages import AskMembers, MembersShown, encode_frame

# How often all are asked again: in case a question was lost, or an answer.
ASK_S: Final = 10.0


class MemberLists:
    """The cluster under the last list that is known; `refused` counts answers that changed nothing, and why."""

    def __init__(self, cluster: ClusterFile) -> None:
        self.cluster = cluster
        self.refused = Counter[str]()
        self._asked: set[int] = set()

    def question(self, replica: int) -> bytes:
        """Return the frame that asks `replica` what followed; it may answer once."""
        self._asked.add(replica)
        return encode_frame(AskMembers(len(self.cluster.links)))

    def left(self, replica: int) -> None:
        """Expect no answer of a replica that is not connected any more."""
        self._asked.discard(replica)

    def shown(self, replica: int, message: MembersShown) -> bool:
        """Take what a replica shows; say whether `cluster` is under a later list now."""
        if replica not in self._asked:
            self.refused["members-unasked"] += 1  # each costs some signatures to verify
            return False
        self._asked.discard(replica)
        if message.number != len(self.cluster.links) or not message.link:
            return False  # all were asked, and another was quicker; or it knows of none
        try:
            self.cluster = follow(self.cluster, [message.link], f"what replica {replica} shows")
        except ClusterFileError:
            self.refused["members-refused"] += 1
            return False
        self._asked.clear()  # a number may be another replica's now
        return True
