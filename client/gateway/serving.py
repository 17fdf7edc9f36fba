"""Running a gateway: its listeners until a signal, and the banner that says whom it must be trusted by."""

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator

from client.api import Client
from client.gateway.http import GatewayHttp
from client.gateway.server import APPLICATION, Gateway
from trustlog.cli.contract import CommandError, Exit, Output, printable

__all__ = ["APPLICATION", "serve"]


async def serve(
    client: Client, resp: tuple[str, int] | None, http: tuple[str, int] | None, password: bytes | None, output: Output
) -> None:
    """Serve until SIGINT or SIGTERM; CommandError if an address cannot be had."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    async with client, contextlib.AsyncExitStack() as stack:
        served = Gateway(client, password)
        stack.push_async_callback(served.close)
        at_resp = at_http = None
        if resp is not None:
            async with _listening(resp):
                at_resp = await served.start(*resp)
        if http is not None:
            door = GatewayHttp(served).door
            stack.push_async_callback(door.close)
            async with _listening(http):
                at_http = await door.start(*http)
        _announce(client, at_resp, at_http, output)
        await stop.wait()


def _announce(client: Client, resp: tuple[str, int] | None, http: tuple[str, int] | None, output: Output) -> None:
    genesis = client.cluster.genesis
    addresses = {name: f"{at[0]}:{at[1]}" for name, at in (("resp", resp), ("http", http)) if at is not None}
    data: dict[str, object] = {"event": "listening", "cluster": genesis.name, **addresses, "needed": genesis.quorum}
    lines = [
        f"gateway of cluster {printable(genesis.name)}: {genesis.n} replicas, f = {genesis.f}",
        *(f"{'Redis protocol' if name == 'resp' else 'HTTP/JSON'} at {address}" for name, address in addresses.items()),
        f"This gateway is a client: it signs requests and checks {genesis.quorum} matching replies itself.",
        "Whoever connects trusts this program, its host and the way to it; run one beside each application.",
        "Ctrl-C ends it.",
    ]
    output.result(data, lines)
    sys.stdout.flush()


@contextlib.asynccontextmanager
async def _listening(address: tuple[str, int]) -> AsyncIterator[None]:
    try:
        yield
    except OSError as error:
        raise CommandError(
            f"cannot listen at {address[0]}:{address[1]}: {error.strerror or error}",
            "choose another address; is another gateway running there?",
            Exit.USAGE,
            code="address",
        ) from error
