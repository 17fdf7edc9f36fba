"""Watching: what changes, in order, each change vouched for by f+1 replicas.

    async with client.watch("user/") as changes:
        async for change in changes:
            print(change.position, change.key, change.value)

A watch reconnects by itself and goes on where it stood. `changes.position`, or a change's own, is where another watch
may resume, in this program or a later one: `client.watch("user/", after=position)` misses nothing and repeats nothing.
Replicas keep changes for a bounded while; after that, `WatchGone` says so, and what to do.
"""

import asyncio
from collections import deque
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from client.errors import ClientError, NotAllowed, Undecided, Unreachable
from client.merging import Merge, Part
from replica.core.layout import LayoutError
from replica.wire.changes import PREFIX_BYTES_MAX, Change, Link, Position, decode_changes, parse_position
from replica.wire.messages import Changes, Unwatch, WatchAck, WatchEnded, encode_frame
from replica.wire.messages import Watch as WatchMessage

if TYPE_CHECKING:
    from client.driver import Driver

__all__ = ["Change", "Position", "Watch", "WatchAhead", "WatchGone", "parse_position"]

# A watch looks now and then whether a replica that could not take part can by now.
TEND_S: Final = 1.0


class WatchGone(ClientError):  # noqa: N818 - as in client.errors
    """What changed after the position to resume at is no longer kept.

    kept_from: changes after it are kept; what lies between is lost to watchers, though not to the state.
    """

    def __init__(self, position: Position, kept_from: Position) -> None:
        super().__init__(
            f"gone: the changes after {position} are no longer kept, only those after {kept_from}; begin a new watch, "
            "then read the keys anew"
        )
        self.position, self.kept_from = position, kept_from


class WatchAhead(ClientError):  # noqa: N818 - as in client.errors
    """The position to resume at does not exist: f+1 replicas waited some seconds and did not come to it.

    executed: the slot at which they are.
    """

    def __init__(self, position: Position, executed: int) -> None:
        super().__init__(
            f"ahead: the position {position} does not exist, {executed} is the last slot executed; is it of another "
            "cluster? Begin a new watch, then read the keys anew"
        )
        self.position, self.executed = position, executed


