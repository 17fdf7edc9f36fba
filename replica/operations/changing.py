"""Changing the members of a running cluster, and learning how they changed (`replica.core.members`, `.chain`).

The operator's command is an envelope that is ordered like a client's request: f + 1 replicas must say alike what came
of it. It takes effect some hundred slots later, so that is waited for; and because an idle cluster would never get
there, the command is followed by others that are ordered and do nothing, one at a time, until the last slot of the
list is reached. Then a replica shows the link that proves the next list. Nothing here is believed that one replica
alone says.
"""

import asyncio
import hashlib
import os
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Self, cast

from replica.cluster.clusterfile import ClusterFile, ReplicaPlace
from replica.cluster.keys import ClientKey
from replica.cluster.memberlists import follow
from replica.cluster.strict_toml import ConfigError
from replica.core.envelope import Administer, AdministerReply, Status, decode_reply, encode_administer
from replica.core.layout import U64_MAX, LayoutError
from replica.core.members import MemberList
from replica.wire.dial import dial, resolve
from replica.wire.frames import MessageProtocol
from replica.wire.handshake import connect_statement
from replica.wire.messages import (
    FRAME_BYTES_MAX,
    WIRE_VERSION,
    AskMembers,
    Challenge,
    ClientHello,
    MembersShown,
    Message,
    Notice,
    Refused,
    Reply,
    Request,
    Welcome,
)
from replica.wire.tls import WrongCertificate, client_context, pinned

AGAIN_S: Final = 1.0
DIAL_S: Final = 3.0
PUSH: Final = b"go on"

Said = Callable[[str], None]


class ChangeError(ConfigError):
    """The members were not changed, or it is not known that they were; the text says what to do."""


class _Line(MessageProtocol):
    """A connection to one replica with the operator's key."""

    def __init__(self, council: "Council", place: ReplicaPlace) -> None:
        super().__init__()
        self.place = place
        self.ended: asyncio.Future[str] = self._loop.create_future()
        self.is_welcome = False
        self._council = council

    def opened(self) -> None:
        """Look at the certificate: the bytes count."""
        try:
            pinned(cast("asyncio.Transport", self.transport).get_extra_info("ssl_object"), self.place.certificate_der)
        except WrongCertificate as error:
            self._end(str(error))

    def closed(self, reason: str) -> None:
        """Have it dialled again."""
        self._end(reason)

    def message_received(self, message: Message) -> None:
        """Go through the handshake, then hand on what is said."""
        if isinstance(message, Challenge):
            self._on_challenge(message)
        elif isinstance(message, Welcome):
            self.frame_bytes_max = FRAME_BYTES_MAX
            self.is_welcome = True
            self._council.welcome(self)
        elif isinstance(message, Refused):
            self._end(f"refused: {message.text}")
        elif self.is_welcome:
            self._council.hear(self.place.number, message)

    def _on_challenge(self, challenge: Challenge) -> None:
        cluster, key = self._council.cluster, self._council.key
        if challenge.cluster_id != cluster.cluster_id or challenge.number != self.place.number:
            self._end(f"{self.place.address} is another replica, or of another cluster")
            return
        signature = key.sign(connect_statement(challenge, self.place.certificate_der))
        self.send(ClientHello(WIRE_VERSION, cluster.cluster_id, key.public_key, signature))

    def _end(self, why: str) -> None:
        self.is_welcome = False
        if not self.ended.done():
            self.ended.set_result(why)


@dataclass(slots=True)
class _Question:
    """An envelope that is sent until f + 1 replicas answer it alike."""

    raw: bytes
    command: bytes
    answer: "asyncio.Future[AdministerReply]"
    replies: dict[int, bytes] = field(default_factory=dict)


