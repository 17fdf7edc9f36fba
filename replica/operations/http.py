"""Reading a replica's own HTTP port, where it has one."""

import asyncio
from typing import Final

from replica.cluster.clusterfile import format_address
from replica.cluster.home import ReplicaHome
from replica.core.genesis import MIB
from replica.operations.health import ANY_ADDRESS

METRICS_BYTES_MAX: Final = 4 * MIB


async def fetch_metrics(home: ReplicaHome, deadline_s: float) -> bytes | None:
    """Return what /metrics says now; None if replica.toml names no port, or nobody answers there in time."""
    # Imported here: commands that need no HTTP answer sooner without it, health above all.
    import aiohttp  # noqa: PLC0415

    if home.settings.http is None:
        return None
    host, port = home.settings.http
    url = f"http://{format_address(ANY_ADDRESS.get(host, host), port)}/metrics"
    try:
        async with (
            asyncio.timeout(deadline_s),
            aiohttp.ClientSession() as session,
            session.get(url, allow_redirects=False) as response,
        ):
            found = b""
            while len(found) < METRICS_BYTES_MAX and (more := await response.content.readany()):
                found += more
            return found
    except (TimeoutError, aiohttp.ClientError, OSError):
        return None
