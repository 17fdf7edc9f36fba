"""Lists of members at a running replica: showing what followed, learning it, and going over (`replica.core.chain`).

When the last state of a list is durable, the replica writes the link to the next list into its own folder and goes on
under that: its links, its verifier and its core are made anew, its process and its trusted log stay. Who is no member
any more stays under the old list, to serve those that are late, until it is stopped.

A replica that is behind asks its peers what followed its list, and for a state. If one is offered that a quorum of a
later list attested, nobody may have kept what lies between; then it leaves its own state behind and begins anew there.
"""

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from replica.cluster.clusterfile import ClusterFile
from replica.cluster.memberlists import EntryVerifier, follow, write_links
from replica.cluster.strict_toml import ConfigError
from replica.core.chain import Link, found
from replica.core.checkpoint import Header, check_certificate, decode_header, is_founding
from replica.core.events import CheckpointOffered
from replica.core.genesis import Genesis
from replica.core.layout import LayoutError
from replica.core.snapshot import Fetched, Snapshot
from replica.wire.messages import AskMembers, CheckpointOffer, MembersShown

if TYPE_CHECKING:
    from replica.shell.node import Node


# Questions about lists of members that one peer may answer late.
ANSWERS_MAX = 4


class MemberLists:
    """What a replica knows of the lists after its own. renew: called when it must be made anew under another list."""

    def __init__(self, node: "Node", renew: Callable[[], None]) -> None:
        self._node = node
        self._renew = renew
        self._later: ClusterFile = node.home.cluster  # with what peers have proven so far
        self._asked = Counter[int]()  # how many answers each peer may still give
        self._leaving = False
        self._left: int | None = None

    @property
    def _cluster(self) -> ClusterFile:
        return self._node.home.cluster

    @property
    def is_member(self) -> bool:
        """Say whether this replica is a member of the last list that it executed."""
        current = self._node.core.executor.membership.current
        return current is None or self._is_in(current.genesis(self._cluster.lists[0]))

    @property
    def left_with(self) -> int | None:
        """The list of members, in force, with which this replica is no member any more; None if none is known here."""
        return self._left

    def _is_in(self, genesis: Genesis) -> bool:
        key = self._node.trusted_log.public_key
        return any(member.log_public_key == key for member in genesis.members)

    # Showing and learning

    def shown(self, number: int) -> MembersShown:
        """Return the link from list `number` to the next one, empty if none is known here."""
        links = self._cluster.links
        return MembersShown(number, links[number] if number < len(links) else b"")

    def ask(self, peer: int) -> None:
        """Ask a peer what followed the last list that is known here."""
        self._asked[peer] = min(self._asked[peer] + 1, ANSWERS_MAX)
        self._node.links[peer].send(AskMembers(len(self._later.links)))

    def on_shown(self, message: MembersShown, sender: int) -> None:
        """Take a link that a peer shows; one that proves nothing is refused."""
        if not self._asked[sender]:
            self._node.refusals["members-unasked"] += 1  # each is some signatures to verify
            return
        self._asked[sender] -= 1
        if message.number != len(self._later.links) or not message.link:
            return  # several were asked, and not all know of one
        try:
            self._later = follow(self._later, [message.link], f"what replica {sender} shows")
        except ConfigError as error:
            self._node.refusals["members-refused"] += 1
            self._node.log.warning("list of members refused", sender=sender, text=str(error))
            return
        self._node.log.info("a later list of members is known", list=len(self._later.links), sender=sender)
        self.ask(sender)

    def is_another_log(self, log: int, number: int) -> bool:
        """Say whether the log that list `number` calls `log` is none of the present list's."""
        genesis = self._cluster.genesis
        if number >= genesis.list_number:
            return False
        return log >= genesis.n or genesis.members[log].since > number

    # The state, of this list or a later one

    def on_offer(self, message: CheckpointOffer, sender: int) -> None:
        """Take an offered state; LayoutError if no list of members that is known here attested it."""
        genesis, before = self._cluster.genesis, self._cluster.before
        for agreed in (genesis, *self._later.lists[len(self._cluster.lists) :]):
            header = _certified(message, agreed)
            if header is not None and (header.slot > agreed.base or is_founding(header, agreed)):
                if agreed is genesis:
                    self._node.post(CheckpointOffered(sender, header, message.certificate))
                else:
                    # A quorum of that list has a state of its own, so some correct member hands it out.
                    self._jump(agreed)
                return
        if before is not None:
            header = _certified(message, before)
            if header is not None and header.slot == genesis.base:
                self._node.post(CheckpointOffered(sender, header, message.certificate, before))
                return
        raise LayoutError("no list of members that is known here attested that state")

    def snapshot(self, fetched: Fetched) -> Snapshot:
        """Return what a core begins with from a state that was fetched; LayoutError if it cannot be that."""
        genesis, before, node = self._cluster.genesis, self._cluster.before, self._node
        if before is not None and fetched.header.list_number == before.list_number:
            last = fetched.snapshot(node.application, before)
            return found(last, genesis, node.verifier.initial_heads())
        return fetched.snapshot(node.application, genesis)

    def _jump(self, genesis: Genesis) -> None:
        if self._leaving:
            return
        if not self._is_in(genesis):
            self._node.stop(
                f"this replica is no member of the cluster any more: list {genesis.list_number} of members, in force "
                f"after slot {genesis.base}, does not have its log; stop it for good"
            )
            return
        self._node.log.warning("left behind across a change of members; beginning anew", list=genesis.list_number)
        self._go_on_under(self._later.links[: genesis.list_number])

    # Going over

    def look(self) -> None:
        """Go over to the next list if the last state of this one is durable here."""
        node = self._node
        ends = node.core.ends
        if self._leaving or self._left is not None or ends is None or node.core.halted is not None:
            return
        if node.core.executed != ends or node.keeper.slot != ends or node.core.is_appending:
            return
        if not self.is_member:
            self._left = self._cluster.genesis.list_number + 1
            node.log.warning(
                "no member any more; serving those that are late until stopped",
                list=self._left,
                after=ends,
            )
            return
        self._leaving = True
        node.server.start_task(self._go_over())

    async def _go_over(self) -> None:
        node = self._node
        members = node.core.executor.membership.current
        offer = await node.keeper.offer()
        if offer is None or members is None or node.is_closing:
            self._leaving = False
            return
        link = Link(*offer, members.encode()).encode()
        try:
            follow(self._cluster, [link], "the own last checkpoint")
        except ConfigError as error:
            node.stop(f"cannot go over to list {members.number} of members: {error}")
            return
        node.log.warning("going over to the next list of members", list=members.number, after=members.after)
        self._go_on_under((*self._cluster.links, link))

    def _go_on_under(self, links: tuple[bytes, ...]) -> None:
        self._leaving = True
        try:
            write_links(self._node.home.members_path, links)
        except OSError as error:
            self._node.stop(f"{self._node.home.members_path}: cannot be written: {error}")
            return
        except ConfigError as error:
            self._node.stop(str(error))
            return
        self._renew()


def _certified(message: CheckpointOffer, genesis: Genesis) -> Header | None:
    """Return the header if a quorum of this list's logs attested it."""
    try:
        header = decode_header(message.header, genesis.n)
        check_certificate(message.certificate, header, genesis, EntryVerifier(genesis))
    except LayoutError:
        return None
    return header