class Council:
    """Connections to all members of one list, kept up until closed."""

    def __init__(self, cluster: ClusterFile, key: ClientKey) -> None:
        self.cluster, self.key = cluster, key
        self.trouble: dict[int, str] = {}
        self._lines: dict[int, _Line] = {}
        self._question: _Question | None = None
        self._shown: asyncio.Queue[bytes] = asyncio.Queue()
        self._nothing_more: set[int] = set()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._keep_up(place)) for place in self.cluster.replicas]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for line in self._lines.values():
            line.abort()

    async def _keep_up(self, place: ReplicaPlace) -> None:
        while True:
            line = _Line(self, place)
            tls = client_context(place.certificate_der)
            try:
                addresses = await resolve(place.host, place.port, DIAL_S)
                async with asyncio.timeout(DIAL_S):
                    await dial(partial(_same, line), addresses, place.port, tls)
                self._lines[place.number] = line
                self.trouble[place.number] = await line.ended
            except (OSError, ssl.SSLError, TimeoutError) as error:
                self.trouble[place.number] = str(error) or "no answer"
            finally:
                line.abort()
            await asyncio.sleep(0.1)

    def welcome(self, line: _Line) -> None:
        """Send a replica that just came what is asked now."""
        self.trouble.pop(line.place.number, None)
        if self._question is not None:
            line.send(Request(self._question.raw))
        line.send(AskMembers(len(self.cluster.links)))

    def hear(self, number: int, message: Message) -> None:
        """Take what a replica says."""
        if isinstance(message, Notice):
            self.trouble[number] = message.text
        elif isinstance(message, MembersShown) and message.number == len(self.cluster.links):
            if message.link:
                self._shown.put_nowait(message.link)
            else:
                self._nothing_more.add(number)
        elif isinstance(message, Reply) and self._question is not None:
            self._on_reply(number, message.reply, self._question)

    def _on_reply(self, number: int, raw: bytes, question: _Question) -> None:
        try:
            reply = decode_reply(raw, self.cluster.genesis.limits)
        except LayoutError:
            return
        if not isinstance(reply, AdministerReply) or reply.command != hashlib.sha256(question.command).digest():
            return
        question.replies[number] = raw
        alike = sum(other == raw for other in question.replies.values())
        if alike >= self.cluster.genesis.quorum and not question.answer.done():
            question.answer.set_result(reply)

    def _tell_all(self, message: Message) -> None:
        for line in self._lines.values():
            if line.is_welcome and line.writable:
                line.send(message)

    async def order(self, command: bytes, void_after: int = U64_MAX // 2) -> AdministerReply:
        """Have a command ordered; return what f + 1 replicas say alike."""
        content = Administer(void_after, command)
        signed = encode_administer(self.cluster.cluster_id, self.key.public_key, content)
        answer: asyncio.Future[AdministerReply] = asyncio.get_running_loop().create_future()
        self._question = _Question(signed + self.key.sign(signed), command, answer)
        try:
            while True:
                self._tell_all(Request(self._question.raw))
                try:
                    return await asyncio.wait_for(asyncio.shield(answer), AGAIN_S)
                except TimeoutError:
                    continue
        finally:
            self._question = None

    async def next_link(self) -> bytes:
        """Return a link that a replica shows; it may prove nothing."""
        while True:
            self._tell_all(AskMembers(len(self.cluster.links)))
            try:
                return await asyncio.wait_for(self._shown.get(), AGAIN_S / 4)
            except TimeoutError:
                continue

    async def later(self) -> ClusterFile | None:
        """Return the cluster under the next list, or None as soon as f + 1 replicas know of none."""
        while len(self._nothing_more) < self.cluster.genesis.quorum:
            self._tell_all(AskMembers(len(self.cluster.links)))
            try:
                raw = await asyncio.wait_for(self._shown.get(), AGAIN_S / 4)
            except TimeoutError:
                continue
            found = _followed(self.cluster, raw)
            if found is not None:
                return found
        return None


def _same(line: _Line) -> _Line:
    return line


def _followed(cluster: ClusterFile, raw: bytes) -> ClusterFile | None:
    try:
        return follow(cluster, [raw], "what a replica shows")
    except ConfigError:
        return None  # its own invention


async def refresh(cluster: ClusterFile, deadline_s: float) -> ClusterFile:
    """Return the cluster under the last list of members that its replicas prove; ChangeError if too few answer."""
    key = ClientKey.generate()
    try:
        async with asyncio.timeout(deadline_s):
            while True:
                async with Council(cluster, key) as council:
                    later = await council.later()
                if later is None:
                    return cluster
                cluster = later
    except TimeoutError:
        raise silence(council, "say what their members are", deadline_s) from None


async def change(
    cluster: ClusterFile, key: ClientKey, wanted: MemberList, *, deadline_s: float, say: Said
) -> ClusterFile:
    """Have `wanted` follow the present list, wait until it is in force, and return the cluster under it.

    ChangeError if it is refused, or if that is not known within the deadline.
    """
    try:
        async with asyncio.timeout(deadline_s), Council(cluster, key) as council:
            reply = await council.order(wanted.encode())
            if reply.status is not Status.OK:
                raise ChangeError(f"list {wanted.number} of members was refused: {reply.text}")
            say(f"list {wanted.number} of members is agreed; it is in force after slot {reply.slot}")
            return await _until_in_force(council, reply.slot)
    except TimeoutError:
        raise silence(council, f"put list {wanted.number} of members in force", deadline_s) from None


async def _until_in_force(council: Council, last: int) -> ClusterFile:
    """Order what does nothing until slot `last` is reached; return the cluster under the list that begins then."""
    shown = asyncio.ensure_future(_first_valid(council))
    try:
        slot = 0
        while slot < last and not shown.done():
            pushed = asyncio.ensure_future(council.order(PUSH + os.urandom(16), 0))
            await asyncio.wait({pushed, shown}, return_when=asyncio.FIRST_COMPLETED)
            if pushed.done():
                slot = pushed.result().slot
            pushed.cancel()
        return await shown
    finally:
        shown.cancel()


async def _first_valid(council: Council) -> ClusterFile:
    while True:
        found = _followed(council.cluster, await council.next_link())
        if found is not None:
            return found


def silence(council: Council, what: str, deadline_s: float, commands: str = "member") -> ChangeError:
    """Return the error for what too few replicas did in time; `commands` list shows whether they do it later."""
    why = "; ".join(f"replica {number}: {text}" for number, text in sorted(council.trouble.items()))
    needed = council.cluster.genesis.quorum
    return ChangeError(
        f"{needed} replicas did not {what} within {deadline_s:g} s ({why or 'all are connected'}). See "
        f"trustlog-replica status. What was sent may still happen: trustlog-replica {commands} list says whether it "
        "did, and the same command again goes on waiting for it"
    )


def missing_of(cluster: ClusterFile, staying: Sequence[int], alive: Sequence[int], quorum: int) -> str | None:
    """Return why the cluster is not fit for a change now: too few of those who stay are alive. None if it is."""
    found = [number for number in staying if number in alive]
    if len(found) >= quorum:
        return None
    lost = ", ".join(str(number) for number in staying if number not in alive)
    return (
        f"{len(found)} of the replicas that stay answer, {quorum} must, or nothing would be decided after the change; "
        f"start first: replica {lost} of list {cluster.genesis.list_number}"
    )
