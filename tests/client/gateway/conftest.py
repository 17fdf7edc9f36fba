"""The Redis gateway before three fake replicas."""

import pytest_asyncio

from tests.client.gateway.talk import gateway


@pytest_asyncio.fixture
async def talk(fleet):
    async with fleet, gateway(fleet) as (_, connect):
        yield await connect()
