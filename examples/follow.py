"""Following changes: a watch that ends in the middle, and another that resumes there, together see each change once."""

import asyncio
import sys

from client import Client, Position


async def follow(
    client: Client, after: Position | None, count: int, ready: asyncio.Event
) -> tuple[list[str], Position]:
    """Return the next changes as text, and where to resume."""
    seen = []
    async with client.watch("temperature/", after=after) as changes:
        ready.set()
        async for change in changes:
            value = "gone" if change.value is None else change.value.decode()
            seen.append(f"{change.key.decode()} {value}")
            if len(seen) == count:
                break
        return seen, changes.position


async def main(directory: str) -> None:
    async with Client.from_dir(directory) as client, Client.from_dir(directory) as follower:
        for room in ("cellar", "attic"):
            await client.delete(f"temperature/{room}")
        ready = asyncio.Event()
        first = asyncio.create_task(follow(follower, None, 3, ready))
        await ready.wait()
        for degrees in (17, 18, 19):
            await client.put("temperature/cellar", str(degrees))
            await client.put("temperature/attic", str(degrees + 10))
        await client.delete("temperature/attic")
        seen, position = await first
        print("first:", ", ".join(seen))
        # Nobody followed for a while; nothing is missed.
        seen, _ = await follow(follower, position, 4, ready)
        print("then:", ", ".join(seen))


asyncio.run(main(sys.argv[1]))
