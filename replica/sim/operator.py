"""Who changes the members of the virtual cluster, and what happens around it (design section 4.4).

The operator signs a list of members and sends it to every replica until f + 1 say that it is agreed; as soon as the
list is in force somewhere, those who come in start with the chain of lists, and clients are told a while later. What a
list replaces may be lost, and never come back; or it is a faulty replica, which goes on with its old log.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from replica.core.chain import check_link, decode_link
from replica.core.envelope import Administer, AdministerReply, Status, decode_reply, encode_administer
from replica.core.genesis import Genesis, Member
from replica.core.layout import U64_MAX, LayoutError
from replica.core.members import MemberList, Seat
from replica.sim.logs import ClientKey, Log, make_log, place_of
from replica.sim.messages import Reply, Request
from replica.sim.setting import NEWCOMERS_FROM, OPERATOR, Setting
from trustlog import BackendKind

AGAIN_MS = 300
LOOK_MS = 50
LOGS_FROM = 1000


@dataclass(frozen=True, slots=True)
class Change:
    """One change of the members, begun `at_ms`.

    kind: "replace" (the log of replica `number`), "add" or "remove" (two, the last ones). lost: who is replaced is lost
    before, and was correct. off: who leaves is switched off as soon as one replica has gone over.
    """

    kind: str
    at_ms: int
    number: int = 0
    lost: bool = False
    off: bool = False


@dataclass(slots=True)
class Newcomer:
    """A replica that comes in with the next list."""

    number: int
    node: int
    log: Log


@dataclass(slots=True)
class _Wish:
    change: Change
    members: MemberList
    newcomers: list[Newcomer]
    envelope: bytes
    replies: dict[int, bytes] = field(default_factory=dict)
    agreed: bool = False


class Operator:
    """One change after the other.

    lose: called with the node of a replica that is lost. enter: called when a list is in force, with the change, who
    comes in and the lists so far. settled: says whether a list has what it needs to bear f faults.
    """

    def __init__(
        self,
        setting: Setting,
        key: ClientKey,
        changes: tuple[Change, ...],
        *,
        lose: Callable[[int], None],
        enter: Callable[[Change, list[Newcomer], list[Genesis]], None],
        settled: Callable[[Genesis], bool],
    ) -> None:
        self.setting, self.world, self.key = setting, setting.world, key
        self.chain: list[Genesis] = []
        self._changes = list(changes)
        self._lose, self._enter, self._settled = lose, enter, settled
        self._wish: _Wish | None = None
        self._logs = 0
        setting.network.nodes[OPERATOR] = self
        setting.clients[key.public] = OPERATOR

    @property
    def waits_for(self) -> list[str]:
        """What is still to happen."""
        wish = [f"list {self._wish.members.number} of members is not in force"] if self._wish is not None else []
        return wish + [f"a change of the members has not begun: {change}" for change in self._changes]

    def start(self) -> None:
        """Begin."""
        self._next()

    def _next(self) -> None:
        if self._changes:
            change = self._changes.pop(0)
            self.world.at(change.at_ms, lambda: self._begin(change))

    def _begin(self, change: Change) -> None:
        if change.lost:
            key = (self.chain[-1] if self.chain else self.setting.genesis).members[change.number].log_public_key
            self._lose(self.setting.places.get(key, change.number))
        self.world.note(f"change of members: {change.kind} {change.number}")
        self.world.counts[f"change-{change.kind}"] += 1
        before = self.chain[-1] if self.chain else self.setting.genesis
        newcomers: list[Newcomer] = []
        members = list(before.members)
        number = before.list_number + 1
        if change.kind == "remove":
            members = members[:-2]
        for place in {"replace": [change.number], "add": [before.n, before.n + 1]}.get(change.kind, []):
            newcomer = self._newcomer(place, number)
            newcomers.append(newcomer)
            members[place : place + 1] = [Member(place, BackendKind.SOFTWARE, newcomer.log.public_key, b"", number)]
        wanted = MemberList(number, 0, tuple(Seat(member, place_of(member.number)) for member in members), change.kind)
        content = Administer(U64_MAX // 2, wanted.encode())
        signed = encode_administer(self.setting.cluster_id, self.key.public, content)
        self._wish = _Wish(change, wanted, newcomers, signed + self.key.sign(signed))
        self._ask()
        self._look()

    def _newcomer(self, number: int, list_number: int) -> Newcomer:
        name = LOGS_FROM + self._logs
        node = NEWCOMERS_FROM + self._logs
        self._logs += 1
        log = make_log(name, self.setting.genesis.context(list_number), real=self.setting.real_signatures)
        self.setting.places[log.public_key] = node
        return Newcomer(number, node, log)

    def _ask(self) -> None:
        wish = self._wish
        if wish is None or wish.agreed:
            return
        for node in list(self.setting.network.nodes):
            if node < NEWCOMERS_FROM + self._logs and node not in {new.node for new in wish.newcomers}:
                self.setting.network.send(OPERATOR, node, Request(wish.envelope), "list of members")
        self.world.after(AGAIN_MS, self._ask)

    def receive(self, source: int, message: object) -> None:
        """Take a reply."""
        wish = self._wish
        if wish is None or not isinstance(message, Reply):
            return
        try:
            reply = decode_reply(message.raw, self.setting.genesis.limits)
        except LayoutError:
            return
        if not isinstance(reply, AdministerReply):
            return
        wish.replies[source] = message.raw
        same = sum(raw == message.raw for raw in wish.replies.values())
        if same > (self.chain[-1] if self.chain else self.setting.genesis).f:
            wish.agreed = wish.agreed or reply.status is Status.OK
            if reply.status is not Status.OK:
                text = f"list {wish.members.number} was refused: {reply.text}"
                self.setting.witness.violation("reply", text)

    def _look(self) -> None:
        """See whether the list is in force somewhere: then there is a link that leads to it."""
        wish, links = self._wish, self.setting.links
        if wish is None:
            return
        if len(links) < wish.members.number:
            self.world.after(LOOK_MS, self._look)
            return
        before = self.chain[-1] if self.chain else self.setting.genesis
        verifier = self.setting.verifier_of(before)
        self.chain.append(check_link(decode_link(links[wish.members.number - 1]), before, verifier.entry).genesis)
        self.world.counts[f"{wish.change.kind}-to-n{self.chain[-1].n}"] += 1
        self._wish = None
        self._enter(wish.change, wish.newcomers, list(self.chain))
        self._when_settled()

    def _when_settled(self) -> None:
        """Begin the next change when all correct members have the state of this list: before, none may be lost."""
        if self._settled(self.chain[-1]):
            self._next()
        else:
            self.world.after(LOOK_MS, self._when_settled)
