"""An operator's commands about clients (`replica.core.clients`): ordered, believed when f + 1 replicas answer alike."""

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass

from replica.cluster.clusterfile import ClusterFile
from replica.cluster.keys import ClientKey
from replica.core.clients import NONCE_SIZE, Command, Listing, Mode, Show, decode_page
from replica.core.envelope import Status
from replica.core.layout import LayoutError
from replica.core.quotas import Quota
from replica.operations.changing import ChangeError, Council, silence

PAGES_MAX = 10_000


@dataclass(frozen=True, slots=True)
class Policy:
    """What is agreed about clients: after which command, and at which slot that was so at the latest.

    quota: of keys that have none of their own; listings: keys, their own quotas, and what else is agreed about them.
    """

    number: int
    slot: int
    mode: Mode
    quota: Quota
    listings: tuple[tuple[bytes, Quota, Listing], ...]


async def read_policy(cluster: ClusterFile, key: ClientKey, *, deadline_s: float) -> Policy:
    """Return the policy as it is now; `key` is an operator's. ChangeError if it is not known within the deadline."""
    try:
        async with asyncio.timeout(deadline_s), Council(cluster, key) as council:
            return await _read(council)
    except TimeoutError:
        raise silence(council, "say who may be a client", deadline_s) from None


async def command(
    cluster: ClusterFile, key: ClientKey, made: Callable[[int], Command], *, deadline_s: float
) -> tuple[int, int]:
    """Have a command executed; return its number and the slot at which it was.

    made: returns the command with the number given. ChangeError if it is refused, or if that is not known within the
    deadline.
    """
    try:
        async with asyncio.timeout(deadline_s), Council(cluster, key) as council:
            number = (await _read(council)).number + 1
            reply = await council.order(made(number).encode())
            if reply.status is not Status.OK:
                raise ChangeError(
                    f"the command was refused: {reply.text}; see trustlog-replica clients list, try again"
                )
            return number, reply.slot
    except TimeoutError:
        raise silence(council, "execute the command", deadline_s, "clients list") from None


async def _read(council: Council) -> Policy:
    """Ask page by page; from the beginning again if a command came in between."""
    listings: list[tuple[bytes, Quota, Listing]] = []
    number: int | None = None
    for _ in range(PAGES_MAX):
        after = listings[-1][0] if listings else b""
        reply = await council.order(Show(os.urandom(NONCE_SIZE), after).encode())
        if reply.status is not Status.OK:
            raise ChangeError(f"the replicas do not say who may be a client: {reply.text}")
        try:
            page = decode_page(reply.text)
        except LayoutError as error:
            raise ChangeError(f"what the replicas say of clients cannot be read: {error}") from error
        if listings and page.number != number:
            listings = []
            continue
        number = page.number
        listings += page.listings
        if not page.more:
            return Policy(page.number, reply.slot, page.mode, page.quota, tuple(listings))
    raise ChangeError("who may be a client changes faster than it can be read; try again later")