class Watch:
    """One watch: an async context manager and iterator. Made by `Client.watch`."""

    def __init__(self, driver: "Driver", prefix: bytes, after: Position, deadline_s: float) -> None:
        if len(prefix) > PREFIX_BYTES_MAX:
            raise ValueError(f"a prefix has at most {PREFIX_BYTES_MAX} bytes, not {len(prefix)}")
        self.prefix = prefix
        self.position = after
        self._driver = driver
        self._deadline_s = deadline_s
        self._merge = Merge(driver.n, driver.quorum, after)
        self._queries: dict[int, int] = {}  # of the replicas that were asked last: number -> query
        self._links: deque[Link] = deque()
        self._changes: deque[Change] = deque()
        self._end = after  # of the link that `_changes` are left of
        self._news = asyncio.Event()
        self._failure: ClientError | None = None
        self._tender: asyncio.Task[None] | None = None
        self._closed = False

    # Life

    async def __aenter__(self) -> Self:
        """Begin; return when f+1 replicas tell. Unreachable at the deadline.

        WatchGone or WatchAhead if it cannot resume there.
        """
        self._driver.watches[self] = None
        for replica in self._driver.core.connected:
            self._ask(replica)
        self._tender = asyncio.get_running_loop().create_task(self._tend())
        try:
            async with asyncio.timeout(self._deadline_s):
                while self._merge.telling < self._driver.quorum and self._failure is None:
                    await self._wait()
        except TimeoutError:
            await self.close()
            raise Unreachable(
                f"the watch did not begin: {self._merge.telling} replicas tell what changes, {self._driver.quorum} are "
                f"needed. {self._driver.describe_links()}"
            ) from None
        except BaseException:
            await self.close()
            raise
        if self._failure is not None:
            await self.close()
            raise self._failure
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End the watch; an iteration ends."""
        self._closed = True
        self._driver.watches.pop(self, None)
        for replica in list(self._queries):
            self._drop(replica)
        if self._tender is not None:
            self._tender.cancel()
        self._news.set()

    # The iterator

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Change:
        """Return the next change; WatchGone if there was a gap. Waits as long as it takes."""
        while not self._changes:
            self.position = max(self.position, self._end)
            if self._links:
                self._unpack(self._links.popleft())
            elif self._failure is not None:
                raise self._failure
            elif self._closed:
                raise StopAsyncIteration
            else:
                await self._wait()
        change = self._changes.popleft()
        self.position = change.position
        return change

    @property
    def telling(self) -> int:
        """How many replicas tell what changes now; with fewer than f+1 nothing comes."""
        return self._merge.telling

    def _unpack(self, link: Link) -> None:
        try:
            self._changes.extend(decode_changes(link.changes, link.end.slot, link.end))
        except LayoutError as error:
            self._failure = Undecided(f"what f+1 replicas tell cannot be read ({error}); are all of one version?")
            return
        self._end = link.end
        # They may go on only as this is taken.
        for replica, query in self._queries.items():
            self._driver.links[replica].send_frame(encode_frame(WatchAck(query, *link.end)))

    async def _wait(self) -> None:
        self._news.clear()
        await self._news.wait()

    # The driver's side

    def connected(self, replica: int) -> None:
        """Take in that a replica is connected."""
        self._ask(replica)

    def disconnected(self, replica: int) -> None:
        """Take in that a replica is not connected any more."""
        query = self._queries.pop(replica, None)
        if query is not None:
            self._driver.watch_queries.pop(query, None)
        self._merge.lost(replica)

    def renew(self) -> None:
        """Go on with the replicas of another list of members, which are told one by one that they are connected."""
        for replica in list(self._queries):
            self._drop(replica)
        self._merge = self._merge.renewed(self._driver.n, self._driver.quorum)

    def on_message(self, replica: int, message: Changes | WatchEnded) -> None:
        """Take what a replica tells."""
        if self._queries.get(replica) != message.query:
            return
        if isinstance(message, WatchEnded):
            self._merge.ended(replica, message.code, message.slot)
            self._drop(replica, told=True)
            if self._merge.is_gone and self._failure is None:
                self._failure = WatchGone(self._merge.position, Position(self._merge.kept_from()))
            elif self._merge.is_ahead and self._failure is None:
                self._failure = WatchAhead(self._merge.position, self._merge.executed())
            elif self._merge.is_denied and self._failure is None:
                self._failure = NotAllowed(
                    "this client's key may not watch these keys: it was revoked or never allowed, or may not read "
                    "all that begin so"
                )
        else:
            start = Position(message.from_slot, message.from_place)
            end = Position(message.to_slot, message.to_place)
            self._links += self._merge.told(replica, Link(start, end, message.changes))
            if self._merge.parts[replica] is Part.REFUSED:
                self._drop(replica)
        self._news.set()

    def _ask(self, replica: int) -> None:
        if self._closed or self._failure is not None:
            return
        self._drop(replica)
        query = self._driver.next_query()
        position = self._merge.position
        frame = encode_frame(WatchMessage(query, self.prefix, position.slot, position.place))
        if self._driver.links[replica].send_frame(frame):
            self._queries[replica] = query
            self._driver.watch_queries[query] = self
            self._merge.asked(replica)

    def _drop(self, replica: int, *, told: bool = False) -> None:
        query = self._queries.pop(replica, None)
        if query is None:
            return
        self._driver.watch_queries.pop(query, None)
        if not told:
            self._driver.links[replica].send_frame(encode_frame(Unwatch(query)))

    async def _tend(self) -> None:
        while True:
            await asyncio.sleep(TEND_S)
            again = self._merge.to_ask_again()
            # Not asked while it was connected, because its buffer was full, for one.
            again += [one for one in self._driver.core.connected if self._merge.parts[one] is Part.ABSENT]
            for replica in again:
                if replica in self._driver.core.connected:
                    self._ask(replica)
